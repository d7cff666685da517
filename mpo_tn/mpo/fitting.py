"""What brings an MPO closer to a matrix: fits, one core for given others, and the best of low rank in a metric."""

from __future__ import annotations

from typing import Self

from mpo_tn.chains.chain import Chain
from mpo_tn.fit.activation import LowRankFits
from mpo_tn.fit.metric import Metric
from mpo_tn.fit.sweeps import FitCallback, FitReport, fit, refit
from mpo_tn.linalg import Array


class Fitting(Chain):
    """The verbs that fit."""

    @classmethod
    def low_rank_fit(cls, matrix: Array, rank: int, metric: Metric) -> tuple[Self, FitReport]:
        """The best matrix of a rank in a metric, as the two-site MPO with legs (out, 1), (1, in).

        For many ranks of one matrix use :class:`mpo_tn.LowRankFits`, of which this is one cut.

        Args:
            matrix: W, (out, in), real; NumPy, torch or JAX.
            rank: at least 1; one beyond the weighted rank of the matrix is lowered to that.
            metric: of its layer.

        Raises:
            MPOError: as for :class:`mpo_tn.LowRankFits`.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Metric
        >>> w = np.diag([3.0, 2.0, 1.0])
        >>> mpo, report = MPO.low_rank_fit(w, 2, Metric(np.diag([1.0, 4.0, 25.0])))
        >>> mpo.bonds, round(report.error, 12)
        ((2,), 3.0)
        >>> print(report)
        error = 3 (42.4264% of the norm in the metric: activation) after 0 sweeps, converged
        """
        return LowRankFits(matrix, metric).fitted(rank, cls)

    def fit(
        self,
        target: Array | Chain,
        *,
        sites: int = 1,
        sweeps: int = 20,
        tol: float = 1e-4,
        max_bond: int | None = None,
        callback: FitCallback | None = None,
        metric: Metric | None = None,
    ) -> tuple[Self, FitReport]:
        """Bring this MPO closer to a target by alternating least squares, in the Frobenius norm or in a metric.

        Args:
            target: a matrix (out, in), or an MPO with the same legs and any bonds, which is never made dense.
            sites: 1 improves one core after the other and keeps the bonds; 2 improves two neighbours at a time and
                divides them again, by which bonds grow up to ``max_bond`` and shrink where nothing is left to keep.
            sweeps: the most sweeps, each to the last site and back.
            tol: stop when a sweep lowers the error by less than this fraction of it.
            max_bond: the widest bond for ``sites=2``; without it bonds grow until the target is met. If this MPO has
                wider ones, it is first rounded to it.
            callback: called after every update with the sweep, the first site updated and the chain.
            metric: of the layer that the matrix is in: its error, not that of the entries, is made small. The target is
                a matrix then, and one site is improved at a time. Most is gained in the first two sweeps.

        Returns:
            The fitted MPO, in this one's dtype, and a :class:`FitReport` with the exact error.

        Guarantee (fit-never-worse): with the centre on the updated cores the best ones are a projection of the target,
        so no update increases the error, up to ``4 eps(float64) sqrt(size)`` times the norms of target and start and,
        for two sites, the dropping of singular values below ``eps(dtype) * norm``.
        Guarantee (fit-from-truncation): started from :meth:`from_matrix` the result is at least as good, but for what
        storing it in the dtype rounds.
        Guarantee (metric-fit): in a metric no sweep increases the weighted error, up to ``4 eps(float64) sqrt(size)``
        times the weighted norms of target and start, and ``error`` is the weighted norm of the difference itself.
        It is a local minimum, not always the best, and a bond cannot grow past a site whose legs are both 1 (Holtz,
        Rohwedder, Schneider, SIAM J. Sci. Comput. 34, 2012).

        Cost of a sweep: about ``4 n size d`` flops for a dense target, ``8 n p d a (d + a)`` for one with bonds a. In a
        metric up to ``50 size in`` for every core that is large, in single precision for data of 32 bits or fewer.

        Raises:
            MPOError: another shape, legs, library, dtype or device, entries that are not finite, or bad options.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites, Truncation
        >>> w = np.random.default_rng(0).standard_normal((27, 27))
        >>> start, report = MPO.from_matrix(w, Sites.balanced(27, 27, n=3), Truncation(max_bond=4))
        >>> better, fitted = start.fit(w)
        >>> better.bonds, report.error > fitted.error
        ((4, 4), True)
        >>> bool(abs(np.linalg.norm(w - better.to_matrix()) - fitted.error) < 1e-12)
        True
        """
        return fit(
            target, self, sites=sites, sweeps=sweeps, tol=tol, max_bond=max_bond, callback=callback, metric=metric
        )

    def refit(self, k: int, target: Array | Chain, *, metric: Metric | None = None) -> tuple[Self, FitReport]:
        """The best core ``k`` while all others stay as they are, bit for bit.

        For the central tensor and given auxiliary ones this is ``k = sites.center``. The core is the least-squares
        solution, of least norm where the other cores leave it open, by orthogonal factorisations of the others and
        never by normal equations. Legs and bonds may be of any size.

        Guarantee (best-core): no other core ``k`` gives a smaller Frobenius error, up to
        ``4 eps(dtype) * sqrt(size) * norm`` times the condition number of the other cores in a chain that is not
        canonical. Singular values of the others below ``eps(dtype)`` of the largest count as zero.
        Guarantee (metric-refit): in a metric no other core ``k`` gives a smaller weighted error, up to ``1e-6`` of the
        weighted norm; what the other cores or the metric leave open stays nearly as it was.
        Cost: half a sweep of :meth:`fit`; in a metric as much as a core there takes, repeated until it stands still.

        Raises:
            MPOError: ``k`` is not a site, and as for :meth:`fit`.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites, Truncation
        >>> w = np.random.default_rng(0).standard_normal((8, 8))
        >>> mpo, _ = MPO.from_matrix(w, Sites.balanced(8, 8, n=3), Truncation(max_bond=2))
        >>> again, report = mpo.refit(1, w)
        >>> again.cores[0] is mpo.cores[0], report.errors[1] <= report.errors[0] + 1e-14
        (True, True)
        """
        return refit(self, k, target, metric=metric)
