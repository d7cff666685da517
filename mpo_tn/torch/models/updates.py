"""A matrix of low rank added to the cores of a layer, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from mpo_tn.mpo import MPO
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.truncation import Truncation


def merged_bonds(spec: ModuleSpec, rank: int) -> tuple[int, ...]:
    """The bonds of ``W + s B A``, at most: those of W and those of a matrix of this rank on the same legs.

    ::

        B A = sum_a b_a a_a     at a bond rank(b_a) <= min(out left, out right), and rank(a_a) as much of the in legs

    So a low-rank pair grows by ``rank``; on legs of many sites an update soon needs the full bonds.

    >>> from mpo_tn import Sites
    >>> merged_bonds(ModuleSpec("linear", Sites.low_rank(64, 64), (8,), 64, 64), 4)
    (12,)
    >>> merged_bonds(ModuleSpec("linear", Sites((4, 4, 4), (4, 4, 4)), (8, 8), 64, 64), 4)
    (16, 16)
    """
    return tuple(
        min(bond + own, full)
        for bond, own, full in zip(spec.bonds, _update_bonds(spec, rank), spec.sites.full_bonds, strict=True)
    )


def _update_bonds(spec: ModuleSpec, rank: int) -> tuple[int, ...]:
    bonds: list[int] = []
    for k in range(1, len(spec.sites)):
        ways = [min(math.prod(legs[:k]), math.prod(legs[k:])) for legs in (spec.sites.out, spec.sites.in_)]
        bonds.append(min(rank * ways[0] * ways[1], spec.sites.full_bonds[k - 1]))
    return tuple(bonds)


def with_update(base: MPOLayer, delta: torch.Tensor, rank: int) -> tuple[Sequence[torch.Tensor], tuple[int, ...]]:
    """Cores of W + delta in double precision, and their bonds, see :func:`merged_bonds`.

    ``delta`` (out, in) has at most this rank. Cost: one dense matrix in double precision.
    """
    spec = base.spec
    rows, columns = spec.sites.shape
    padded = functional.pad(delta.double(), (0, columns - delta.shape[1], 0, rows - delta.shape[0]))
    update = MPO.from_matrix(padded, spec.sites, Truncation(max_bond=_update_bonds(spec, rank)))[0]
    whole = MPO(tuple(core.detach().double() for core in base.cores.forward())) + update
    bonds = merged_bonds(spec, rank)
    if whole.bonds != bonds:
        whole = whole.compress(Truncation(max_bond=bonds))[0]
    return whole.cores, whole.bonds
