"""Fine-tuning in plain PyTorch: one loop for every method, scored on the dev set after every epoch, and resumable."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.storage.files import written_beside
from mpo_tn.storage.places import claimed_if
from mpo_tn.storage.tensors import as_os_error
from mpo_tn.tuning.carry_out import carry_out
from mpo_tn.tuning.checkpoints import Keeper
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.phases import phases_of, squeezing_of
from mpo_tn.tuning.result import FinetuneResult, result_of
from mpo_tn.tuning.run import NotFiniteError, start
from mpo_tn.tuning.settings import Settings, Squeezing
from mpo_tn.tuning.squeezing import hold_out
from mpo_tn.tuning.tasks.data import Data, TaskData


def finetune(
    source: str | Path,
    data: Data,
    method: Method | None = None,
    settings: Settings | None = None,
    *,
    squeezing: Squeezing | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[FinetuneResult, Any]:
    """Tune a model on a task and score it on the dev set after every epoch; returns the result and the tuned model.

    Args:
        source: a model folder or a hub name; dense, or for ``lfa`` and ``squeeze`` compressed.
        data: from :func:`~mpo_tn.tuning.tasks.data.load_task`.
        method: what is compressed and what trains; LFA by default.
        settings: how long.
        squeezing: for the method ``squeeze``: what follows after the epochs of LFA.
        folder: for checkpoints, every ``settings.save_every`` steps and after every epoch. See :func:`save_finetuned`
            for the end.
        resume: go on from the checkpoint in ``folder``, if there is one.
        progress: told of matrices that are compressed, of steps, and of rounds of squeezing.

    Guarantee (tuned-same-bits): the same arguments, versions, threads and machine kind give the same bits.
    Guarantee (resumed-same-bits): they do so if the run was killed at any point and resumed, too.

    Raises:
        MPOError: bad input, see :func:`mpo_tn.tuning.run.start`; a checkpoint of another run; a folder
            that another process writes to.
        NotFiniteError: the loss is no number any more; the last checkpoint is kept.

    Source: lightweight fine-tuning and dimension squeezing of Liu, Gao et al., ACL 2021, sections 4.1 and 4.2.
    """
    began = time.perf_counter()
    method, settings = method or Method(), settings or Settings()
    phases = phases_of(method, settings, squeezing)
    squeezing = squeezing_of(phases)
    if squeezing is not None and settings.epochs == 0:
        _check_task(Path(source), data)
    gap_data: TaskData | None = None
    if squeezing is not None and squeezing.gap_on == "held-out":
        data, gap_data = hold_out(data)
    with claimed_if(folder):
        run = start(source, data, method, settings, phases, progress)
        keeper = Keeper(folder, run, began)
        if resume:
            keeper.read()
        try:
            carry_out(run, keeper=keeper, gap_data=gap_data, progress=progress)
        except NotFiniteError as error:
            raise keeper.told(error) from error
    return result_of(run, keeper.elapsed()), run.prepared.finish(run.model)


def _check_task(source: Path, data: Data) -> None:
    """A model tuned on another task has no score here that a loss could be counted from."""
    try:
        task = json.loads((source / "result.json").read_text(encoding="utf-8"))["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not ours to judge
    if task != data.name:
        raise MPOError(
            f"{source} was tuned on {task}, and the task is {data.name}: its score there is nothing to count a loss "
            f"from; tune it on {data.name} first, with mpo-tn finetune"
        )


def save_finetuned(folder: Path, result: FinetuneResult, model: Any, tokenizer: Any, report: str = "") -> None:
    """Write the model, its tokenizer, ``result.json`` and ``report.html``, whole or not at all.

    The checkpoints of the run are removed with that: ``AutoModelForSequenceClassification.from_pretrained`` reads the
    folder (after ``import mpo_tn.torch`` if it is compressed).

    Raises:
        MPOError: the disk is full or may not be written to; the checkpoints are then still there.
    """
    with written_beside(folder) as temporary:
        with as_os_error():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        document = json.dumps(result.to_dict(), indent=2, default=float)
        (temporary / "result.json").write_text(document, encoding="utf-8")
        if report:
            (temporary / "report.html").write_text(report, encoding="utf-8")
