"""Chain: the cores of an MPO and what is known about their canonical form. Nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mpo_tn.chains.pytree import register
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, check_dtype, describe, dtype_name, is_traced, library, namespace
from mpo_tn.sites import Sites


@dataclass(frozen=True, eq=False)
class Chain:
    """Cores ``T_k`` of shape (bond_{k-1}, out_k, in_k, bond_k), outer bonds 1.

    ::

          out_1    out_2    out_3
            |        |        |
        1 --T_1------T_2------T_3-- 1        W[o, i] = T_1[:, o_1, i_1, :] @ T_2[:, o_2, i_2, :] @ ...
            |  d_1   |  d_2   |
          in_1     in_2     in_3

    Args:
        cores: arrays of one library, dtype and device.
        canonical_interval: sites before the first index are left-isometric, sites after the second right-isometric.
            ``None`` claims nothing.

    Raises:
        MPOError: no cores, a core that is not four-dimensional, bonds that do not match, a dtype that is not
            floating-point or complex, mixed libraries, dtypes or devices.
    """

    cores: tuple[Array, ...]
    canonical_interval: tuple[int, int] = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        register(type(self))
        object.__setattr__(self, "cores", _checked_cores(self.cores))
        last = len(self.cores) - 1
        interval: Any = self.canonical_interval
        if interval is None:
            interval = (0, last)
        ends = [whole_number(end) for end in interval] if isinstance(interval, (tuple, list)) else []
        low, high = ends if len(ends) == 2 else (None, None)
        if low is None or high is None or not 0 <= low <= high <= last:
            raise MPOError(f"canonical_interval={interval} is not a pair of sites, first and last, from 0 to {last}")
        object.__setattr__(self, "canonical_interval", (low, high))

    def __len__(self) -> int:
        return len(self.cores)

    @property
    def sites(self) -> Sites:
        """The legs of every site."""
        return Sites(tuple(int(core.shape[1]) for core in self.cores), tuple(int(core.shape[2]) for core in self.cores))

    @property
    def bonds(self) -> tuple[int, ...]:
        """The ``n - 1`` inner bonds."""
        return tuple(int(core.shape[3]) for core in self.cores[:-1])

    @property
    def center(self) -> int | None:
        """The orthogonality centre, or None if the canonical interval is wider than one site."""
        low, high = self.canonical_interval
        return low if low == high else None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the matrix."""
        return self.sites.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the cores, as their library names it."""
        return self.cores[0].dtype

    @property
    def num_parameters(self) -> int:
        """How many numbers the cores hold."""
        return sum(math.prod(core.shape) for core in self.cores)

    def with_cores(self, cores: Iterable[Array], canonical_interval: tuple[int, int] | None) -> Self:
        """A chain of the same class with other cores."""
        return type(self)(tuple(cores), canonical_interval)  # type: ignore[arg-type]


def same_kind(a: Array, b: Array) -> bool:
    """Whether two arrays are of one library, dtype and device; what JAX traces is on whichever device is needed."""
    if type(a) is np.ndarray and type(b) is np.ndarray:
        return a.dtype == b.dtype
    if is_traced(a) or is_traced(b):
        return library(a) == library(b) and dtype_name(a) == dtype_name(b)
    return describe(a) == describe(b)


def _checked_cores(cores: Iterable[Array]) -> tuple[Array, ...]:
    checked = tuple(cores)
    if not checked:
        raise MPOError("cores=() is empty: a chain has at least one core")
    first = checked[0]
    namespace(first)
    check_dtype(first, "a core")
    for k, core in enumerate(checked):
        namespace(core)
        shape = tuple(core.shape)
        if len(shape) != 4 or 0 in shape:
            raise MPOError(
                f"core {k} has shape {shape}: expected (left bond, out leg, in leg, right bond), none of them 0"
            )
        if not same_kind(core, first):
            raise MPOError(
                f"core {k} is {describe(core)} and core 0 is {describe(first)}: use one library, dtype and device"
            )
        left = 1 if k == 0 else int(checked[k - 1].shape[3])
        if shape[0] != left:
            raise MPOError(f"core {k} has left bond {shape[0]} where {left} is needed: its shape is {shape}")
    if int(checked[-1].shape[3]) != 1:
        raise MPOError(f"the last core has right bond {checked[-1].shape[3]}: the outer bonds are 1")
    return checked
