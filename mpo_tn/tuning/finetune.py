"""Fine-tuning in plain PyTorch: one loop for every method, scored on the dev set after every epoch, and resumable."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import written_beside
from mpo_tn.tuning.checkpoints import Keeper, asked_settings, check_folder
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.result import FinetuneResult, peak_rss, versions
from mpo_tn.tuning.run import Data, NotFiniteError, Run, Settings, Track, start
from mpo_tn.tuning.squeezing import Squeezing, falling, hold_out, recount, squeeze_run
from mpo_tn.tuning.tasks.data import TaskData, TextData

__all__ = ["FinetuneResult", "NotFiniteError", "Settings", "Squeezing", "check_folder", "finetune", "save_finetuned"]


def finetune(
    source: str | Path,
    data: Data,
    method: Method | None = None,
    settings: Settings | None = None,
    *,
    squeezing: Squeezing | None = None,
    folder: Path | None = None,
    resume: bool = False,
    track: Track | None = None,
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
        track: told of the progress.

    Guarantee (tuned-same-bits): the same arguments, versions, threads and machine kind give the same bits.
    Guarantee (resumed-same-bits): they do so if the run was killed at any point and resumed, too.

    Raises:
        MPOError: bad input, see :func:`mpo_tn.tuning.run.start`; a checkpoint of another run.
        NotFiniteError: the loss is no number any more; the last checkpoint is kept.

    Source: lightweight fine-tuning and dimension squeezing of Liu, Gao et al., ACL 2021, sections 4.1 and 4.2.
    """
    began = time.perf_counter()
    method, settings = method or Method(), settings or Settings()
    if method.name == "squeeze":
        squeezing = squeezing or Squeezing()
    elif squeezing is not None:
        raise MPOError(f"squeezing is given and the method is {method.name}: use the method squeeze")
    if method.name != "squeeze" and settings.epochs == 0 and settings.max_steps is None:
        raise MPOError("epochs=0: train for at least one")
    if squeezing is not None and settings.epochs == 0:
        _check_task(Path(source), data)
    gap_data: TaskData | None = None
    if squeezing is not None and squeezing.gap_on == "held-out":
        data, gap_data = hold_out(data)
    run = start(source, data, method, settings, track)
    result = new_result(run, method, squeezing, str(source))
    keeper = Keeper(folder, run, result, began)
    if resume:
        keeper.read()
    try:
        _phases(run, result, keeper, squeezing, gap_data, track)
    except NotFiniteError as error:
        raise keeper.told(error) from error
    fill_in(result, run, keeper.elapsed())
    return result, run.prepared.finish(run.model)


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


def _phases(
    run: Run, result: FinetuneResult, keeper: Keeper, squeezing: Squeezing | None, gap_data: TaskData | None,
    track: Track | None,
) -> None:  # fmt: skip
    first = run.steps
    if result.squeezing is None:
        _train_to(run, first, result, keeper, track)
    if squeezing is None:
        return
    per_epoch = run.train.per_epoch
    if result.squeezing is None:
        where = keeper.folder / "squeezing" if keeper.folder else None
        if keeper.saved_at is None:  # no epoch before: without a checkpoint the rounds would not be known as this run's
            keeper.save()
        squeezed = squeeze_run(run, squeezing, folder=where, gap_data=gap_data, resume=keeper.resumed, track=track)
        result.squeezing = json.loads(json.dumps(squeezed.to_dict()))  # the same as after a restart: no tuples
        keeper.squeezed_to = {"begin": run.done, "end": run.done + squeezing.final_epochs * per_epoch}
        if not squeezing.final_epochs:
            result.scores.append(run.evaluate())
        keeper.save()
    begin, end = keeper.squeezed_to["begin"], keeper.squeezed_to["end"]
    recount(run)
    run.steps = end
    run.rate = falling(begin, end, squeezing.rate)
    _train_to(run, end, result, keeper, track, begin)


def _train_to(run: Run, end: int, result: FinetuneResult, keeper: Keeper, track: Track | None, begin: int = 0) -> None:
    """Train until step ``end``; an epoch after ``begin``, and at ``end``, the dev set is scored."""
    say = track or (lambda _what, _done, _total: None)
    per_epoch = run.train.per_epoch
    while run.done < end:
        loss = f", loss {run.losses[-1]:.3f}" if run.losses else ""
        say(f"step {run.done + 1} of {run.steps}{loss}", run.done, run.steps)
        run.step()
        if (run.done - begin) % per_epoch == 0 or run.done == end:
            say("scoring the dev set", run.done, run.steps)
            recent = run.losses[-((run.done - begin - 1) % per_epoch + 1) :]
            result.losses.append(sum(recent) / len(recent))
            result.scores.append(run.evaluate())
            keeper.save()
        elif (run.done - begin) % run.settings.save_every == 0:
            keeper.save()


def new_result(run: Run, method: Method, squeezing: Squeezing | None, source: str) -> FinetuneResult:
    """The parts of a result that are known before training."""
    data, prepared = run.data, run.prepared
    baseline, baseline_is = data.baseline()
    settings = asked_settings(source, data, method, run.settings, squeezing) | {"examples": len(run.train.rows)}
    return FinetuneResult(
        method=method.name, task=data.name, seed=run.settings.seed, higher_is_better=data.higher_is_better,
        baseline=baseline, baseline_headline=data.headline(baseline), baseline_is=baseline_is,
        note="" if isinstance(data, TextData) else data.task.note,
        trainable=prepared.trainable, total=prepared.total, matrix_dense=prepared.matrix_dense,
        matrix_parameters=prepared.matrix_parameters, matrix_trainable=prepared.matrix_trainable,
        versions=versions(), settings=settings, notes=dict(prepared.notes),
    )  # fmt: skip


def fill_in(result: FinetuneResult, run: Run, seconds: float) -> None:
    """Fill in what is known after training."""
    prepared = run.prepared
    headlines = [run.data.headline(scores) for scores in result.scores]
    result.headline = headlines[-1]
    known = [value for value in headlines if not math.isnan(value)]
    result.best = (max if result.higher_is_better else min)(known, default=math.nan)
    result.steps = run.done
    result.seconds = seconds
    result.seconds_per_step = statistics.median(run.seconds) if run.seconds else math.nan
    result.tokens_per_step = run.tokens / max(1, len(run.seconds))
    result.peak_rss_bytes = peak_rss()
    result.trainable, result.total = prepared.trainable, prepared.total
    result.matrix_parameters, result.matrix_trainable = prepared.matrix_parameters, prepared.matrix_trainable


def save_finetuned(folder: Path, result: FinetuneResult, model: Any, tokenizer: Any, report: str = "") -> None:
    """Write the model, its tokenizer, ``result.json`` and ``report.html``, whole or not at all.

    The checkpoints of the run are removed with that: ``AutoModelForSequenceClassification.from_pretrained`` reads the
    folder (after ``import mpo_tn.torch`` if it is compressed).

    Raises:
        MPOError: the disk is full or may not be written to; the checkpoints are then still there.
    """
    with written_beside(folder) as temporary:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        document = json.dumps(result.to_dict(), indent=2, default=float)
        (temporary / "result.json").write_text(document, encoding="utf-8")
        if report:
            (temporary / "report.html").write_text(report, encoding="utf-8")
