"""A run squeezed: cut bonds and tune in turn on the run's own batches, until the score has fallen by delta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.torch import MPOLayer, SqueezeResult, SqueezeRound, squeeze
from mpo_tn.tuning.run import Data, Run, Track, batch_sizes
from mpo_tn.tuning.tasks.batches import task_batches
from mpo_tn.tuning.tasks.data import Split, TaskData, TextData


@dataclass(frozen=True)
class Squeezing:
    """How to squeeze; see :func:`mpo_tn.torch.squeeze` for what the numbers mean.

    Args:
        delta: the loss of score that ends it: points of the headline (perplexity for text).
        cuts_per_round: cuts by one before the model is tuned again.
        tune_steps: training steps after each round of cuts.
        keep: the kept ratio of the decomposed matrices at which it ends.
        max_rounds: the most rounds.
        score: ``"error_per_parameter"`` or ``"error"``: what is cut first.
        rate: share of the learning rates in those steps, the same for all of them (their number is not known before),
            and at the start of the final epochs. With a half, ten steps after fifty cuts moved a tuned model by more
            than the cuts did, and delta was lost to that.
        final_epochs: epochs of tuning after the last cut, with rates that fall to zero.
        gap_on: where the gap is measured: ``"dev"``, the set that is reported, so that the score at the end has been
            looked at while choosing where to stop; or ``"held-out"``, a tenth of the training set that is then not
            trained on.
    """

    delta: float = 1.0
    cuts_per_round: int = 50
    tune_steps: int = 10
    keep: float | None = None
    max_rounds: int = 100
    score: str = "error_per_parameter"
    rate: float = 0.1
    final_epochs: int = 0
    gap_on: str = "dev"

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise MPOError(f"delta={self.delta} must be at least 0: it is how many points of score may be lost")
        for name in ("cuts_per_round", "max_rounds"):
            if getattr(self, name) < 1:
                raise MPOError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("tune_steps", "final_epochs"):
            if getattr(self, name) < 0:
                raise MPOError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 < self.rate <= 1:
            raise MPOError(f"rate={self.rate} is not a share of the learning rates: give for instance 0.1")
        if self.score not in ("error", "error_per_parameter"):
            raise MPOError(f"score={self.score!r} is neither error nor error_per_parameter")
        if self.gap_on not in ("dev", "held-out"):
            raise MPOError(f"gap_on={self.gap_on!r} is neither dev nor held-out")


def hold_out(data: Data, share: float = 0.1) -> tuple[Data, TaskData]:
    """Take a share of the training set away; returns the data without it, and the data scored on it.

    Raises:
        MPOError: text, whose validation part has to serve.
    """
    if isinstance(data, TextData):
        raise MPOError("gap_on='held-out' needs a GLUE task: for text measure the gap on dev")
    held = data.train.subset(max(1, round(share * len(data.train))), seed=0)
    taken = set(zip(held.texts, held.labels, strict=True))  # a sentence that occurs twice is taken twice
    rest = [pair for pair in zip(data.train.texts, data.train.labels, strict=True) if pair not in taken]
    if not rest:
        raise MPOError("holding out leaves nothing to train on: measure the gap on dev")
    remaining = Split(tuple(text for text, _ in rest), tuple(label for _, label in rest))
    return replace(data, train=remaining), replace(data, dev={"dev": held})


def squeeze_run(
    run: Run,
    how: Squeezing,
    *,
    folder: Path | None = None,
    resume: bool = False,
    gap_data: TaskData | None = None,
    track: Track | None = None,
) -> SqueezeResult:
    """Squeeze the model of a run, from the step where it is. The steps of tuning count on from there.

    Args:
        run: its optimiser follows the cuts; its position and counts end where the last accepted round ends.
        how: what to cut and when to stop.
        folder: for the log and the state to resume from.
        resume: go on with what is in ``folder``.
        gap_data: what the gap is measured on; the dev set if not given.
        track: told of the progress.
    """
    data: Data = gap_data or run.data
    splits = run.dev
    if gap_data is not None:
        sizes = batch_sizes(run.model, run.settings)
        splits = {name: task_batches(split, run.tokenizer, **sizes) for name, split in gap_data.dev.items()}
    began = run.done
    run.rate = lambda _step: how.rate

    def train_step(step: int) -> float:
        run.done = began + step
        return run.step()

    def evaluate(_model: Any) -> float:
        return data.headline(run.evaluate(data, splits))

    def say(part: SqueezeRound) -> None:
        if track:
            track(f"squeezed to {part.kept:.3f}, score {part.value:.2f}", part.number, how.max_rounds)

    if track:
        track("scoring before the first cut", 0, how.max_rounds)
    result = squeeze(
        run.model, evaluate=evaluate, delta=how.delta, train_step=train_step if how.tune_steps else None,
        optimizer=run.optimizer, higher_is_better=data.higher_is_better, max_steps=how.max_rounds,
        cuts_per_round=how.cuts_per_round, tune_steps=how.tune_steps or 1, score=how.score, keep=how.keep,
        folder=folder, resume=resume, on_round=say,
    )  # fmt: skip
    run.done = began + (result.rounds[result.best_round - 1].position if result.best_round else 0)
    recount(run)
    return result


def falling(begin: int, end: int, rate: float) -> Callable[[int], float]:
    """The share of the learning rates from step ``begin`` to ``end``: from ``rate`` down to zero.

    >>> [falling(10, 14, 0.5)(step) for step in (10, 12, 13)]
    [0.5, 0.25, 0.125]
    """
    return lambda step: rate * max(0.0, min(1.0, (end - step) / max(1, end - begin)))


def recount(run: Run) -> None:
    """Bring the counts of a run's matrices up to date with their bonds."""
    layers = [m for m in run.model.modules() if isinstance(m, MPOLayer) and m.spec.tied_to is None]
    run.prepared.matrix_parameters = sum(layer.spec.num_parameters for layer in layers)
    cores = [core for layer in layers for core in layer.cores]
    run.prepared.matrix_trainable = sum(core.numel() for core in cores if core.requires_grad)
