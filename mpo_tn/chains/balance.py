"""Bonds whose values differ by more than a dtype can tell at once, made alike.

A core whose columns are ``(1e300, 1e-300)`` before one whose rows are ``(1e-300, 1e300)`` stands for a tame matrix, but
whatever scales either core as a whole loses one of the columns. Which of them matters only the product tells. So every
column is divided by the power of two that it is worth from the left, and the row that it meets is multiplied by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat
import numpy as np

from mpo_tn.linalg import DOUBLE, Array, dtype_name, namespace, to_numpy, widen

_NOTHING = -(10**9)
"""The exponent of 0."""


def balanced(cores: Sequence[Array]) -> tuple[list[Array], int]:
    """Neighbouring cores of a chain whose columns all have a largest entry from 1/2 to 1, and the exponent taken out.

    ::

        --A--B--  ->  --(A D**-1)--(D B)--     D diagonal, powers of two: no digit changes, but of entries that are
                                               below the range beside the largest one of their column

    The columns of the last core keep their values to one another.
    """
    found: list[Array] = []
    above, total = np.zeros(int(cores[0].shape[0]), dtype=np.int64), 0
    for k, core in enumerate(cores):
        exponents = _exponents(core) + above[:, None]
        columns = exponents.max(axis=0)
        if k == len(cores) - 1:
            columns = np.full_like(columns, columns.max())
        alive = columns > _NOTHING // 2
        shift = np.where((exponents > _NOTHING // 2) & alive, above[:, None] - columns, 0)
        found.append(_shifted(core, shift))
        top = int(columns.max()) if alive.any() else 0
        above, total = np.where(alive, columns - top, _NOTHING), total + top
    return found, total


def least_exponent(core: Array) -> int:
    """The least exponent of what is no 0 between two indices of the bonds of a core; 0 where all is 0."""
    exponents = _exponents(core)
    return int(exponents[exponents > _NOTHING // 2].min(initial=0))


def _exponents(core: Array) -> np.ndarray:
    """That of the largest entry of a core between any two of its bonds' indices."""
    wide = widen(core)
    xp = namespace(wide)
    sizes = to_numpy(xp.max(xp.reshape(xp.abs(wide), (core.shape[0], -1, core.shape[3])), axis=1))
    return np.where(sizes > 0, np.frexp(sizes)[1].astype(np.int64), _NOTHING)


def _shifted(core: Array, exponents: np.ndarray) -> Array:
    """``core[i, ..., j] * 2**exponents[i, j]``, in steps that go one way and are in range where the result is."""
    xp, device = namespace(core), array_api_compat.device(core)
    real = xp.real(core) if dtype_name(core).startswith("complex") else core
    left, most = np.clip(exponents, -2200, 2200), 1000 if dtype_name(core) in DOUBLE else 14
    while np.any(left):
        part = np.clip(left, -most, most)
        factors = xp.asarray((2.0**part).astype("float32" if most < 1000 else "float64"), device=device)
        core = core * xp.astype(factors, real.dtype)[:, None, None, :]
        left = left - part
    return core
