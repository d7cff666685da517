"""A folder with the log of a run and the states that the log names, consistent whenever the process is killed.

New states are written under new names first, then ``log.json`` is replaced in one step, then what nothing names any
more is deleted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.storage.files import write_whole
from mpo_tn.storage.places import clear_leftovers
from mpo_tn.torch.state.damage import MISFITS, read_json
from mpo_tn.torch.state.training_state import TrainingState, read_state, write_state

WAY_OUT = "name another folder, or pass resume=False to start afresh"

_LOG = "log.json"


class LogFolder:
    """Where a run writes.

    Args:
        path: made if it does not exist; files of others in it are left alone.
        settings: what has to be the same when the run is resumed, as JSON can hold it.
        resume: read the run that is there, if any; else its log is deleted.
        what: what kind of run it is, for messages.
        version: of the log.
        states: the entries of the log that name states.
        check: raises one of ``MISFITS`` for a log whose other entries are not what a run writes.

    Raises:
        MPOError: a file, a log that is damaged or of another version, a run with other settings.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], *, resume: bool, what: str, version: int,
        states: Sequence[str], check: Callable[[Mapping[str, Any]], object],
    ) -> None:  # fmt: skip
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        self._what, self._version, self._states, self._check = what, version, tuple(states), check
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
        file = self.path / _LOG
        try:
            log = read_json(file)
            version, settings = log["format_version"], dict(log["settings"].items())
            names = [log[key] for key in self._states]
        except FileNotFoundError:
            return None
        except (OSError, *MISFITS) as error:
            raise MPOError(f"{file} is not the log of a {self._what} run, or it is damaged: {WAY_OUT}") from error
        if whole_number(version) != self._version:
            raise MPOError(f"{file} has format {version!r} and this version reads {self._version}: {WAY_OUT}")
        for key in [*self.settings, *settings]:
            mine, theirs = self.settings.get(key), settings.get(key)
            if mine != theirs:
                raise MPOError(f"{file} is of a run with {key}={theirs!r}, and this one has {mine!r}: {WAY_OUT}")
        for name in names:
            # What has another name is deleted, so it has to be one of ours.
            if not isinstance(name, str) or re.fullmatch(r"state-\d{6,}", name) is None:
                raise MPOError(f"{file} is damaged, it names the state {name!r}: {WAY_OUT}")
            if not (self.path / name).is_dir():
                raise MPOError(f"{file} names the state {name}, which is missing: {WAY_OUT}")
        try:
            self._check(log)
        except MISFITS as error:
            raise MPOError(f"{file} is damaged ({type(error).__name__}: {error}): {WAY_OUT}") from error
        return log

    @property
    def finished(self) -> bool:
        """Whether the run in the log came to its end."""
        return self.log is not None and "result" in self.log

    def state(self, key: str) -> TrainingState:
        """The state that an entry of the log names.

        Raises:
            MPOError: it is damaged.
        """
        assert self.log is not None
        return read_state(self.path / self.log[key])

    def write(self, states: Mapping[str, tuple[int, TrainingState]], content: Mapping[str, Any]) -> None:
        """Replace the log, and with it the states whose numbers are not those of the log.

        Args:
            states: for each entry that names a state its number, of which its name is made, and the state.
            content: what else is in the log, as JSON can hold it.

        Raises:
            MPOError: the disk is full or may not be written to; the earlier log and states are still there.
        """
        names = {key: state_name(number) for key, (number, _) in states.items()}
        there = set[str]() if self.log is None else {self.log[key] for key in self._states}
        for key, (_, state) in states.items():
            if names[key] not in there:
                write_state(state, self.path / names[key])
                there.add(names[key])
        log: dict[str, Any] = {"format_version": self._version, "settings": self.settings, **names, **content}
        write_whole(self.path / _LOG, (json.dumps(log, indent=1) + "\n").encode())
        self.log = log
        self._tidy()

    def _tidy(self) -> None:
        """Delete states that the log does not name, and what a killed process left half written."""
        named = set[Path]() if self.log is None else {self.path / self.log[key] for key in self._states}
        for path in self.path.glob("state-[0-9]*"):
            if path not in named:
                shutil.rmtree(path, ignore_errors=True)
        for begin in ("state-", _LOG):
            clear_leftovers(self.path, begin)


def state_name(number: int) -> str:
    """The folder of a state."""
    return f"state-{number:06d}"


def expect(so: bool, what: str) -> None:
    """Raise one of ``MISFITS`` unless it is so."""
    if not so:
        raise ValueError(f"{what} is not what a run writes")


def counts(value: Any, least: int) -> bool:
    """Whether it is a whole number of at least ``least``."""
    number = whole_number(value)
    return number is not None and number >= least
