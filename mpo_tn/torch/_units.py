"""Units: the MPO matrices of a model, each counted once however many modules and names use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import ModuleSpec
from mpo_tn.torch.layers.layer import MPOLayer


@dataclass(frozen=True)
class MPOUnit:
    """One MPO matrix: the modules on its cores, of which the first occurrence in the model gives the name."""

    name: str
    modules: tuple[MPOLayer, ...]

    @property
    def spec(self) -> ModuleSpec:
        """The structure now, of the first module."""
        return self.modules[0].spec

    @property
    def cores(self) -> tuple[nn.Parameter, ...]:
        """The parameters, first site to last."""
        return tuple(self.modules[0].cores)

    def replace(self, tensors: Sequence[torch.Tensor], bonds: Sequence[int]) -> None:
        """New cores for every module of the unit. See :meth:`~mpo_tn.torch.MPOLayer.replace_cores`."""
        for module in self.modules:
            module.replace_cores(tensors, bonds)


def mpo_units(model: nn.Module, *, required: bool = True) -> dict[str, MPOUnit]:
    """Every MPO matrix of a model by the name of its first occurrence, in the order of the modules.

    Shared modules and modules tied by sharing cores are one unit.

    Raises:
        MPOError: no MPO module (if one is ``required``), cores without data, or sharded over processes, or shared one
            by one between matrices.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> layer = nn.Linear(8, 8)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 8))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> list(mpo_units(model))
    ['0', '3']
    """
    grouped: dict[tuple[int, ...], tuple[str, list[MPOLayer]]] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MPOLayer):
            continue
        key = tuple(id(core) for core in module.cores)
        if key in grouped:
            grouped[key][1].append(module)
            continue
        for k, core in enumerate(module.cores):
            if id(core) in owners:
                raise MPOError(
                    f"core {k} of {name} is also a core of {owners[id(core)]}, and their other cores differ: a cut of "
                    "one would break the other; give each its own"
                )
            _check_core(core, f"{name}.cores.{k}")
            owners[id(core)] = name
        grouped[key] = name, [module]
    if required and not grouped:
        raise MPOError("the model has no MPO modules: compress it first, see mpo_tn.torch.compress")
    return {name: MPOUnit(name, tuple(modules)) for name, modules in grouped.values()}


def _check_core(core: torch.Tensor, name: str) -> None:
    if core.device.type == "meta":
        raise MPOError(f"{name} is on the meta device (offloaded or not loaded) and has no values: load it whole")
    if hasattr(core, "placements") or core.ndim != 4:
        raise MPOError(
            f"{name} is sharded over processes, and a cut needs it whole: squeeze in one process, or without FSDP"
        )


def kept_ratio(units: Iterable[MPOUnit]) -> float:
    """Parameters of the cores over those of the dense matrices, bias apart."""
    specs = [unit.spec for unit in units]
    return sum(s.num_parameters for s in specs) / sum(s.out_features * s.in_features for s in specs)


def count_parameters(model: nn.Module) -> int:
    """Of the whole model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def all_bonds(units: Mapping[str, MPOUnit]) -> dict[str, tuple[int, ...]]:
    """The bonds of every unit."""
    return {name: unit.spec.bonds for name, unit in units.items()}


_after_cut: list[Callable[[nn.Module], None]] = []


def on_cut(callback: Callable[[nn.Module], None]) -> None:
    """Call ``callback(model)`` when bonds have changed; the transformers hook renews its copies of the specs."""
    _after_cut.append(callback)


def specs_changed(model: nn.Module) -> None:
    """Tell those who keep copies of the specs."""
    for callback in _after_cut:
        callback(model)
