"""The transformers hook: save_pretrained and from_pretrained for models with MPO modules.

transformers calls anything that replaces modules a quantizer; what is registered here under the name ``"mpo"`` builds
the MPO modules empty before the weights are read.
"""

# transformers types the hooks of its quantizers by their empty bodies, and keeps what they must touch in attributes
# with a leading underscore.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import QuantizedCore, quantized_cores
from mpo_tn.torch.models.compress import build, compress
from mpo_tn.torch.models.host import use_host
from mpo_tn.torch.models.units import mpo_specs

FORMAT_VERSION = 1

# What torch puts between the names of modules, and takes out of state dicts again, where it wraps them in place.
_WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# The tensors of a core in bits.
_IN_BITS = re.compile(r"\.cores\.\d+\.weight(_packed|_scale|_shape)?$")


class MPOQuantizationConfig(QuantizationConfigMixin):
    """What ``config.json`` holds under ``quantization_config``.

    The configuration of a model reads ``modules`` from it whenever they are asked for (see :meth:`follow`), so bonds
    that change need no announcement. One without a model, from a file, pickled or copied alone, holds what is given.

    Args:
        config: the policy, an :class:`~mpo_tn.torch.MPOConfig` or its dictionary.
        modules: module name to :class:`~mpo_tn.planning.spec.ModuleSpec` or its dictionary; empty before compression.
        format_version: of this dictionary and of the names of the tensors.

    Raises:
        MPOError: written by a newer version, or damaged.
    """

    def __init__(
        self,
        config: MPOConfig | dict[str, Any] | None = None,
        modules: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "mpo",
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise MPOError(
                f"the model was written in format {format_version!r} and this version reads {FORMAT_VERSION}: upgrade "
                "mpo-tn"
            )
        self.quant_method: Any = quant_method
        self.config = config if isinstance(config, MPOConfig) else MPOConfig.from_dict(config or {})
        self._modules = {
            name: spec if isinstance(spec, ModuleSpec) else ModuleSpec.from_dict(spec)
            for name, spec in (modules or {}).items()
        }
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model that ``modules`` are read from; None if there is none, or none any more."""
        return None if self._model is None else self._model()

    @property
    def modules(self) -> dict[str, ModuleSpec]:
        """The specs by name of the module: of the model as it is now; once it is gone, as they were read last."""
        model = self.model
        if model is not None:
            self._modules = {_WRAPPED.sub("", name): spec for name, spec in mpo_specs(model).items()}
        return self._modules

    def follow(self, model: nn.Module) -> None:
        """Read ``modules`` from ``model`` from now on, which need not be built to the end yet.

        The reference is weak: a configuration that somebody keeps would otherwise keep the weights in memory.
        """
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: a snapshot. The quantizer, which a model carries along, makes it follow the copy."""
        return {**self.__dict__, "_modules": self.modules, "_model": None}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """So that ``dict(config)`` gives what :meth:`to_dict` gives; transformers' own lists the attributes."""
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """Like a dictionary's: transformers asks so when the configuration of a loaded model is passed on."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "quant_method": "mpo",
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
        }


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
        specs = _local_names(model, self.quantization_config.modules)
        built: dict[str, MPOLayer] = {}
        owners = dict(model.named_modules(remove_duplicate=False))
        for name, spec in specs.items():
            cores = list(built[spec.tied_to].cores) if spec.tied_to in built else None
            built[name] = build(spec, cores, device="meta", dtype=dtype)
            old = owners[name]
            for alias in [alias for alias, module in owners.items() if module is old]:
                model.set_submodule(alias, built[name])
                _nothing_to_initialise(model, alias)
        _retie(model, _tied_cores(model))
        for tied in _tied_layers(model, specs):
            for k in quantized_cores(tied.cores):  # put back once loaded: its name has nothing to read
                del tied.cores._modules[k]
        sentinel = sentinel_key(self.quantization_config.modules)
        # The key may carry the prefix of another head or none.
        ignored = {f"(^|\\.){key}$" for key in _spellings(model, sentinel)}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            specs = _local_names(model, self.quantization_config.modules)
            for tied, source in _tied_layers(model, specs).items():
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
        for name in _second_names(model):
            del state[name]
        state[sentinel_key(modules)] = torch.empty(0)
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
    return f"{min(name for name, spec in modules.items() if spec.tied_to not in modules)}.weight"


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
    quantizer, tied = MPOHfQuantizer(hf_config, pre_quantized=True), _tied_cores(model)
    # In place: the model around a compressed base model has the same object, and saves with it.
    model.config.quantization_config = hf_config
    model.hf_quantizer = quantizer
    # Cores are ordinary parameters: half() and float() may cast them, which they refuse to quantized models.
    model.is_quantized = False
    model.quantization_method = hf_config.quant_method
    _retie(model, tied)


def _local_names(model: Any, modules: dict[str, ModuleSpec]) -> dict[str, ModuleSpec]:
    """The specs under the names this model class uses: with or without the prefix of the base model.

    Modules of a head that this class does not have are left out.

    Raises:
        MPOError: no name fits.
    """
    present = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, ModuleSpec] = {}
    renamed: dict[str, str] = {}
    for name, spec in modules.items():
        for spelling in _spellings(model, name):
            if spelling in present:
                found[spelling], renamed[name] = spec, spelling
                break
    if not found:
        raise MPOError(
            f"none of the {len(modules)} compressed modules (the first is {next(iter(modules), None)}) is in "
            f"{type(model).__name__}: load the model with the class it was saved from, {model.config.architectures}"
        )
    local = {
        name: replace(spec, tied_to=renamed.get(spec.tied_to)) if spec.tied_to else spec for name, spec in found.items()
    }
    # Owners of cores first, so that the modules tied to them find the cores built.
    return dict(sorted(local.items(), key=lambda item: item[1].tied_to is not None))


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
        if root in roots and not any(_has_module(model, spelling) for spelling in _spellings(model, name)):
            raise MPOError(
                f"config.json lists {name} as compressed, which {type(model).__name__} does not have, and "
                f"{roots[root]} is not in the files: the folder is damaged"
            )


def _buffers_of_cores(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [item for name, core in quantized_cores(model).items() for item in held_tensors(core, name).items()]


def _tied_layers(model: nn.Module, specs: Mapping[str, ModuleSpec]) -> dict[MPOLayer, MPOLayer]:
    """The MPO modules that use the cores of another, with that other."""
    found: dict[MPOLayer, MPOLayer] = {}
    for name, spec in specs.items():
        if spec.tied_to is not None and spec.tied_to in specs:
            tied, source = model.get_submodule(name), model.get_submodule(spec.tied_to)
            assert isinstance(tied, MPOLayer)
            assert isinstance(source, MPOLayer)
            found[tied] = source
    return found


def _second_names(model: nn.Module) -> list[str]:
    """What the tensors of shared quantised cores are called beside the name that is written: that of the owner."""
    names: dict[QuantizedCore, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedCore):
            names.setdefault(module, []).append(name)
    found: list[str] = []
    for core, own in names.items():
        layers = [model.get_submodule(name.rpartition(".cores.")[0]) for name in own]
        owns = [isinstance(layer, MPOLayer) and layer.spec.tied_to is None for layer in layers]
        kept = own[owns.index(True)] if any(owns) else own[0]
        found += [_WRAPPED.sub("", part) for name in own if name != kept for part in held_tensors(core, name)]
    return found


def _is_core(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name is a core of an MPO module, or a part of one."""
    found = re.search(r"^(.*)\.cores\.\d+(\.\w+)?$", name)
    return found is not None and isinstance(model.get_submodule(found[1]), MPOLayer)


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _spellings(model: Any, name: str) -> list[str]:
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


def _nothing_to_initialise(model: Any, name: str) -> None:
    """Keep ``_init_weights`` of GPT-2, T5 and their like away from ``parent.c_proj.weight``.

    They are asked to initialise the parent of every layer. A parent that owns no tensor has nothing to initialise.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
        parent._is_hf_initialized = True


def _tied_cores(model: Any) -> dict[str, str]:
    """The map of tied weights, with the names of cores in place of dense names."""
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        mpo_target, mpo_source = (_mpo_parent(model, key) for key in (target, source))
        if mpo_target is None and mpo_source is None:
            tied[target] = source
        elif mpo_target is not None and mpo_source is not None:
            for k, core in enumerate(mpo_source.cores):
                if isinstance(core, QuantizedCore):  # transformers ties no buffers, and these modules share it
                    continue
                tied[f"{target.removesuffix('.weight')}.cores.{k}"] = f"{source.removesuffix('.weight')}.cores.{k}"
    return tied


def _retie(model: Any, tied: dict[str, str]) -> None:
    """Have transformers tie cores as it tied dense weights. See :func:`_tied_cores`."""
    for submodule in model.modules():
        if isinstance(submodule, PreTrainedModel) and submodule is not model and submodule._tied_weights_keys:
            submodule._tied_weights_keys = {}
    model._tied_weights_keys = dict(tied)
    model.all_tied_weights_keys = tied


def _mpo_parent(model: nn.Module, key: str) -> MPOLayer | None:
    """The MPO module whose dense weight ``key`` used to name."""
    parent, _, leaf = key.rpartition(".")
    # A head that was taken off is still in the map.
    if leaf != "weight" or not _has_module(model, parent):
        return None
    module = model.get_submodule(parent)
    return module if isinstance(module, MPOLayer) else None
