"""Dense matrix to chain: peel both ends inward, the widest bond last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpo_tn import bounds
from mpo_tn._canonical import stored
from mpo_tn._factor import Factor, Method, Request, checked_method, factor
from mpo_tn.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    check_matrix,
    dtype_name,
    eps,
    frobenius_norm,
    interleave,
    is_half,
    namespace,
    tails,
    times_power_of_two,
    widen,
)
from mpo_tn.sites import Sites, checked_sites
from mpo_tn.truncation import BondReport, Report, Truncation, checked_truncation

BondCallback = Callable[[int, BondReport], object]
"""Called after each bond with its index and what happened there, in the order of the sweep."""


def decompose(
    matrix: Array,
    sites: Sites,
    truncation: Truncation,
    *,
    spectra: bool = False,
    method: Method = "auto",
    callback: BondCallback | None = None,
) -> tuple[Chain, Report]:
    """Decompose a dense matrix. See :meth:`mpo_tn.MPO.from_matrix`, which says what is guaranteed."""
    matrix = check_matrix(matrix)
    sites = checked_sites(sites)
    truncation = checked_truncation(truncation)
    chosen = checked_method(method)
    if sites.shape != tuple(matrix.shape):
        raise MPOError(
            f"legs out={sites.out}, in_={sites.in_} multiply to {sites.shape} and the matrix is "
            f"{tuple(matrix.shape)}: legs must multiply exactly, see Sites.balanced"
        )
    caps = truncation.caps(len(sites) - 1)
    norm = frobenius_norm(matrix)
    budget = Budget(truncation.budget(norm, eps(matrix), dtype_name(matrix)), len(sites) - 1)

    # A power of two, so that scaling is exact; it keeps squares of huge or tiny entries within range.
    if norm == math.inf:
        raise MPOError(
            f"the norm of the matrix of shape {tuple(matrix.shape)} overflows double precision: scale it down"
        )
    exponent = binary_exponent(norm)
    scale = 2.0**exponent
    tensor = interleave(times_power_of_two(widen(matrix), -exponent), sites.out, sites.in_)
    budget.scale(scale)
    single = dtype_name(matrix) not in ("float64", "complex128")
    sweep = Sweep(caps, budget, chosen, single, scale, callback)
    cores = _peel(tensor, sites, sweep)

    center = sites.center
    cores[center] = cores[center] * scale
    chain = stored(Chain(tuple(cores), (center, center)), matrix.dtype)

    if is_half(matrix):
        sweep.notes.append(f"computed in float64, stored as {dtype_name(matrix)}")
    if spectra:
        original = bounds.unfolding_spectra(matrix, sites)
        sweep.steps = [
            replace(step, tail=float(tails(values)[step.kept]))
            for step, values in zip(sweep.steps, original, strict=True)
        ]
    return chain, sweep.report(norm, eps(matrix), truncation)


@dataclass
class Budget:
    """The total error still to be spent and the bonds that may still spend it."""

    error: float
    bonds_left: int

    def scale(self, unit: float) -> None:
        """Measure in multiples of ``unit`` from now on."""
        self.error /= unit

    @property
    def share(self) -> float:
        """What the next bond may cut; infinite where only bonds are capped."""
        return self.error / math.sqrt(self.bonds_left)

    def keep(self, tail: np.ndarray, cap: int | None) -> int:
        """How many singular values the next bond keeps: its share of the budget, then its cap, at least one.

        ``tail[r]`` is the norm of what keeping ``r`` values cuts, see :func:`mpo_tn.linalg.tails`.
        """
        rank = len(tail) - 1
        if math.isfinite(self.error):
            # An approximate method may know the first values only.
            rank = min(rank, int((tail > self.share).sum()))
        if cap is not None:
            rank = min(rank, cap)
        rank = max(rank, 1)
        cut = float(tail[rank])
        if math.isfinite(self.error):
            self.error = math.sqrt(max(self.error**2 - cut**2, 0.0))
        self.bonds_left -= 1
        return rank


class Sweep:
    """What the steps of one truncating sweep share, and what they leave behind: reports and notes.

    Args:
        caps: the largest number of columns at each bond.
        budget: the error still to be spent, in multiples of ``scale``.
        method: see :func:`mpo_tn._factor.factor`.
        single: the data had 32 bits or fewer.
        scale: what matrices were divided by.
        callback: see :data:`BondCallback`.
    """

    def __init__(
        self,
        caps: tuple[int | None, ...],
        budget: Budget,
        method: Method,
        single: bool,
        scale: float,
        callback: BondCallback | None,
    ) -> None:
        self.caps = caps
        self.budget = budget
        self.method: Method = method
        self.single = single
        self.scale = scale
        self.callback = callback
        self.steps: list[BondReport] = [BondReport(1, 1, 0.0)] * len(caps)
        self.notes: list[str] = []
        self.optimal = True

    def cut(self, group: Array, bond: int) -> tuple[Array, Factor]:
        """The basis (m, kept) that the budget and the cap leave of ``group`` (m, k), and where it comes from."""
        found = factor(group, self.method, Request(self.caps[bond], self.budget.share), single=self.single)
        if found.note:
            self.notes.append(f"bond {bond}: {found.note}")
        kept = self.budget.keep(found.tail, self.caps[bond])
        missed = float(found.tail[kept])
        self.optimal = self.optimal and (found.optimal or missed == 0.0)
        self.steps[bond] = BondReport(kept, found.available, missed * self.scale, method=found.method)
        if self.callback is not None:
            self.callback(bond, self.steps[bond])
        return found.basis(kept), found

    def report(self, norm: float, precision: float, truncation: Truncation) -> Report:
        """See :func:`sweep_report`; without bounds where a bond was not cut in the best way."""
        report = sweep_report(self.steps, norm, len(self.caps) + 1, precision, truncation, self.notes)
        return report if self.optimal else replace(report, bound=None, lower_bound=None)


def _peel(tensor: Array, sites: Sites, sweep: Sweep) -> list[Array]:
    """Split sites off both ends until the centre is left.

    ::

        left --[ l  ...  c  ...  r ]-- right      peel l:  U_l -- left' --[ l+1 ... c ... r ]-- right

    Every step is an orthogonal projection, left ones nested, right ones nested, and left commutes with right, so the
    squared errors of the steps add up to the squared total error.
    """
    xp = namespace(tensor)
    sizes = sites.sizes
    center = sites.center
    low, high = 0, len(sites) - 1
    left = right = 1
    cores: list[Array] = [None] * len(sites)
    while low < high:
        from_left = low < center and (high == center or left * sizes[low] <= right * sizes[high])
        if from_left:
            group = xp.reshape(tensor, (left * sizes[low], -1))
            u, found = sweep.cut(group, low)
            cores[low] = xp.reshape(u, (left, sites.out[low], sites.in_[low], u.shape[1]))
            tensor, left, low = found.project(u, group), u.shape[1], low + 1
        else:
            group = xp.reshape(tensor, (-1, sizes[high] * right))
            u, found = sweep.cut(adjoint(group), high - 1)
            v = adjoint(u)
            cores[high] = xp.reshape(v, (v.shape[0], sites.out[high], sites.in_[high], right))
            tensor, right, high = adjoint(found.project(u, adjoint(group))), v.shape[0], high - 1
    cores[center] = xp.reshape(tensor, (left, sites.out[center], sites.in_[center], right))
    return cores


def sweep_report(
    steps: list[BondReport], norm: float, n: int, precision: float, truncation: Truncation, notes: list[str]
) -> Report:
    """The report of one truncating sweep, whose squared errors add up.

    Raises:
        MPOError: ``truncation.strict`` and the tolerance was missed.
    """
    error = math.hypot(*(step.discarded_norm for step in steps))
    floor = precision * math.sqrt(n) * norm
    allowed = truncation.budget(norm, 0.0, "")
    met = error <= allowed * (1 + 1e-12)
    if not met and truncation.strict:
        raise MPOError(
            f"max_bond={truncation.max_bond} leaves an error of {error:.6g}, above the {allowed:.6g} allowed: raise "
            "max_bond or the tolerance, or use strict=False to accept it"
        )
    measured = [step.discarded_norm if step.tail is None else step.tail for step in steps]
    return Report(
        error=error,
        norm=norm,
        bonds=tuple(steps),
        # In exact arithmetic the error lies between the two; rounding of what was measured must not say otherwise.
        bound=max(math.hypot(*measured), error),
        lower_bound=min(max(measured, default=0.0), error),
        floor=floor,
        tolerance_met=met,
        notes=tuple(notes),
    )
