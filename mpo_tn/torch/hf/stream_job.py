"""All that is known of a streamed run before the first matrix is read: what is where, and what becomes of it."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.effort import Effort, effort_of
from mpo_tn.planning.entries import ACTIVATION
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.storage.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from mpo_tn.storage.pieces import StoredPieces
from mpo_tn.storage.places import name_beside
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.hf.assembling import Piece
from mpo_tn.torch.hf.folder import empty_model
from mpo_tn.torch.hf.quantizer import attach
from mpo_tn.torch.hf.record import NAME as RECORD_NAME
from mpo_tn.torch.hf.record import altered, read_record
from mpo_tn.torch.hf.sentinel import sentinels
from mpo_tn.torch.hf.snapshot import Names, core_prefix, local_folder, read_names
from mpo_tn.torch.layers.parameter import dense_key
from mpo_tn.torch.models.anchoring import ANCHOR, ROUNDS
from mpo_tn.torch.models.calibration import SAMPLED, Calibration, Fingerprint
from mpo_tn.torch.models.compress import empty_modules, report_of, specs_of
from mpo_tn.torch.models.coverage import matrix_numbers
from mpo_tn.torch.models.decide import plan, units_of_plan
from mpo_tn.torch.models.feeding import entries_of
from mpo_tn.torch.models.places import put
from mpo_tn.torch.models.report import CompressionReport
from mpo_tn.torch.models.samples import Samples, is_biased
from mpo_tn.torch.models.stream_folder import Manifest, WorkFolder, plan_digest
from mpo_tn.torch.models.stream_unit import UnitRecord, UnitTask, as_tensor, versions, write_moments
from mpo_tn.torch.models.survey import DenseUnit
from mpo_tn.torch.models.units import count_parameters


class Job:
    """Everything that is known of a run before the first matrix is read."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        names: Names,
        decided: Plan,
        out: Path,
        known: Calibration | Samples | None,
        anchored: bool | None,
    ) -> None:
        self.model, self.checkpoint, self.names, self.decided, self.out = model, checkpoint, names, decided, out
        self.pairs = units_of_plan(model, decided)
        in_metric = [unit for planned, unit in self.pairs if planned.metric == ACTIVATION]
        if in_metric and known is None:
            raise MPOError(
                f"the plan fits {in_metric[0].name} to what its layer is given, and nothing is known of that: give "
                "text (--texts FILE), or a saved Calibration of the dense model (--calibration FILE)"
            )
        self.calibration = known if in_metric and isinstance(known, Calibration) else None
        self.text = known if in_metric and isinstance(known, Samples) else None
        if anchored and isinstance(known, Calibration):
            raise MPOError("anchored=True goes through the model block by block: give batches, not moments alone")
        self.anchored = anchored is not False and self.text is not None
        if self.calibration is not None:
            self.calibration.check_print(self._fingerprint())
        owners = dict(model.named_parameters(remove_duplicate=False))
        self._places: dict[nn.Parameter, tuple[str, StoredTensor | StoredPieces]] = {
            owners[name]: (name, stored) for name, stored in names.whole.items() if name in owners
        }
        for _, unit in self.pairs:
            if unit.weight not in self._places:
                raise MPOError(
                    f"{dense_key(unit.name)} is not in the checkpoint {checkpoint.folder} as it is, and what "
                    "transformers makes it of is not only stacked, joined or transposed: leave it out (--exclude), or "
                    "compress the model in memory"
                )
        self.source = checkpoint.fingerprint()
        made_of: str | None = None
        if self.calibration is not None:
            made_of = _calibration_digest(self.calibration, in_metric)
        elif self.text is not None:
            made_of = _text_digest(self.text, anchored=self.anchored)
        manifest = Manifest(plan_digest(decided), self.source, made_of, versions())
        self.work = WorkFolder(out.with_name(name_beside(out, ".work")), manifest)

    @classmethod
    def of(
        cls, source: str | Path, out: Path, config: MPOConfig | Plan, known: Calibration | Samples | None,
        *, anchored: bool | None = None,
    ) -> Job:  # fmt: skip
        """Read the headers and decide.

        Raises:
            MPOError: as :func:`compress_folder`.
        """
        folder = local_folder(source)
        if out.resolve().is_relative_to(folder.resolve()):
            raise MPOError(f"{out} lies in the source {folder}: name another folder")
        if folder.resolve().is_relative_to(out.resolve()):
            raise MPOError(f"{out} holds the input {folder}: name another folder")
        checkpoint = open_checkpoint(folder)
        model = empty_model(folder)
        model.config.name_or_path = str(source)  # and not where the files of a hub name lie: it is in the card
        names = read_names(model, checkpoint)
        if isinstance(config, Plan):
            decided = config
        elif config.has_budget or (config.shares_keep and known is not None):
            raise MPOError(
                "a budget is spent by what the model does on text, which needs the whole model in memory: make a "
                "plan with "
                "mpo-tn plan --out FILE on a machine that holds it, and carry it out here with --plan FILE"
            )
        else:
            decided = plan(model, config, calibration=known)
        return cls(model, checkpoint, names, decided, out, known, anchored)

    def effort(self, number: int) -> Effort:
        """What a unit costs."""
        planned, unit = self.pairs[number]
        return effort_of(planned, self._places[unit.weight][1].itemsize)

    def source_bytes(self, number: int) -> int:
        """Of the dense weight of a unit."""
        return self._places[self.pairs[number][1].weight][1].nbytes

    def longest_first(self, number: int) -> tuple[float, int]:
        """To sort by."""
        return -self.effort(number).seconds, number

    @property
    def on_text(self) -> dict[str, int]:
        """Numbers of the units, by name, whose moments are made of text on the way."""
        if self.text is None:
            return {}
        return {unit.name: k for k, (planned, unit) in enumerate(self.pairs) if planned.metric == ACTIVATION}

    def task(self, number: int, moments: tuple[str, ...] | None = None, *, anchored: bool = False) -> UnitTask:
        """What a worker needs; ``moments`` are files of what is known of its layer, if that is not a calibration.

        If ``anchored`` they are of what it is given once those before it are changed.
        """
        planned, unit = self.pairs[number]
        biases: dict[str, tuple[StoredTensor | StoredPieces, str]] = {}
        if planned.metric == ACTIVATION:
            if self.calibration is not None:
                path = self.work.moments(number)
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    write_moments(path, _known(self.calibration, unit))
                moments = (str(path.resolve()),)
            biases = {} if not is_biased(unit) else dict(self._biases(unit))
        found = UnitTask(
            planned, _light(unit), self._places[unit.weight][1], biases,
            str(self.work.file(number, anchored=anchored).resolve()), moments, versions(), self.work.task,
        )  # fmt: skip
        return replace(found, anchor=ANCHOR, rounds=ROUNDS) if anchored else found

    def _biases(self, unit: DenseUnit) -> list[tuple[str, tuple[StoredTensor | StoredPieces, str]]]:
        found: dict[str, tuple[StoredTensor | StoredPieces, str]] = {}
        for module in unit.modules:
            bias = module.bias
            assert isinstance(bias, nn.Parameter)
            name, stored = self._places[bias]
            found[name] = stored, str(bias.dtype).removeprefix("torch.")
        return list(found.items())

    def records(self) -> dict[int, UnitRecord]:
        """Of units that are done, by their place in the plan; every byte of them is looked at."""
        found = {number: self.work.finished(number, unit.name) for number, (_, unit) in enumerate(self.pairs)}
        return {number: record for number, record in found.items() if record is not None}

    def check_source(self) -> None:
        """Refuse a checkpoint that is another by now.

        Raises:
            MPOError: it is so.
        """
        if open_checkpoint(self.checkpoint.folder).fingerprint() != self.source:
            raise MPOError(
                f"{self.checkpoint.folder} was changed while it was read: start again, and let nothing write to it"
            )

    @property
    def bytes_beside(self) -> int:
        """Of what is not a matrix of the plan, as it is stored."""
        in_units = {key for _, unit in self.pairs for key in self._places[unit.weight][1].keys}
        left = [*self.names.stored.values(), *self.names.kept.values()]
        return sum(stored.nbytes for stored in left if stored.key not in in_units)

    @property
    def result_bytes(self) -> int:
        """Of the tensors of the result, at most."""
        modules = {
            names[0]: spec
            for planned, unit in self.pairs
            for names, spec in zip(unit.names, specs_of(unit, planned.spec), strict=True)
        }
        record = sum(self.sentinels(modules).sizes.values()) if modules else 0
        return sum(planned.bytes for planned, _ in self.pairs) + self.bytes_beside + record

    def bytes_to_write(self, records: Mapping[int, UnitRecord]) -> int:
        """Units that are missing, with the moments they are fitted by, and the result."""
        missing = [number for number in range(len(self.pairs)) if number not in records]
        units = sum(self.pairs[number][0].bytes for number in missing)
        return units + sum(self._moment_bytes(number) for number in missing) + self.result_bytes

    def _moment_bytes(self, number: int) -> int:
        """Of the moments that a unit is fitted by, if they are still to be written for the workers."""
        planned, unit = self.pairs[number]
        if planned.metric != ACTIVATION or self.calibration is None or self.work.moments(number).exists():
            return 0
        known = vars(_known(self.calibration, unit)).values()
        return sum(part.nbytes for part in known if isinstance(part, torch.Tensor))

    def check_space(self, records: Mapping[int, UnitRecord], meanwhile: int = 0) -> None:
        """Refuse a disk on which there is no room for the result, before anything is done.

        Args:
            records: of units that are done.
            meanwhile: bytes of what waits in files until it is used.

        Raises:
            MPOError: it is so.
        """
        there = next(folder for folder in self.out.resolve().parents if folder.exists())
        needed, free = self.bytes_to_write(records) + meanwhile, shutil.disk_usage(there).free
        if needed > free:
            raise MPOError(
                f"{self.out.parent} has {free / 1e9:.3g} GB free, and {needed / 1e9:.3g} GB are needed for the "
                f"matrices and the result{', and what is made of text meanwhile' if meanwhile else ''}: free some "
                f"space or name another folder"
            )

    def pieces(self, records: list[UnitRecord]) -> list[Piece]:
        """The tensors of the result, in the order of the checkpoint, and the record; the model is dense as yet."""
        numbers = {unit.weight: number for number, (_, unit) in enumerate(self.pairs)}
        owners = dict(self.model.named_parameters(remove_duplicate=False))
        moved = {
            key.removeprefix("bias."): number
            for number, record in enumerate(records)
            for key in record.tensors
            if key.startswith("bias.")
        }
        pieces: list[Piece] = []
        kept = dict(self.names.kept)
        for name, stored in self.names.whole.items():
            number = numbers.get(owners[name]) if name in owners else None
            if number is not None and records[number].dense is None:
                for key in stored.keys if isinstance(stored, StoredPieces) else ():
                    del kept[key]
                pieces.append(self._unit_piece(number, records[number], stored))
            elif isinstance(stored, StoredPieces):
                continue  # what it is made of stays as it is
            elif name in moved:
                own = f"bias.{name}"
                pieces.append(
                    Piece.of_unit(self.work.file(moved[name]), self.work.task, {own: stored.key}, records[moved[name]])
                )
            else:
                pieces.append(Piece.of_source(stored, self.names.dtypes[name]))
        dtype = self.model.dtype
        pieces += [Piece.of_source(stored, dtype) for stored in kept.values()]
        modules = {name: spec for own in records if own.dense is None for name, spec in own.specs.items()}
        return [*pieces, self.sentinels(modules)] if modules else pieces

    def replace(self, records: list[UnitRecord]) -> CompressionReport:
        """Put empty MPO modules into the model, as ``compress`` puts full ones, and give its report."""
        before, matrices = count_parameters(self.model), matrix_numbers(self.model)
        larger = {record.layer.name: record.dense for record in records if record.dense is not None}
        modules: dict[str, nn.Module] = {}
        for (_, unit), record in zip(self.pairs, records, strict=True):
            if record.dense is None:
                modules |= empty_modules(unit, record.layer.spec)
        if modules:
            put(self.model, modules)
            attach(self.model, self.decided.config)
        layers = [record.layer for record in records if record.dense is None]
        return report_of(self.model, self.decided, layers, larger, before, matrices)

    def sentinels(self, modules: dict[str, ModuleSpec]) -> Piece:
        """What stops whoever has not imported this package, and the record of these modules."""
        unsaved: set[str] = set(self.model._keys_to_ignore_on_save or ())
        owned = [unit for _, unit in self.pairs if unit.name in modules]
        in_cores = {dense_key(name) for unit in owned for name in unit.all_names}
        found = sentinels(self.model, modules, [name for name in self.names.dtypes if name not in unsaved | in_cores])
        # As a checkpoint calls the weight: transformers renames both.
        stored, written = self.names.whole, dict[str, torch.Tensor]()
        for key, tensor in found.items():
            place = stored.get(key)
            if isinstance(place, StoredPieces):
                written |= {part.tensor.key: tensor.new_empty(part.emptied) for part in place.pieces}
            else:
                written[place.key if place else key] = tensor
        return Piece.of_tensors(written)

    def _unit_piece(self, number: int, record: UnitRecord, stored: StoredTensor | StoredPieces) -> Piece:
        prefix = core_prefix(self.model, self.pairs[number][1].name, stored)
        keys = {key: f"{prefix}.{key}" for key in record.tensors if key.startswith("cores.")}
        return Piece.of_unit(self.work.file(number), self.work.task, keys, record)

    def record(self, records: list[UnitRecord]) -> dict[str, Any]:
        """What the result says of how it was made."""
        return {
            "run": self.work.manifest.to_dict(),
            "plan": {key: value for key, value in self.decided.to_dict().items() if key != "considered"},
            "units": [record.to_dict() for record in records],
        }

    def finished_result(self) -> list[UnitRecord] | None:
        """The units of a result of this very run that is there already, None if there is none.

        Raises:
            MPOError: it was altered since.
        """
        if not (self.out / RECORD_NAME).is_file():
            return None
        record = read_record(self.out)
        if record["run"] != self.work.manifest.to_dict():
            return None
        found = altered(self.out, record)
        if found:
            raise MPOError(
                f"{self.out} is the result of this run and was altered since ({found[0]}): see mpo-tn verify, or pass "
                "--overwrite to write it again"
            )
        return [UnitRecord.from_dict(unit) for unit in record["units"]]

    def _fingerprint(self) -> Fingerprint:
        """What :meth:`Fingerprint.of` gives of the loaded model."""
        found: dict[str, tuple[str, tuple[int, ...], str]] = {}
        whole = self.names.whole
        for name, parameter in self.model.named_parameters():
            if name not in whole:
                raise MPOError(
                    f"transformers makes {name} of other tensors of {self.checkpoint.folder} in a way that is unknown "
                    "here, so that it cannot be told whether the calibration is of this model: give text (--texts)"
                )
            stored = whole[name]
            entries = stored.sample(SAMPLED)
            sample = as_tensor(stored.dtype, (len(entries),), entries.reshape(-1), parameter.dtype)
            dtype = str(parameter.dtype).removeprefix("torch.")
            found[name] = (dtype, tuple(parameter.shape), bytes_digest([entries_of(sample)]))
        return Fingerprint(type(self.model).__name__, found, "")


