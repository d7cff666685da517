"""What every option of every matrix costs: its error in the metric, times what the model makes of such an error.

One sensitivity does for no two families: rounding noise and cut directions of the same weighted size move a model by
amounts that differ by a factor of several, so each family is tried in each matrix, one forward pass each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.fit.activation import LowRankFits
from mpo_tn.fit.metric import dense
from mpo_tn.fit.quantized import quantize_chain
from mpo_tn.linalg import frobenius_norm, widen
from mpo_tn.planning.options import BITS, Option
from mpo_tn.progress import Progress
from mpo_tn.sites import Sites
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.chain_costs import Alike, ChainCost, chain_costs
from mpo_tn.torch.models.fitting import metric_of, row_weights
from mpo_tn.torch.models.samples import Judge, is_biased, replaced
from mpo_tn.torch.models.survey import DenseUnit
from mpo_tn.truncate.quantize import quantize

_ROWS = 96
"""So many rows of a matrix tell how large its rounding errors are: rows are rounded one by one."""

_REFERENCE_BITS = 3
_MEASURED = (2, 3, 4)
_A_BIT = 0.25
"""What one more bit leaves of a squared rounding error."""


@dataclass(frozen=True)
class Errors:
    """Squared errors of a matrix, relative to its weighted norm.

    Attributes:
        rounding: by bits, of the matrix itself.
        tails: ``tails[r]`` of the best matrix of rank r.
        factor: how much more the factors of a low-rank pair err by rounding than the matrix does.
    """

    rounding: dict[int, float]
    tails: np.ndarray
    factor: float

    def of_rounding(self, bits: int) -> float:
        """Of so many bits, extrapolated where it was not measured."""
        if bits in self.rounding:
            return self.rounding[bits]
        most = max(self.rounding)
        return self.rounding[most] * _A_BIT ** (bits - most)

    def parts(self, option: Option) -> tuple[float, float]:
        """What is rounded, and what is cut."""
        if option.spec is None:
            return 0.0, 0.0
        if option.family == BITS:
            assert option.width is not None
            return self.of_rounding(option.width), 0.0
        assert option.rank is not None
        cut = float(self.tails[min(option.rank, len(self.tails) - 1)])
        if option.width is None or option.width == 16:
            return 0.0, cut
        return self.factor * self.of_rounding(option.width) * (1 - cut), cut


@dataclass(frozen=True)
class Sensitivity:
    """What a squared relative error of 1 does to D: of rounding, and of cutting."""

    rounding: float
    cutting: float


@dataclass(frozen=True)
class Tradeoff:
    """One matrix, what it could become, and what that is expected to cost; ``chains`` by their legs."""

    unit: DenseUnit
    options: tuple[Option, ...]
    errors: Errors
    sensitivity: Sensitivity
    chains: Mapping[Sites, ChainCost] = field(default_factory=dict[Sites, ChainCost])

    def cost(self, option: Option) -> float:
        """What an option is expected to add to D."""
        if option.spec is not None and option.is_fitted:
            chain = self.chains[option.spec.sites]
            cut = chain.cut(option.spec.num_parameters)
            rounded = 0.0 if option.width is None else chain.factor * self.errors.of_rounding(option.width) * (1 - cut)
            cutting = self.sensitivity.cutting if chain.sensitivity is None else chain.sensitivity
            return self.sensitivity.rounding * rounded + cutting * cut
        rounded, cut = self.errors.parts(option)
        return self.sensitivity.rounding * rounded + self.sensitivity.cutting * cut


def tradeoffs(
    units: Sequence[DenseUnit],
    choices: Sequence[Sequence[Option]],
    calibration: Calibration,
    judge: Judge | None,
    group: int,
    progress: Progress,
) -> list[Tradeoff]:
    """The tradeoff of every unit that has more than one option.

    Args:
        units: of the dense model.
        choices: what each could become.
        calibration: of the model.
        judge: D on held-back text; without one every relative error counts alike, times the size of the matrix.
        group: columns a scale is for.
        progress: told of every unit.
    """
    found: list[Tradeoff] = []
    factors: dict[str, float] = {}
    alike: dict[str, Alike] = {}
    for done, (unit, options) in enumerate(zip(units, choices, strict=True)):
        progress(done, len(units), unit.name)
        known = calibration.of(unit.name)
        try:
            with torch.no_grad():
                one = _tradeoff(unit, tuple(options), known, judge, group, factors)
                rounding = one.errors.rounding if any(option.width for option in options) else {}
                chains = chain_costs(unit, options, known, judge, rounding, group, alike)
                found.append(replace(one, chains=chains))
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
    progress(len(units), len(units), units[-1].name)
    return _with_unseen(found, calibration) if judge is not None else found


def _with_unseen(found: Sequence[Tradeoff], calibration: Calibration) -> list[Tradeoff]:
    """An error in a matrix of which text says nothing counts as much as in the others.

    Text may not reach it, or D may not see it: the pooler of BERT comes after the last hidden states.
    """
    unseen = {
        each.unit.name
        for each in found
        if each.unit.name in calibration.unreached
        or max(each.sensitivity.rounding, each.sensitivity.cutting) == 0  # the outputs have the same bits
    }
    seen = [each.sensitivity for each in found if each.unit.name not in unseen]
    if not seen:
        return list(found)
    typical = Sensitivity(
        *(float(np.median([getattr(each, kind) for each in seen])) for kind in ("rounding", "cutting"))
    )
    return [
        replace(
            each, sensitivity=typical,
            chains={legs: replace(chain, sensitivity=None) for legs, chain in each.chains.items()},
        )
        if each.unit.name in unseen else each for each in found
    ]  # fmt: skip


class _Layer:
    """A matrix whose layer gets inputs of a known metric."""

    def __init__(self, unit: DenseUnit, known: Moments, group: int) -> None:
        self.matrix, self.wide, self.group = unit.matrix(), widen(unit.matrix()), group
        biased = is_biased(unit)
        self.mean = known.mean if biased else None
        self.metric = metric_of(known, centred=biased)
        self.fits = LowRankFits(self.matrix, self.metric)
        self.values = self.fits.values

    def rounded(self, bits: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        part = self.matrix if rows is None else self.matrix[rows]
        # Sweeps take as much of the error of every matrix, about.
        return quantize(part, bits, self.group, metric=self.metric.second, sweeps=0).matrix()

    def missed(self, there: torch.Tensor) -> float:
        """The squared error of a whole matrix."""
        return self.metric.weighed(self.wide - there) ** 2

    def missed_rows(self, there: torch.Tensor, rows: torch.Tensor) -> float:
        return frobenius_norm((self.wide[rows] - there) @ self.metric.root) ** 2

    def cut(self, rank: int) -> torch.Tensor:
        return dense([widen(core) for core in self.fits.cut(rank).cores])

    def shift(self, there: torch.Tensor) -> torch.Tensor | None:
        return None if self.mean is None else (self.wide - there) @ self.mean

    def factor(self, rank: int, rounding: float) -> float:
        """How much more a pair errs by rounding, of what it holds, than the matrix by as many bits."""
        cut = self.fits.error(rank) ** 2
        report = quantize_chain(
            self.fits.cut(rank), self.matrix, (_REFERENCE_BITS,) * 2, self.group, self.metric, rounds=1
        )[2]  # fmt: skip
        held = self.fits.norm**2 - cut
        return max(report.error**2 - cut, 0.0) / max(held * rounding, 1e-300)


class _Table:
    """A matrix of whose rows it is known how often they are read, or nothing at all."""

    def __init__(self, unit: DenseUnit, known: Moments | None, group: int) -> None:
        self.matrix, self.wide, self.group = unit.matrix(), widen(unit.matrix()), group
        self.weights = row_weights(known or Moments(0), len(self.matrix))
        scaled = self.weights * self.wide
        values, self.basis = torch.linalg.eigh(scaled.T @ scaled)
        self.values = values.flip(0).clamp(min=0).sqrt().numpy()

    def rounded(self, bits: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        part = self.matrix if rows is None else self.matrix[rows]
        return quantize(part, bits, self.group).matrix()

    def missed(self, there: torch.Tensor) -> float:
        return frobenius_norm(self.weights * (self.wide - there)) ** 2

    def missed_rows(self, there: torch.Tensor, rows: torch.Tensor) -> float:
        return frobenius_norm(self.weights[rows] * (self.wide[rows] - there)) ** 2

    def cut(self, rank: int) -> torch.Tensor:
        basis = self.basis[:, -rank:]
        return (self.wide @ basis) @ basis.T

    def shift(self, there: torch.Tensor) -> None:
        return None

    def factor(self, rank: int, rounding: float) -> float:
        """Both factors are rounded, and each row of the product takes part of both errors."""
        return 2.0


def _tradeoff(
    unit: DenseUnit, options: tuple[Option, ...], known: Moments | None, judge: Judge | None, group: int,
    factors: dict[str, float],
) -> Tradeoff:  # fmt: skip
    here = _Table(unit, known, group) if known is None or known.second is None else _Layer(unit, known, group)
    squares = np.asarray(here.values, dtype=np.float64) ** 2
    total = max(float(squares.sum()), 1e-300)
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0) / total
    out, in_ = here.matrix.shape
    # About half of what would take as many numbers as the matrix.
    rank = min(max(1, round(out * in_ / (out + in_) / 2)), len(squares))
    reference, low = here.rounded(_REFERENCE_BITS), here.cut(rank)
    rounding = _rounding(here, reference, total)
    pattern = re.sub(r"\d+", "*", unit.name)
    if pattern not in factors:  # alike in all blocks
        factors[pattern] = here.factor(rank, rounding[_REFERENCE_BITS])
    errors = Errors(rounding, tails, factors[pattern])
    if judge is None:
        return Tradeoff(unit, options, errors, Sensitivity(total, total))
    with replaced(unit, reference, here.shift(reference)):
        by_rounding = judge()
    with replaced(unit, low, here.shift(low)):
        by_cutting = judge()
    if not (np.isfinite(by_rounding) and np.isfinite(by_cutting)):
        raise MPOError(f"the model gives no numbers once it is rounded to {_REFERENCE_BITS} bits")
    cut = max(float(tails[rank]), 1e-12)
    return Tradeoff(
        unit, options, errors, Sensitivity(by_rounding / max(rounding[_REFERENCE_BITS], 1e-12), by_cutting / cut)
    )


def _rounding(here: _Layer | _Table, reference: torch.Tensor, total: float) -> dict[int, float]:
    """Squared relative rounding errors by bits: of every row for the reference, of some rows how it goes with bits.

    Rows are rounded one by one, and a few of them may hold most of the norm.
    """
    rows = len(here.matrix)
    chosen = torch.arange(0, rows, max(1, rows // _ROWS))[:_ROWS]
    of = {
        bits: here.missed_rows(here.rounded(bits, chosen), chosen) for bits in _MEASURED if bits != _REFERENCE_BITS
    }  # fmt: skip
    of[_REFERENCE_BITS] = max(here.missed_rows(reference[chosen], chosen), 1e-300)
    whole = here.missed(reference) / total
    return {bits: whole * value / of[_REFERENCE_BITS] for bits, value in of.items()}
