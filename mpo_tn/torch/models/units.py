"""The matrices of a compressed model, each once however many modules and names use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.layers.cores import Core, held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import QuantizedCore, quantized_cores, trained_scales


@dataclass(frozen=True)
class MPOUnit:
    """One matrix after compression: the modules on its cores, each under all its names; a :class:`DenseUnit` before."""

    modules: tuple[MPOLayer, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0][0]

    @property
    def readers(self) -> tuple[MPOLayer, ...]:
        """The modules that are called with what the matrix multiplies, or with ids."""
        return tuple(module for module in self.modules if module.spec.kind != PARAMETER)

    @property
    def spec(self) -> ModuleSpec:
        """The structure now, of the first module."""
        return self.modules[0].spec

    @property
    def cores(self) -> tuple[Core, ...]:
        """The parameters and quantised cores, first site to last."""
        return tuple(self.modules[0].cores)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The cores as they are computed with, without gradients; those in bits are dequantised copies."""
        return tuple(core.detach() for core in self.modules[0].cores.forward())

    def replace(self, tensors: Sequence[torch.Tensor | QuantizedCore], bonds: Sequence[int]) -> None:
        """New cores for every module of the unit. See :meth:`~mpo_tn.torch.MPOLayer.replace_cores`."""
        for module in self.modules:
            module.replace_cores(tensors, bonds)
            tensors = self.cores  # which all of them share


def mpo_units(model: nn.Module, *, required: bool = True) -> dict[str, MPOUnit]:
    """Every MPO matrix of a model by the name of its first occurrence, in the order of the modules.

    Shared modules and modules tied by sharing cores are one unit. Only structure is looked at: cores may lie on the
    meta device or be sharded. Whoever changes them asks :func:`cuttable_units`.

    Raises:
        MPOError: no MPO module, if one is ``required``.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> layer = nn.Linear(8, 8)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 8))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> {name: unit.names for name, unit in mpo_units(model).items()}
    {'0': (('0', '2'),), '3': (('3',),)}
    """
    grouped: dict[tuple[int, ...], list[MPOLayer]] = {}
    names = _mpo_modules(model)
    for module in names:
        grouped.setdefault(tuple(id(core) for core in module.cores), []).append(module)
    if required and not grouped:
        raise MPOError("the model has no MPO modules: compress it first, see mpo_tn.torch.compress")
    units = [MPOUnit(tuple(modules), tuple(tuple(names[m]) for m in modules)) for modules in grouped.values()]
    return {unit.name: unit for unit in units}


def cuttable_units(model: nn.Module, *, required: bool = True) -> dict[str, MPOUnit]:
    """The units of :func:`mpo_units`, if each of them may be given other cores.

    Raises:
        MPOError: as :func:`mpo_units`; cores without data, or sharded over processes, or shared one by one between
            matrices.
    """
    units = mpo_units(model, required=required)
    owners: dict[int, str] = {}
    for name, unit in units.items():
        for k, core in enumerate(unit.cores):
            if id(core) in owners:
                raise MPOError(
                    f"core {k} of {name} is also a core of {owners[id(core)]}, and their other cores differ: a cut of "
                    "one would break the other; give each its own"
                )
            _check_core(core, f"{name}.cores.{k}")
            owners[id(core)] = name
    return units


def _check_core(core: Core, name: str) -> None:
    for own, tensor in held_tensors(core, name).items():
        check_loaded(tensor, own)
    if core.ndim != 4:  # flattened, as the earlier FSDP does it
        raise MPOError(
            f"{name} is sharded over processes, and a cut needs it whole: squeeze in one process, or without FSDP"
        )


def mpo_specs(model: nn.Module) -> dict[str, ModuleSpec]:
    """The structure of every MPO *module* by its first name, those that are tied to another included.

    It is what files list, and enough to build the modules empty. Whose cores a module uses, and whether it has a bias,
    is what is the case in ``model`` now: what it was compressed as part of may have had other names.
    """
    units = mpo_units(model, required=False).values()
    owners = {module: unit.name for unit in units for module in unit.modules[1:]}
    return {
        names[0]: replace(module.spec, bias=getattr(module, "bias", None) is not None, tied_to=owners.get(module))
        for module, names in _mpo_modules(model).items()
    }


def _mpo_modules(model: nn.Module) -> dict[MPOLayer, list[str]]:
    """Every MPO module once, with all its names, in order of first occurrence."""
    names: dict[MPOLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MPOLayer):
            names.setdefault(module, []).append(name)
    return names


def count_parameters(model: nn.Module) -> int:
    """Of the whole model, shared ones once, cores that are held in bits among them, and no scales of those."""
    plain = {p for p in model.parameters() if not is_lazy(p)} - {*trained_scales(model).values()}
    return sum(each.numel() for each in (*plain, *quantized_cores(model).values()))


def all_bonds(units: Mapping[str, MPOUnit]) -> dict[str, tuple[int, ...]]:
    """The bonds of every unit."""
    return {name: unit.spec.bonds for name, unit in units.items()}
