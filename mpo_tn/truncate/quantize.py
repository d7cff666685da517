"""Integers of few bits: a matrix held as small whole numbers with one scale for every group of columns.

A core (left, out, in, right) is the matrix (left out, in right): its columns are what is summed over when the core is
applied, and along them lie the groups. The dense matrix is the chain of one site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import array_api_compat
import numpy as np

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, adjoint, check_matrix, dtype_name, namespace, narrow, widen

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bits an integer can have."""

GROUP = 128
"""Columns that share a scale, unless said otherwise."""

_CLIPS = 25
"""How many largest entries are tried for a group, as fractions of its largest: clipping it pays for the finer steps."""

_DEEPEST = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}
"""The least of these fractions, by bits: the more there are, the less clipping has to win."""

_PIECE = 2**15
"""Entries that are tried at once, so that they stay in the cache."""

_BLOCK = 64
"""Columns that are rounded before the rest hears of it."""

_DAMPING = 0.01
"""What is added to the diagonal of a metric, as a fraction of its mean: without, directions that the calibration has
hardly seen would take up any error."""

_LARGEST_SCALE, _LEAST_SCALE = 65504.0, 2.0**-24
_COARSEST_SCALE = 2.0**-20
"""Below it a scale in float16 has fewer than five digits of two left."""


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
        """What the integers stand for, (rows, columns) in float64: exactly integer times scale, in float32 as well."""
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
    signs, with the least squared error. With a metric ``S = U diag(d) U^T``, U upper triangular with a unit diagonal,
    ``tr(D S D^T)`` is the sum of ``d_j`` times the squares of column j of ``D U``: columns are rounded one after
    another, each to what makes up for the rounding of those before it (GPTQ), and d weighs the errors that choose the
    scales.

    Args:
        matrix: (rows, columns), real; NumPy, torch or JAX.
        bits: 2 to 8.
        group: columns a scale is for, at least 8; the last group may have fewer.
        metric: S, (columns, columns), positive semidefinite, of what the columns are multiplied with; in any scale.

    Returns:
        :class:`Integers` in the library of the matrix; NumPy for JAX.

    Guarantee (nearest): without a metric no integer times its scale is nearer to an entry than the one that was chosen.
    Guarantee (scales-exact): every scale is a nonzero float16, and ``matrix()`` exactly integer times scale.
    Cost: about ``500`` operations an entry; with a metric ``2 rows columns**2 + columns**3 / 3`` flops as well.

    Raises:
        MPOError: bits or a group out of range, a complex matrix, entries that are not finite, or so large or all so
            small that float16 has no scales for them; a metric of another size or with entries that are not finite.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, in the form of Chee et al., QuIP, arXiv 2307.13304 (LDLQ), with the
    scales of all groups fixed before the columns are taken in the order of their weight in the metric.

    >>> found = quantize(np.array([[0.5, -1.0, 0.25, 0.0]]), 3, 8)
    >>> found.values, np.round(found.matrix(), 3)
    (array([[ 2, -4,  1,  0]], dtype=int8), array([[ 0.5 , -1.  ,  0.25,  0.  ]]))
    """
    bits, group = check_bits(bits, group)
    matrix = check_matrix(matrix)
    if dtype_name(matrix).startswith("complex"):
        raise MPOError("a complex matrix has no integers: quantize its real and imaginary part")
    wide = widen(matrix)
    xp = namespace(wide)
    if metric is None:
        scales = _best_scales(wide, None, bits, group)
        values = _rounded(wide, spread_scales(scales, group, wide.shape[1]), bits)
    else:
        checked = _checked_metric(metric, wide)
        order, upper, weights = _feedback(checked)
        scales = _best_scales(wide, weights[xp.argsort(order)], bits, group)
        spread = spread_scales(scales, group, wide.shape[1])
        values = _with_feedback(wide[:, order], spread[:, order], bits, upper)[:, xp.argsort(order)]
    return Integers(xp.astype(values, xp.int8), _half(scales), bits, group)


def _rounded(values: Array, scales: Array, bits: int) -> Array:
    xp, top = namespace(values), 2 ** (bits - 1)
    return xp.clip(xp.round(values / scales), -top, top - 1)


def _best_scales(wide: Array, weights: Array | None, bits: int, group: int) -> Array:
    """The scale of every group, as float64 that float16 holds exactly: the clip and sign of least squared error."""
    xp = namespace(wide)
    rows, columns = wide.shape
    count = group_count(columns, group)
    largest_of_all, top = float(xp.max(xp.abs(wide))), 2 ** (bits - 1)
    if largest_of_all / top > _LARGEST_SCALE:
        raise MPOError(f"entries of size {largest_of_all:.3g} are beyond scales in float16: scale the matrix down")
    if 0 < largest_of_all / top < _COARSEST_SCALE:
        raise MPOError(f"no entry is larger than {largest_of_all:.3g}, below scales in float16: scale the matrix up")
    device = array_api_compat.device(wide)
    padded = xp.zeros((rows, count * group), dtype=wide.dtype, device=device)
    padded[:, :columns] = wide
    blocks = xp.reshape(narrow(padded), (rows, count, group))
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
    return namespace(scales).clip(widen(_half(scales)), min=_LEAST_SCALE)


def _half(scales: Array) -> Array:
    if isinstance(scales, np.ndarray):
        return scales.astype(np.float16)
    return scales.half()


def _checked_metric(metric: Array, wide: Array) -> Array:
    xp = namespace(wide)
    checked = xp.asarray(widen(metric), dtype=wide.dtype, device=array_api_compat.device(wide))
    if tuple(checked.shape) != (wide.shape[1], wide.shape[1]):
        raise MPOError(f"the metric is {tuple(checked.shape)} for a matrix with {wide.shape[1]} columns")
    if not bool(xp.all(xp.isfinite(checked))):
        raise MPOError("the metric has entries that are NaN or infinite")
    return checked


def _feedback(metric: Array) -> tuple[Array, Array, Array]:
    """An order of the columns, and U and d of the damped metric in that order, ``U diag(d) U^T``."""
    xp = namespace(metric)
    diagonal = xp.linalg.diagonal(metric)
    mean = float(xp.mean(diagonal))
    size, device = metric.shape[0], array_api_compat.device(metric)
    eye = xp.eye(size, dtype=metric.dtype, device=device)
    order = xp.argsort(-diagonal)
    turned = xp.flip(order)
    # A metric of nothing weighs all alike. Cholesky from the last column to the first gives the upper triangle.
    damped = metric[turned, :][:, turned] / mean + _DAMPING * eye if mean > 0 else eye
    try:
        root = xp.linalg.cholesky(damped)
    except (np.linalg.LinAlgError, RuntimeError):
        raise MPOError("the metric has negative eigenvalues: it is no second moment") from None
    root = xp.flip(root)
    sizes = xp.linalg.diagonal(root)
    return order, root / sizes[None, :], sizes**2


def _with_feedback(wide: Array, scales: Array, bits: int, upper: Array) -> Array:
    """Integers of one column after another: column j of ``(W - Q) U`` is made small, given those before it."""
    xp = namespace(wide)
    columns, top = wide.shape[1], 2 ** (bits - 1)
    # Columns as rows, so that each is one piece of memory.
    wanted, steps = xp.asarray(adjoint(wide), copy=True), xp.asarray(adjoint(scales), copy=True)
    inverse = 1 / steps
    found, missed = xp.zeros_like(wanted), xp.zeros_like(wanted)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        moved = wanted[start:stop] + adjoint(upper[:start, start:stop]) @ missed[:start]
        for j in range(start, stop):
            value = xp.clip(xp.round(moved[j - start] * inverse[j]), -top, top - 1)
            found[j] = value
            miss = wanted[j] - value * steps[j]
            missed[j] = miss
            if j + 1 < stop:
                moved[j + 1 - start :] += upper[j, j + 1 : stop][:, None] * miss[None, :]
    return adjoint(found)
