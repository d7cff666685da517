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
    xp, top, device = namespace(blocks), 2 ** (bits - 1), array_api_compat.device(blocks)
    largest = widen(xp.max(xp.abs(blocks), axis=2))
    steps = (1.0 - _DEEPEST[bits]) / (_CLIPS - 1)
    clips = xp.asarray([(1.0 - steps * k) / top for k in range(_CLIPS)], dtype=largest.dtype, device=device)
    sizes = clipped(widen(half(clips[:, None, None] * largest)), _LEAST_SCALE, math.inf)
    single = narrow(sizes)
    # Both signs of a size, one after the other: the integers reach one farther below zero.
    errors = xp.empty((2 * _CLIPS, *largest.shape), dtype=blocks.dtype, device=device)
    for k in range(_CLIPS):
        scaled = blocks / single[k][:, :, None]
        nearest = xp.round(scaled)
        for sign, low in enumerate((-top, 1 - top)):
            squares = clipped(nearest, low, low + 2 * top - 1)
            squares -= scaled
            squares *= squares
            if importance is not None:
                squares *= importance
            errors[2 * k + sign] = xp.sum(squares, axis=2)
    errors *= xp.repeat(single**2, 2, axis=0)
    best = xp.argmin(errors, axis=0)
    rows, groups = xp.arange(largest.shape[0], device=device), xp.arange(largest.shape[1], device=device)
    chosen = sizes[best // 2, rows[:, None], groups[None, :]] * (1 - 2 * (best % 2))
    return xp.where(largest > 0, chosen, xp.ones_like(chosen))


def half(scales: Array) -> Array:
    """Scales as float16."""
    if isinstance(scales, np.ndarray):
        return scales.astype(np.float16)
    return scales.half()


def clipped(array: Array, low: float, high: float) -> Array:
    """Entries not below ``low`` or above ``high``; the array API's own takes longer than a short row does."""
    if isinstance(array, np.ndarray):
        return np.minimum(np.maximum(array, low), high)
    return array.clamp(low, high)
