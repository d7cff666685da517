"""One step of a sweep: an orthonormal basis for the range of a matrix, by one of four methods, and what it misses.

Whatever the method, the basis ``u`` is orthonormal, so ``z -> u u^H z`` is an orthogonal projection and what it misses
is measured, not estimated. Methods differ in cost, and in how near the best basis of that size they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.lapack import is_small
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    eigenvectors,
    frobenius_norm,
    is_single,
    left_factor,
    namespace,
    narrow,
    qr,
    tails,
    times_power_of_two,
    to_numpy,
    triangle,
    widen,
)
from mpo_tn.truncate.leading import LARGE, gaussian, gram_matrix, leading, may_pay

Method = Literal["auto", "svd", "gram", "krylov", "randomized"]

OVERSAMPLING = 10
"""Columns beyond the wanted ones in every block."""
FIRST_BLOCKS, LAST_BLOCKS = 5, 9
"""How many blocks `krylov` builds at least (four applications of ``z z^H``) and at most."""
SETTLED = 0.005
"""`krylov` stops when a further block raises the captured energy by less than this fraction."""
POWERS = 4
"""Applications of ``z z^H`` in `randomized`, which also doubles the number of columns."""
FEW = 16
"""`auto` takes `krylov` if at most one in ``FEW`` of at least ``LARGE`` values is wanted."""
CANCELS = 0.1
"""Below this fraction of the norm, what is missed is not taken from a difference of squares, and no basis from a Gram
matrix in the precision of the data."""
_SINGLE_RANGE, _DOUBLE_RANGE = (1e-12, 1e12), (1e-60, 1e60)
"""Norms whose cube, which a block of `krylov` may have, is in the range of single or double precision."""
_CLEAN = 1e-4
"""A block that had less than this within the basis is orthonormal to its square once that is taken out."""
_SMALL = 16
"""Of fewer values all are found in less time than it takes to look whether half the digits are enough."""
_FIRST_GUESS = 16
"""Columns tried first when only a tolerance says how many are wanted."""


@dataclass(frozen=True)
class Request:
    """What a step needs: at most ``cap`` columns, or as few as miss no more than ``share``. None and inf: all.

    ``best``: `auto` must not approximate, as bounds were asked for that hold of the best basis alone.
    """

    cap: int | None = None
    share: float = math.inf
    best: bool = False


@dataclass(frozen=True)
class Factor:
    """An orthonormal basis of the range of a matrix ``z`` (m, k), most important columns first.

    Attributes:
        basis: ``basis(r)`` has shape (m, r), for r below ``len(tail)``.
        tail: ``tail[r] == |z - u u^H z|`` for ``u = basis(r)``, as a host array in double precision.
        available: ``min(m, k)``.
        optimal: whether no other basis of r columns misses less (to rounding).
        method: the method that was used.
        note: what was out of the ordinary, if anything.
        image: ``u^H z`` for all columns, where it was computed anyway.
    """

    basis: Callable[[int], Array]
    tail: np.ndarray
    available: int
    optimal: bool
    method: str
    note: str | None = None
    image: Array | None = None


def checked_method(method: str) -> Method:
    """The method itself.

    Raises:
        MPOError: there is none of this name.
    """
    for known in get_args(Method):
        if method == known:
            return known
    raise MPOError(f"method={method!r} is not one of {', '.join(get_args(Method))}")


def factor(matrix: Array, method: Method, request: Request, *, single: bool) -> Factor:
    """A basis for the range of a matrix that is good enough for what was requested.

    Args:
        matrix: shape (m, k), of a norm near 1, as squares have to be in range; double precision, or single where a
            product in single precision loses nothing.
        method: ``svd`` (QR of the long side, then a small SVD), ``gram`` (eigenvectors of the Gram matrix of the short
            side), ``krylov`` (block Krylov), ``randomized`` (subspace iteration) or ``auto``.
        request: how many columns are wanted.
        single: the data had 32 bits or fewer, so that a Gram matrix in double precision loses nothing.

    Guarantee (measured-tail): ``tail[r]`` is ``|z - u u^H z|`` to ``4 eps sqrt(m k) |z|`` for every method, with the
    eps of ``matrix``; or, by ``gram`` of 32 bit data in double precision, its square is to
    ``4 eps(float64) sqrt(m k) |z|**2``, so that of less than about ``1.5e-8`` of the norm nothing is known.
    Guarantee (orthonormal): ``u`` is in double precision, and orthonormal to ``16 eps(float64) sqrt(m r)``, whatever
    the precision of ``matrix`` and of the search.

    ``auto`` takes the eigenvectors of a Gram matrix in the precision of ``matrix`` where only a cap says how many are
    wanted and more than a tenth of the norm is missed: by Ky Fan's principle a Gram matrix that is off by ``E`` costs
    at most ``2 r |E|`` of the captured energy, which is then far below what is missed. If ``single``, of a matrix of
    2048 rows and columns or more, and up to about .37 of its rank, only the first eigenvectors are sought, near enough
    to capture .999 of what the best do (:func:`mpo_tn.truncate.leading.leading`), which is told as ``randomized``;
    where the spectrum makes that dear it is given up, and all eigenvectors are found.

    Cost, for ``m <= k`` and r wanted: ``2 m**2 k + 13 m**3`` flops (svd), ``m**2 k + 9 m**3`` (gram),
    ``4 q m k (r + 10)`` (krylov, q = 5 to 9), ``20 m k (2 r + 10)`` (randomized).
    """
    rank = min(matrix.shape)
    wanted = rank if request.cap is None else min(rank, request.cap)
    if method == "auto":
        capped = math.isinf(request.share) and wanted < rank
        few = capped and not request.best and rank >= LARGE and FEW * wanted <= rank
        if capped and not few and rank >= max(2 * wanted, _SMALL):
            near = single and not request.best and may_pay(rank, wanted)
            found = _rough(matrix, wanted, single=single, near=near)
            if found is not None:
                return found
        method = "krylov" if few else "gram" if single and not is_small(matrix) else "svd"
    dense = _gram if method == "gram" or (single and method != "svd") else _svd
    if method in ("krylov", "randomized"):
        finder = _krylov if method == "krylov" else _randomized
        columns = wanted if math.isinf(request.share) else min(wanted, _FIRST_GUESS)
        while columns < rank and _room(method, columns) < rank:
            found = _measured(matrix, finder(matrix, columns, single=single), columns, method, single=single)
            if columns == wanted or found.tail[columns] <= request.share:
                return found
            columns = min(wanted, 2 * columns)
    return dense(widen(matrix), single=single)


def _room(method: str, columns: int) -> int:
    """The columns of a block; with as many as the matrix has rank nothing is left to approximate."""
    return columns + OVERSAMPLING + (columns if method == "randomized" else 0)


def _svd(matrix: Array, *, single: bool) -> Factor:
    """All singular vectors, from the triangle of a QR of the longer side where that is cheaper."""
    m, k = matrix.shape
    if m > k and not is_small(matrix):
        small = left_factor(adjoint(triangle(matrix)) if 2 * m > 3 * k else adjoint(matrix), gram=False)
        return Factor(_turned(matrix, small.u), tails(small.values), k, True, "svd", small.note)
    flat = 2 * k > 3 * m and not is_small(matrix)
    small = left_factor(adjoint(triangle(adjoint(matrix))) if flat else matrix, gram=False)
    return Factor(lambda r: small.u[:, :r], tails(small.values), min(m, k), True, "svd", small.note)


def _gram(matrix: Array, *, single: bool) -> Factor:
    """All singular vectors from the Gram matrix of the shorter side.

    Of double precision data it resolves values down to ``1.5e-8`` of the largest only. What a basis misses is then
    taken from the norms of the rows of ``u^H z``, which are exact because ``u`` is complete.
    """
    m, k = matrix.shape
    if m > k:
        small = left_factor(adjoint(matrix), gram=True)
        basis = _turned(matrix, small.u)
        if single:
            return Factor(basis, tails(small.values), k, True, "gram", small.note)
        full = basis(k)
        return _complete(matrix, full, small.note)
    small = left_factor(matrix, gram=True)
    if single:
        return Factor(lambda r: small.u[:, :r], tails(small.values), m, True, "gram", small.note)
    return _complete(matrix, small.u, small.note)


def _complete(matrix: Array, basis: Array, note: str | None) -> Factor:
    xp = namespace(matrix)
    image = adjoint(basis) @ matrix
    rows = to_numpy(xp.linalg.vector_norm(image, axis=1))
    return Factor(lambda r: basis[:, :r], tails(rows), min(matrix.shape), False, "gram", note, image)


def _rough(matrix: Array, columns: int, *, single: bool, near: bool) -> Factor | None:
    """The first singular vectors from a Gram matrix in the precision of the data, and what exactly they miss.

    None where that is too little for the precision to be enough. ``near``: vectors will do that capture nearly as much,
    where those are cheaper to find.
    """
    work = narrow(matrix) if single and min(matrix.shape) >= LARGE else matrix
    norm = frobenius_norm(matrix)
    half_the_digits = _SINGLE_RANGE if is_single(work) else _DOUBLE_RANGE
    if not half_the_digits[0] < norm < half_the_digits[1]:
        return None
    tall = matrix.shape[0] > matrix.shape[1]
    gram = gram_matrix(adjoint(work) if tall else work)
    first = leading(gram, columns, norm**2, CANCELS**2) if near else None
    found = eigenvectors(gram) if first is None else first
    vectors = found.u[:, :columns]
    # Orthonormal in double precision, so that norms of what it captures are exact.
    basis = qr(widen(work @ vectors if tall else vectors))[0]
    xp = namespace(matrix)
    image = adjoint(xp.astype(basis, matrix.dtype, copy=False)) @ matrix
    captured = frobenius_norm(image)
    missed = math.sqrt(max(norm - captured, 0.0)) * math.sqrt(norm + captured)
    if missed < CANCELS * norm:
        return None
    rows = to_numpy(namespace(basis).linalg.vector_norm(widen(image), axis=1))
    tail = tails(np.append(rows, missed))[:-1]
    method = "gram" if first is None else "randomized"
    return Factor(lambda r: basis[:, :r], tail, min(matrix.shape), first is None, method, found.note, image)


def _turned(matrix: Array, right: Array) -> Callable[[int], Array]:
    """Left singular vectors of a tall matrix from its right ones: orthonormal even where singular values vanish."""
    return lambda r: qr(matrix @ right[:, :r])[0]


def _measured(matrix: Array, basis: Array, columns: int, method: str, *, single: bool) -> Factor:
    """Turn a basis so that its first columns capture most, and measure what each number of columns misses."""
    image = widen(adjoint(namespace(matrix).astype(basis, matrix.dtype, copy=False)) @ matrix)
    small = (_gram if single else _svd)(image, single=single)
    turn = small.basis(basis.shape[1])
    basis, image = basis @ turn, adjoint(turn) @ image
    norm, captured = frobenius_norm(matrix), frobenius_norm(image)
    missed = math.sqrt(max(norm - captured, 0.0)) * math.sqrt(norm + captured)
    if missed < CANCELS * norm:
        missed = frobenius_norm(widen(matrix) - basis @ image)
    # Not the singular values: the norms of rows are what the basis captures, whatever rounding did to it.
    rows = to_numpy(namespace(matrix).linalg.vector_norm(image, axis=1))
    tail = tails(np.append(rows, missed))[:-1]
    return Factor(lambda r: basis[:, :r], tail, min(matrix.shape), False, method, small.note, image)


def _working(matrix: Array, *, single: bool) -> Array:
    """What a basis is searched in: a good basis needs no more digits than the data have."""
    if not single:
        return matrix
    norm = frobenius_norm(matrix)
    in_range = _SINGLE_RANGE[0] < norm < _SINGLE_RANGE[1]
    return narrow(matrix if in_range else times_power_of_two(matrix, -binary_exponent(norm)))


def _randomized(matrix: Array, columns: int, *, single: bool) -> Array:
    """Subspace iteration (Halko, Martinsson, Tropp, SIAM Rev. 53, 2011, Algorithm 4.4)."""
    work = _working(matrix, single=single)
    start = gaussian(work, work.shape[1], _room("randomized", columns))
    basis, _ = qr(work @ start)
    for _ in range(POWERS):
        basis, _ = qr(work @ qr(adjoint(work) @ basis)[0])
    return qr(widen(basis))[0]


def _krylov(matrix: Array, columns: int, *, single: bool) -> Array:
    """Block Krylov (Musco and Musco, NeurIPS 2015), one block at a time with full reorthogonalisation.

    ``q_j^H z`` is both what block j captures and what the next block grows from.
    """
    xp = namespace(matrix)
    work = _working(matrix, single=single)
    block, _ = qr(work @ gaussian(work, work.shape[1], _room("krylov", columns)))
    width = block.shape[1]
    basis, image = block, adjoint(block) @ work
    gram = image @ adjoint(image)
    energy = 0.0
    count = 1
    while True:
        last = count >= LAST_BLOCKS or basis.shape[1] + width > min(matrix.shape)
        if count >= FIRST_BLOCKS - 1 or last:
            # Only whether to go on, and how to turn the basis: what it captures is measured afterwards.
            small = eigenvectors(widen(gram))
            found = float(small.values[:columns].sum())
            if last or (count >= FIRST_BLOCKS and found - energy <= SETTLED * found):
                turned = widen(basis) @ small.u[:, : columns + OVERSAMPLING]
                return qr(turned)[0]
            energy = found
        block = work @ adjoint(image[-width:, :])
        block, _ = qr(block - basis @ (adjoint(basis) @ block))
        # Columns that were almost within the basis have been blown up, and have to be cleaned again.
        within = adjoint(basis) @ block
        block = block - basis @ within
        if frobenius_norm(within) > _CLEAN:
            block, _ = qr(block)
        basis = xp.concat((basis, block), axis=1)
        image = xp.concat((image, adjoint(block) @ work), axis=0)
        fresh = image @ adjoint(image[-width:, :])
        gram = xp.concat((xp.concat((gram, adjoint(fresh[:-width, :])), axis=0), fresh), axis=1)
        count += 1