def _light(unit: DenseUnit) -> DenseUnit:
    """The same with modules that hold no more than a task asks of them, to be sent to other processes."""
    modules: list[nn.Module] = []
    for module in unit.modules:
        light = nn.Module()
        for name in ("bias", "padding_idx"):
            setattr(light, name, getattr(module, name, None))
        modules.append(light)
    return replace(unit, modules=tuple(modules))


def _known(calibration: Calibration, unit: DenseUnit) -> Any:
    known = calibration.of(unit.name)
    if known is None:
        raise MPOError(
            f"{unit.name}: no token of the calibration reached it: leave it out of the plan, or calibrate on more"
        )
    return known


def _text_digest(text: Samples, *, anchored: bool) -> str:
    parts = [f"anchored={anchored}".encode()]
    for batches in (text.batches, text.held_back):
        for batch in batches:
            for name, value in sorted(batch.items()):
                parts.append(f"{name} {getattr(value, 'shape', '')}".encode())
                parts.append(bytes(entries_of(value)) if isinstance(value, torch.Tensor) else repr(value).encode())
    return bytes_digest(parts)


def _calibration_digest(calibration: Calibration, units: list[DenseUnit]) -> str:
    parts: list[bytes | memoryview] = []
    for unit in units:
        known = _known(calibration, unit)
        for name, value in sorted(vars(known).items()):
            parts.append(f"{unit.name} {name}".encode())
            parts.append(
                value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()
            )
    return bytes_digest(parts)
