"""The folder of a squeezing run: its log and the state to resume from, consistent whenever the process is killed.

``log.json`` names the folder of the state that belongs to it. A new state is written under a new name first, then the
log is replaced in one step, then what nothing names any more is deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import write_whole
from mpo_tn.torch.loops.rounds import SqueezeResult, SqueezeRound, bonds_after
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.state.training_state import read_state, restore, write_state

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
            log = json.loads(file.read_text(encoding="utf-8"))
            version, settings, name = log["format_version"], log["settings"], log["state"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MPOError(f"{file} is not the log of a squeezing run, or it is damaged: {way_out}") from error
        if version != LOG_VERSION:
            raise MPOError(f"{file} has format {version!r} and this version reads {LOG_VERSION}: {way_out}")
        for key in [*self.settings, *settings]:
            mine, theirs = self.settings.get(key), settings.get(key)
            if mine != theirs:
                raise MPOError(f"{file} is of a run with {key}={theirs!r}, and this one has {mine!r}: {way_out}")
        if not (self.path / name).is_dir():
            raise MPOError(f"{file} names the state {name}, which is missing: {way_out}")
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
        try:
            start = {name: tuple(bonds) for name, bonds in log["start_bonds"].items()}
            rounds = [SqueezeRound.from_dict(part) for part in log["rounds"]]
            digest, reference = str(log["start_digest"]), float(log["reference"])
            known = [bonds_after(start, rounds[:number]) for number in range(len(rounds) + 1)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise MPOError(
                f"the log in {self.path} is damaged ({error!r}): pass resume=False to start afresh"
            ) from error
        bonds = squeezer.bonds
        if bonds not in known:
            raise MPOError(
                f"{self.path} is of a run of another model: it started from the bonds {start}, and this model has "
                f"{bonds}; name another folder, or pass resume=False to start afresh"
            )
        given = squeezer.good if bonds == start else None
        good = read_state(self.path / log["state"])
        try:
            squeezer.resume(good, start, rounds, reference)
        except MPOError as error:
            raise MPOError(f"{self.path} cannot be resumed: {error}, or pass resume=False to start afresh") from error
        if given is not None and given.model_digest() != digest:
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
        name = f"state-{squeezer.best_round:06d}"
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
