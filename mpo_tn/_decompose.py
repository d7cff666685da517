"""Dense matrix to chain: peel both ends inward, the widest bond last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpo_tn import bounds
from mpo_tn._canonical import stored
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
    left_factor,
    namespace,
    storage_notes,
    tails,
    times_power_of_two,
    widen,
)
from mpo_tn.sites import Sites, checked_sites
from mpo_tn.truncation import BondReport, Report, Truncation, checked_truncation


def decompose(matrix: Array, sites: Sites, truncation: Truncation, *, spectra: bool = False) -> tuple[Chain, Report]:
    """Decompose a dense matrix. See :meth:`mpo_tn.MPO.from_matrix`, which says what is guaranteed."""
    matrix = check_matrix(matrix)
    sites = checked_sites(sites)
    truncation = checked_truncation(truncation)
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
    known = bounds.unfolding_spectra(matrix, sites) if spectra or truncation.max_parameters is not None else None
    if known is not None and truncation.max_parameters is not None:
        caps = known.bonds_for(truncation.max_parameters, caps)
    exponent = binary_exponent(norm)
    scale = 2.0**exponent
    tensor = interleave(times_power_of_two(widen(matrix), -exponent), sites.out, sites.in_)
    budget.scale(scale)
    gram = dtype_name(matrix) not in ("float64", "complex128")
    cores, steps, notes = _peel(tensor, sites, caps, budget, gram=gram)

    center = sites.center
    cores[center] = cores[center] * scale
    chain = stored(Chain(tuple(cores), (center, center)), matrix)

    notes += storage_notes(matrix)
    if known is not None:
        steps = [
            BondReport(s.kept, s.available, s.discarded_norm * scale, known.tail(k, s.kept))
            for k, s in enumerate(steps)
        ]
    else:
        steps = [BondReport(s.kept, s.available, s.discarded_norm * scale) for s in steps]
    return chain, sweep_report(steps, norm, len(sites), eps(matrix), truncation, notes)


@dataclass
class Budget:
    """The total error still to be spent and the bonds that may still spend it."""

    error: float
    bonds_left: int

    def scale(self, unit: float) -> None:
        """Measure in multiples of ``unit`` from now on."""
        self.error /= unit

    def keep(self, tail: np.ndarray, cap: int | None) -> int:
        """How many singular values the next bond keeps: its share of the budget, then its cap, at least one.

        ``tail[r]`` is the norm of what keeping ``r`` values cuts, see :func:`mpo_tn.linalg.tails`.
        """
        rank = len(tail) - 1
        if math.isfinite(self.error):
            share = self.error / math.sqrt(self.bonds_left)
            rank = int((tail > share).sum())
        if cap is not None:
            rank = min(rank, cap)
        rank = max(rank, 1)
        cut = float(tail[rank])
        if math.isfinite(self.error):
            self.error = math.sqrt(max(self.error**2 - cut**2, 0.0))
        self.bonds_left -= 1
        return rank


def _peel(
    tensor: Array, sites: Sites, caps: tuple[int | None, ...], budget: Budget, *, gram: bool
) -> tuple[list[Array], list[BondReport], list[str]]:
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
    steps: list[BondReport] = [BondReport(1, 1, 0.0)] * (len(sites) - 1)
    notes: list[str] = []

    def take(group: Array, bond: int) -> Array:
        factor = left_factor(group, gram=gram)
        if factor.note:
            notes.append(f"bond {bond}: {factor.note}")
        tail = tails(factor.values)
        kept = budget.keep(tail, caps[bond])
        steps[bond] = BondReport(kept, len(factor.values), float(tail[kept]))
        return factor.u[:, :kept]

    while low < high:
        from_left = low < center and (high == center or left * sizes[low] <= right * sizes[high])
        if from_left:
            group = xp.reshape(tensor, (left * sizes[low], -1))
            u = take(group, low)
            cores[low] = xp.reshape(u, (left, sites.out[low], sites.in_[low], u.shape[1]))
            tensor, left, low = adjoint(u) @ group, u.shape[1], low + 1
        else:
            group = xp.reshape(tensor, (-1, sizes[high] * right))
            v = adjoint(take(adjoint(group), high - 1))
            cores[high] = xp.reshape(v, (v.shape[0], sites.out[high], sites.in_[high], right))
            tensor, right, high = group @ adjoint(v), v.shape[0], high - 1
    cores[center] = xp.reshape(tensor, (left, sites.out[center], sites.in_[center], right))
    return cores, steps, notes


def sweep_report(
    steps: list[BondReport], norm: float, n: int, precision: float, truncation: Truncation, notes: list[str]
) -> Report:
    """The report of one truncating sweep, whose squared errors add up.

    Raises:
        MPOError: ``truncation.strict`` and the tolerance was missed.
    """
    error = math.hypot(*(step.discarded_norm for step in steps))
    floor = bounds.float_floor(precision, n, norm)
    allowed = truncation.budget(norm, 0.0, "")
    met = error <= allowed * (1 + 1e-12)
    if not met and truncation.strict:
        raise MPOError(
            f"{truncation.limit} leaves an error of {error:.6g}, above the {allowed:.6g} allowed: raise "
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
