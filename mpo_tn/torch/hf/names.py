"""What modules and tensors are called: by the class that saved them and the class that loads them, and where shared."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.hf.quantization_config import WRAPPED
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.parameter import held_name, place_of
from mpo_tn.torch.layers.quantized import QuantizedCore


def local_names(model: Any, modules: dict[str, ModuleSpec]) -> dict[str, ModuleSpec]:
    """The specs under the names this model class uses: with or without the prefix of the base model.

    Modules of a head that this class does not have are left out.

    Raises:
        MPOError: no name fits.
    """
    present = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, ModuleSpec] = {}
    renamed: dict[str, str] = {}
    for name, spec in modules.items():
        for spelling in spellings(model, name):
            if spelling in present or (spec.kind == PARAMETER and has_parameter(present, spelling, spec)):
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


def tied_layers(model: nn.Module, specs: Mapping[str, ModuleSpec]) -> dict[MPOLayer, MPOLayer]:
    """The MPO modules that use the cores of another, with that other."""
    found: dict[MPOLayer, MPOLayer] = {}
    for name, spec in specs.items():
        if spec.tied_to is not None and spec.tied_to in specs:
            tied, source = model.get_submodule(name), model.get_submodule(spec.tied_to)
            assert isinstance(tied, MPOLayer)
            assert isinstance(source, MPOLayer)
            found[tied] = source
    return found


def second_names(model: nn.Module) -> list[str]:
    """What the tensors of shared quantised cores are called beside the name that is written: the first, the owner's."""
    names: dict[QuantizedCore, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedCore):
            names.setdefault(module, []).append(name)
    return [
        WRAPPED.sub("", part) for core, own in names.items() for name in own[1:] for part in held_tensors(core, name)
    ]


def owned_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state as it is written: under the names that the class has, and shared cores once.

    Raises:
        MPOError: a state that was given holds two values for one core.
    """
    named = {WRAPPED.sub("", name): tensor for name, tensor in state.items()}
    second = set(second_names(model))
    for target, source in _tied_now(model).items():
        if ".cores." in target and target in named and source in named:
            a, b = named[target], named[source]
            if not (a.is_meta or a.data_ptr() == b.data_ptr() or torch.equal(a, b)):
                raise MPOError(
                    f"the state holds other numbers for {target} than for {source}, and the modules share this core: "
                    "give both the same, or leave one out"
                )
            second.add(target)
    return {name: tensor for name, tensor in named.items() if name not in second}


def has_module(model: nn.Module, name: str) -> bool:
    """Whether there is a module of this name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def has_parameter(modules: Mapping[str, nn.Module], name: str, spec: ModuleSpec) -> bool:
    """Whether there is a parameter of the shape that is to be reached under ``name``.

    Raises:
        MPOError: there is one of another shape.
    """
    owner, parameter = place_of(name) or ("", "")
    weight = modules[owner]._parameters.get(parameter) if owner in modules else None
    if weight is not None and tuple(weight.shape) != spec.shape:
        raise MPOError(
            f"config.json says that {name} is a parameter of shape {spec.shape}, and the model has one of shape "
            f"{tuple(weight.shape)}: the configuration is damaged, or of another model"
        )
    return weight is not None


def spellings(model: Any, name: str) -> list[str]:
    """What a module may be called by a class with a head or without: as it is, with the prefix of the base, without."""
    prefix = f"{model.base_model_prefix}."
    return [name, prefix + name, name.removeprefix(prefix)]


def tied_weights(model: Any, declared: Mapping[str, str]) -> dict[str, str]:
    """The map of the weights that a model ties, with the names of cores in place of dense names.

    Args:
        model: of transformers, with MPO modules or without.
        declared: the map that its class has for the dense model.
    """
    tied: dict[str, str] = {}
    for target, source in declared.items():
        mpo_target, mpo_source = (mpo_parent(model, key) for key in (target, source))
        if mpo_target is None and mpo_source is None:
            # One that the files did not tie has been taken out.
            if target in _tied_now(model) or _is_same(model, target, source):
                tied[target] = source
        elif mpo_target is not None and mpo_source is not None and _share_cores(mpo_target, mpo_source):
            for k, core in enumerate(mpo_source.cores):
                if isinstance(core, QuantizedCore):  # transformers ties no buffers, and these modules share it
                    continue
                tied[f"{holder_name(model, target)}.cores.{k}"] = f"{holder_name(model, source)}.cores.{k}"
    return tied


def _tied_now(model: Any) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", {})


def _share_cores(a: MPOLayer, b: MPOLayer) -> bool:
    return len(a.cores) == len(b.cores) and all(one is other for one, other in zip(a.cores, b.cores, strict=True))


def _is_same(model: Any, target: str, source: str) -> bool:
    try:
        return model.get_parameter(target) is model.get_parameter(source)
    except AttributeError:
        return False


_DECLARED = "_tied_when_dense"
"""Where a model keeps what transformers tied in it before: its own map if it had one, and the map of all of it."""


def retie(model: Any) -> None:
    """Have transformers tie cores as it tied dense weights, in a model and in the models inside it."""
    for part in transformers_models(model):
        _, declared = vars(part).setdefault(_DECLARED, (vars(part).get("_tied_weights_keys"), dict(_tied_now(part))))
        tied = tied_weights(part, declared)
        if part._tied_weights_keys is not None:  # pyright: ignore[reportUnnecessaryComparison] - else models inside tie
            part._tied_weights_keys = dict(tied)
        part.all_tied_weights_keys = tied


def untie(model: Any) -> None:
    """Take back what :func:`retie` did to a model without MPO modules; what is still shared is still tied."""
    if _DECLARED not in vars(model):
        return
    own, declared = vars(model).pop(_DECLARED)
    model.all_tied_weights_keys = tied_weights(model, declared)
    if own is None:
        vars(model).pop("_tied_weights_keys", None)
    else:
        model._tied_weights_keys = own


def transformers_models(model: nn.Module) -> list[PreTrainedModel]:
    """A model and the models inside of it, as far as transformers knows them, the outer ones first."""
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def mpo_parent(model: nn.Module, key: str) -> MPOLayer | None:
    """The MPO module that holds the dense weight which ``key`` used to name."""
    name = holder_name(model, key)
    # A head that was taken off is still in the map.
    if name is None or not has_module(model, name):
        return None
    module = model.get_submodule(name)
    return module if isinstance(module, MPOLayer) else None


def holder_name(model: nn.Module, key: str) -> str | None:
    """The name of the module that holds the dense weight of this name: its own, or what it reads it from."""
    owner, _, parameter = key.rpartition(".")
    held = held_name(owner, parameter)
    return held if has_module(model, held) else owner if parameter == "weight" else None
