"""The leading eigenvectors of a Gram matrix by filtered subspace iteration, where all of them would cost more.

A random block is multiplied by a polynomial of the matrix that stays between -1 and 1 on the eigenvalues that are not
wanted and grows as fast as it can on those that are: Chebyshev's. Where the unwanted ones end is found beforehand from
the density of eigenvalues. On flat spectra, as weights have, that needs a degree of 4 to 8 where plain powers need some
dozens.

Not ``torch.svd_lowrank`` or scikit-learn's ``randomized_svd``: both are those powers, factorise after every product,
and neither says what it misses or whether it was enough.
"""

from __future__ import annotations

import array_api_compat
import numpy as np

from mpo_tn.linalg import Array, LeftFactor, adjoint, conjugate, eigenvectors, eps, library, namespace, qr, to_numpy

SEED = 0
"""Of every random start: the same call gives the same bits."""
LARGE = 2048
"""Of smaller matrices all eigenvectors are found in about the same time."""
LOSS = 1e-3
"""The energy that may be lost, as a fraction of what the best vectors capture."""
SPARE = 3 / 8
"""Columns beyond the wanted ones, as a fraction of these: with more the degree falls, and each product costs more."""
ROUNDS, DEGREE = 2, 5
"""How often the block is orthonormalised, and the degree, for the spectra of weights."""
_MOST = 14
"""No degree is higher: spectra that ask for more have next to no gap, and no filter is cheap for them."""
_EIGH, _QR, _GAIN = 13.0, 5.6, 0.8
"""Time of all eigenvectors of n x n, ``13 n**3``, and of an orthonormal basis, ``5.6 m k**2``, against a product of as
many flops, as measured in one thread; and the part of the former that may be spent in order to avoid it."""
_BLOCK = 512
"""Rows of a Gram matrix that are computed at a time."""
_PROBES, _STEPS = 8, 28
"""Of the density: how many random vectors, and Lanczos steps for each."""
_GROWTH = 1e6, 1e8
"""How far a filter may blow up the first eigenvector against unwanted ones: of a random block, up to where rounding of
single precision is as large as these; then of Ritz vectors, of which the first has been taken out."""


def gaussian(like: Array, rows: int, columns: int) -> Array:
    """A Gaussian block with the same entries in every process, of the dtype and device of ``like``."""
    xp = namespace(like)
    block = np.random.default_rng(SEED).standard_normal((rows, columns))
    return xp.astype(xp.asarray(block, device=array_api_compat.device(like)), like.dtype)


def gram_matrix(matrix: Array) -> Array:
    """``matrix matrix^H``. torch does not see that only half of it has to be computed, as NumPy does."""
    rows = matrix.shape[0]
    if rows < LARGE or library(matrix) != "torch":
        return matrix @ adjoint(matrix)
    gram = namespace(matrix).empty((rows, rows), dtype=matrix.dtype, device=array_api_compat.device(matrix))
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        gram[start:stop, :stop] = matrix[start:stop, :] @ adjoint(matrix[:stop, :])
        gram[:start, start:stop] = adjoint(gram[start:stop, :start])
    return gram


def columns_of(count: int) -> int:
    """The columns of the block from which ``count`` eigenvectors are taken."""
    return count + max(int(SPARE * count), 16)


def work(side: int, count: int, degree: int = DEGREE, rounds: int = ROUNDS) -> tuple[float, float]:
    """Flops of products and of orthonormal bases, and the cubes of sides of eigenproblems, for ``count`` vectors."""
    columns = columns_of(count)
    products = 2.0 * side**2 * columns * (degree + 1) + rounds * (6.0 + _QR) * side * columns**2
    return products, rounds * float(columns) ** 3


def pays(side: int, count: int, degree: int = DEGREE, rounds: int = ROUNDS) -> bool:
    """Whether the first ``count`` eigenvectors of ``side`` cost less than all of them."""
    if side < LARGE or columns_of(count) >= side:
        return False
    products, cubes = work(side, count, degree, rounds)
    return products + 9.0 * cubes <= _GAIN * _EIGH * float(side) ** 3


