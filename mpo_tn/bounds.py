"""Spectra of bonds, the entropies and the error bounds that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array, check_matrix, dtype_name, interleave, namespace, singular_values, tails, widen
from mpo_tn.sites import Sites


def unfolding_spectra(matrix: Array, sites: Sites) -> list[np.ndarray]:
    """The singular values of every unfolding ``W[o_1 i_1 .. o_k i_k ; o_{k+1} i_{k+1} .. o_n i_n]``, descending.

    Returns ``n - 1`` host arrays of lengths ``sites.full_bonds``. Cost: one Gram matrix and its eigenvalues a bond for
    data of 32 bits or fewer, one SVD a bond otherwise.

    >>> unfolding_spectra(np.eye(4), Sites(out=(2, 2), in_=(2, 2)))
    [array([2., 0., 0., 0.])]
    """
    matrix = check_matrix(matrix)
    if sites.shape != tuple(matrix.shape):
        raise MPOError(f"legs multiply to {sites.shape} and the matrix is {tuple(matrix.shape)}: see Sites.balanced")
    xp = namespace(matrix)
    tensor = interleave(widen(matrix), sites.out, sites.in_)
    gram = dtype_name(matrix) not in ("float64", "complex128")
    rows = [math.prod(sites.sizes[: k + 1]) for k in range(len(sites) - 1)]
    return [singular_values(xp.reshape(tensor, (m, -1)), gram=gram) for m in rows]


def error_bounds(spectra: Sequence[np.ndarray], bonds: Sequence[int]) -> tuple[float, float]:
    """The a-priori bounds ``(max_k eps_k, sqrt(sum_k eps_k**2))`` on the error of truncating to ``bonds``.

    The first bounds the best possible MPO with these bonds from below, the second the sweep of
    :meth:`mpo_tn.MPO.from_matrix` from above; ``eps_k`` is the 2-norm of the singular values of unfolding k beyond
    ``bonds[k]``. This corrects Eq. 3 of Liu, Gao et al. (ACL 2021), whose printed limit and missing squares do not
    give a bound.

    Raises:
        MPOError: not one bond per spectrum.

    >>> error_bounds([np.array([4.0, 3.0]), np.array([12.0, 4.0, 3.0])], bonds=(1, 1))
    (5.0, 5.830951894845301)
    """
    if len(spectra) != len(bonds):
        raise MPOError(f"bonds={tuple(bonds)} has {len(bonds)} entries and there are {len(spectra)} spectra")
    cut = [float(tails(values)[min(bond, len(values))]) for values, bond in zip(spectra, bonds, strict=True)]
    return max(cut, default=0.0), math.hypot(*cut)


def entropy(spectrum: np.ndarray) -> float:
    """The entanglement entropy ``-sum v ln v`` in nats, ``v = s**2 / sum s**2``; 0 for a zero spectrum.

    It lies between 0 (one value carries everything) and ``ln(len(spectrum))`` (a flat spectrum, which does not
    compress).

    >>> round(entropy(np.ones(4)) - math.log(4), 12)
    0.0
    """
    largest = float(spectrum.max(initial=0.0))
    if largest == 0.0:
        return 0.0
    weights = (spectrum / largest) ** 2
    weights = weights[weights > 0] / weights.sum()
    return float(-(weights * np.log(weights)).sum()) + 0.0
