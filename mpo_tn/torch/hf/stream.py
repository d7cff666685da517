"""compress_folder: a checkpoint of any size made into a compressed folder, one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.plan import Plan
from mpo_tn.progress import Progress, silent
from mpo_tn.storage.places import claimed
from mpo_tn.torch.hf.assembling import write_result
from mpo_tn.torch.hf.folder import check_model_target
from mpo_tn.torch.hf.stream_job import Job
from mpo_tn.torch.hf.stream_text import fit_on_text, is_fitted
from mpo_tn.torch.hf.text_sizes import TextSizes
from mpo_tn.torch.models.calibration import Calibration
from mpo_tn.torch.models.decide import samples_of
from mpo_tn.torch.models.report import CompressionReport
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.stream import run_units
from mpo_tn.torch.models.stream_unit import UnitTask

SHARD_BYTES = 2 * 10**9
"""Of the files of the result: one at a time is in memory."""


def compress_folder(
    source: str | Path,
    out: str | Path,
    config: MPOConfig | Plan,
    *,
    calibration: Iterable[Any] | Calibration | Samples | None = None,
    anchored: bool | None = None,
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
        config: as for :func:`mpo_tn.torch.compress`, but not what needs text, a budget: make a plan of that first.
        calibration: as for :func:`mpo_tn.torch.compress`, for a plan that fits matrices in the metric of their layers:
            batches of text, with which the model is run block by block, or moments of the dense model that were saved.
            With it, what a configuration makes of matrices is fitted so.
        anchored: as there: whether what is fitted to text is also fitted layer after layer, and what was held back
            says which is kept. By default wherever there is text.
        workers: processes, of one BLAS thread each.
        executor: any of ``concurrent.futures`` in place of them, Dask's and MPI's too; its workers must see the folders
            under the same paths.
        shard_bytes: of the files of the result.
        overwrite: replace an earlier result.
        progress: told of every matrix.

    Returns:
        The report that ``compress`` gives.

    Guarantee (stream-same-model): all tensors are bit for bit those that :func:`mpo_tn.torch.compress` in one thread
    gives of the loaded model, with the same moments. With text, what is fitted to it are the same sums over the same
    tokens in the same order; a model may round a product by where its operands lie in memory, and what is fitted
    follows that.
    Guarantee (stream-any-workers): every byte of the result is the same for any number of workers and threads, any
    executor, and however often it was killed and run again, for the same versions and kind of machine. With text the
    model itself is run in as many threads as torch is given, on which last digits of moments depend.
    Guarantee (stream-resumes): after a kill at any moment, or an error, the same call does only what is not done yet.
    With another plan, source, calibration or other versions it is refused, with both fingerprints.
    Guarantee (stream-memory): a process holds one matrix at a time while matrices are done, and one file of the result
    while that is written. With text it first holds the weights of one block, or what lies outside of all, the moments
    of one block, and what running one batch through that takes; of all batches what the blocks are called with beside
    hidden states, such as masks.

    Raises:
        MPOError: the folder is damaged, incomplete, changed meanwhile or no dense model; too little space; a budget;
            text and a model that cannot be run block by block, as one with an encoder and a decoder; a matrix that
            cannot be done, by name, and whatever is done by then is kept.
    """
    if whole_number(workers) is None or workers < 1:
        raise MPOError(f"workers={workers!r} must be a whole number of at least 1")
    if whole_number(shard_bytes) is None or shard_bytes < 1:
        raise MPOError(f"shard_bytes={shard_bytes!r} must be a whole number of at least 1")
    tell = progress or silent
    tell(0, 1, "looking at the checkpoint")
    job = Job.of(source, Path(out), config, samples_of(calibration), anchored=anchored)
    with claimed(Path(out)):
        finished = job.finished_result()
        if finished is not None and not overwrite:
            job.work.delete()
            return job.replace(finished)
        check_model_target(Path(out), job.checkpoint.folder, overwrite=overwrite)
        job.work.check()
        records = job.records()
        job.check_space(records, 0 if is_fitted(job, records) else TextSizes.of(job).disk)
        job.work.open()
        do = partial(_do, job, workers, executor, tell)
        on_text = set(job.on_text.values())
        do([job.task(k) for k in range(len(job.pairs)) if k not in records and k not in on_text], len(records))
        fit_on_text(job, do, tell)
        records = job.records()
        ordered = [records[number] for number in range(len(job.pairs))]
        tell(0, 1, "writing the model")
        job.check_source()
        pieces = job.pieces(ordered)
        report = job.replace(ordered)
        write_result(job.model, job.checkpoint.folder, Path(out), pieces, job.record(ordered), shard_bytes)
        tell(1, 1, "writing the model")
        job.work.delete()
    return report


def _do(
    job: Job, workers: int, executor: Executor | None, tell: Progress, tasks: Sequence[UnitTask], done: int
) -> None:
    """Do units, the longest first, of which so many of the run are done."""
    numbers = {unit.name: number for number, (_, unit) in enumerate(job.pairs)}
    ordered = sorted(tasks, key=lambda task: job.longest_first(numbers[task.name]))

    def told(at: int, _total: int, what: str) -> None:
        tell(at, len(job.pairs), f"compressing {what}")

    run_units(ordered, workers=workers, executor=executor, progress=told, total=done + len(ordered))


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        units: matrices in all, and
        done: those that an earlier run has finished.
        bytes_read: of the source.
        bytes_written: of finished matrices and of the result together; so much space is needed.
        seconds: with so many workers as asked for, by the cost law, on a machine such as it was measured on; running
            the model on text comes on top.
        memory: the most that one worker holds at a time, in bytes, above 300 MB for the libraries.
        bytes_meanwhile: of moments, gradients and hidden states that wait in files until they are used, at most; so
            much space is needed besides.
    """

    units: int
    done: int
    bytes_read: int
    bytes_written: int
    seconds: float
    memory: int
    bytes_meanwhile: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return vars(self).copy()


def dry_run(
    source: str | Path,
    out: str | Path,
    config: MPOConfig | Plan,
    *,
    calibration: Iterable[Any] | Calibration | Samples | None = None,
    anchored: bool | None = None,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> DryRun:
    """What :func:`compress_folder` would read and write, how long and in how much memory; nothing is written.

    Raises:
        MPOError: as :func:`compress_folder`, as far as it can be known by then.
    """
    job = Job.of(source, Path(out), config, samples_of(calibration), anchored=anchored)
    job.work.check()
    finished = job.finished_result()
    if finished is not None:
        return DryRun(len(job.pairs), len(finished), 0, 0, 0.0, 0)
    records = job.records()
    left = [job.effort(number) for number in range(len(job.pairs)) if number not in records]
    text = TextSizes() if is_fitted(job, records) else TextSizes.of(job)
    memory = max((effort.memory for effort in left), default=0)
    return DryRun(
        len(job.pairs),
        len(records),
        sum(effort.bytes_read for effort in left) + job.bytes_beside + text.read,
        job.bytes_to_write(records),
        finish_time([effort.seconds for effort in left], workers),
        max(memory, text.memory, min(shard_bytes, job.result_bytes)),
        text.disk,
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
