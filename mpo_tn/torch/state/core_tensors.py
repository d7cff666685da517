"""The tensors that hold the cores of a model, by name: what a state keeps of them, whatever the bonds are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.quantized import QuantizedCore, buffer_kinds
from mpo_tn.torch.models.units import cuttable_units


def kinds_of_cores(model: nn.Module) -> dict[int, list[int]]:
    """For every tensor that holds a core or a part of one, by its id, what no cut changes: the legs, bits and group.

    Raises:
        MPOError: as :func:`~mpo_tn.torch.models.units.cuttable_units`.
    """
    return {
        id(tensor): [*core.shape[1:3], *((core.bits, core.group) if isinstance(core, QuantizedCore) else ())]
        for name, unit in cuttable_units(model, required=False).items()
        for k, core in enumerate(unit.cores)
        for tensor in held_tensors(core, f"{name}.cores.{k}").values()
    }


def core_shapes(spec: ModuleSpec, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that hold the cores of a unit."""
    shapes: dict[str, tuple[int, ...]] = {}
    for k, (shape, bits) in enumerate(zip(spec.core_shapes, spec.core_bits, strict=True)):
        own = f"{name}.cores.{k}"
        if bits is None:
            shapes[own] = shape
        else:
            shapes |= {f"{own}.{part}": size for part, (size, _) in buffer_kinds(shape, bits, spec.group).items()}
    return shapes


def cores_among(tensors: Mapping[str, torch.Tensor], spec: ModuleSpec, name: str) -> list[torch.Tensor | QuantizedCore]:
    """The cores of a unit from the tensors that hold them."""
    cores: list[torch.Tensor | QuantizedCore] = []
    for k, (shape, bits) in enumerate(zip(spec.core_shapes, spec.core_bits, strict=True)):
        own = f"{name}.cores.{k}"
        if bits is None:
            cores.append(tensors[own])
            continue
        core = QuantizedCore(shape, bits, spec.group)
        for part, buffer in held_tensors(core, own).items():
            buffer.copy_(tensors[part])
        cores.append(core)
    return cores
