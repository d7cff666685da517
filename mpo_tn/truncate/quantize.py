"""Integers of few bits: a matrix held as small whole numbers with one scale for every group of columns.

A core (left, out, in, right) is the matrix (left out, in right): its columns are what is summed over when the core is
applied, and along them lie the groups. The dense matrix is the chain of one site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import array_api_compat
import numpy as np

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, adjoint, check_matrix, dtype_name, library, namespace, to_numpy, widen
from mpo_tn.truncate.refine_integers import refine_integers, turned
from mpo_tn.truncate.scales import best_scales, check_scale, clipped, group_count, half, spread_scales

BITS = (2, 3, 4, 5, 6, 7, 8)
"""Bits an integer can have."""

GROUP = 128
"""Columns that share a scale, unless said otherwise."""

_AT_ONCE = 2**19
"""Entries that are rounded at once without a metric, and"""

_ROWS = 1024
"""rows in one: what is worked with takes ten times as much room as they."""

_BLOCK = 64
"""Columns that are rounded before the rest hears of it."""

SWEEPS = 4
"""How often integers and scales are improved in a metric, unless said otherwise."""

_DAMPING = 0.01
"""What is added to the diagonal of a metric, as a fraction of its mean: without, directions that the calibration has
hardly seen would take up any error."""


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


def quantize(
    matrix: Array, bits: int, group: int = GROUP, *, metric: Array | None = None, sweeps: int = SWEEPS
) -> Integers:
    """Round a matrix to integers of ``bits`` bits with the best scale for every group.

    Without a metric every entry is rounded to the nearest, and the scale of a group is the one of 25 clips, of both
    signs, with the least squared error. With a metric S, to whose diagonal a hundredth of its mean is added, columns
    are rounded one after another, each to what makes up for the rounding of those before it (GPTQ): with
    ``S = U diag(d) U^T``, U upper triangular with a unit diagonal, ``tr(D S D^T)`` is the sum of ``d_j`` times the
    squares of column j of ``D U``, and d weighs the errors that choose the scales. Sweeps then give every column and
    every scale once more what is best for all others as they are (:mod:`mpo_tn.truncate.refine_integers`).

    Args:
        matrix: (rows, columns), real; NumPy, torch or JAX.
        bits: 2 to 8.
        group: columns a scale is for, at least 8; the last group may have fewer.
        metric: S, (columns, columns), positive semidefinite, of what the columns are multiplied with; in any scale.
        sweeps: in a metric, how often all columns and scales are improved; 0 is GPTQ. In 2 bits four sweeps take about
            a tenth of the squared error away, in 3 bits a twentieth; many more another hundredth.

    Returns:
        :class:`Integers` in the library of the matrix; NumPy for JAX.

    Guarantee (nearest): without a metric no integer times its scale is nearer to an entry than the one that was chosen.
    Guarantee (scales-exact): every scale is a nonzero float16, and ``matrix()`` exactly integer times scale.
    Guarantee (sweeps-improve): ``tr(D S D^T)``, S with that hundredth, is never larger with more sweeps, to rounding in
    single precision.
    Cost: about ``500`` operations an entry; with a metric ``2 (1 + sweeps) rows columns**2 + columns**3 / 3`` flops as
    well, those of the sweeps in single precision.

    Raises:
        MPOError: bits or a group out of range, a complex matrix, entries that are not finite, or so large or all so
            small that float16 has no scales for them; a metric of another size or with entries that are not finite;
            sweeps below 0.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, in the form of Chee et al., QuIP, arXiv 2307.13304 (LDLQ), with the
    scales of all groups fixed before the columns are taken in the order of their weight in the metric; the sweeps are
    those of QuantEase, Behdin et al., arXiv 2309.01885.

    >>> found = quantize(np.array([[0.5, -1.0, 0.25, 0.0]]), 3, 8)
    >>> found.values, np.round(found.matrix(), 3)
    (array([[ 2, -4,  1,  0]], dtype=int8), array([[ 0.5 , -1.  ,  0.25,  0.  ]]))
    """
    bits, group = check_bits(bits, group)
    number = whole_number(sweeps)
    if number is None or number < 0:
        raise MPOError(f"sweeps={sweeps!r} must be a whole number of at least 0")
    matrix = check_matrix(matrix)
    if dtype_name(matrix).startswith("complex"):
        raise MPOError("a complex matrix has no integers: quantize its real and imaginary part")
    if library(matrix) == "jax":  # which would compile for every shape
        matrix = to_numpy(matrix)
    check_scale(matrix, bits)
    if metric is None:
        return _joined([_nearest(piece, bits, group) for piece in _row_pieces(matrix, _AT_ONCE)], bits, group)
    damped = _damped(_checked_metric(metric, matrix))
    feedback = _feedback(damped)
    pieces = _row_pieces(matrix, _ROWS * matrix.shape[1])
    return _joined([_in_metric(piece, bits, group, damped, feedback, number) for piece in pieces], bits, group)


def _row_pieces(matrix: Array, entries: int) -> Iterator[Array]:
    """So many entries at a time, whole rows, in double precision: rows do not know of each other."""
    rows = max(entries // matrix.shape[1], 1)
    return (widen(matrix[start : start + rows, :]) for start in range(0, matrix.shape[0], rows))


def _joined(pieces: list[tuple[Array, Array]], bits: int, group: int) -> Integers:
    if len(pieces) == 1:
        return Integers(*pieces[0], bits, group)
    xp = namespace(pieces[0][0])
    values, scales = (xp.concat(parts, axis=0) for parts in zip(*pieces, strict=True))
    return Integers(values, scales, bits, group)


def _nearest(wide: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Integers and scales of some rows without a metric."""
    xp, top = namespace(wide), 2 ** (bits - 1)
    scales = best_scales(wide, None, bits, group)
    values = clipped(xp.round(wide / spread_scales(scales, group, wide.shape[1])), -top, top - 1)
    return xp.astype(values, xp.int8), half(scales)


