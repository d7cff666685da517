"""The folder of a squeezing run: its log and the state to resume from, consistent whenever the process is killed.

``log.json`` names the folder of the state that belongs to it. A new state is written under a new name first, then the
log is replaced in one step, then what nothing names any more is deleted.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.storage.files import write_whole
from mpo_tn.torch.loops.rounds import Bonds, SqueezeResult, SqueezeRound, bonds_after
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.state.damage import MISFITS, read_json
from mpo_tn.torch.state.training_state import read_state, restore, saved_bonds, write_state

LOG_VERSION = 2

_LOG = "log.json"


class RunFolder:
    """Where a run writes.

    Args:
        path: made if it does not exist; files of others in it are left alone.
        settings: what has to be the same when the run is resumed, as JSON can hold it.
        resume: read the run that is there, if any; else its log is deleted.

    Raises:
        MPOError: a file, a log that is damaged or of another version, a run with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        if self.path.exists() and not self.path.is_dir():
            raise MPOError(f"{self.path} is a file: name a folder for the log and the state")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                (self.path / _LOG).unlink(missing_ok=True)
        except OSError as error:
            raise MPOError(f"{self.path} cannot be written to ({error.strerror}): name another folder") from error
        self.log = self._read()
        self._tidy()

    def _read(self) -> dict[str, Any] | None:
        way_out = "name another folder, or pass resume=False to start afresh"
        file = self.path / _LOG
        try:
            log = read_json(file)
            version, settings, name = log["format_version"], dict(log["settings"].items()), log["state"]
        except FileNotFoundError:
            return None
        except (OSError, *MISFITS) as error:
            raise MPOError(f"{file} is not the log of a squeezing run, or it is damaged: {way_out}") from error
        if version != LOG_VERSION:
            raise MPOError(f"{file} has format {version!r} and this version reads {LOG_VERSION}: {way_out}")
        for key in [*self.settings, *settings]:
            mine, theirs = self.settings.get(key), settings.get(key)
            if mine != theirs:
                raise MPOError(f"{file} is of a run with {key}={theirs!r}, and this one has {mine!r}: {way_out}")
        # What has another name is deleted, so it has to be one of ours.
        if not isinstance(name, str) or re.fullmatch(r"state-\d{6,}", name) is None:
            raise MPOError(f"{file} is damaged, it names the state {name!r}: {way_out}")
        if not (self.path / name).is_dir():
            raise MPOError(f"{file} names the state {name}, which is missing: {way_out}")
        try:
            _Past.of(log)
        except MISFITS as error:
            raise MPOError(f"{file} is damaged ({type(error).__name__}: {error}): {way_out}") from error
        return log

    @property
    def finished(self) -> bool:
        """Whether the run in the log came to its end."""
        return self.log is not None and "result" in self.log

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
        good = read_state(self.path / log["state"])
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
        name = _state_name(squeezer.best_round)
        if self.log is None or self.log["state"] != name:
            write_state(squeezer.good, self.path / name)
        content: dict[str, Any] = {
            "reference": squeezer.reference,
            "start_bonds": squeezer.start_bonds,
            "start_digest": squeezer.good.model_digest() if self.log is None else self.log["start_digest"],
            "rounds": [part.to_dict() for part in squeezer.rounds],
        }
        if result is not None:
            content["result"] = {key: value for key, value in result.to_dict().items() if key not in content}
        log: dict[str, Any] = {"format_version": LOG_VERSION, "settings": self.settings, "state": name, **content}
        write_whole(self.path / _LOG, (json.dumps(log, indent=1) + "\n").encode())
        self.log = log
        self._tidy()

    def _tidy(self) -> None:
        """Delete states that the log does not name, and what a killed process left half written."""
        named = None if self.log is None else self.path / self.log["state"]
        for path in [*self.path.glob("state-[0-9]*"), *self.path.glob(".state-[0-9]*")]:
            if path != named:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(f".{_LOG}.*"):
            path.unlink(missing_ok=True)


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
        _expect(all(_counts(bond, 1) for entry in bonds.values() for bond in entry), "start_bonds")
        _expect(isinstance(digest, str), "start_digest")
        _expect(is_real(reference) and math.isfinite(reference), "reference")
        _expect(isinstance(log.get("result", {}), dict), "result")
        now = {name: list(entry) for name, entry in bonds.items()}
        for number, entry in enumerate(rounds, start=1):
            _check_round(entry, number, last=number == len(rounds), bonds=now)
        past = cls(bonds, rounds, digest, reference)
        _expect(log["state"] == _state_name(past.best_round), "state, which is not that of the last accepted round,")
        return past


def _state_name(best_round: int) -> str:
    """The folder of the state after a round."""
    return f"state-{best_round:06d}"


def _check_round(entry: Any, number: int, *, last: bool, bonds: dict[str, list[int]]) -> None:
    """Refuse what no round can have been; the cuts of it are carried out on ``bonds``."""
    where = f"of round {number}"
    _expect(_counts(entry.number, 1) and entry.number == number, f"number {where}")
    _expect(isinstance(entry.accepted, bool) and (entry.accepted or last), f"accepted {where}")
    for name in ("value", "gap", "kept", "seconds"):
        _expect(is_real(getattr(entry, name)), f"{name} {where}")
    _expect(not entry.accepted or math.isfinite(entry.value), f"value {where}")
    _expect(entry.loss is None or is_real(entry.loss), f"loss {where}")
    _expect(_counts(entry.parameters, 0), f"parameters {where}")
    _expect(_counts(entry.position, 0), f"position {where}")
    _expect(isinstance(entry.random, str), f"random {where}")
    _expect(all(isinstance(note, str) for note in entry.notes), f"notes {where}")
    for cut in entry.cuts:
        _expect(_counts(cut.bond, 0) and _counts(cut.before, 2) and _counts(cut.after, 1), f"cuts {where}")
        _expect(is_real(cut.score), f"score of a cut {where}")
        _expect(bonds[cut.unit][cut.bond] == cut.before > cut.after, f"cuts {where}")
        bonds[cut.unit][cut.bond] = cut.after


def _expect(so: bool, what: str) -> None:
    if not so:
        raise ValueError(f"{what} is not what a run writes")


def _counts(value: Any, least: int) -> bool:
    number = whole_number(value)
    return number is not None and number >= least
