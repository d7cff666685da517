"""The matrices of a streamed run that are fitted to text: moments made block by block, and what is fitted with them."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from mpo_tn.progress import Progress
from mpo_tn.torch.hf.folder import hollow_model
from mpo_tn.torch.hf.stream_job import Job
from mpo_tn.torch.models.finished_units import FinishedUnits
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.stream_anchor import AnchoredWalk, Own, distances
from mpo_tn.torch.models.stream_unit import UnitTask
from mpo_tn.torch.models.stream_walk import StreamWalk
from mpo_tn.torch.models.walk_files import StaleWalkError, WalkFiles

Do = Callable[[Sequence[UnitTask], int], None]
"""Does units, of which so many of the run are done."""


def fit_on_text(job: Job, do: Do, progress: Progress) -> None:
    """Do all units of a run that are fitted to text, block by block, from the last to the first.

    The moments of a block are deleted once its units are done. If the job is anchored, all of them are then fitted
    layer after layer as well, and text that was held back says which are kept. What an earlier run left is gone on
    with.

    Raises:
        MPOError: as :class:`~mpo_tn.torch.models.stream_walk.StreamWalk`, and as units that fail.
    """
    if is_fitted(job, job.records()):
        return
    job.work.decide(None)
    files = WalkFiles(job.work.path / "walk", job.on_text, job.work.task)
    try:
        _fit(job, files, do, progress)
    except StaleWalkError:
        files.delete()
        _fit(job, files, do, progress)
    files.delete()


def is_fitted(job: Job, done: Container[int]) -> bool:
    """Whether nothing is left to do for :func:`fit_on_text`, ``done`` being the numbers of units that are done."""
    decided = not job.anchored or job.work.decision is not None
    return decided and all(number in done for number in job.on_text.values())


def _fit(job: Job, files: WalkFiles, do: Do, progress: Progress) -> None:
    assert job.text is not None
    done = set(job.records())
    names = list(job.on_text)
    model = hollow_model(job.checkpoint.folder)
    weights = WeightsOnDisk(model, job.names.readers(model))
    walk = StreamWalk(weights, job.text.batches, names, files, progress)
    own: dict[str, Own] = {}
    for part in walk.parts():
        left = [name for name in part.units if job.on_text[name] not in done]
        for name in left if part.is_old else ():
            files.check_moments(part.units[name])
        do([job.task(job.on_text[name], part.units[name]) for name in left], len(done))
        done |= {job.on_text[name] for name in left}
        files.forget_moments(part, but_own=job.anchored)
        for name, paths in part.units.items():
            alone = files.own_of(paths)
            own[name] = Own(alone, alone != paths)
    if job.anchored:
        _fit_after(job, walk, own, do, len(done))


def _fit_after(job: Job, walk: StreamWalk, own: Mapping[str, Own], do: Do, done: int) -> None:
    assert job.text is not None
    (job.work.path / "anchored").mkdir(exist_ok=True)

    def file_of(name: str, anchored: bool) -> Path:
        return job.work.file(job.on_text[name], anchored=anchored)

    def fit(wanted: Mapping[str, tuple[str, ...]]) -> None:
        do([job.task(job.on_text[name], paths, anchored=True) for name, paths in wanted.items()], done - len(wanted))

    finished = FinishedUnits(walk.weights, job.on_text, file_of, job.work.task)
    AnchoredWalk(walk, finished, own, fit).run()
    job.work.decide(distances(walk, finished, job.text.held_back))
