"""What decides in squeezing: the numbers a caller gives, and the cuts of one round."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.planning.ranking import RankedCut, Score, checked_score, choose_cuts
from mpo_tn.torch.models.cuts import cut_unit, unit_spectra
from mpo_tn.torch.models.moments import OptimizerLike
from mpo_tn.torch.models.units import MPOUnit


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The numbers that decide what is cut and when it ends."""

    delta: float
    higher_is_better: bool
    max_steps: int
    cuts_per_round: int
    tune_steps: int
    score: Score
    keep: float | None
    minimum_bond: int

    def __post_init__(self) -> None:
        if not (is_real(self.delta) and self.delta >= 0):
            raise MPOError(f"delta={self.delta!r} must be at least 0, a number in the units of what evaluate returns")
        for name in ("max_steps", "cuts_per_round", "tune_steps", "minimum_bond"):
            number, least = whole_number(getattr(self, name)), int(name != "tune_steps")
            if number is None or number < least:
                raise MPOError(f"{name}={getattr(self, name)!r} must be a whole number of at least {least}")
        if self.keep is not None and not (is_real(self.keep) and 0 < self.keep <= 2):
            raise MPOError(f"keep={self.keep!r} is not a kept ratio: use for instance keep=0.6, or None for no limit")
        checked_score(self.score)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; of a score that is a function, the name."""
        score = self.score
        name = score if isinstance(score, str) else getattr(score, "__qualname__", type(score).__qualname__)
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "score": name}

    def gap(self, value: float, reference: float) -> float:
        """By how much ``value`` is worse: infinity for an infinite one whatever its sign, NaN for NaN."""
        if not math.isfinite(value):
            return abs(value)
        return reference - value if self.higher_is_better else value - reference


def cut_once(
    units: dict[str, MPOUnit], policy: Policy, optimizer: OptimizerLike | None
) -> tuple[tuple[RankedCut, ...], tuple[str, ...]]:
    """The cuts of one round, from fresh spectra, carried out; and notes on optimiser state that could not follow."""
    spectra = {name: unit_spectra(unit) for name, unit in units.items()}
    specs = {name: unit.spec for name, unit in units.items()}
    cuts = choose_cuts(
        specs, spectra, policy.cuts_per_round, score=policy.score, minimum_bond=policy.minimum_bond, keep=policy.keep
    )
    notes: list[str] = []
    for cut in cuts:
        notes += cut_unit(units[cut.unit], cut.bond, cut.after, optimizer)
    return tuple(cuts), tuple(notes)
