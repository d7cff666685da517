"""The folder of a squeezing run: its log, and the state to go back to and to resume from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, is_real
from mpo_tn.torch.loops.log_folder import LogFolder, counts, expect, state_name
from mpo_tn.torch.loops.rounds import Bonds, SqueezeResult, SqueezeRound, bonds_after
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.state.training_state import restore, saved_bonds

LOG_VERSION = 2


class RunFolder:
    """Where a squeezing writes. See :class:`LogFolder`."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self._folder = LogFolder(
            path, settings, resume=resume, what="squeezing", version=LOG_VERSION, states=("state",), check=_Past.of
        )

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def log(self) -> dict[str, Any] | None:
        """What was written last, or None."""
        return self._folder.log

    @property
    def finished(self) -> bool:
        """Whether the run in the log came to its end."""
        return self._folder.finished

    def resume(self, squeezer: Squeezer) -> None:
        """Bring a squeezing to the state that the log names.

        Raises:
            MPOError: the log or the state is damaged, or of a run of another model; nothing has been changed.
        """
        log = self.log
        assert log is not None
        past = _Past.of(log)
        start, bonds = past.start_bonds, squeezer.bonds
        if bonds not in [bonds_after(start, past.rounds[:number]) for number in range(len(past.rounds) + 1)]:
            raise MPOError(
                f"{self.path} is of a run of another model: it started from the bonds {start}, and this model has "
                f"{bonds}; name another folder, or pass resume=False to start afresh"
            )
        given = squeezer.good if bonds == start else None
        good = self._folder.state("state")
        try:
            if saved_bonds(good) != bonds_after(start, past.rounds[: past.best_round]):
                raise MPOError(f"the log is damaged: its cuts do not lead to the bonds of {log['state']}")
            squeezer.resume(good, start, past.rounds, past.reference)
        except MPOError as error:
            raise MPOError(f"{self.path} cannot be resumed: {error}, or pass resume=False to start afresh") from error
        if given is not None and given.model_digest() != past.start_digest:
            restore(given, squeezer.model, squeezer.optimizer, squeezer.scheduler)
            raise MPOError(
                f"{self.path} is of a run of another model: its tensors had other values at the start; give the model "
                "it started from, name another folder, or pass resume=False to start afresh"
            )

    def save(self, squeezer: Squeezer, result: SqueezeResult | None = None) -> None:
        """Replace the log, and with it the state to go back to where it is another than before.

        Raises:
            MPOError: the disk is full or may not be written to; the earlier log and state are still there.
        """
        content: dict[str, Any] = {
            "reference": squeezer.reference,
            "start_bonds": squeezer.start_bonds,
            "start_digest": squeezer.good.model_digest() if self.log is None else self.log["start_digest"],
            "rounds": [part.to_dict() for part in squeezer.rounds],
        }
        if result is not None:
            content["result"] = {key: value for key, value in result.to_dict().items() if key not in content}
        self._folder.write({"state": (squeezer.best_round, squeezer.good)}, content)


@dataclass(frozen=True)
class _Past:
    """What a log says of the run so far."""

    start_bonds: Bonds
    rounds: tuple[SqueezeRound, ...]
    start_digest: str
    reference: float

    @property
    def best_round(self) -> int:
        return sum(entry.accepted for entry in self.rounds)

    @classmethod
    def of(cls, log: Mapping[str, Any]) -> _Past:
        """The same as values, each of its kind and all of one run; else one of ``MISFITS`` is raised."""
        bonds = {name: tuple(entry) for name, entry in log["start_bonds"].items()}
        rounds = tuple(SqueezeRound.from_dict(entry) for entry in log["rounds"])
        digest, reference = log["start_digest"], log["reference"]
        expect(all(counts(bond, 1) for entry in bonds.values() for bond in entry), "start_bonds")
        expect(isinstance(digest, str), "start_digest")
        expect(is_real(reference) and math.isfinite(reference), "reference")
        expect(isinstance(log.get("result", {}), dict), "result")
        now = {name: list(entry) for name, entry in bonds.items()}
        for number, entry in enumerate(rounds, start=1):
            _check_round(entry, number, last=number == len(rounds), bonds=now)
        past = cls(bonds, rounds, digest, reference)
        expect(log["state"] == state_name(past.best_round), "state, which is not that of the last accepted round,")
        return past


def _check_round(entry: Any, number: int, *, last: bool, bonds: dict[str, list[int]]) -> None:
    """Refuse what no round can have been; the cuts of it are carried out on ``bonds``."""
    where = f"of round {number}"
    expect(counts(entry.number, 1) and entry.number == number, f"number {where}")
    expect(isinstance(entry.accepted, bool) and (entry.accepted or last), f"accepted {where}")
    for name in ("value", "gap", "kept", "seconds"):
        expect(is_real(getattr(entry, name)), f"{name} {where}")
    expect(not entry.accepted or math.isfinite(entry.value), f"value {where}")
    expect(entry.loss is None or is_real(entry.loss), f"loss {where}")
    expect(counts(entry.parameters, 0), f"parameters {where}")
    expect(counts(entry.position, 0), f"position {where}")
    expect(isinstance(entry.random, str), f"random {where}")
    expect(all(isinstance(note, str) for note in entry.notes), f"notes {where}")
    for cut in entry.cuts:
        expect(counts(cut.bond, 0) and counts(cut.before, 2) and counts(cut.after, 1), f"cuts {where}")
        expect(is_real(cut.score), f"score of a cut {where}")
        expect(bonds[cut.unit][cut.bond] == cut.before > cut.after, f"cuts {where}")
        bonds[cut.unit][cut.bond] = cut.after
