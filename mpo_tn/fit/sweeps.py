"""Variational fits: the cores that come closest to a target, one or two sites at a time.

Every update is the exact solution of a linear least-squares problem, so the error never increases. With the
orthogonality centre on the updated sites that problem is a projection of the target, and there is nothing to invert:
``|target - chain|**2 = |target|**2 - |projection|**2 + |projection - core|**2``.

In a metric, ``tr(G D S D^T)`` with ``D = target - chain``, one place is another, the local problem: the isometries do
not make it a projection there. :class:`~mpo_tn.fit.targets.MetricTarget` improves the core that is there and measures
in the metric, and goes through the one-site sweeps unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import array_api_compat
import numpy as np

from mpo_tn.chains.canonical import (
    ChainT,
    centred,
    check_cores,
    checked_site,
    moved,
    shift_left,
    shift_right,
    split_left,
    split_right,
    stored,
    wide_chain,
)
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, lost, unit
from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.fit.metric import Metric
from mpo_tn.fit.product import ProductTarget
from mpo_tn.fit.targets import FROBENIUS, Target, target_of
from mpo_tn.linalg import (
    Array,
    adjoint,
    eps,
    frobenius_norm,
    left_factor,
    namespace,
    restored,
    tails,
    times_power_of_two,
    widen,
)
from mpo_tn.truncate.rounding import compress
from mpo_tn.truncate.spectra import float_floor
from mpo_tn.truncation import Truncation

_STEPS = 30
"""How often a core that is solved for in a metric is improved before it is taken for the best."""

_STANDS_STILL = 1e-10
"""The relative change of a core from which on it is."""


@dataclass(frozen=True)
class FitReport:
    """What a fit did, in the norm that ``metric`` names.

    Attributes:
        error: ``|target - result|`` of what was returned, storage dtype included; measured on the difference itself.
        norm: ``|target|``.
        errors: the error of the start, then after every sweep, before rounding to the storage dtype. Not increasing, up
            to ``floor``.
        converged: whether the last sweep gained less than the fraction ``tol`` of the error.
        bonds: the bonds of the result.
        floor: what rounding and the storage dtype add, :func:`mpo_tn.truncate.float_floor`.
        metric: the norm that all of these are in: ``"frobenius"``, or what :attr:`Metric.name` says.
    """

    error: float
    norm: float
    errors: tuple[float, ...]
    converged: bool
    bonds: tuple[int, ...]
    floor: float
    metric: str = FROBENIUS

    @property
    def rel_error(self) -> float:
        """``error / norm``; 0 for a zero target."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def sweeps(self) -> int:
        """How many sweeps were made, each to the last site and back."""
        return len(self.errors) - 1

    def __str__(self) -> str:
        end = "converged" if self.converged else "not converged"
        norm = "the norm" if self.metric == FROBENIUS else f"the norm in the metric: {self.metric}"
        return f"error = {self.error:.6g} ({self.rel_error:.4%} of {norm}) after {self.sweeps} sweeps, {end}"


FitCallback = Callable[[int, int, Chain], object]
"""Called after every local update with the sweep, the first site updated and the chain, in double precision."""


def fit(
    target: Array | Chain | ProductTarget,
    start: ChainT,
    *,
    sites: int = 1,
    sweeps: int = 20,
    tol: float = 1e-4,
    max_bond: int | None = None,
    callback: FitCallback | None = None,
    metric: Metric | None = None,
) -> tuple[ChainT, FitReport]:
    """Fit a chain to a target by alternating least squares. See :meth:`mpo_tn.MPO.fit`."""
    width, sweeps = _options(sites, sweeps, tol, max_bond)
    if metric is not None and width == 2:
        raise MPOError("sites=2 with a metric: a metric weighs one site at a time, use sites=1")
    goal = target if isinstance(target, ProductTarget) else target_of(target, start, metric)
    check_cores(start)
    begun = start if max_bond is None else compress(wide_chain(start), Truncation(max_bond=max_bond))[0]
    cores, exponent = centred(begun, 0)
    width = min(width, len(start))
    search = _Search(goal, start.with_cores(cores, (0, 0)), exponent, width, max_bond, eps(start.cores[0]), callback)
    floor = float_floor(start.dtype, len(start), goal.norm)
    errors = [search.error()]
    converged = False
    while len(errors) <= sweeps and not converged:
        search.sweep(len(errors) - 1)
        errors.append(search.error())
        converged = errors[-2] - errors[-1] <= tol * errors[-2] or errors[-1] <= floor
    center = start.sites.center
    cores, exponent = moved(search.cores, search.exponent, (0, 0), center)
    result, _ = stored(start.with_cores(cores, (center, center)), start.cores[0], exponent)
    error = goal.error([widen(core) for core in result.cores])
    return result, FitReport(error, goal.norm, tuple(errors), converged, result.bonds, floor, goal.metric)


