"""What every option of every matrix costs: its error in the metric, times what the model makes of such an error.

One sensitivity does for no two families: rounding noise and cut directions of the same weighted size move a model by
amounts that differ by a factor of several, so each family is tried in each matrix, one forward pass each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.fit.activation import LowRankFits
from mpo_tn.fit.metric import Metric, dense
from mpo_tn.fit.quantized import quantize_chain
from mpo_tn.linalg import frobenius_norm, widen
from mpo_tn.planning.options import BITS, LOW_RANK, Option
from mpo_tn.progress import Progress
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.fitting import metric_of, row_weights
from mpo_tn.torch.models.samples import Judge, is_biased, replaced
from mpo_tn.torch.models.units import DenseUnit
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
    """One matrix, what it could become, and what that is expected to cost."""

    unit: DenseUnit
    options: tuple[Option, ...]
    errors: Errors
    sensitivity: Sensitivity

    def cost(self, option: Option) -> float:
        """What an option is expected to add to D."""
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
    for done, (unit, options) in enumerate(zip(units, choices, strict=True)):
        progress(done, len(units), unit.name)
        known = calibration.of(unit.name)
        with torch.no_grad():
            found.append(_tradeoff(unit, tuple(options), known, judge, group, factors))
    progress(len(units), len(units), units[-1].name)
    return found


def _tradeoff(
    unit: DenseUnit, options: tuple[Option, ...], known: Moments | None, judge: Judge | None, group: int,
    factors: dict[str, float],
) -> Tradeoff:  # fmt: skip
    matrix = unit.matrix()
    wide = widen(matrix)
    biased = is_biased(unit)
    if known is None or known.second is None:
        # A table, or a layer that no text reached: rows weigh what is known of them, columns alike.
        weights = row_weights(known if known is not None else Moments(0), len(matrix))
        scaled = weights * wide
        values = torch.linalg.svdvals(scaled) if min(scaled.shape) <= 64 else _values(scaled)
        total = float(values.square().sum())
        reference = quantize(matrix, _REFERENCE_BITS, group).matrix()
        rounding = _measured(
            lambda rows, bits: weights[rows] * (wide[rows] - quantize(matrix[rows], bits, group).matrix()),
            lambda rows: weights[rows] * wide[rows],
            len(matrix),
        )
        rank = _reference_rank(matrix)
        basis = torch.linalg.eigh(scaled.T @ scaled)[1][:, -rank:]
        low = (wide @ basis) @ basis.T
        shifts = (None, None)
        metric = None
    else:
        metric = metric_of(known, centred=biased)
        fits = LowRankFits(matrix, metric)
        values = torch.as_tensor(fits.values)
        total = float(values.square().sum())
        rounding = _measured(
            lambda rows, bits: (
                (wide[rows] - quantize(matrix[rows], bits, group, metric=metric.second).matrix()) @ metric.root
            ),
            lambda rows: wide[rows] @ metric.root,
            len(matrix),
        )
        rank = min(_reference_rank(matrix), len(fits.values))
        low = dense([widen(core) for core in fits.cut(rank).cores])
        reference = quantize(matrix, _REFERENCE_BITS, group, metric=metric.second).matrix()
        mean = known.mean if biased else None
        shifts = tuple(None if mean is None else (wide - there) @ mean for there in (reference, low))
        pattern = re.sub(r"\d+", "*", unit.name)
        if pattern not in factors:
            factors[pattern] = _factor(matrix, fits, metric, rank, group, rounding[_REFERENCE_BITS])
    tails = np.append(np.cumsum(values.square().numpy()[::-1])[::-1], 0.0) / max(total, 1e-300)
    factor = factors.get(re.sub(r"\d+", "*", unit.name), 2.0)
    errors = Errors(rounding, tails, factor)
    if judge is None:
        size = total if metric is not None else 1.0
        return Tradeoff(unit, options, errors, Sensitivity(size, size))
    with replaced(unit, reference, shifts[0]):
        by_rounding = judge()
    with replaced(unit, low, shifts[1]):
        by_cutting = judge()
    if not (np.isfinite(by_rounding) and np.isfinite(by_cutting)):
        raise MPOError(f"{unit.name}: the model gives no numbers once it is rounded to {_REFERENCE_BITS} bits")
    cut = max(float(tails[min(rank, len(tails) - 1)]), 1e-12)
    return Tradeoff(
        unit, options, errors, Sensitivity(by_rounding / max(rounding[_REFERENCE_BITS], 1e-12), by_cutting / cut)
    )


def _values(scaled: torch.Tensor) -> torch.Tensor:
    small = scaled.T @ scaled if scaled.shape[0] >= scaled.shape[1] else scaled @ scaled.T
    return torch.linalg.eigvalsh(small).clamp(min=0).flip(0).sqrt()


def _reference_rank(matrix: torch.Tensor) -> int:
    """About half of what would take as many numbers as the matrix."""
    out, in_ = matrix.shape
    return max(1, round(out * in_ / (out + in_) / 2))


def _measured(miss: object, whole: object, rows: int) -> dict[int, float]:
    """Squared relative rounding errors by bits, over rows spread evenly."""
    chosen = torch.arange(0, rows, max(1, rows // _ROWS))[:_ROWS]
    size = frobenius_norm(whole(chosen)) ** 2  # type: ignore[operator]
    return {bits: frobenius_norm(miss(chosen, bits)) ** 2 / max(size, 1e-300) for bits in _MEASURED}  # type: ignore[operator]


def _factor(matrix: torch.Tensor, fits: LowRankFits, metric: Metric, rank: int, group: int, rounding: float) -> float:
    """How much more a pair errs by rounding, of what it holds, than the matrix by as many bits."""
    chain = fits.cut(rank)
    cores, _, report = quantize_chain(chain, matrix, (_REFERENCE_BITS,) * 2, group, metric, rounds=1)
    del cores
    held = fits.norm**2 - fits.error(rank) ** 2
    noise = max(report.error**2 - fits.error(rank) ** 2, 0.0)
    return noise / max(held * rounding, 1e-300)


def families_of(options: Sequence[Option]) -> set[str]:
    """Those there are."""
    return {option.family for option in options if option.family in (BITS, LOW_RANK)}
