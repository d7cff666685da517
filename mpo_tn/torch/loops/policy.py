"""What decides in squeezing: the numbers a caller gives, and the cuts of one round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.ranking import RankedCut, Score, checked_score, choose_cuts
from mpo_tn.planning.spec import kept_ratio
from mpo_tn.torch.models.cuts import cut_unit, unit_spectra
from mpo_tn.torch.models.moments import OptimizerLike
from mpo_tn.torch.models.units import MPOUnit, all_bonds


@dataclass(frozen=True)
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
        if not self.delta >= 0:
            raise MPOError(f"delta={self.delta!r} must be at least 0, in the units of what evaluate returns")
        for name in ("max_steps", "cuts_per_round", "tune_steps", "minimum_bond"):
            number, least = whole_number(getattr(self, name)), int(name != "tune_steps")
            if number is None or number < least:
                raise MPOError(f"{name}={getattr(self, name)!r} must be a whole number of at least {least}")
        if self.keep is not None and not 0 < self.keep <= 2:
            raise MPOError(f"keep={self.keep!r} is not a kept ratio: use for instance keep=0.6, or None for no limit")
        checked_score(self.score)

    def check_start(self, units: dict[str, MPOUnit]) -> None:
        """Refuse a model without a bond to cut."""
        if _at_minimum(units, self.minimum_bond):
            raise MPOError(
                f"nothing is left to cut: every bond is at minimum_bond={self.minimum_bond} or below already"
            )

    def satisfied(self, units: dict[str, MPOUnit]) -> str:
        """Why there is nothing more to cut, or an empty string."""
        if self.keep is not None and kept_ratio(unit.spec for unit in units.values()) <= self.keep:
            return "keep"
        return "nothing left to cut" if _at_minimum(units, self.minimum_bond) else ""

    def gap(self, value: float, reference: float) -> float:
        """By how much ``value`` is worse."""
        return reference - value if self.higher_is_better else value - reference


def _at_minimum(units: dict[str, MPOUnit], minimum_bond: int) -> bool:
    return all(bond <= minimum_bond for bonds in all_bonds(units).values() for bond in bonds)


def cut_once(
    model: nn.Module, units: dict[str, MPOUnit], policy: Policy, optimizer: OptimizerLike | None
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


def training_flags(model: nn.Module) -> dict[nn.Module, bool]:
    """Which modules are in training mode, outer ones first."""
    return {module: module.training for module in model.modules()}


def set_training(flags: dict[nn.Module, bool]) -> None:
    """Bring modules back to their modes, through ``train``, which some override."""
    for module, training in flags.items():
        module.train(training)


def as_number(value: Any, source: str) -> float:
    """What a caller's function returned, as a float."""
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise MPOError(f"{source} returned {value!r}, which is no number: return a float") from None
