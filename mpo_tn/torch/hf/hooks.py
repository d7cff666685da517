"""All that is changed in transformers and around it once both are imported; ``mpo_tn.torch`` sees to that.

| of | what | by |
| --- | --- | --- |
| transformers | the quantizer ``"mpo"``, and its configuration | :mod:`~mpo_tn.torch.hf.quantizer` |
| ``PreTrainedModel`` | ``save_pretrained``, ``dequantize``, the upload | :mod:`~mpo_tn.torch.hf.saving` |
| ``PreTrainedConfig`` | reading ``config.json``, the name of the weight file | ``config_file``, ``sentinel`` |
| ``Trainer`` | weight decay, its model card | ``decay``, ``saving`` |
| ``SentenceTransformer`` and the like | their model card | ``saving`` |
| ``PyTorchModelHubMixin`` | how it writes and reads tensors | :mod:`~mpo_tn.torch.hf.mixin` |
| PEFT | see :mod:`~mpo_tn.torch.hf.peft_door` | ``peft_door``, ``lora`` |

Guarantee (hooks-once): each is put there once, however often this is loaded, and with signature and name as before.
"""

# What is changed has leading underscores in part, and sentence-transformers no types.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from mpo_tn.torch.hf import config_file, decay, mixin, saving
from mpo_tn.torch.hf.peft_door import open_door
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.hf.quantizer import MPOHfQuantizer
from mpo_tn.torch.hf.sentinel import hide_guard
from mpo_tn.torch.models.host import use_host
from mpo_tn.when_imported import wrap_once


def of_transformers() -> None:
    """Quantizer, configurations and models."""
    if "mpo" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        # Called rather than used as decorators, which would hide the types of the classes.
        register_quantization_config("mpo")(MPOQuantizationConfig)
        register_quantizer("mpo")(MPOHfQuantizer)
    hide_guard()
    wrap_once(PreTrainedConfig, "_dict_from_json_file", config_file.looking)
    wrap_once(PreTrainedModel, "save_pretrained", saving.looking)
    wrap_once(PreTrainedModel, "_upload_modified_files", saving.uploading)
    wrap_once(PreTrainedModel, "dequantize", saving.attaching)
    use_host(saving.TransformersHost())


def of_trainer() -> None:
    """Weight decay and model card."""
    from transformers.trainer import Trainer

    wrap_once(Trainer, "get_decay_parameter_names", decay.sparing)
    wrap_once(Trainer, "create_model_card", saving.carding(_what_trainer_saves))


def _what_trainer_saves(trainer: Any, *args: Any, **kwargs: Any) -> tuple[Path, Any]:
    """The folder, and the model unless its adapters alone are saved."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return Path(trainer.args.output_dir), model if isinstance(model, PreTrainedModel) else None


def of_mixin() -> None:
    """How tensors are written and read."""
    from huggingface_hub.hub_mixin import PyTorchModelHubMixin

    wrap_once(PyTorchModelHubMixin, "_save_pretrained", mixin.saving)
    wrap_once(PyTorchModelHubMixin, "_load_as_safetensor", mixin.loading)


def of_sentence_transformers() -> None:
    """Model cards."""
    import sentence_transformers

    for name in ("SentenceTransformer", "CrossEncoder", "SparseEncoder"):
        known = getattr(sentence_transformers, name, None)
        for owner in getattr(known, "__mro__", ()):
            if "_create_model_card" in vars(owner):
                wrap_once(owner, "_create_model_card", saving.carding(_what_is_embedded))
                break


def _what_is_embedded(model: Any, path: Any, *args: Any, **kwargs: Any) -> tuple[Path, Any]:
    return Path(path), model


def of_peft() -> None:
    """LoRA on cores, and what else does not go."""
    open_door()