def _in_metric(
    wide: Array, bits: int, group: int, damped: Array, feedback: tuple[Array, Array, Array], sweeps: int
) -> tuple[Array, Array]:
    """Integers and scales of some rows in a metric."""
    xp = namespace(wide)
    order, upper, weights = feedback
    back = xp.argsort(order)
    scales = best_scales(wide, weights[back], bits, group)
    spread = spread_scales(scales, group, wide.shape[1])
    values = _with_feedback(wide[:, order], spread[:, order], bits, upper)[:, back]
    values, scales = refine_integers(wide, values, scales, damped, bits, group, sweeps)
    return xp.astype(values, xp.int8), half(scales)


def _checked_metric(metric: Array, matrix: Array) -> Array:
    like = widen(matrix[:1, :])
    xp, columns = namespace(like), matrix.shape[1]
    checked = xp.asarray(widen(metric), dtype=like.dtype, device=array_api_compat.device(like))
    if tuple(checked.shape) != (columns, columns):
        raise MPOError(f"the metric is {tuple(checked.shape)} for a matrix with {columns} columns")
    if not bool(xp.all(xp.isfinite(checked))):
        raise MPOError("the metric has entries that are NaN or infinite")
    return checked


def _damped(metric: Array) -> Array:
    """The metric that is worked in: of mean one on its diagonal, and a little more; one of nothing weighs all alike."""
    xp = namespace(metric)
    mean = float(xp.mean(xp.linalg.diagonal(metric)))
    eye = xp.eye(metric.shape[0], dtype=metric.dtype, device=array_api_compat.device(metric))
    return metric / mean + _DAMPING * eye if mean > 0 else eye


def _feedback(damped: Array) -> tuple[Array, Array, Array]:
    """An order of the columns, and U and d of a metric in that order, ``U diag(d) U^T``."""
    xp = namespace(damped)
    order = xp.argsort(-xp.linalg.diagonal(damped))
    backward = xp.flip(order)
    try:
        # From the last column to the first it gives the upper triangle.
        root = xp.linalg.cholesky(damped[backward, :][:, backward])
    except (np.linalg.LinAlgError, RuntimeError):
        raise MPOError("the metric has negative eigenvalues: it is no second moment") from None
    root = xp.flip(root)
    sizes = xp.linalg.diagonal(root)
    return order, root / sizes[None, :], sizes**2


def _with_feedback(wide: Array, scales: Array, bits: int, upper: Array) -> Array:
    """Integers of one column after another: column j of ``(W - Q) U`` is made small, given those before it."""
    xp, device = namespace(wide), array_api_compat.device(wide)
    columns, top = wide.shape[1], 2 ** (bits - 1)
    # Columns as rows, so that each is one piece of memory.
    wanted, steps = turned(wide), turned(scales)
    found, missed = xp.zeros_like(wanted), xp.zeros_like(wanted)
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        moved = wanted[part, :] + adjoint(upper[:start, part]) @ missed[:start, :]
        values, miss = _columns_with_feedback(
            to_numpy(wanted[part, :]), to_numpy(moved), to_numpy(steps[part, :]), to_numpy(upper[part, part]), top
        )
        found[part, :] = xp.asarray(values, device=device)
        missed[part, :] = xp.asarray(miss, device=device)
    return adjoint(found)


def _columns_with_feedback(
    wanted: np.ndarray, moved: np.ndarray, steps: np.ndarray, upper: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The integers of a block and what they miss; on the host, where a short row is done before torch has begun."""
    found, missed, room = np.empty_like(wanted), np.empty_like(wanted), np.empty_like(wanted)
    moved, inverse = moved.copy(), 1 / steps
    for j, value in enumerate(found):
        np.multiply(moved[j], inverse[j], out=value)
        np.rint(value, out=value)
        np.minimum(value, top - 1, out=value)
        np.maximum(value, -top, out=value)
        np.multiply(value, steps[j], out=missed[j])
        np.subtract(wanted[j], missed[j], out=missed[j])
        np.multiply(upper[j, j + 1 :][:, None], missed[j], out=room[j + 1 :])
        moved[j + 1 :] += room[j + 1 :]
    return found, missed
