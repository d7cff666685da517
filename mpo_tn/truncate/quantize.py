"""Integers of few bits: a matrix held as small whole numbers with one scale for every group of columns.

A core (left, out, in, right) is the matrix (left out, in right): its columns are what is summed over when the core is
applied, and along them lie the groups. The dense matrix is the chain of one site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, check_matrix, namespace, widen

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bits an integer can have."""

GROUP = 128
"""Columns that share a scale, unless said otherwise."""

_CLIPS = tuple(1.0 - 0.7 * k / 24 for k in range(25))
"""The largest entries that are tried for a group, as fractions of its largest: clipping it pays for the finer steps."""

_DAMPING = 0.01
"""What is added to the diagonal of a metric, as a fraction of its mean: without, directions that the calibration has
hardly seen would take up any error."""

_LARGEST_SCALE, _LEAST_SCALE = 65504.0, 2.0**-24


@dataclass(frozen=True)
class Integers:
    """A matrix of small integers and its scales; ``matrix()`` is what they stand for.

    Attributes:
        values: (rows, columns) int8, from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``.
        scales: (rows, groups) float16, one for each group of columns; negative where the entry of largest size is
            positive, because the range of the integers reaches one further below zero.
        bits: of each integer.
        group: columns a scale is for; the last group may have fewer.
    """

    values: Array
    scales: Array
    bits: int
    group: int

    def matrix(self) -> Array:
        """What the integers stand for, (rows, columns) in float64: exactly integer times scale."""
        return widen_integers(self.values) * spread_scales(widen(self.scales), self.group, self.values.shape[1])


def widen_integers(values: Array) -> Array:
    """Integers as float64, in their own library."""
    xp = namespace(values)
    return xp.astype(values, xp.float64)


def spread_scales(scales: Array, group: int, columns: int) -> Array:
    """(rows, groups) to (rows, columns)."""
    return namespace(scales).repeat(scales, group, axis=1)[:, :columns]


