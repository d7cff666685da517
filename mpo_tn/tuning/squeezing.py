"""A run squeezed: cut bonds and tune in turn on the run's own batches, until the score has fallen by delta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress, silent
from mpo_tn.torch import SqueezeRound, squeeze
from mpo_tn.tuning.run import Run, batch_sizes
from mpo_tn.tuning.settings import Squeezing
from mpo_tn.tuning.tasks.batches import task_batches
from mpo_tn.tuning.tasks.data import Data, TaskData, TextData


def hold_out(data: Data, share: float = 0.1) -> tuple[Data, TaskData]:
    """Take a share of the training set away; returns the data without it, and the data scored on it.

    Raises:
        MPOError: text, whose validation part has to serve.
    """
    if isinstance(data, TextData):
        raise MPOError("gap_on='held-out' needs a GLUE task: for text measure the gap on dev")
    rest, held = data.train.hold_out(share)
    return replace(data, train=rest), replace(data, dev={"dev": held})


def squeeze_run(
    run: Run,
    how: Squeezing,
    *,
    folder: Path | None = None,
    resume: bool = False,
    gap_data: TaskData | None = None,
    progress: Progress | None = None,
) -> None:
    """Squeeze the model of a run that is in such a phase, and end the phase. Its steps of tuning count on from there.

    Args:
        run: its optimiser follows the cuts; its position ends where the last accepted round ends.
        how: what to cut and when to stop.
        folder: for the log and the state to resume from.
        resume: go on with what is in ``folder``.
        gap_data: what the gap is measured on; the dev set if not given.
        progress: told of every round.
    """
    data: Data = gap_data or run.data
    splits = run.dev
    if gap_data is not None:
        sizes = batch_sizes(run.model, run.settings)
        splits = {name: task_batches(split, run.tokenizer, **sizes) for name, split in gap_data.dev.items()}
    say = progress or silent

    def train_step(step: int) -> float:
        run.go_to(run.begin + step)
        return run.step()

    def evaluate(_model: Any) -> float:
        return data.headline(run.evaluate(data, splits))

    def on_round(part: SqueezeRound) -> None:
        say(part.number, how.max_rounds, f"squeezed to {part.kept:.3f}, score {part.value:.2f}")

    say(0, how.max_rounds, "scoring before the first cut")
    result = squeeze(
        run.model, evaluate=evaluate, delta=how.delta, train_step=train_step if how.tune_steps else None,
        optimizer=run.optimizer, higher_is_better=data.higher_is_better, max_steps=how.max_rounds,
        cuts_per_round=how.cuts_per_round, tune_steps=how.tune_steps or 1, score=how.score, keep=how.keep,
        folder=folder, resume=resume, on_round=on_round,
    )  # fmt: skip
    run.go_to(run.begin + (result.rounds[result.best_round - 1].position if result.best_round else 0))
    run.end_phase(result)
