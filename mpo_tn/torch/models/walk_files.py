"""What a walk through a model on disk leaves between its steps: hidden states, gradients, moments, a file each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import write_whole
from mpo_tn.storage.tensors import read_tensors, write_tensors
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.stream_unit import array_of, as_tensor, read_moments, write_moments

FORMAT = "mpo_tn.walk"
VERSION = 1


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
            for kind in ("hidden", "gradients", "moments", "parts"):
                (self.path / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MPOError(f"{self.path} could not be made ({error.strerror}): name another result") from error

    def delete(self) -> None:
        """All of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def tensor_file(self, kind: str, place: int, batch: int) -> Path:
        """Of the hidden states that block ``place`` is given, or of the gradients there, in one batch."""
        return self.path / kind / f"{place:04d}-{batch:06d}.safetensors"

    def write(self, kind: str, place: int, batch: int, tensor: torch.Tensor) -> None:
        """Keep hidden states or gradients (batch, length, width), whole or not at all."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        record = {"format": FORMAT, "version": VERSION, "run": self.run, "dtype": dtype, "shape": list(tensor.shape)}
        write_tensors(self.tensor_file(kind, place, batch), {"x": array_of(tensor.cpu())}, record)

    def read(self, kind: str, place: int, batch: int) -> torch.Tensor:
        """What :meth:`write` wrote, on the host.

        Raises:
            StaleWalkError: it is not there, damaged, or of another run.
        """
        path = self.tensor_file(kind, place, batch)
        try:
            arrays, record = read_tensors(path, FORMAT, VERSION)
        except MPOError as error:
            raise StaleWalkError(str(error)) from error
        if record["run"] != self.run:
            raise StaleWalkError(f"{path} is of another run")
        return as_tensor(record["dtype"], tuple(record["shape"]), arrays["x"].reshape(-1).view("uint8"))

    def forget(self, kind: str, place: int) -> None:
        """Delete the files of one place."""
        for path in (self.path / kind).glob(f"{place:04d}-*.safetensors"):
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
                paths.append(self._moments(number, "-own"))
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

    def forget_moments(self, part: PartFiles) -> None:
        """Delete the moments of a part."""
        for path in {path for paths in part.units.values() for path in paths}:
            Path(path).unlink(missing_ok=True)

    def _moments(self, number: int, which: str = "") -> Path:
        return self.path / "moments" / f"{number:06d}{which}.safetensors"

    def _part(self, place: int) -> Path:
        return self.path / "parts" / f"{place + 1:04d}.json"
