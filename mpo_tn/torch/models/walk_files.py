"""What a walk through a model on disk leaves between its steps: hidden states, gradients, moments, a file each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import write_whole
from mpo_tn.storage.tensors import read_tensors, write_tensors
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.stream_unit import array_of, as_tensor, read_moments, write_moments

FORMAT = "mpo_tn.walk"
VERSION = 1
_OWN = "-own"


class StaleWalkError(MPOError):
    """Something of a walk that was begun is missing or damaged: it is begun anew."""


@dataclass(frozen=True)
class PartFiles:
    """Where the moments of the units of one part of a model are.

    Attributes:
        place: the number of the block; -1 is what lies before all of them, and what lies after them comes last.
        units: by name the files that hold together what is known of a unit, see
            :func:`~mpo_tn.torch.models.stream_unit.read_moments`.
        is_old: whether an earlier run wrote them.
    """

    place: int
    units: Mapping[str, tuple[str, ...]]
    is_old: bool = False


class WalkFiles:
    """The folder of a walk.

    Args:
        path: of the folder, which is made.
        numbers: of units, by name, that their files are named by.
        run: a digest of what it is a walk of.
    """

    def __init__(self, path: Path, numbers: Mapping[str, int], run: str) -> None:
        self.path, self.numbers, self.run = path, numbers, run

    def open(self) -> None:
        """Make the folders.

        Raises:
            MPOError: it cannot be written to.
        """
        try:
            for kind in ("moments", "parts"):
                (self.path / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MPOError(f"{self.path} could not be made ({error.strerror}): name another result") from error

    def delete(self) -> None:
        """All of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def there(self, kind: str, place: int, batch: int) -> bool:
        """Whether :meth:`write` wrote that."""
        return self._tensors(kind, place, batch).exists()

    def write(self, kind: str, place: int, batch: int, tensor: torch.Tensor) -> None:
        """Keep hidden states or gradients (batch, length, width) before block ``place``, whole or not at all."""
        self.write_all(kind, place, batch, {"x": [tensor]})

    def read(self, kind: str, place: int, batch: int) -> torch.Tensor:
        """What :meth:`write` wrote, on the host.

        Raises:
            StaleWalkError: it is not there, damaged, or of another run.
        """
        return self.read_all(kind, place, batch)["x"][0]

    def write_all(self, kind: str, place: int, batch: int, tensors: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """The same of several tensors under each of several names."""
        path = self._tensors(kind, place, batch)
        path.parent.mkdir(exist_ok=True)
        listed = [(name, tensor.cpu()) for name, own in tensors.items() for tensor in own]
        entries = [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in listed]
        record = {"format": FORMAT, "version": VERSION, "run": self.run, "entries": entries}
        write_tensors(path, {f"{k:06d}": array_of(tensor) for k, (_, tensor) in enumerate(listed)}, record)

    def read_all(self, kind: str, place: int, batch: int) -> dict[str, list[torch.Tensor]]:
        """What :meth:`write_all` wrote.

        Raises:
            StaleWalkError: as :meth:`read`.
        """
        path = self._tensors(kind, place, batch)
        try:
            arrays, record = read_tensors(path, FORMAT, VERSION)
        except MPOError as error:
            raise StaleWalkError(str(error)) from error
        if record["run"] != self.run:
            raise StaleWalkError(f"{path} is of another run")
        found: dict[str, list[torch.Tensor]] = {}
        for k, (name, dtype, shape) in enumerate(record["entries"]):
            data = arrays[f"{k:06d}"].reshape(-1).view(np.uint8)
            found.setdefault(name, []).append(as_tensor(dtype, tuple(shape), data))
        return found

    def forget(self, kind: str, place: int) -> None:
        """Delete the files of one place."""
        for path in (self.path / kind).glob(f"{place + 1:04d}-*.safetensors"):
            path.unlink()

    def keep_part(self, place: int, units: Iterable[str], found: Calibration | None,
                  outers: Mapping[str, torch.Tensor]) -> PartFiles:  # fmt: skip
        """Write what is known of the units of a part, distinct inputs once, and then that all of it is there."""
        files: dict[str, tuple[str, ...]] = {}
        for unit in units:
            number = self.numbers[unit]
            key = None if found is None else found.inputs.get(unit)
            paths: list[Path] = []
            if found is not None and key is not None:
                paths.append(self._moments(self.numbers[key]))
                if key == unit:
                    write_moments(paths[-1], found.moments[key])
            rows = None if found is None else found.rows.get(unit)
            outer = outers.get(unit)
            if rows is not None or outer is not None or not paths:
                paths.append(self._moments(number, _OWN))
                tokens = 0 if rows is None else int(rows.sum())
                write_moments(paths[-1], Moments(tokens, outer=outer, rows=rows))
            files[unit] = tuple(str(path.resolve()) for path in paths)
        record = {"format": FORMAT, "version": VERSION, "run": self.run, "units": files}
        write_whole(self._part(place), json.dumps(record, indent=1).encode())
        return PartFiles(place, files)

    def part(self, place: int) -> PartFiles | None:
        """What :meth:`keep_part` wrote; None if it was not come to.

        Raises:
            StaleWalkError: it is damaged, or of another run.
        """
        path = self._part(place)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if (record["format"], record["run"]) != (FORMAT, self.run):
                raise ValueError("it is of another run")
            units = {str(unit): tuple(map(str, paths)) for unit, paths in record["units"].items()}
            return PartFiles(place, units, is_old=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise StaleWalkError(f"{path} is damaged ({error})") from error

    @staticmethod
    def check_moments(paths: Iterable[str]) -> None:
        """Read the moments of a unit that an earlier run left.

        Raises:
            StaleWalkError: they are not there or damaged.
        """
        try:
            read_moments([*paths])
        except MPOError as error:
            raise StaleWalkError(str(error)) from error

    def forget_moments(self, part: PartFiles, *, but_own: bool = False) -> None:
        """Delete the moments of a part; or only what its units are given, and not what is their own."""
        for path in {path for paths in part.units.values() for path in paths}:
            if not (but_own and _is_own(path)):
                Path(path).unlink(missing_ok=True)

    @staticmethod
    def own_of(paths: Iterable[str]) -> tuple[str, ...]:
        """Those files of a unit that it shares with no other."""
        return tuple(path for path in paths if _is_own(path))

    def keep_given(self, unit: str, known: Moments) -> str:
        """Write what a unit is given once those before it are changed; the name of the file."""
        path = self._moments(self.numbers[unit], "-given")
        write_moments(path, known)
        return str(path.resolve())

    def step_is_done(self, step: str) -> bool:
        """Whether :meth:`keep_step` was called."""
        return self._step(step).exists()

    def keep_step(self, step: str) -> None:
        """Remember that a step is done."""
        write_whole(self._step(step), self.run.encode())

    def _step(self, step: str) -> Path:
        return self.path / "parts" / f"{step}.done"

    def _tensors(self, kind: str, place: int, batch: int) -> Path:
        return self.path / kind / f"{place + 1:04d}-{batch:06d}.safetensors"

    def _moments(self, number: int, which: str = "") -> Path:
        return self.path / "moments" / f"{number:06d}{which}.safetensors"

    def _part(self, place: int) -> Path:
        return self.path / "parts" / f"{place + 1:04d}.json"


def _is_own(path: str) -> bool:
    return Path(path).stem.endswith(_OWN)
