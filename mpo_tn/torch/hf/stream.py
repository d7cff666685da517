"""compress_folder: a checkpoint of any size made into a compressed folder, one matrix in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.effort import Effort, effort_of
from mpo_tn.planning.entries import ACTIVATION
from mpo_tn.planning.plan import Plan
from mpo_tn.progress import Progress, doing, silent
from mpo_tn.storage.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.hf.assembling import RECORD, Piece, altered_tensors, read_record, write_result
from mpo_tn.torch.hf.folder import check_model_target, empty_model
from mpo_tn.torch.hf.snapshot import Names, core_prefix, local_folder, read_names
from mpo_tn.torch.models.calibration import SAMPLED, Calibration, Fingerprint
from mpo_tn.torch.models.decide import plan, units_of_plan
from mpo_tn.torch.models.feeding import entries_of
from mpo_tn.torch.models.report import CompressionReport
from mpo_tn.torch.models.samples import is_biased
from mpo_tn.torch.models.stream import run_units
from mpo_tn.torch.models.stream_folder import Manifest, WorkFolder, plan_digest
from mpo_tn.torch.models.stream_unit import UnitRecord, UnitTask, as_tensor, versions, write_moments
from mpo_tn.torch.models.survey import DenseUnit

SHARD_BYTES = 2 * 10**9
"""Of the files of the result: one at a time is in memory."""


def compress_folder(
    source: str | Path,
    out: str | Path,
    config: MPOConfig | Plan,
    *,
    calibration: Calibration | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a model folder into another without ever loading the model.

    Args:
        source: a folder of safetensors files with ``config.json``, or a name on the hub.
        out: where the compressed model goes. Finished matrices wait in ``<out>.work`` beside it, until all are there.
        config: as for :func:`mpo_tn.torch.compress`, but what needs text cannot be: a budget, batches. Make a plan first.
        calibration: of the dense model, for a plan that fits matrices in the metric of their layers.
        workers: processes, of one BLAS thread each.
        executor: any of ``concurrent.futures`` in place of them, Dask's and MPI's too; its workers must see the folders
            under the same paths.
        shard_bytes: of the files of the result.
        overwrite: replace an earlier result.
        progress: told of every matrix.

    Returns:
        The report that ``compress`` gives.

    Guarantee (stream-same-model): the cores, and all other tensors, are bit for bit those that :func:`mpo_tn.torch.compress`
    in one thread gives of the loaded model, with the moments of the same calibration and ``anchored=False``.
    Guarantee (stream-any-workers): every byte of the result is the same for any number of workers and threads, any executor,
    and however often it was killed and run again, for the same versions and kind of machine.
    Guarantee (stream-resumes): after a kill at any moment, or an error, the same call does only what is not done yet. Of
    another plan, source, calibration or versions it is refused, with both fingerprints.
    Guarantee (stream-memory): a process holds one matrix at a time while matrices are done, and one file of the result
    while that is written.

    Raises:
        MPOError: the folder is damaged, incomplete, changed meanwhile or no dense model; too little space; what needs text;
            a matrix that cannot be done, by name, and whatever is done by then is kept.
    """
    if whole_number(workers) is None or workers < 1:
        raise MPOError(f"workers={workers!r} must be a whole number of at least 1")
    if whole_number(shard_bytes) is None or shard_bytes < 1:
        raise MPOError(f"shard_bytes={shard_bytes!r} must be a whole number of at least 1")
    tell = progress or silent
    tell(0, 1, "looking at the checkpoint")
    job = Job.of(source, Path(out), config, calibration)
    finished = job.finished_result()
    if finished is not None and not overwrite:
        job.work.delete()
        return job.report(finished)
    check_model_target(Path(out), job.checkpoint.folder, overwrite=overwrite)
    with job.work.opened():
        records = job.records()
        job.check_space(records)
        missing = [number for number in range(len(job.pairs)) if number not in records]
        tasks = [job.task(number) for number in sorted(missing, key=job.longest_first)]
        run_units(
            tasks, workers=workers, executor=executor, progress=doing("compressing", tell), total=len(job.pairs)
        )
        records = job.records()
        ordered = [records[number] for number in range(len(job.pairs))]
        tell(0, 1, "writing the model")
        job.check_source()
        pieces, modules = job.pieces(ordered)
        write_result(
            job.model, job.checkpoint.folder, Path(out), pieces, modules, job.decided, job.record(ordered), shard_bytes
        )
        tell(1, 1, "writing the model")
    job.work.delete()
    return job.report(ordered)


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        units: matrices in all, and
        done: those that an earlier run has finished.
        bytes_read: of the source.
        bytes_written: of finished matrices and of the result together; so much space is needed.
        seconds: with so many workers as asked for, by the cost law, on a machine such as it was measured on.
        memory: the most that one worker holds at a time, in bytes, above 300 MB for the libraries.
    """

    units: int
    done: int
    bytes_read: int
    bytes_written: int
    seconds: float
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return vars(self).copy()


def dry_run(
    source: str | Path,
    out: str | Path,
    config: MPOConfig | Plan,
    *,
    calibration: Calibration | None = None,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> DryRun:
    """What :func:`compress_folder` would read and write, how long and in how much memory; nothing is written.

    Raises:
        MPOError: as :func:`compress_folder`, as far as it can be known by then.
    """
    job = Job.of(source, Path(out), config, calibration)
    job.work.check()
    finished = job.finished_result()
    records = job.records() if finished is None else dict(enumerate(finished))
    left = [job.effort(number) for number in range(len(job.pairs)) if number not in records]
    memory = max((effort.memory for effort in left), default=0)
    return DryRun(
        len(job.pairs),
        len(records),
        0 if finished else sum(effort.bytes_read for effort in left) + job.bytes_beside,
        0 if finished else job.bytes_to_write(records),
        0.0 if finished else finish_time([effort.seconds for effort in left], workers),
        max(memory, min(shard_bytes, job.result_bytes)),
    )


def finish_time(seconds: list[float], workers: int) -> float:
    """When the last of several jobs ends that are given to so many workers, the longest first.

    >>> finish_time([3, 3, 2, 2, 2], 2)
    7.0
    """
    ends = [0.0] * workers
    for each in sorted(seconds, reverse=True):
        ends.sort()
        ends[0] += each
    return max(ends)


class Job:
    """Everything that is known of a run before the first matrix is read."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, names: Names, decided: Plan, out: Path, calibration: Calibration | None
    ) -> None:
        self.model, self.checkpoint, self.names, self.decided, self.out = model, checkpoint, names, decided, out
        self.pairs = units_of_plan(model, decided)
        in_metric = [unit for planned, unit in self.pairs if planned.metric == ACTIVATION]
        if in_metric and calibration is None:
            raise MPOError(
                f"the plan fits {in_metric[0].name} to what its layer is given, and nothing is known of that: give a saved "
                "Calibration of the dense model (--calibration FILE); text itself needs the whole model in memory"
            )
        self.calibration = calibration if in_metric else None
        if self.calibration is not None:
            self.calibration.check_print(self._fingerprint())
        owners = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._places: dict[nn.Parameter, tuple[str, StoredTensor]] = {
            owners[name]: (name, stored) for name, stored in names.stored.items() if name in owners
        }
        for _, unit in self.pairs:
            if unit.weight not in self._places:
                raise MPOError(
                    f"{unit.name}.weight is not in the checkpoint {checkpoint.folder} as it is, transformers makes it of "
                    "other tensors: load the model and save it again, or compress it in memory"
                )
        self.source = checkpoint.fingerprint()
        known = None if self.calibration is None else _calibration_digest(self.calibration, in_metric)
        manifest = Manifest(plan_digest(decided), self.source, known, versions())
        self.work = WorkFolder(out.parent / f"{out.name}.work", manifest)

    @classmethod
    def of(cls, source: str | Path, out: Path, config: MPOConfig | Plan, calibration: Calibration | None) -> Job:
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
        names = read_names(model, checkpoint)
        if isinstance(config, Plan):
            decided = config
        elif config.has_budget or (config.shares_keep and calibration is not None):
            raise MPOError(
                "a budget is spent by what the model does on text, which needs the whole model in memory: make a plan with "
                "mpo-tn plan --out FILE on a machine that holds it, and carry it out here with --plan FILE"
            )
        else:
            decided = plan(model, config, calibration=calibration)
        return cls(model, checkpoint, names, decided, out, calibration)

    def effort(self, number: int) -> Effort:
        """What a unit costs."""
        planned, unit = self.pairs[number]
        return effort_of(planned, self._places[unit.weight][1].itemsize)

    def longest_first(self, number: int) -> tuple[float, int]:
        """To sort by."""
        return -self.effort(number).seconds, number

    def task(self, number: int) -> UnitTask:
        """What a worker needs."""
        planned, unit = self.pairs[number]
        moments: str | None = None
        biases: dict[str, tuple[StoredTensor, str]] = {}
        if planned.metric == ACTIVATION and self.calibration is not None:
            path = self.work.moments(number)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                write_moments(path, _known(self.calibration, unit))
            moments = str(path.resolve())
            biases = {} if not is_biased(unit) else dict(self._biases(unit))
        return UnitTask(
            planned, unit, self._places[unit.weight][1], biases, str(self.work.file(number).resolve()), moments, versions(),
            self.work.task,
        )  # fmt: skip

    def _biases(self, unit: DenseUnit) -> list[tuple[str, tuple[StoredTensor, str]]]:
        found: dict[str, tuple[StoredTensor, str]] = {}
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
            raise MPOError(f"{self.checkpoint.folder} was changed while it was read: start again, and let nothing write to it")

    @property
    def bytes_beside(self) -> int:
        """Of what is not a matrix of the plan, as it is stored."""
        in_units = {self._places[unit.weight][1].key for _, unit in self.pairs}
        left = [*self.names.stored.values(), *self.names.kept.values()]
        return sum(stored.nbytes for stored in left if stored.key not in in_units)

    @property
    def result_bytes(self) -> int:
        """Of the tensors of the result, at most."""
        return sum(planned.bytes for planned, _ in self.pairs) + self.bytes_beside

    def bytes_to_write(self, records: Mapping[int, UnitRecord]) -> int:
        """Units that are missing, and the result."""
        return sum(pair[0].bytes for number, pair in enumerate(self.pairs) if number not in records) + self.result_bytes

    def check_space(self, records: Mapping[int, UnitRecord]) -> None:
        """Refuse a disk on which there is no room for the result, before anything is done.

        Raises:
            MPOError: it is so.
        """
        needed, free = self.bytes_to_write(records), shutil.disk_usage(self.work.path).free
        if needed > free:
            raise MPOError(
                f"{self.out.parent} has {free / 1e9:.3g} GB free, and {needed / 1e9:.3g} GB are needed for the matrices and the "
                "result: free some space or name another folder"
            )

    def pieces(self, records: list[UnitRecord]) -> tuple[list[Piece], dict[str, Any]]:
        """The tensors of the result in the order of the checkpoint, and the structure of all modules."""
        numbers = {unit.weight: number for number, (_, unit) in enumerate(self.pairs)}
        owners = {name: parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        moved = {
            key.removeprefix("bias."): number
            for number, record in enumerate(records)
            for key in record.tensors
            if key.startswith("bias.")
        }
        pieces: list[Piece] = []
        for name, stored in self.names.stored.items():
            number = numbers.get(owners.get(name), None) if name in owners else None
            if number is not None:
                pieces.append(self._unit_piece(number, records[number], stored))
            elif name in moved:
                own = f"bias.{name}"
                pieces.append(
                    Piece.of_unit(self.work.file(moved[name]), self.work.task, {own: stored.key}, records[moved[name]])
                )
            else:
                pieces.append(Piece.of_source(stored, self.names.dtypes[name]))
        dtype = self.model.dtype
        pieces += [Piece.of_source(stored, dtype) for stored in self.names.kept.values()]
        return pieces, {name: spec for record in records for name, spec in record.specs.items()}

    def _unit_piece(self, number: int, record: UnitRecord, stored: StoredTensor) -> Piece:
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
        if not (self.out / RECORD).is_file():
            return None
        record = read_record(self.out)
        if record["run"] != self.work.manifest.to_dict():
            return None
        altered = altered_tensors(self.out, record)
        if altered:
            raise MPOError(
                f"{self.out} is the result of this run and was altered since ({altered[0]}): see mpo-tn verify, or pass "
                "--overwrite to write it again"
            )
        return [UnitRecord.from_dict(unit) for unit in record["units"]]

    def report(self, records: list[UnitRecord]) -> CompressionReport:
        """As ``compress`` gives it."""
        layers = tuple(record.layer for record in records)
        before = self.decided.parameters_before
        after = before - self.decided.matrix_before + sum(layer.spec.num_parameters for layer in layers)
        return CompressionReport(layers, self.decided.skipped, before, after)

    def _fingerprint(self) -> Fingerprint:
        """What :meth:`Fingerprint.of` gives of the loaded model."""
        found: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for name, parameter in self.model.named_parameters():
            stored = self.names.stored[name]
            entries = stored.sample(SAMPLED)
            sample = as_tensor(stored.dtype, (len(entries),), entries.reshape(-1), parameter.dtype)
            dtype = str(parameter.dtype).removeprefix("torch.")
            found[name] = (dtype, tuple(parameter.shape), bytes_digest([entries_of(sample)]))
        return Fingerprint(type(self.model).__name__, found, "")


def _known(calibration: Calibration, unit: DenseUnit) -> Any:
    known = calibration.of(unit.name)
    if known is None:
        raise MPOError(f"{unit.name}: no token of the calibration reached it: leave it out of the plan, or calibrate on more")
    return known


def _calibration_digest(calibration: Calibration, units: list[DenseUnit]) -> str:
    parts: list[bytes | memoryview] = []
    for unit in units:
        known = _known(calibration, unit)
        for name, value in sorted(vars(known).items()):
            parts.append(f"{unit.name} {name}".encode())
            parts.append(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode())
    return bytes_digest(parts)
