"""What a squeezing run did, round by round, and the folder that holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mpo_tn.planning.ranking import RankedCut
from mpo_tn.planning.spec import kept_ratio
from mpo_tn.torch.models.units import MPOUnit, all_bonds, count_parameters

Bonds = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SqueezeRound:
    """One round: what was cut, and what came of it.

    ``value`` is what ``evaluate`` gave, ``gap`` by how much it is worse than the reference, ``loss`` the mean over the
    round's training steps. ``kept`` is the kept ratio of the decomposed matrices, ``parameters`` counts the whole
    model. ``position`` is the number of training steps done so far, ``random`` a digest of all random generators.
    """

    number: int
    cuts: tuple[RankedCut, ...]
    loss: float | None
    value: float
    gap: float
    accepted: bool
    kept: float
    parameters: int
    position: int
    random: str
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**asdict(self), "cuts": [cut.to_dict() for cut in self.cuts], "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SqueezeRound:
        """The inverse of :meth:`to_dict`."""
        cuts = tuple(RankedCut(c["unit"], c["bond"], c["from"], c["to"], c["score"]) for c in values["cuts"])
        plain: dict[str, Any] = {**values, "cuts": cuts, "notes": tuple(values["notes"])}
        return cls(**plain)


_REASONS = {
    "gap": "the next round lost more than delta",
    "keep": "the kept ratio is reached",
    "max_steps": "no more rounds were allowed",
}


@dataclass(frozen=True)
class SqueezeResult:
    """What :func:`squeeze` did. The model is in the state after ``best_round``; 0 is the start.

    ``reference`` is the value that gaps are counted from, ``value`` that of the model now. ``start_bonds`` and
    ``bonds`` are by unit. ``stopped`` is one of ``"gap"``, ``"keep"``, ``"max_steps"`` and ``"nothing left to cut"``.
    """

    rounds: tuple[SqueezeRound, ...]
    stopped: str
    best_round: int
    reference: float
    value: float
    start_bonds: Bonds
    bonds: Bonds
    kept: float
    parameters: int

    def bonds_after(self, number: int) -> Bonds:
        """The bonds after the cuts of round ``number``, whether they were accepted or not; 0 is the start."""
        return bonds_after(self.start_bonds, self.rounds[:number])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**asdict(self), "rounds": [part.to_dict() for part in self.rounds]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SqueezeResult:
        """The inverse of :meth:`to_dict`."""
        rounds = tuple(SqueezeRound.from_dict(part) for part in values["rounds"])
        plain: dict[str, Any] = {**values, "rounds": rounds}
        for key in ("start_bonds", "bonds"):
            plain[key] = {name: tuple(part) for name, part in values[key].items()}
        return cls(**plain)

    def __str__(self) -> str:
        cuts = sum(cut.before - cut.after for part in self.rounds[: self.best_round] for cut in part.cuts)
        why = _REASONS.get(self.stopped, self.stopped)
        return (
            f"{self.best_round} rounds, {cuts} cuts, kept {self.kept:.3f} of the matrices ({self.parameters} "
            f"parameters in all), {self.reference:.6g} -> {self.value:.6g}; stopped: {why}"
        )


def bonds_after(start: Mapping[str, Sequence[int]], rounds: Sequence[SqueezeRound]) -> Bonds:
    """Bonds after the cuts of some rounds."""
    bonds = {name: list(part) for name, part in start.items()}
    for part in rounds:
        for cut in part.cuts:
            bonds[cut.unit][cut.bond] = cut.after
    return {name: tuple(part) for name, part in bonds.items()}


def outcome(
    model: nn.Module, units: Mapping[str, MPOUnit], rounds: Sequence[SqueezeRound], stopped: str, reference: float,
    start: Bonds,
) -> SqueezeResult:  # fmt: skip
    """The result of a run whose model is in the state that was kept."""
    accepted = [part for part in rounds if part.accepted]
    return SqueezeResult(
        rounds=tuple(rounds),
        stopped=stopped,
        best_round=len(accepted),
        reference=reference,
        value=accepted[-1].value if accepted else reference,
        start_bonds=start,
        bonds=all_bonds(units),
        kept=kept_ratio(unit.spec for unit in units.values()),
        parameters=count_parameters(model),
    )