def group_count(columns: int, group: int) -> int:
    """How many scales a row has."""
    return -(-columns // group)


def packed_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a matrix as it is stored: rows of 32-bit words, two bytes a scale, and its shape as two int64.

    >>> packed_bytes(384, 1536, 4, 128) * 8 / (384 * 1536)
    4.125...
    """
    return rows * (4 * -(-columns * bits // 32) + 2 * group_count(columns, group)) + 16


def check_bits(bits: object, group: object) -> tuple[int, int]:
    """Bits and group as whole numbers.

    Raises:
        MPOError: out of range.
    """
    number, size = whole_number(bits), whole_number(group)
    if number not in BITS:
        raise MPOError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
    if size is None or size < 8:
        raise MPOError(f"group={group!r} must be a whole number of at least 8: columns that share a scale")
    return number, size


def quantize(matrix: Array, bits: int, group: int = GROUP, *, metric: Array | None = None) -> Integers:
    """Round a matrix to integers of ``bits`` bits with the best scale for every group.

    Without a metric every entry is rounded to the nearest, and the scale of a group is the one of 25 clips, of both
    signs, with the least squared error. With a metric the columns are rounded one after another, and what rounding
    did to one is made up for by those that follow (GPTQ): for given integers so far, the columns left are at the
    minimum of ``tr(D S D^T)``.

    Args:
        matrix: (rows, columns), real; NumPy, torch or JAX.
        bits: 2 to 8.
        group: columns a scale is for.
        metric: S, (columns, columns), positive semidefinite, of what the columns are multiplied with; in any scale.

    Returns:
        :class:`Integers` in the library of the matrix; NumPy for JAX.

    Guarantee (nearest): without a metric no entry within the clip is further from what stands for it than half of
    its scale.

    Raises:
        MPOError: bits or a group out of range, a complex matrix, entries that are not finite, or too large or too small
            for scales in float16.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, with the scales of all groups fixed before columns are taken in
    the order of their weight in the metric.

    >>> found = quantize(np.array([[0.5, -1.0, 0.25, 0.0]]), 3, 8)
    >>> found.values, np.round(found.matrix(), 3)
    (array([[ 2, -4,  1,  0]], dtype=int8), array([[ 0.5 , -1.  ,  0.25,  0.  ]]))
    """
    bits, group = check_bits(bits, group)
    check_matrix(matrix)
    wide = widen(matrix)
    xp = namespace(wide)
    if xp.isdtype(wide.dtype, "complex floating"):
        raise MPOError("a complex matrix has no integers: quantize its real and imaginary part")
    scales = _best_scales(wide, bits, group)
    spread = spread_scales(scales, group, wide.shape[1])
    if metric is None:
        values = _rounded(wide, spread, bits)
    else:
        values = _with_feedback(wide, spread, bits, _checked_metric(metric, wide))
    return Integers(xp.astype(values, xp.int8), _half(scales), bits, group)


def _rounded(values: Array, scales: Array, bits: int) -> Array:
    xp, top = namespace(values), 2 ** (bits - 1)
    return xp.clip(xp.round(values / scales), -top, top - 1)


def _best_scales(wide: Array, bits: int, group: int) -> Array:
    """The scale of every group, as float64 that float16 holds exactly: the clip and sign of least squared error."""
    xp = namespace(wide)
    rows, columns = wide.shape
    count = group_count(columns, group)
    padded = xp.zeros((rows, count * group), dtype=wide.dtype, device=array_api_compat.device(wide))
    padded[:, :columns] = wide
    blocks = xp.reshape(padded, (rows, count, group))
    largest = xp.max(xp.abs(blocks), axis=2)
    if float(xp.max(largest)) / 2 ** (bits - 1) > _LARGEST_SCALE:
        raise MPOError(f"entries of size {float(xp.max(largest)):.3g} are beyond scales in float16: scale the matrix")
    best = xp.full((rows, count), xp.inf, dtype=wide.dtype, device=array_api_compat.device(wide))
    chosen = xp.ones_like(best)
    for sign in (1.0, -1.0):
        for clip in _CLIPS:
            scale = _widened_half(largest * (sign * clip / 2 ** (bits - 1)))
            tried = scale[:, :, None]
            error = xp.sum((_rounded(blocks, tried, bits) * tried - blocks) ** 2, axis=2)
            better = error < best
            best, chosen = xp.where(better, error, best), xp.where(better, scale, chosen)
    return xp.where(largest > 0, chosen, xp.ones_like(chosen))


def _widened_half(scales: Array) -> Array:
    """Scales as float16 rounds them, never zero."""
    xp = namespace(scales)
    rounded = widen(_half(scales))
    least = xp.where(scales < 0, -_LEAST_SCALE, _LEAST_SCALE)
    return xp.where(rounded == 0, least, rounded)


def _half(scales: Array) -> Array:
    if isinstance(scales, np.ndarray):
        return scales.astype(np.float16)
    return scales.half()


def _checked_metric(metric: Array, wide: Array) -> Array:
    xp = namespace(wide)
    checked = xp.asarray(widen(metric), device=array_api_compat.device(wide))
    if checked.shape != (wide.shape[1], wide.shape[1]):
        raise MPOError(f"the metric is {tuple(checked.shape)} for a matrix with {wide.shape[1]} columns")
    if not bool(xp.all(xp.isfinite(checked))):
        raise MPOError("the metric has entries that are NaN or infinite")
    return checked


def _with_feedback(wide: Array, scales: Array, bits: int, metric: Array) -> Array:
    """GPTQ: integers of one column after another, the others moved to where the error in the metric is least."""
    xp = namespace(wide)
    columns = wide.shape[1]
    diagonal = xp.linalg.diagonal(metric)
    mean = float(xp.mean(diagonal))
    if not mean > 0:
        return _rounded(wide, scales, bits)
    order = xp.argsort(-diagonal)
    back = xp.argsort(order)
    sorted_metric = metric[order, :][:, order] / mean
    damped = sorted_metric + _DAMPING * xp.eye(columns, dtype=wide.dtype, device=array_api_compat.device(wide))
    # H^-1 = U^T U with U upper: row j of U says how the columns after j follow the rounding of column j.
    inverse = xp.linalg.inv(damped)
    upper = xp.matrix_transpose(xp.linalg.cholesky((inverse + xp.matrix_transpose(inverse)) / 2))
    left = wide[:, order]
    steps = scales[:, order]
    found = xp.zeros_like(left)
    block = 64
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        work = xp.asarray(left[:, start:stop], copy=True)
        errors = xp.zeros_like(work)
        for j in range(stop - start):
            column, step = work[:, j], steps[:, start + j]
            value = _rounded(column, step, bits)
            found[:, start + j] = value
            error = (column - value * step) / upper[start + j, start + j]
            errors[:, j] = error
            if j + 1 < stop - start:
                work[:, j + 1 :] -= error[:, None] * upper[start + j, start + j + 1 : stop][None, :]
        if stop < columns:
            left[:, stop:] -= errors @ upper[start:stop, stop:]
    return found[:, back]


__all__: list[Any] = ["BITS", "GROUP", "Integers", "check_bits", "group_count", "packed_bytes", "quantize"]
