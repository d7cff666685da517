"""What transformers does when a model is saved or dequantized that holds MPO modules anywhere.

It asks the model that ``save_pretrained`` is called on for its quantizer. Whoever compresses a part of a model, or a
module around it, cannot know which model that will be, so it is found out when it is saved.
"""

# transformers keeps what a model is saved by in attributes with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.torch.hf.card import NAME, write_card
from mpo_tn.torch.hf.names import transformers_models
from mpo_tn.torch.hf.quantization_config import is_ours
from mpo_tn.torch.hf.quantizer import MPOHfQuantizer, attach, detach, lead
from mpo_tn.torch.hf.record import forget, record_saved
from mpo_tn.torch.hf.rehearsal import rehearse
from mpo_tn.torch.layers.layer import MPOLayer


class TransformersHost:
    """transformers as a :class:`~mpo_tn.torch.models.host.Host`."""

    def attach(self, model: nn.Module, config: MPOConfig) -> None:
        """Take note of the model, or of the models of transformers inside of it that have MPO modules."""
        for module in model.modules():
            if isinstance(module, MPOLayer) and module.policy is None:
                module.policy = config  # of the model around it, which is not known here
        for part in _outermost(model):
            if part is model or not isinstance(_quantizer(part), MPOHfQuantizer):
                attach(part, config)

    def detach(self, model: nn.Module) -> None:
        """See :func:`~mpo_tn.torch.hf.quantizer.detach`."""
        detach(model)

    def conv1d(self, in_features: int, out_features: int) -> nn.Module:
        """The Conv1D of transformers."""
        return Conv1D(out_features, in_features)


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers that hold MPO modules and are in no other such model."""
    found: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for part in transformers_models(model):
        if part not in inside and _has_mpo(part):
            found.append(part)
            inside.update(part.modules())
    return found


def _has_mpo(model: nn.Module) -> bool:
    return any(isinstance(module, MPOLayer) for module in model.modules())


def _quantizer(model: nn.Module) -> Any:
    return getattr(model, "hf_quantizer", None)


@contextmanager
def _saved_as_it_is(
    model: PreTrainedModel, state: Mapping[str, torch.Tensor] | None, *, writes: bool
) -> Generator[None]:
    """Inside of it ``model`` and its configuration say what its modules are, or it is refused before.

    Of several processes only one ``writes``, and it alone may hold a state that was gathered.

    Guarantee (saved-as-it-is): a transformers model with MPO modules anywhere, however they came there, is written with
    its structure as it is now, and ``from_pretrained`` gives it back; what could not be read again is refused before
    anything is written.
    """
    if not _has_mpo(model):
        if isinstance(_quantizer(model), MPOHfQuantizer):  # all were replaced by dense modules
            detach(model)
        with _silent_about_mpo(model.config):
            yield
        return
    others = [part for part in transformers_models(model) if not isinstance(_quantizer(part), MPOHfQuantizer | None)]
    if others:
        method = _quantizer(others[0]).quantization_config.quant_method
        raise MPOError(
            f"{type(model).__name__} has MPO modules and is quantized by {getattr(method, 'value', method)} as well, "
            "and a folder holds one of both: dequantize the model before it is compressed, or make the MPO modules "
            "dense with mpo_tn.torch.to_dense"
        )
    if _quantizer(model) is None:
        attach(model, _policy(model))
    else:
        lead(model)
    quantizer: Any = _quantizer(model)
    if not getattr(model, "_hf_peft_config_loaded", False):  # else adapters alone are written
        state = model.state_dict() if state is None else state
        _check_whole(model, state)
        if state or writes:
            rehearse(model, quantizer.quantization_config, state)
    quantizer.given = state
    try:
        with _silent_about_mpo(*_configs_inside(model.config)):
            yield
    finally:
        del quantizer.given


def _check_whole(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    if any(hasattr(tensor, "placements") for tensor in state.values()):  # a DTensor
        name = type(model).__name__.removeprefix("FSDP")
        raise MPOError(
            f"the tensors of this {name} are sharded over processes: in all of them let state = "
            "accelerator.get_state_dict(model), then save_pretrained(folder, state_dict=state, "
            "is_main_process=accelerator.is_main_process)"
        )


def _policy(model: nn.Module) -> MPOConfig:
    """What a model was compressed by that nobody took note of: what a part of it was compressed by."""
    for part in model.modules():
        if isinstance(_quantizer(part), MPOHfQuantizer):
            return _quantizer(part).quantization_config.config
        if isinstance(part, MPOLayer) and part.policy is not None:
            return part.policy
    return MPOConfig()


def _configs_inside(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configurations in a configuration, at any depth."""
    own = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [*own, *(inner for other in own for inner in _configs_inside(other))]


@contextmanager
def _silent_about_mpo(*configs: PreTrainedConfig) -> Generator[None]:
    """Leave out what configurations say of MPO modules: those of other models that have the same configuration.

    Of the models inside of a model the outer one says everything, and transformers would take the inner one's word.
    """
    said = [(config, config.quantization_config) for config in configs if is_ours(config)]
    for config, _ in said:
        if is_ours(config):  # it may be there twice
            del vars(config)["quantization_config"]
    try:
        yield
    finally:
        for config, found in said:
            config.quantization_config = found


def looking(original: Callable[..., Any]) -> Callable[..., Any]:
    """``save_pretrained`` of a model that may hold MPO modules."""
    signature = inspect.signature(original)

    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        folder, writes = Path(given.arguments["save_directory"]), bool(given.arguments["is_main_process"])
        with _saved_as_it_is(self, given.arguments["state_dict"], writes=writes):
            result = original(self, *args, **kwargs)
            if writes and folder.is_dir() and not _saves_adapters(self):
                write_beside(self, folder)
        return result

    return save_pretrained


def write_beside(model: Any, folder: Path) -> None:
    """Write what lies beside the weights of a model with MPO modules: its card and its record; of another model none.

    Raises:
        MPOError: the disk is full or may not be written to.
    """
    if isinstance(_quantizer(model), MPOHfQuantizer):
        write_card(model, folder)
        record_saved(folder)
    else:
        forget(folder)


def _saves_adapters(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def uploading(original: Callable[..., Any]) -> Callable[..., Any]:
    """What ``push_to_hub`` does last; before that it wrote a card over ours.

    Guarantee (card-stays): what is sent to the hub, by ``push_to_hub`` or ``save_pretrained(push_to_hub=True)``, and
    what ``Trainer`` and sentence-transformers write of a model that they save, has our card above theirs.
    """

    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if _has_mpo(self) and not _saves_adapters(self):
            write_beside(self, Path(working_dir))
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def carding(folder_of: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Around a method of another library that writes a card into ``folder_of(its arguments)``, where a model is.

    ``folder_of`` gives the folder and the model.
    """

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def writing(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            folder, model = folder_of(self, *args, **kwargs)
            parts = _outermost(model) if isinstance(model, nn.Module) else []
            if len(parts) == 1 and isinstance(_quantizer(parts[0]), MPOHfQuantizer) and (folder / NAME).is_file():
                write_card(parts[0], folder)
            return result

        return writing

    return around


def attaching(original: Callable[..., Any]) -> Callable[..., Any]:
    """``dequantize`` of a model that may hold MPO modules nobody took note of."""

    def dequantize(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if _quantizer(self) is None and _has_mpo(self):
            attach(self, _policy(self))
        return original(self, *args, **kwargs)

    return dequantize