def may_pay(side: int, count: int) -> bool:
    """Whether they do where the spectrum is kind: one round of a low degree."""
    return pays(side, count, DEGREE - 1, 1)


def singular_work(side: int, count: int) -> tuple[float, float]:
    """As :func:`work`, of what is done once there is a Gram matrix of 32 bit data: all eigenvectors, or the first."""
    return work(side, count) if pays(side, count) else (0.0, float(side) ** 3)


def leading(gram: Array, count: int, trace: float, missed: float) -> LeftFactor | None:
    """Orthonormal vectors (n, count) that capture nearly as much as the first eigenvectors, and what each captures.

    Args:
        gram: Hermitian without negative eigenvalues (n, n).
        count: how many are wanted.
        trace: of ``gram``.
        missed: the least part of the trace that may be left over.

    Returns:
        None where the spectrum asks for so many products that all eigenvectors cost less, or less than ``missed`` would
        be left over.

    Guarantee (near-best-leading): the expected loss against the first eigenvectors, of a Gaussian start and by the
    density of eigenvalues as it was estimated, is at most ``LOSS`` of what those capture. For sin**2 of the angle
    between an eigenvector and the block the bound of Halko, Martinsson and Tropp is taken,
    ``q / (1 + q)`` with ``q = sum_(j > k) f_j**2 / ((b - k - 1) f_i**2)``, b columns, the least over k from count on.

    Cost: ``2 n**2 b (degree + 1)`` flops, and a QR of (n, b) and an eigenproblem (b, b) each round; b = 1.375 count.
    Sources: Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006); Halko, Martinsson and Tropp, SIAM Rev.
    53 (2011), Theorem 10.5; for the density Lin, Saad and Yang, SIAM Rev. 58 (2016).
    """
    n, columns = gram.shape[0], columns_of(count)
    start = gaussian(gram, n, columns + _PROBES)
    spectrum, first = _spectrum(gram, start[:, columns:])
    if 1.0 - spectrum[:count].sum() / trace < missed:
        return None
    cut, top = spectrum[columns], first
    filters: list[tuple[int, float]] = []
    ritz, block, image = spectrum[:columns], start[:, :columns], None
    growth, done = _GROWTH[0], 0
    while True:
        cut = max(cut, 8.0 * eps(gram) * top)
        degree = _degree(ritz, spectrum, filters, cut, count, trace)
        bounded = degree
        while bounded > 1 and chebyshev(2.0 * top / cut - 1.0, bounded) > growth:
            bounded -= 1
        if degree == 0 or not pays(n, count, done + degree, len(filters) + (1 if bounded == degree else 2)):
            return None
        degree = bounded
        block = _filtered(gram, block, image, degree, cut)
        filters.append((degree, cut))
        done += degree
        basis = qr(block)[0]
        image = gram @ basis
        found = eigenvectors(adjoint(basis) @ image)
        ritz = found.values.astype(np.float64)
        if 1.0 - ritz[:count].sum() / trace < missed:
            return None
        if expected_loss(ritz, spectrum, filters, count, trace) <= LOSS:
            return LeftFactor(basis @ found.u[:, :count], ritz[:count], found.note)
        block, image = basis @ found.u, image @ found.u
        growth, top = _GROWTH[1], ritz[0]
        # Ritz values are too small, and so is the last by far, the one in the middle of the spare ones hardly.
        cut = min(max(cut, ritz[-1]), ritz[(count + columns) // 2])


def _degree(
    ritz: np.ndarray, spectrum: np.ndarray, filters: list[tuple[int, float]], cut: float, count: int, trace: float
) -> int:
    """The least degree of one more filter that will do; 0 if none in reach will."""
    for degree in range(1, _MOST + 1):
        if expected_loss(ritz, spectrum, [*filters, (degree, cut)], count, trace) <= LOSS:
            return degree
    return 0


def expected_loss(
    ritz: np.ndarray, spectrum: np.ndarray, filters: list[tuple[int, float]], count: int, trace: float
) -> float:
    """The part of the captured energy that is lost, see :func:`leading`.

    Args:
        ritz: Ritz values of the block, descending, or estimates.
        spectrum: an estimate of all eigenvalues, descending.
        filters: degree and upper end of the interval of every filter so far.
        count: how many vectors are kept.
        trace: of the matrix.
    """
    columns = len(ritz)
    spare = columns - count
    known = np.zeros(len(spectrum) - count)
    known[:spare] = ritz[count:]
    # The mean of a squared Chebyshev polynomial is 1/2; one of few values may meet it where it vanishes.
    unwanted = np.maximum(_squares(np.maximum(spectrum[count:], known), filters), 0.5)
    beyond = np.cumsum(unwanted[::-1])[::-1][: spare - 1]
    q = (beyond / (spare - 1.0 - np.arange(spare - 1))).min() / _squares(ritz[:count], filters)
    captured = ritz[:count].sum()
    # What takes the place of a missed vector has the mean of what is left.
    other = max(trace - ritz.sum(), 0.0) / (len(spectrum) - columns)
    return float((np.maximum(ritz[:count] - other, 0.0) * q / (1.0 + q)).sum() / captured)


def chebyshev(x: np.ndarray | float, degree: int) -> np.ndarray:
    """The size of the Chebyshev polynomial at x >= -1."""
    inside = np.cos(degree * np.arccos(np.clip(x, -1.0, 1.0)))
    return np.where(np.abs(x) <= 1.0, np.abs(inside), np.cosh(degree * np.arccosh(np.maximum(x, 1.0))))


def _squares(values: np.ndarray, filters: list[tuple[int, float]]) -> np.ndarray:
    """The square of the product of all filters at eigenvalues."""
    squares = np.ones_like(values)
    for degree, cut in filters:
        squares *= chebyshev(2.0 * values / cut - 1.0, degree) ** 2
    return squares


def _filtered(gram: Array, block: Array, image: Array | None, degree: int, cut: float) -> Array:
    """The Chebyshev polynomial of a degree, of the interval from 0 to ``cut``, in ``gram``, times ``block``.

    ``image``: ``gram @ block`` if it is known.
    """
    half = 0.5 * cut
    before, last = block, ((gram @ block if image is None else image) - half * block) * (1.0 / half)
    for _ in range(degree - 1):
        before, last = last, (gram @ last - half * last) * (2.0 / half) - before
    return last


def _spectrum(gram: Array, probes: Array) -> tuple[np.ndarray, float]:
    """An estimate of all eigenvalues, descending, by stochastic Lanczos quadrature, and one of the first alone."""
    xp = namespace(gram)
    n, count = probes.shape
    steps = min(_STEPS, n)
    now = probes / xp.linalg.vector_norm(probes, axis=0)
    before, beta = xp.zeros_like(now), xp.zeros_like(xp.linalg.vector_norm(now, axis=0))
    matrices = np.zeros((count, steps, steps))
    for k in range(steps):
        following = gram @ now - before * beta
        alpha = xp.sum(conjugate(now) * following, axis=0)
        following = following - now * alpha
        beta = xp.linalg.vector_norm(following, axis=0)
        matrices[:, k, k] = np.real(to_numpy(alpha))
        if k + 1 < steps:
            matrices[:, k, k + 1] = matrices[:, k + 1, k] = to_numpy(beta)
        before, now = now, following / xp.where(beta > 0, beta, xp.ones_like(beta))
    nodes, vectors = np.linalg.eigh(matrices)
    weights = (vectors[:, 0, :] ** 2).ravel() * (n / count)
    order = np.argsort(-nodes.ravel(), kind="stable")
    nodes, weights = np.maximum(nodes.ravel()[order], 0.0), weights[order]
    # Half the values that a node stands for are above it.
    return np.interp(np.arange(n) + 0.5, np.cumsum(weights) - 0.5 * weights, nodes), float(nodes[0])
