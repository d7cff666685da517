"""The matrices of a streamed run that are fitted to text: moments made block by block, and what is fitted with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.torch.hf.folder import hollow_model
from mpo_tn.torch.hf.stream_job import Job
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.stream_unit import UnitTask
from mpo_tn.torch.models.stream_walk import StreamWalk
from mpo_tn.torch.models.walk_files import StaleWalkError, WalkFiles

Do = Callable[[Sequence[UnitTask], int], None]
"""Does units, of which so many of the run are done."""


def fit_on_text(job: Job, do: Do, progress: Progress) -> None:
    """Do all units of a run that are fitted to text, block by block, from the last to the first.

    The moments of a block are deleted once its units are done. What an earlier run left is gone on with.

    Raises:
        MPOError: as :class:`~mpo_tn.torch.models.stream_walk.StreamWalk`, and as units that fail.
    """
    done = job.records()
    if job.text is None or all(number in done for number in job.on_text.values()):
        return
    files = WalkFiles(job.work.path / "walk", job.on_text, job.work.task)
    try:
        _fit(job, files, do, progress)
    except StaleWalkError:
        files.delete()
        _fit(job, files, do, progress)
    files.delete()


def _fit(job: Job, files: WalkFiles, do: Do, progress: Progress) -> None:
    assert job.text is not None
    done = set(job.records())
    weights = WeightsOnDisk(hollow_model(job.checkpoint.folder), job.names.stored)
    walk = StreamWalk(weights, job.text.batches, list(job.on_text), files, progress)
    for part in walk.parts():
        left = [name for name in part.units if job.on_text[name] not in done]
        for name in left if part.is_old else ():
            files.check_moments(part.units[name])
        do([job.task(job.on_text[name], part.units[name]) for name in left], len(done))
        done |= {job.on_text[name] for name in left}
        files.forget_moments(part)
    missing = [name for name, number in job.on_text.items() if number not in done]
    if missing:
        raise MPOError(f"{missing[0]} was not come to block by block")
