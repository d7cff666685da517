"""Integers and scales that are there, made better in a metric: one column or one scale at a time, given all others."""

from __future__ import annotations

import array_api_compat
import numpy as np

from mpo_tn.linalg import Array, adjoint, namespace, narrow, to_numpy, widen
from mpo_tn.truncate.scales import LARGEST_SCALE, clipped, half, spread_scales

_BLOCK = 32
"""Columns that change before the rest of their group hears of it."""


def refine_integers(
    wide: Array, values: Array, scales: Array, metric: Array, bits: int, group: int, sweeps: int
) -> tuple[Array, Array]:
    """Integers V and scales s with less ``tr(D S D^T)``, ``D = W - V s``, by coordinate descent.

    A sweep goes through the groups. In each, every column takes the integers that are best for all other columns as
    they are, ``V_j + (D S)_j / (S_jj s)`` rounded, and then the scale of each row the best there is for its integers, a
    parabola, as float16 rounds it.

    Args:
        wide: W, (rows, columns) in float64.
        values: V, of that shape, whole numbers in float64.
        scales: s, (rows, groups), numbers of float16 in float64, none of them zero.
        metric: S, (columns, columns) in float64, positive semidefinite with a positive diagonal; in any scale that
            single precision has room for.
        bits: of the integers.
        group: columns a scale is for.
        sweeps: how often, at least 0.

    Returns:
        Values and scales as they were given, in arrays of their own.

    Guarantee (refined-integers): no step makes ``tr(D S D^T)`` of any row larger, to rounding in single precision.
    Cost: a sweep takes ``2 rows columns**2`` flops in single precision, and about 10 operations an entry.

    Source: QuantEase, Behdin et al., arXiv 2309.01885, with steps of the scales.

    >>> import numpy as np
    >>> w, s = np.array([[0.9, 0.9]]), np.ones((1, 1))
    >>> metric = np.array([[1.0, 0.5], [0.5, 1.0]])
    >>> refine_integers(w, np.array([[1.0, 0.0]]), s, metric, 3, 8, 1)
    (array([[1., 1.]]), array([[0.89990234]]))
    """
    xp, columns = namespace(wide), wide.shape[1]
    weights, diagonal = narrow(metric), narrow(xp.linalg.diagonal(metric))
    # Columns as rows, so that each is one piece of memory.
    wanted, found, steps = turned(wide), turned(narrow(values)), turned(scales)
    missed = turned(narrow(wide - values * spread_scales(scales, group, columns)))
    for _ in range(sweeps):
        for g in range(steps.shape[0]):
            part = slice(g * group, min((g + 1) * group, columns))
            inside, chosen = weights[part, part], found[part, :]
            pull = weights[part, :] @ missed
            _best_values(chosen, narrow(steps[g, :]), pull, inside, diagonal[part], bits)
            steps[g, :] = _best_scale(chosen, steps[g, :], pull, inside)
            missed[part, :] = narrow(wanted[part, :] - widen(chosen) * steps[g, :])
    return widen(adjoint(found)), adjoint(steps)


def turned(array: Array) -> Array:
    """The transpose, a new array in the order of memory."""
    xp = namespace(array)
    rows, columns = array.shape
    out = xp.empty((columns, rows), dtype=array.dtype, device=array_api_compat.device(array))
    out[...] = adjoint(array)
    return out


def _best_values(values: Array, steps: Array, pull: Array, inside: Array, diagonal: Array, bits: int) -> None:
    """Change the integers of a group, (columns, rows), in place; ``pull``, ``S D`` of its columns, follows."""
    xp, top = namespace(values), 2 ** (bits - 1)
    columns = values.shape[0]
    inverse, sizes, around = to_numpy(1 / (diagonal[:, None] * steps[None, :])), to_numpy(steps), to_numpy(inside)
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        found, moved = _best_columns(
            to_numpy(values[part, :]),
            sizes,
            to_numpy(pull[part, :]),
            around[part, part],
            inverse[part],
            top,
        )
        values[part, :] = xp.asarray(found, device=array_api_compat.device(values))
        pull -= inside[:, part] @ xp.asarray(moved, device=array_api_compat.device(values))


def _best_columns(
    old: np.ndarray, steps: np.ndarray, pull: np.ndarray, around: np.ndarray, inverse: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Integers one column after another, and how far what they stand for moved.

    On the host and in place, whatever library asks: a row of a few hundred numbers is done before torch has begun.
    """
    found, moved, pull = np.empty_like(old), np.empty_like(old), pull.copy()
    room = np.empty_like(old)
    for j, new in enumerate(found):
        np.multiply(pull[j], inverse[j], out=new)
        new += old[j]
        np.rint(new, out=new)
        np.minimum(new, top - 1, out=new)
        np.maximum(new, -top, out=new)
        np.subtract(new, old[j], out=moved[j])
        moved[j] *= steps
        np.multiply(around[j + 1 :, j][:, None], moved[j], out=room[j + 1 :])
        pull[j + 1 :] -= room[j + 1 :]
    return found, moved


def _best_scale(values: Array, steps: Array, pull: Array, inside: Array) -> Array:
    """The scales of a group that are best for its integers, of those in float16; never zero."""
    xp = namespace(values)
    # With the scale s + h the error changes by h (h curve - 2 slope): the nearest to the vertex is the best.
    slope = widen(xp.sum(values * pull, axis=0))
    curve = widen(xp.sum(values * (inside @ values), axis=0))
    moves = curve > 0
    best = steps + xp.where(moves, slope, 0 * slope) / xp.where(moves, curve, 1 + 0 * curve)
    best = widen(half(clipped(best, -LARGEST_SCALE, LARGEST_SCALE)))
    return xp.where(moves & (best != 0), best, steps)
