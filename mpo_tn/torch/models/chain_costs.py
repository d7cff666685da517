"""What chains with legs of their own cost: two fits for each choice of legs, and what the model makes of each.

Low rank has its errors in closed form; here alternating least squares has to be run for every one. So few are, at
bonds far apart, and between them a squared error is taken to go with a power of the numbers that are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.options import Option, in_bits
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.torch.models.fitting import Fitter
from mpo_tn.torch.models.samples import Judge, is_biased, replaced
from mpo_tn.torch.models.survey import DenseUnit

_REFERENCE_BITS = 3
_TINY = 1e-12
_TYPICAL_KEPT = 0.15
"""Where legs are compared."""


@dataclass(frozen=True)
class ChainCost:
    """One matrix on one choice of legs.

    Attributes:
        numbers: that its two fits hold, rising; one where there is one choice only.
        missed: their squared errors in the metric, relative.
        factor: how much more its cores err by rounding than the matrix does.
        sensitivity: what a squared relative error of 1 does to D, of chains on these legs; without text nothing.
    """

    numbers: tuple[int, ...]
    missed: tuple[float, ...]
    factor: float
    sensitivity: float | None

    def cut(self, numbers: float) -> float:
        """The squared relative error of so many numbers.

        >>> cost = ChainCost((100, 400), (0.4, 0.1), 1.0, None)
        >>> [round(cost.cut(numbers), 3) for numbers in (10, 100, 200, 400, 800)]
        [1.0, 0.4, 0.2, 0.1, 0.05]
        """
        first, last = self.numbers[0], self.numbers[-1]
        if first == last:
            return self.missed[0]
        low, high = (math.log(max(missed, _TINY)) for missed in (self.missed[0], self.missed[-1]))
        power = min((high - low) / math.log(last / first), 0.0)
        return math.exp(min(low + power * math.log(numbers / first), 0.0))


@dataclass
class Alike:
    """What was found of the first of several matrices whose names differ by numbers."""

    costs: dict[Sites, ChainCost]
    best: dict[str, Sites]


def chain_costs(
    unit: DenseUnit,
    options: Sequence[Option],
    known: Moments | None,
    judge: Judge | None,
    rounding: Mapping[int, float],
    group: int,
    alike: dict[str, Alike],
) -> dict[Sites, ChainCost]:
    """What those of the options cost whose errors only fits tell, by their legs.

    Args:
        unit: of the dense model.
        options: what it could become.
        known: of the inputs of its layer.
        judge: D on held-back text.
        rounding: squared relative errors of the matrix in bits; nothing where none are asked for.
        group: columns a scale is for.
        alike: what is known of matrices of other blocks, by pattern; this one is added if it is the first.

    Raises:
        MPOError: the model gives no numbers with one of them.

    Cost: of the first of a kind two fits and two forward passes for each choice of legs, and a fit in bits; of the
    others one fit and one pass for the best legs of each family: the other legs are taken to go along.
    """
    specs: dict[str, dict[Sites, dict[int, ModuleSpec]]] = {}
    for option in options:
        if option.is_fitted and option.spec is not None:
            own = specs.setdefault(option.family, {}).setdefault(option.spec.sites, {})
            own[option.spec.num_parameters] = replace(option.spec, bits=())
    if not specs:
        return {}
    tries = _Tries(unit, Fitter(unit.matrix(), known or Moments(0), biased=is_biased(unit)), judge)
    pattern = f"{re.sub(r'[0-9]+', '*', unit.name)} {tuple(unit.matrix().shape)} {group}"
    before = alike.get(pattern)
    found: dict[Sites, ChainCost] = {}
    if before is None or {legs for own in specs.values() for legs in own} - set(before.costs):
        best: dict[str, Sites] = {}
        for family, own in specs.items():
            found |= {legs: tries.explored(by_numbers, rounding, group) for legs, by_numbers in own.items()}
            middle = unit.matrix().numel() * _TYPICAL_KEPT
            best[family] = min(own, key=lambda legs: found[legs].cut(middle) * (found[legs].sensitivity or 1.0))
        alike.setdefault(pattern, Alike(found, best))
        return found
    for family, own in specs.items():
        first = before.best[family]
        by_numbers = own.get(first) or next(iter(own.values()))
        spec = by_numbers[sorted(by_numbers)[len(by_numbers) // 2]]
        missed, hurts = tries.tried(spec)
        reference = before.costs[spec.sites]
        less = missed / max(reference.cut(spec.num_parameters), _TINY)
        for legs in own:
            there = before.costs[legs]
            sensitivity = there.sensitivity
            if hurts is not None and sensitivity is not None:
                # Where D saw nothing of the first, all legs count alike.
                sensitivity = sensitivity * hurts / reference.sensitivity if reference.sensitivity else hurts
            scaled = tuple(min(part * less, 1.0) for part in there.missed)
            found[legs] = replace(there, missed=scaled, sensitivity=sensitivity)
    return found


@dataclass(frozen=True)
class _Tries:
    """Fits of one matrix, each put into the model."""

    unit: DenseUnit
    fitter: Fitter
    judge: Judge | None

    def tried(self, spec: ModuleSpec) -> tuple[float, float | None]:
        """The squared relative error of a structure, and what D becomes by it for an error of 1."""
        fitted = self.fitter.fit(spec, rounds=1)
        missed = fitted.weighted**2
        if self.judge is None:
            return missed, None
        with replaced(self.unit, fitted.rebuilt(), fitted.shift):
            distance = self.judge()
        if not math.isfinite(distance):
            raise MPOError(f"the model gives no numbers once it is a chain of {len(spec.sites)} sites")
        return missed, distance / max(missed, _TINY)

    def explored(self, by_numbers: Mapping[int, ModuleSpec], rounding: Mapping[int, float], group: int) -> ChainCost:
        """What legs cost, from two fits and one in bits."""
        sizes = sorted(by_numbers)
        chosen = sorted({sizes[len(sizes) // 4], sizes[-1 - len(sizes) // 4]})
        tries = [self.tried(by_numbers[numbers]) for numbers in chosen]
        missed = tuple(error for error, _ in tries)
        hurts = [hurt for _, hurt in tries if hurt is not None]
        factor = 1.0
        if rounding:
            held = self.fitter.fit(in_bits(by_numbers[chosen[-1]], _REFERENCE_BITS, group), rounds=1).weighted ** 2
            rest = max(1 - missed[-1], _TINY) * max(rounding[_REFERENCE_BITS], _TINY)
            factor = max(held - missed[-1], 0.0) / rest
        return ChainCost(tuple(chosen), missed, factor, math.prod(hurts) ** (1 / len(hurts)) if hurts else None)
