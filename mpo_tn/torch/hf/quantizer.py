"""The transformers hook: save_pretrained and from_pretrained for models with MPO modules.

transformers calls anything that replaces modules a quantizer; what is registered here under the name ``"mpo"`` builds
the MPO modules empty before the weights are read.
"""

# transformers types the hooks of its quantizers by their empty bodies, and keeps what they must touch in attributes
# with a leading underscore.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.hf.names import (
    has_module,
    local_names,
    retie,
    second_names,
    spellings,
    tied_cores,
    tied_layers,
)
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.parameter import place_of
from mpo_tn.torch.layers.quantized import quantized_cores
from mpo_tn.torch.models.compress import build, compress
from mpo_tn.torch.models.host import use_host
from mpo_tn.torch.models.places import put
from mpo_tn.torch.models.units import mpo_specs

# The tensors of a core in bits.
_IN_BITS = re.compile(r"\.cores\.\d+\.weight(_packed|_scale|_shape)?$")


class MPOHfQuantizer(HfQuantizer):
    """Builds MPO modules before loading; compresses after loading when the files are dense.

    Guarantee (reload-bits): what ``save_pretrained`` wrote comes back bit for bit, with every tie and shared module.
    Guarantee (no-random-cores): a folder from which a core is missing is refused.
    """

    quantization_config: Any  # an MPOQuantizationConfig

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the model as well, which they have in hand already, because it holds this quantizer."""
        return {**self.__dict__, "model": self.quantization_config.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the configuration of the copy follow the copy of the model."""
        model = state.pop("model")
        vars(self).update(state)
        if model is not None:
            self.quantization_config.follow(model)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        dtype = kwargs.get("dtype")
        specs = local_names(model, self.quantization_config.modules)
        built: dict[str, MPOLayer] = {}
        owners = dict(model.named_modules(remove_duplicate=False))
        for name, spec in specs.items():
            cores = list(built[spec.tied_to].cores) if spec.tied_to in built else None
            built[name] = build(spec, cores, device="meta", dtype=dtype)
            if spec.kind == PARAMETER:
                put(model, {name: built[name]})
                continue
            old = owners[name]
            for alias in [alias for alias, module in owners.items() if module is old]:
                model.set_submodule(alias, built[name])
                _nothing_to_initialise(model, alias)
        retie(model, tied_cores(model))
        for tied in tied_layers(model, specs):
            for k in quantized_cores(tied.cores):  # put back once loaded: its name has nothing to read
                del tied.cores._modules[k]
        sentinel = sentinel_key(self.quantization_config.modules)
        # The key may carry the prefix of another head or none.
        ignored = {f"(^|\\.){key}$" for key in spellings(model, sentinel)}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            specs = local_names(model, self.quantization_config.modules)
            for tied, source in tied_layers(model, specs).items():
                for k, core in quantized_cores(source.cores).items():
                    tied.cores[int(k)] = core
            _require_complete(model, self.quantization_config.modules)
            for name, core in quantized_cores(model).items():
                core.check(name)
            # Names as this class knows them, so that saving it again writes them right.
            attach(model, self.quantization_config.config)
        else:
            compress(model, self.quantization_config.config)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict and one empty tensor under the name of a dense weight.

        Guarantee (loud-without-us): a transformers without this package ignores the unknown quantizer with a warning
        and would go on with random weights. The empty tensor has the wrong shape for the dense model, so that load
        fails instead.

        Raises:
            MPOError: the model has no MPO modules any more.
        """
        # config.json is written after this, and the configuration may have come to follow another model: one object
        # may be shared, and a shallow copy of a model shares everything.
        self.quantization_config.follow(model)
        model.config.quantization_config = self.quantization_config
        modules = self.quantization_config.modules
        if not modules:
            raise MPOError(
                f"the MPO modules of this {type(model).__name__} were all replaced by others: to save it as a dense "
                "model call model.hf_quantizer.remove_quantization_config(model) first"
            )
        state = dict(model.state_dict())
        for name in second_names(model):
            del state[name]
        state[sentinel_key(modules)] = sentinel(modules)
        # No metadata of our own: safetensors writes two entries in random order, and equal models give equal files.
        return state, {}

    def is_serializable(self) -> bool:
        """Always: the cores are ordinary parameters and buffers."""
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Yes for what holds cores in bits: its shape is then looked at once it is read, and the error names it."""
        return bool(_IN_BITS.search(param_name))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, which is as it is in the file, for what holds cores in bits, whatever the model is loaded in."""
        if all(_IN_BITS.search(name) for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    @property
    def is_trainable(self) -> bool:
        """Cores are ordinary parameters, so Trainer may train them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without this Trainer asks for adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers hold plain tensor operations."""
        return True


# Called rather than used as decorators, which would hide the types of the classes.
register_quantization_config("mpo")(MPOQuantizationConfig)
register_quantizer("mpo")(MPOHfQuantizer)


def sentinel_key(modules: dict[str, ModuleSpec]) -> str:
    """The dense key under which the empty tensor is written: of the first module by name that owns its cores.

    By name and not by position, because ``config.json`` sorts its keys.
    """
    return ".".join(place_of(_sentinel_name(modules)) or (_sentinel_name(modules), "weight"))


def _sentinel_name(modules: dict[str, ModuleSpec]) -> str:
    own = {name: spec for name, spec in modules.items() if spec.tied_to not in modules}
    # What it writes of experts transformers renames and splits, and what it writes of a layer it leaves as it is.
    return min(own, key=lambda name: (own[name].kind == PARAMETER, name))


def sentinel(modules: dict[str, ModuleSpec]) -> torch.Tensor:
    """The empty tensor; for a parameter with all axes but the last, by which transformers may split it."""
    return torch.empty(*modules[_sentinel_name(modules)].shape[:-1], 0)


class TransformersHost:
    """transformers as a :class:`~mpo_tn.torch.models.host.Host`: of its models, and of no others, it takes note."""

    def attach(self, model: nn.Module, config: MPOConfig) -> None:
        """See :func:`attach`."""
        if isinstance(model, PreTrainedModel):
            attach(model, config)


use_host(TransformersHost())


def attach(model: Any, config: MPOConfig) -> None:
    """Make plain ``model.save_pretrained`` write what :class:`MPOHfQuantizer` reads; all of it or nothing."""
    hf_config = MPOQuantizationConfig(config, mpo_specs(model))
    hf_config.follow(model)
    quantizer, tied = MPOHfQuantizer(hf_config, pre_quantized=True), tied_cores(model)
    # In place: the model around a compressed base model has the same object, and saves with it.
    model.config.quantization_config = hf_config
    model.hf_quantizer = quantizer
    # Cores are ordinary parameters: half() and float() may cast them, which they refuse to quantized models.
    model.is_quantized = False
    model.quantization_method = hf_config.quant_method
    retie(model, tied)


def _require_complete(model: nn.Module, modules: dict[str, ModuleSpec]) -> None:
    """Refuse cores that no file held: unlike a fresh head they cannot start from random numbers.

    transformers marks every tensor that it read, and only warns of the others.
    """
    unread = [
        name
        for name, parameter in (*model.named_parameters(), *_buffers_of_cores(model))
        if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False)
    ]
    for name in unread:
        if _is_core(model, name):
            raise MPOError(
                f"{name} is not in the files: the folder is incomplete, or it is not the model that config.json "
                "describes (tie_word_embeddings changed, or a configuration shared with a compressed model)"
            )
    # A module of another head is no concern of this class; one that should be where a weight is missing is.
    roots = {name.partition(".")[0]: name for name in unread}
    for name in modules:
        root = name.partition(".")[0]
        if root in roots and not any(has_module(model, spelling) for spelling in spellings(model, name)):
            raise MPOError(
                f"config.json lists {name} as compressed, which {type(model).__name__} does not have, and "
                f"{roots[root]} is not in the files: the folder is damaged"
            )


def _buffers_of_cores(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [item for name, core in quantized_cores(model).items() for item in held_tensors(core, name).items()]


def _is_core(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name is a core of an MPO module, or a part of one."""
    found = re.search(r"^(.*)\.cores\.\d+(\.\w+)?$", name)
    return found is not None and isinstance(model.get_submodule(found[1]), MPOLayer)


def _nothing_to_initialise(model: Any, name: str) -> None:
    """Keep ``_init_weights`` of GPT-2, T5 and their like away from ``parent.c_proj.weight``.

    They are asked to initialise the parent of every layer. A parent that owns no tensor has nothing to initialise.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
        parent._is_hf_initialized = True
