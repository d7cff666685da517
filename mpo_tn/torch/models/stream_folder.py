"""The folder of a run that can be killed: what it is a run of, and what is done by now."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.plan import Plan
from mpo_tn.storage.files import write_whole
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.models.stream_unit import UnitRecord, read_unit

FORMAT = "mpo_tn.stream"
VERSION = 1
_MANIFEST = "run.json"
_DECISION = "decision.json"


@dataclass(frozen=True)
class Manifest:
    """What a run is of: equal ones give equal bytes.

    Attributes:
        plan: its digest.
        source: the fingerprint of the checkpoint, see :meth:`mpo_tn.storage.checkpoint.Checkpoint.fingerprint`.
        calibration: a digest of the moments that are used; None where there are none.
        versions: of the libraries.
    """

    plan: str
    source: str
    calibration: str | None
    versions: Mapping[str, str]

    def digest(self) -> str:
        """Of all of it."""
        return bytes_digest([json.dumps(self.to_dict(), sort_keys=True).encode()])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "plan": self.plan,
            "source": self.source,
            "calibration": self.calibration,
            "versions": dict(self.versions),
        }

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What of an earlier run is different, with both values, a phrase each."""
        return [
            f"the {key} of that run is {other.get(key)} and that of this one {value}"
            for key, value in self.to_dict().items()
            if other.get(key) != value
        ]


def plan_digest(plan: Plan) -> str:
    """A digest of what a plan makes of every matrix and of the rest; what it was compared with does not count."""
    content = {key: value for key, value in plan.to_dict().items() if key != "considered"}
    return bytes_digest([json.dumps(content, sort_keys=True).encode()])


class WorkFolder:
    """Finished units in files, beside the manifest of the run that they belong to.

    Args:
        path: of the folder.
        manifest: of this run.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.task = manifest.digest()
        self._is_anchored: bool | None = None

    def open(self) -> None:
        """Make the folder, or find it as an earlier run with the same manifest left it; of one process at a time.

        Raises:
            MPOError: it is of another plan, source or version, or cannot be written.
        """
        self.check()
        try:
            (self.path / "units").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MPOError(f"{self.path} could not be made ({error.strerror}): name another result") from error
        if not (self.path / _MANIFEST).exists():
            write_whole(self.path / _MANIFEST, json.dumps(self.manifest.to_dict(), indent=1).encode())

    def check(self) -> None:
        """Refuse the folder of another run, before any work.

        Raises:
            MPOError: it is so; the message has both fingerprints.
        """
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise MPOError(f"{self.path} is in the way, and it is no folder: move it, or name another result")
        path = self.path / _MANIFEST
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            names = [entry.name for entry in self.path.iterdir()]
            strange = [name for name in names if name != "units" and not name.startswith(f".{_MANIFEST}.")]
            if strange:
                raise MPOError(
                    f"{self.path} is in the way, and it is no folder of a run ({strange[0]} is in it): move it, or "
                    "name another result"
                ) from None
            return
        except (OSError, ValueError) as error:
            raise MPOError(f"{path} is damaged ({error}): delete {self.path} to start from the beginning") from error
        differences = self.manifest.differences(found) if isinstance(found, dict) else ["it is no manifest"]
        if differences:
            raise MPOError(
                f"{self.path} holds an unfinished run that is not this one: {'; '.join(differences)}. Go on with what "
                f"that run was started with, or delete {self.path} to start from the beginning"
            )

    def file(self, number: int, *, anchored: bool | None = None) -> Path:
        """Of a unit, by its place in the plan; if ``anchored``, as it is fitted after those before it.

        By default what was decided for, see :meth:`decide`.
        """
        name = f"{number:06d}.safetensors"
        if anchored is None:
            better = self.path / "anchored" / name
            return better if self.decision is True and better.exists() else self.path / "units" / name
        return self.path / ("anchored" if anchored else "units") / name

    @property
    def decision(self) -> bool | None:
        """Whether units that are fitted after those before them are kept; None if that is not decided."""
        if self._is_anchored is None:
            with suppress(OSError, ValueError, LookupError, TypeError):
                record = json.loads((self.path / _DECISION).read_text(encoding="utf-8"))
                self._is_anchored = bool(record["anchored"]) if record["run"] == self.task else None
        return self._is_anchored

    def decide(self, distances: Mapping[bool, float] | None) -> None:
        """Keep those of the least D, and in doubt units as they are fitted on their own; or take it back (None)."""
        self._is_anchored = None
        if distances is None:
            (self.path / _DECISION).unlink(missing_ok=True)
            return
        record = {
            "run": self.task, "anchored": distances[True] < distances[False],
            "distances": {"alone": distances[False], "anchored": distances[True]},
        }  # fmt: skip
        write_whole(self.path / _DECISION, json.dumps(record, indent=1).encode())

    def moments(self, number: int) -> Path:
        """Of an input, by its place in the calibration."""
        return self.path / "moments" / f"{number:06d}.safetensors"

    def finished(self, number: int, name: str) -> UnitRecord | None:
        """The record of a unit if its file is there and whole, every byte of it."""
        path = self.file(number)
        if not path.exists():
            return None
        try:
            record, _ = read_unit(path, self.task)
        except MPOError:
            return None
        return record if record.layer.name == name else None

    def delete(self) -> None:
        """Once the result is there."""
        shutil.rmtree(self.path, ignore_errors=True)
