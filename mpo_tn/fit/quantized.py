"""Chains with cores in integers of few bits: rounded with feedback, and the other cores fitted to what rounding did."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from mpo_tn.chains.algebra import one
from mpo_tn.chains.canonical import ChainT, canonicalize, wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.fit.local_problem import column_moment, reduced_rows
from mpo_tn.fit.metric import Metric, like, refuse_complex
from mpo_tn.fit.sweeps import FitReport, best_core
from mpo_tn.fit.targets import Target, target_of, to_right
from mpo_tn.linalg import Array, adjoint, eps, namespace, restored, times_power_of_two, widen
from mpo_tn.truncate.quantize import GROUP, Integers, check_bits, quantize
from mpo_tn.truncate.spectra import float_floor

_REFIT_STEPS = 1
"""How often a core that cannot be solved for directly is improved when a neighbour has been rounded."""


def quantize_chain(
    chain: ChainT,
    matrix: Array,
    bits: Sequence[int | None],
    group: int = GROUP,
    metric: Metric | None = None,
    *,
    rounds: int = 2,
) -> tuple[tuple[Integers | Array, ...], ChainT, FitReport]:
    """Store some cores of a chain as integers, and fit the others to what that did.

    Before, the bonds are turned so that all sites but the last are left-isometric: the columns of a core, which share
    scales, are then of one size, and what they weigh is in the rows of the next core, which have scales of their own.
    Then, the one with the fewest columns first, each core is rounded with error feedback in the metric of its columns,
    and its neighbours, if they are not rounded yet or never will be, become the best there are for it. Later rounds
    take every core again, as the best for all others as they are; of all rounds the best is kept.

    Args:
        chain: n cores, near an optimum for the matrix in the metric.
        matrix: W, (out, in), real, of the library, dtype and device of the chain.
        bits: n entries, 2 to 8, or ``None`` for a core that stays as it is stored.
        group: columns (in, right) of a core (left out, in right) that share a scale.
        metric: of the layer of the matrix; ``None`` for Frobenius.
        rounds: how often every core is rounded, at least 1.

    Returns:
        The cores, :class:`~mpo_tn.truncate.quantize.Integers` (NumPy for JAX) or arrays; the chain they stand for; and
        a report, whose ``errors`` are those of the chain as it was and of the best after each round.

    Guarantee (quantized-exact): ``error`` is measured on the chain that is returned, and its cores are exactly what the
    integers stand for, in every dtype of 32 bits or more.

    Raises:
        MPOError: bits that are not one for each core or out of range, no bits at all, rounds below 1, complex cores,
            and as for :meth:`mpo_tn.MPO.refit` and :func:`mpo_tn.quantize`.

    Cost: a fit of one core for each core that is rounded, times those that are refitted for it.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Metric
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((32, 48)), rng.standard_normal((48, 100))
    >>> metric = Metric(x @ x.T)
    >>> start, report = MPO.low_rank_fit(w, 24, metric)
    >>> cores, mpo, found = quantize_chain(start, w, (None, 4), metric=metric)
    >>> cores[1].values.shape, report.error < found.error < 1.1 * report.error
    ((24, 48), True)
    """
    number = whole_number(rounds)
    if number is None or number < 1:
        raise MPOError(f"rounds={rounds!r} must be a whole number of at least 1")
    bits = _checked_bits(bits, group, len(chain))
    refuse_complex(chain.cores[0], "the chain")
    goal = target_of(matrix, chain, metric)
    start = canonicalize(wide_chain(chain), len(chain) - 1)
    pair = _Pair(matrix, metric) if chain.sites.is_low_rank else None
    work = _Rounding(goal, start, bits, group, metric, eps(chain.cores[0]), pair)
    errors = [goal.error(list(wide_chain(chain).cores))]
    best: tuple[float, tuple[Integers | Array, ...]] | None = None
    for turn in range(number):
        work.turn(first=turn == 0)
        cores = tuple(
            restored(core, chain.cores[k]) if kept is None else kept
            for k, (core, kept) in enumerate(zip(work.cores, work.integers, strict=True))
        )
        error = goal.error(list(wide_chain(_dequantized(cores, chain)).cores))
        if best is None or error < best[0]:
            best = error, cores
        errors.append(best[0])
    assert best is not None
    error, cores = best
    result = _dequantized(cores, chain)
    floor = float_floor(chain.dtype, len(chain), goal.norm)
    return cores, result, FitReport(error, goal.norm, tuple(errors), True, result.bonds, floor, goal.metric)


class _Rounding:
    """Cores in double precision, and the integers of those that have been rounded."""

    def __init__(
        self, goal: Target, chain: Chain, bits: list[int | None], group: int, metric: Metric | None, precision: float,
        pair: _Pair | None,
    ) -> None:  # fmt: skip
        self.pair = pair
        self.goal, self.bits, self.group, self.precision = goal, bits, group, precision
        self.cores: list[Array] = list(chain.cores)
        self.integers: list[Integers | None] = [None] * len(bits)
        xp, first = namespace(self.cores[0]), self.cores[0]
        size = chain.shape[1]
        identity = xp.eye(size, dtype=first.dtype, device=array_api_compat.device(first))
        self.second = identity if metric is None else like(metric.second, first)
        # What is rounded last has nothing to make up for it but its own feedback, which is best over many columns.
        shapes = [core.shape for core in self.cores]
        columns = [(shape[2] * shape[3], shape[0] * shape[1]) for shape in shapes]
        self.order = sorted((k for k, number in enumerate(bits) if number), key=lambda k: (columns[k], k))
        self.free = [k for k, number in enumerate(bits) if not number]

    def turn(self, *, first: bool) -> None:
        """Round every core once."""
        for place, k in enumerate(self.order):
            if not first:
                self.refit(k)
            self.round(k)
            # In the first turn, those that wait to be rounded as well.
            waiting = [*self.order[place + 1 :], *self.free] if first else self.free
            for other in (k - 1, k + 1):
                if other in waiting:
                    self.refit(other)

    def refit(self, k: int) -> None:
        """The best core for the others as they are."""
        if self.pair is not None:
            self.cores[k] = self.pair.best(self.cores, k)
            return
        core = best_core(self.goal, self.cores, k, self.precision, _REFIT_STEPS)
        self.cores[k] = times_power_of_two(core.array, core.exponent)

    def round(self, k: int) -> None:
        """Put integers in the place of a core."""
        core, number = self.cores[k], self.bits[k]
        assert number is not None
        xp = namespace(core)
        left, out, in_, right = core.shape
        columns = column_moment(*self.frames(k), self.second)
        found = quantize(xp.reshape(core, (left * out, in_ * right)), number, self.group, metric=columns)
        self.integers[k] = found
        self.cores[k] = xp.reshape(found.matrix(), core.shape)

    def frames(self, k: int) -> tuple[Array, Array]:
        """What is left of a core, (out, in, bond), and right of it, (bond, out, in)."""
        xp = namespace(self.cores[0])
        left = right = one(self.cores[0])[None, :, :]
        for core in self.cores[:k]:
            joined = xp.permute_dims(to_right(left, core), (0, 2, 1, 3, 4))
            shape = (left.shape[0] * core.shape[1], left.shape[1] * core.shape[2], core.shape[3])
            left = xp.reshape(joined, shape)
        for core in reversed(self.cores[k + 1 :]):
            joined = xp.permute_dims(to_right(core, right), (0, 1, 3, 2, 4))
            shape = (core.shape[0], core.shape[1] * right.shape[1], core.shape[2] * right.shape[2])
            right = xp.reshape(joined, shape)
        return left, reduced_rows(right)


class _Pair:
    """The two factors A (out, r) and B (r, in) of low rank: either is best for the other in closed form.

    ``A = T S B^T (B S B^T)^-1``, whatever G is, and ``B = (A^T G A)^-1 A^T G T``, whatever S is.
    """

    def __init__(self, matrix: Array, metric: Metric | None) -> None:
        self.target = widen(matrix) if metric is None else metric.target(matrix)
        self.second = None if metric is None else like(metric.second, self.target)
        outer = None if metric is None else metric.outer
        self.outer = None if outer is None else like(outer, self.target)
        self.weighted = self.target if self.second is None else self.target @ self.second

    def best(self, cores: list[Array], k: int) -> Array:
        """The best core ``k`` for the other one."""
        xp = namespace(self.target)
        if k == 0:
            b = cores[1][:, 0, :, 0]
            normal = b @ adjoint(b if self.second is None else b @ self.second)
            a = adjoint(_solved(normal, adjoint(self.weighted @ adjoint(b))))
            return xp.reshape(a, (1, a.shape[0], 1, a.shape[1]))
        a = cores[0][0, :, 0, :]
        left = adjoint(a) if self.outer is None else adjoint(a) @ self.outer
        b = _solved(left @ a, left @ self.target)
        return xp.reshape(b, (b.shape[0], 1, b.shape[1], 1))


def _solved(normal: Array, right: Array) -> Array:
    """The solution of normal equations; directions that hold nothing are damped away."""
    xp = namespace(normal)
    ridge = 1e-10 * float(xp.mean(xp.linalg.diagonal(normal))) or 1.0
    eye = xp.eye(normal.shape[0], dtype=normal.dtype, device=array_api_compat.device(normal))
    return xp.linalg.solve(normal + ridge * eye, right)


def _dequantized(cores: tuple[Integers | Array, ...], chain: ChainT) -> ChainT:
    """The chain that cores stand for, in the library and dtype of another."""
    arrays: list[Array] = []
    for k, core in enumerate(cores):
        if not isinstance(core, Integers):
            arrays.append(core)
            continue
        left = 1 if k == 0 else int(arrays[-1].shape[3])
        out, in_ = list(chain.sites)[k]
        matrix = core.matrix()
        shape = (left, out, in_, matrix.shape[1] // in_)
        arrays.append(restored(namespace(matrix).reshape(matrix, shape), chain.cores[k]))
    return chain.with_cores(arrays, None)


def _checked_bits(bits: Sequence[int | None], group: int, sites: int) -> list[int | None]:
    try:
        given = list(bits)
    except TypeError:
        given = []
    if len(given) != sites or not any(number is not None for number in given):
        raise MPOError(
            f"bits={bits!r} must have one entry for each of {sites} cores, None where one stays; not all None"
        )
    return [None if number is None else check_bits(number, group)[0] for number in given]
