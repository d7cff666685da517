"""The best low-rank matrices in a metric, of all ranks at once: one decomposition, and no inverse of a moment."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains.canonical import ChainT, wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.fit.metric import Metric, dense, like
from mpo_tn.fit.sweeps import FitReport
from mpo_tn.linalg import Array, adjoint, is_single, left_factor, namespace, qr, restored, tails
from mpo_tn.truncate.spectra import float_floor

_NOISE = {True: 1e-6, False: 1e-13}
"""Weighted singular values below this fraction of the largest are rounding: through a Gram matrix, through an SVD."""


class LowRankFits:
    """All truncations of a matrix that are best in a metric.

    With ``S = L L^T``, ``G = K K^T`` and the left singular vectors U of ``K^T T L``, T the target of the matrix, the
    best matrix of rank r is ``U_r U_r^T T`` for G = 1, and ``(T L V_r) (1 / s_r) (U_r^T K^T T)`` in general: exactly
    what whitening, truncating and taking the whitening back gives, without taking it back.

    Args:
        matrix: W, (out, in), real.
        metric: of its layer.

    Guarantee (low-rank-best): ``error(r)`` is the tail of the spectrum, ``sqrt(sum_{i >= r} s_i**2)``, and no matrix
    of rank r has a smaller one (Eckart, Young), up to rounding: ``c eps sqrt(size)`` of the norm, ``1e-7`` of it where
    a Gram matrix is taken, that is for data of 32 bits or fewer.
    Cost: ``2 out in (out + in) + 9 min(out, in)**3`` flops once, ``2 out in r`` for a cut.

    Raises:
        MPOError: as for :class:`~mpo_tn.fit.metric.Metric`, and for a matrix that is not of its size.

    Source: Swift-SVD, arXiv 2604.01609, for G = 1: eigenvectors of ``W S W^T``.

    >>> import numpy as np
    >>> fits = LowRankFits(np.diag([3.0, 2.0, 1.0]), Metric(np.diag([1.0, 4.0, 25.0])))
    >>> np.round(fits.values, 12)
    array([5., 4., 3.])
    >>> round(fits.error(2), 12), fits.cut(2).bonds
    (3.0, (2,))
    """

    def __init__(self, matrix: Array, metric: Metric) -> None:
        self.metric = metric
        self._like = matrix
        self._target = metric.target(matrix)
        weighted = self._target @ like(metric.root, self._target)
        self._outer = None if metric.outer_root is None else like(metric.outer_root, self._target)
        if self._outer is not None:
            weighted = adjoint(self._outer) @ weighted
        single = is_single(matrix)
        self._tall = weighted.shape[0] > weighted.shape[1]
        factor = left_factor(adjoint(weighted) if self._tall else weighted, gram=single)
        self.values: np.ndarray = factor.values
        """The weighted singular values, descending."""
        self._vectors = factor.u
        noise = _NOISE[single] * float(self.values.max(initial=0.0))
        self._rank = max(int((self.values > noise).sum()), 1)

    @cached_property
    def tails(self) -> np.ndarray:
        """``tails[r]`` is the error of rank r; its length is one more than there are values."""
        return tails(self.values)

    @property
    def norm(self) -> float:
        """The weighted norm of the target."""
        return float(self.tails[0])

    def error(self, rank: int) -> float:
        """The weighted error of the best matrix of a rank."""
        return float(self.tails[min(self._checked(rank), len(self.values))])

    def cut(self, rank: int) -> Chain:
        """The best chain of legs (out, 1), (1, in) and bond ``rank``, in the library and dtype of the matrix.

        The factors are balanced: column i of the left and row i of the right one have the same norm. A rank beyond the
        weighted rank of the matrix is lowered to that.

        Raises:
            MPOError: the rank is no positive whole number, or above both sides.
        """
        rank = min(self._checked(rank), self._rank)
        xp = namespace(self._target)
        u = self._vectors[:, :rank]
        if self._tall:
            u = self._target @ (like(self.metric.root, self._target) @ u)
            u = qr(u if self._outer is None else adjoint(self._outer) @ u)[0]
        if self._outer is None:
            left, right = u, adjoint(u) @ self._target
        else:
            right = (adjoint(u) @ adjoint(self._outer)) @ self._target
            second = like(self.metric.second, right)
            left = self._target @ (second @ adjoint(right))
            # K^T left is U times these squares, up to rounding; measured, they fit the vectors that QR turned.
            left = left / xp.sum((adjoint(self._outer) @ left) * u, axis=0)[None, :]
        left, right = _balanced(left, right)
        cores = (xp.reshape(left, (1, *left.shape[:1], 1, rank)), xp.reshape(right, (rank, 1, right.shape[1], 1)))
        return Chain(tuple(restored(core, self._like) for core in cores))

    def fitted(self, rank: int, kind: type[ChainT]) -> tuple[ChainT, FitReport]:
        """:meth:`cut` as a chain of some class, and a report with the error of what was stored."""
        chain = self.cut(rank)
        error = self.metric.weighed(self._target - dense(wide_chain(chain).cores))
        floor = float_floor(chain.dtype, len(chain), self.norm)
        found = (self.error(rank),)
        return kind(chain.cores), FitReport(error, self.norm, found, True, chain.bonds, floor, self.metric.name)

    def _checked(self, rank: Any) -> int:
        number, most = whole_number(rank), min(self._target.shape)
        if number is None or not 1 <= number <= most:
            raise MPOError(f"rank={rank!r} must be a whole number from 1 to {most}, the shorter side of the matrix")
        return number


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    """The same product with ``|left[:, i]| == |right[i, :]|``."""
    xp = namespace(left)
    norms = [xp.linalg.vector_norm(left, axis=0), xp.linalg.vector_norm(right, axis=1)]
    # A column or row of zeros has nothing to balance.
    usable = (norms[0] > 0) & (norms[1] > 0)
    one = xp.asarray(1.0, dtype=left.dtype, device=array_api_compat.device(left))
    ratio = xp.sqrt(xp.where(usable, norms[1], one) / xp.where(usable, norms[0], one))
    return left * ratio[None, :], right / ratio[:, None]
