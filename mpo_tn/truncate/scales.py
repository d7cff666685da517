"""Scales of integers of few bits: one in float16 for every group of columns, and the best of many for a group."""

from __future__ import annotations

import math

import array_api_compat
import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array, namespace, narrow, widen

_CLIPS = 25
"""How many largest entries are tried for a group, as fractions of its largest: clipping it pays for the finer steps."""

_DEEPEST = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}
"""The least of these fractions, by bits: the more there are, the less clipping has to win."""

_PIECE = 2**15
"""Entries that are tried at once, so that they stay in the cache."""

LARGEST_SCALE, _LEAST_SCALE = 65504.0, 2.0**-24
_COARSEST_SCALE = 2.0**-20
"""Below it a scale in float16 has fewer than five digits of two left."""


def spread_scales(scales: Array, group: int, columns: int) -> Array:
    """(rows, groups) to (rows, columns)."""
    return namespace(scales).repeat(scales, group, axis=1)[:, :columns]


def group_count(columns: int, group: int) -> int:
    """How many scales a row has."""
    return -(-columns // group)


def check_scale(matrix: Array, bits: int) -> None:
    """Refuse a matrix whose entries are all beyond, or all below, what scales in float16 reach.

    Raises:
        MPOError: it is so.
    """
    xp = namespace(matrix)
    largest_of_all, top = max(float(xp.max(matrix)), -float(xp.min(matrix))), 2 ** (bits - 1)
    if largest_of_all / top > LARGEST_SCALE:
        raise MPOError(f"entries of size {largest_of_all:.3g} are beyond scales in float16: scale the matrix down")
    if 0 < largest_of_all / top < _COARSEST_SCALE:
        raise MPOError(f"no entry is larger than {largest_of_all:.3g}, below scales in float16: scale the matrix up")


def best_scales(wide: Array, weights: Array | None, bits: int, group: int) -> Array:
    """The scale of every group, as float64 that float16 holds exactly: the clip and sign of least squared error."""
    xp = namespace(wide)
    rows, columns = wide.shape
    count = group_count(columns, group)
    device = array_api_compat.device(wide)
    padded = xp.zeros((rows, count * group), dtype=xp.float32, device=device)
    padded[:, :columns] = narrow(wide)
    blocks = xp.reshape(padded, (rows, count, group))
    importance = None
    if weights is not None:
        importance = xp.zeros((count * group,), dtype=wide.dtype, device=device)
        importance[:columns] = weights / xp.max(weights)
        importance = xp.reshape(narrow(importance), (count, group))
    step = max(_PIECE // (count * group), 1)
    chosen = [_piece_scales(blocks[start : start + step], importance, bits) for start in range(0, rows, step)]
    return xp.concat(chosen, axis=0)


def _piece_scales(blocks: Array, importance: Array | None, bits: int) -> Array:
    """The scales of a few rows of groups, (rows, groups, group) in single precision."""
    xp, top = namespace(blocks), 2 ** (bits - 1)
    largest = widen(xp.max(xp.abs(blocks), axis=2))
    best = xp.full(largest.shape, math.inf, dtype=blocks.dtype, device=array_api_compat.device(blocks))
    chosen = xp.ones_like(largest)
    for k in range(_CLIPS):
        clip = 1.0 - (1.0 - _DEEPEST[bits]) * k / (_CLIPS - 1)
        size = _widened_half(largest * (clip / top))
        tried = narrow(size)[:, :, None]
        scaled = blocks / tried
        nearest = xp.round(scaled)
        for sign in (1.0, -1.0):
            low, high = (-top, top - 1) if sign > 0 else (1 - top, top)
            squares = ((xp.clip(nearest, low, high) - scaled) * tried) ** 2
            error = xp.sum(squares if importance is None else squares * importance, axis=2)
            better = error < best
            best, chosen = xp.where(better, error, best), xp.where(better, sign * size, chosen)
    return xp.where(largest > 0, chosen, xp.ones_like(chosen))


def _widened_half(scales: Array) -> Array:
    """Positive scales as float16 rounds them, never zero."""
    return namespace(scales).clip(widen(half(scales)), min=_LEAST_SCALE)


def half(scales: Array) -> Array:
    """Scales as float16."""
    if isinstance(scales, np.ndarray):
        return scales.astype(np.float16)
    return scales.half()