def refit(chain: ChainT, k: int, target: Array | Chain, *, metric: Metric | None = None) -> tuple[ChainT, FitReport]:
    """The best core ``k`` for the other cores as they are. See :meth:`mpo_tn.MPO.refit`."""
    site = checked_site(chain, k, "k")
    check_cores(chain)
    goal = target_of(target, chain, metric)
    cores = [widen(core) for core in chain.cores]
    cutoff = eps(chain.cores[0])
    core = best_core(goal, cores, site, cutoff)
    before = goal.error(cores)
    cores[site] = core.array
    with np.errstate(over="ignore", invalid="ignore"):
        new = restored(times_power_of_two(core.array, core.exponent), chain.cores[site])
    if not math.isfinite(frobenius_norm(new)) or lost(core.array, core.exponent, new) > 0:
        beyond = "beyond" if core.exponent > 0 else "below"
        raise MPOError(
            f"the norm of the best core {site}, {core.size()}, is {beyond} the range of {chain.dtype}: scale the other "
            "cores, or the target"
        )
    low, high = chain.canonical_interval
    kept = (*chain.cores[:site], new, *chain.cores[site + 1 :])
    result = chain.with_cores(kept, (min(low, site), max(high, site)))
    errors = (before, goal.error(cores, core.exponent))
    error = goal.error([widen(part) for part in result.cores])
    floor = float_floor(chain.dtype, len(chain), goal.norm)
    return result, FitReport(error, goal.norm, errors, True, result.bonds, floor, goal.metric)


def best_core(goal: Target, cores: list[Array], site: int, cutoff: float, steps: int = _STEPS) -> Scaled:
    """The best core at a site for the others as they are, in double precision; in a metric, after so many steps."""
    left, right = goal.edge(), goal.end()
    carry = back = None
    for j in range(site):
        here = unit(cores[j]) if carry is None else _joined(carry, cores[j])
        q, r = split_right(here.array)
        carry, left = Scaled(r, here.exponent), goal.advance_left(left, q, j)
    for j in range(len(cores) - 1, site, -1):
        here = unit(cores[j]) if back is None else _joined(cores[j], back)
        r, q = split_left(here.array)
        back, right = Scaled(r, here.exponent), goal.advance_right(right, q, j)
    # The other cores are isometries times carry and back, so the least-squares core is a projection and two inverses;
    # where the others have dependent columns, the one of least norm.
    core = unit(cores[site]) if carry is None else _joined(carry, cores[site])
    core = core if back is None else _joined(core, back)
    for _ in range(steps if goal.metric != FROBENIUS else 1):
        before, core = core, goal.local(left, right, site, 1, core)
        change = core.plus(Scaled(-before.array, before.exponent)).size()
        if change.log <= math.log(_STANDS_STILL) + core.size().log:
            break
    core = core if carry is None else _joined(_pseudo_inverse(carry, cutoff), core)
    return core if back is None else _joined(core, _pseudo_inverse(back, cutoff))


def _joined(first: Scaled | Array, second: Scaled | Array) -> Scaled:
    """Two arrays, at least one a core, joined over the bond between them."""
    first, second = (part if isinstance(part, Scaled) else unit(part) for part in (first, second))
    joined = namespace(first.array).tensordot(first.array, second.array, axes=1)
    return unit(joined, first.exponent + second.exponent)


def _only_turns(cores: list[Array], k: int) -> bool:
    """Whether core k is square and all beyond it is, too: then all that it can do its neighbour can.

    The bond to the neighbour is full. Of two such cores side by side one is left to be improved.
    """
    sizes = [math.prod(core.shape[1:3]) for core in cores]
    left, right = (int(cores[k].shape[axis]) for axis in (0, 3))
    if left == math.prod(sizes[:k]):
        return k < len(cores) - 1 and right == left * sizes[k]
    return right == math.prod(sizes[k + 1 :]) and left == right * sizes[k]


