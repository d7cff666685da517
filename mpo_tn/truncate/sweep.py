"""What the steps of one truncating sweep share: the budget, the reports, the order of peeling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    namespace,
)
from mpo_tn.sites import Sites
from mpo_tn.truncate.basis import Factor, Method, Request, factor
from mpo_tn.truncate.spectra import Spectra, float_floor
from mpo_tn.truncation import BondReport, Report, Truncation

LIGHT_SIZE, LIGHT_NORMS = 2**16, (1e-25, 1e25)
"""Single precision matrices of at least so many entries, and of these norms, are multiplied in single precision: what
rounding adds stays far below the guarantee, which grows with the square root of the size. Factorisations are double all
the same."""

LIGHT_SITES = 16
"""Chains of more sites are not: what rounding adds is added at every site."""

BondCallback = Callable[[int, BondReport], object]
"""Called after each bond with its index and what happened there, in the order of the sweep."""


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
        rank = self.rank(tail, cap)
        self.spend(float(tail[rank]))
        return rank

    def rank(self, tail: np.ndarray, cap: int | None) -> int:
        """What :meth:`keep` would keep; nothing is spent."""
        rank = len(tail) - 1
        if math.isfinite(self.error):
            # An approximate method may know the first values only.
            rank = min(rank, int((tail > self.share).sum()))
        if cap is not None:
            rank = min(rank, cap)
        return max(rank, 1)

    def spend(self, cut: float) -> None:
        """Take what one bond cut out of the budget."""
        if math.isfinite(self.error):
            self.error = math.sqrt(max(self.error**2 - cut**2, 0.0))
        self.bonds_left -= 1


class Sweep:
    """What the steps of one truncating sweep share, and what they leave behind: reports and notes.

    Args:
        caps: the largest number of columns at each bond.
        budget: the error still to be spent, in multiples of ``scale``.
        method: see :func:`mpo_tn.truncate.basis.factor`.
        single: the data had 32 bits or fewer.
        scale: what matrices were divided by.
        callback: see :data:`BondCallback`.
        best: see :class:`mpo_tn.truncate.basis.Request`.
    """

    def __init__(
        self,
        caps: tuple[int | None, ...],
        budget: Budget,
        method: Method,
        single: bool,
        scale: float,
        callback: BondCallback | None,
        best: bool = False,
    ) -> None:
        self.caps = caps
        self.budget = budget
        self.method: Method = method
        self.single = single
        self.scale = scale
        self.callback = callback
        self.best = best
        self.steps: list[BondReport] = [BondReport(1, 1, 0.0)] * len(caps)
        self.notes: list[str] = []
        self.optimal = True

    def passes(self, shape: tuple[int, ...], bond: int) -> bool:
        """Whether nothing can be cut at a bond between so many rows and columns; if so it is reported as full."""
        rows, columns = shape
        cap = self.caps[bond]
        if rows > columns or math.isfinite(self.budget.error) or (cap is not None and cap < rows):
            return False
        self.budget.bonds_left -= 1
        self._record(bond, BondReport(rows, rows, 0.0, method="full"))
        return True

    def cut(self, group: Array, bond: int) -> tuple[Array, Array | None]:
        """The basis ``u`` (m, kept) that budget and cap leave of ``group`` (m, k), and ``u^H group`` if known."""
        return self.take(self.found(group, bond), bond)

    def found(self, group: Array, bond: int) -> Factor:
        """A basis for ``group`` (m, k), good enough for budget and cap."""
        request = Request(self.caps[bond], self.budget.share, self.best)
        return factor(group, self.method, request, single=self.single)

    def take(self, found: Factor, bond: int) -> tuple[Array, Array | None]:
        """What budget and cap leave of a basis, which is reported. See :meth:`cut`."""
        if found.note:
            self.notes.append(f"bond {bond}: {found.note}")
        kept = self.budget.keep(found.tail, self.caps[bond])
        missed = float(found.tail[kept])
        self.optimal = self.optimal and (found.optimal or missed == 0.0)
        self._record(bond, BondReport(kept, found.available, missed * self.scale, method=found.method))
        return found.basis(kept), None if found.image is None else found.image[:kept, :]

    def split(self, group: Array, bond: int) -> tuple[Array, Array]:
        """As :meth:`cut`, with ``u^H group`` in the dtype of ``group`` in any case."""
        u, image = self.cut(group, bond)
        xp = namespace(group)
        if image is None:
            return u, adjoint(xp.astype(u, group.dtype, copy=False)) @ group
        return u, xp.astype(image, group.dtype, copy=False)

    def _record(self, bond: int, step: BondReport) -> None:
        self.steps[bond] = step
        if self.callback is not None:
            self.callback(bond, step)

    def know(self, known: Spectra) -> None:
        """Add to every step what the spectra of the original say of it."""
        self.steps = [replace(step, tail=known.tail(k, step.kept)) for k, step in enumerate(self.steps)]

    def report(self, norm: float, precision: float, truncation: Truncation, lost: float) -> Report:
        """See :func:`sweep_report`; without bounds where a bond was not cut in the best way."""
        report = sweep_report(self.steps, norm, len(self.caps) + 1, precision, truncation, self.notes, lost)
        return report if self.optimal else replace(report, bound=None, lower_bound=None)


def sweep_report(
    steps: list[BondReport],
    norm: float,
    n: int,
    precision: float,
    truncation: Truncation,
    notes: list[str],
    lost: float,
) -> Report:
    """The report of one truncating sweep, whose squared errors add up.

    ``lost`` is the fraction of the norm of the result that is below the range of its dtype, see
    :func:`mpo_tn.chains.canonical.stored`: it is in the core at the centre, so its square adds up with the others.

    Raises:
        MPOError: ``truncation.strict`` and the tolerance was missed.
    """
    cut = [step.discarded_norm for step in steps]
    if lost > 0:
        cut.append(lost * math.sqrt(max(norm - math.hypot(*cut), 0.0)) * math.sqrt(norm + math.hypot(*cut)))
        notes = [*notes, f"below the range of the dtype: {lost:.3g} of the result is lost, which is in the error"]
    error = math.hypot(*cut)
    floor = float_floor(precision, n, norm)
    allowed = truncation.budget(norm, 0.0, "")
    met = error <= allowed * (1 + 1e-12)
    if not met and truncation.strict:
        limit = "the range of the dtype" if lost > 0 else truncation.limit
        raise MPOError(
            f"{limit} leaves an error of {error:.6g}, above the {allowed:.6g} allowed: raise "
            "it or the tolerance, or use strict=False to accept it"
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


def peels_left(sites: Sites, low: int, high: int, left: int, right: int) -> bool:
    """Which end is split off next while a tensor is peeled down to the centre: site ``low``, or else site ``high``.

    The smaller side first, so that the large tensor shrinks soonest, and the left one of two equal ones; a side that
    has come to the centre is done.

    ``low`` and ``high`` are the first and the last site that are left, ``left`` and ``right`` the bonds that were cut
    beside them, 1 where none was.
    """
    sizes, center = sites.sizes, sites.center
    return low < center and (high == center or left * sizes[low] <= right * sizes[high])