class _Search:
    """Cores with the centre at site 0 between sweeps, and the environments on both sides of it."""

    def __init__(
        self,
        goal: Target,
        chain: Chain,
        exponent: int,
        width: int,
        max_bond: int | None,
        precision: float,
        callback: FitCallback | None,
    ) -> None:
        self.goal, self.width, self.max_bond, self.callback = goal, width, max_bond, callback
        self.template = chain
        # Of the core at the centre, which may be of any size while the chain is far from its target.
        self.exponent = exponent
        self.precision = precision
        self.cores: list[Array] = list(chain.cores)
        self.solved: list[int] = []
        n = len(self.cores)
        self.lefts: list[Array] = [goal.edge()] + [None] * n
        self.rights: list[Array] = [None] * n + [goal.end()]
        for k in range(n - 1, 0, -1):
            self.rights[k] = goal.advance_right(self.rights[k + 1], self.cores[k], k)

    def error(self) -> float:
        """How far the chain is from its target."""
        return self.goal.error(self.cores, self.exponent)

    def sweep(self, number: int) -> None:
        """Update every group of sites on the way to the last one, and again on the way back."""
        last = len(self.cores) - self.width
        for k in range(last + 1):
            self.update(number, k, rightwards=k < last)
        for k in range(last - 1, -1, -1):
            self.update(number, k, rightwards=False)

    def update(self, number: int, k: int, *, rightwards: bool) -> None:
        """Replace the sites from ``k`` by the best there is, and leave the centre where the next update wants it."""
        found = self.best(k)
        block, self.exponent = found.array, found.exponent
        if self.width == 2:
            self.cores[k], self.cores[k + 1] = self.divide(block, k, rightwards)
        else:
            self.cores[k] = block
        if self.callback is not None:
            # Before the centre moves on, which changes nothing but rounding.
            center = k if self.width == 1 or not rightwards else k + 1
            cores = list(self.cores)
            cores[center] = times_power_of_two(cores[center], self.exponent)
            self.callback(number, k, self.template.with_cores(cores, (center, center)))
        if rightwards:
            if self.width == 1:
                self.cores[k], self.cores[k + 1] = shift_right(block, self.cores[k + 1])
            self.lefts[k + 1] = self.goal.advance_left(self.lefts[k], self.cores[k], k)
        elif k + self.width > 1:
            moved = k + self.width - 1
            if self.width == 1:
                self.cores[k - 1], self.cores[k] = shift_left(self.cores[k - 1], block)
            self.rights[moved] = self.goal.advance_right(self.rights[moved + 1], self.cores[moved], moved)

    def best(self, k: int) -> Scaled:
        """The best block of the sites from ``k`` on."""
        left, right = self.lefts[k], self.rights[k + self.width]
        if self.width == 2:
            return self.goal.local(left, right, k, 2, None)
        now = Scaled(self.cores[k], self.exponent)
        if self.goal.metric != FROBENIUS and _only_turns(self.cores, k):
            return now
        if self.solved[-1:] == [k] and len(set(self.solved)) > 1:
            return now  # nothing else has changed since: at the turns of a sweep, and beside sites that only turn bonds
        self.solved.append(k)
        return self.goal.local(left, right, k, 1, now)

    def divide(self, block: Array, k: int, rightwards: bool) -> tuple[Array, Array]:
        """The best two cores for the block of sites k and k + 1, the centre in the second if ``rightwards``."""
        xp = namespace(block)
        left, out, in_, second_out, second_in, right = block.shape
        matrix = xp.reshape(block, (left * out * in_, second_out * second_in * right))
        factor = left_factor(matrix if rightwards else adjoint(matrix), gram=False)
        # Of the block, not of the target: far from it the block may be small, and is all there is.
        left_out = tails(factor.values)
        kept = max(int((left_out > self.precision * left_out[0]).sum()), 1)
        u = factor.u[:, : kept if self.max_bond is None else min(kept, self.max_bond)]
        first, second = (u, adjoint(u) @ matrix) if rightwards else (matrix @ u, adjoint(u))
        return (
            xp.reshape(first, (left, out, in_, u.shape[1])),
            xp.reshape(second, (u.shape[1], second_out, second_in, right)),
        )


def _options(sites: int, sweeps: int, tol: float, max_bond: int | None) -> tuple[int, int]:
    width, number = whole_number(sites), whole_number(sweeps)
    if width not in (1, 2):
        raise MPOError(f"sites={sites!r} must be 1 or 2: how many neighbouring cores are fitted at a time")
    if number is None or number < 0:
        raise MPOError(f"sweeps={sweeps!r} must be a whole number of at least 0")
    if not (is_real(tol) and 0 <= tol < 1):
        raise MPOError(f"tol={tol!r} must be at least 0 and below 1: the gain of a sweep as a fraction of the error")
    if max_bond is not None and width == 1:
        raise MPOError(f"max_bond={max_bond!r} with sites=1: one site at a time keeps the bonds, use sites=2")
    return width, number


def _pseudo_inverse(matrix: Scaled, precision: float) -> Scaled:
    """The pseudo-inverse; singular values that the storage dtype cannot tell from zero count as zero."""
    factor = left_factor(matrix.array, gram=False)
    xp = namespace(matrix.array)
    rank = int((factor.values > max(matrix.array.shape) * precision * factor.values.max(initial=0.0)).sum())
    u = factor.u[:, :rank]
    scaled = adjoint(u) @ matrix.array  # S V^H
    values = xp.asarray(factor.values[:rank], dtype=scaled.dtype, device=array_api_compat.device(scaled))[:, None]
    return Scaled(adjoint(scaled / values) @ (adjoint(u) / values), -matrix.exponent)
