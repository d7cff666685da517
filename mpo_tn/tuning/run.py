"""One run: a model, its batches and its optimiser; a step, a score."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.hf.folder import load_for_task, load_tokenizer
from mpo_tn.tuning.methods import Method, Prepared, prepare
from mpo_tn.tuning.tasks.batches import Batch, Batches, task_batches, text_batches, text_bytes
from mpo_tn.tuning.tasks.data import TaskData, TextData

Data = TaskData | TextData
Track = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total."""


@dataclass(frozen=True)
class Settings:
    """How long and in which steps to train; the same for every method.

    Args:
        epochs: passes over the training set; none is for squeezing a tuned model.
        max_steps: stop there instead, if given; the learning rate falls to zero at the end either way.
        seed: of the head, the order of the examples and dropout.
        batch_size: examples a step.
        max_length: tokens at which an example is cut; for text the length of a block.
        warmup: share of the steps in which the learning rate rises from zero; then it falls to zero, both linearly.
        clip: the largest norm of the gradient; a longer one is shortened to it.
        bf16: run the model under autocast to bfloat16; parameters and optimiser stay in float32.
        device: where to train.
        save_every: steps between checkpoints, of a run that has a folder; the end of an epoch is one, too.
    """

    epochs: int = 3
    max_steps: int | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int = 128
    warmup: float = 0.06
    clip: float = 1.0
    bf16: bool = False
    device: str = "cpu"
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.max_steps is not None and self.max_steps < 1):
            raise MPOError(f"epochs={self.epochs}, max_steps={self.max_steps}: train for at least one step")
        if not 0 <= self.warmup < 1:
            raise MPOError(f"warmup={self.warmup} is not a share of the steps: give for instance 0.06")
        if self.save_every < 1:
            raise MPOError(f"save_every={self.save_every} must be at least 1")
        if not self.clip > 0:
            raise MPOError(f"clip={self.clip} must be positive; for no clipping use math.inf")


class NotFiniteError(MPOError):
    """The loss or the gradient stopped being a number. ``step`` is where; the model is as it was before that step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Run:
    """A model, its batches and its optimiser, and the steps that are done: everything that training needs.

    ``step()`` is one step of training; ``evaluate()`` the scores on the dev set. ``rate`` gives the share of the
    learning rates by step.
    """

    prepared: Prepared
    tokenizer: Any
    train: Batches
    dev: Mapping[str, Batches]
    data: Data
    settings: Settings
    optimizer: torch.optim.Optimizer
    steps: int
    rate: Callable[[int], float]
    done: int = 0
    seconds: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])
    tokens: int = 0

    @property
    def model(self) -> Any:
        """The model in training."""
        return self.prepared.model

    def step(self) -> float:
        """One step of training on the batch that belongs to it; returns the loss.

        Guarantee (nan-spoils-nothing): if the loss or the gradient is NaN or infinite the parameters are left as they
        were before the step.

        Raises:
            NotFiniteError: the loss or the gradient is NaN or infinite.
        """
        settings, place = self.settings, self.done
        start = time.perf_counter()
        # Seeded by the step, so that dropout after a restart is what it would have been.
        torch.manual_seed(settings.seed * 1_000_003 + place)
        rate = self.rate(place)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.model.train()
        batch = self.train.at(place).to(settings.device)
        loss = _loss(_logits(self.model, batch, settings), batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._stopped("loss", value)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip))
        if not math.isfinite(norm):
            raise self._stopped("norm of the gradient", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)
        self.tokens += batch.tokens
        return value

    def _stopped(self, what: str, value: float) -> NotFiniteError:
        epoch = self.done // self.train.per_epoch + 1
        return NotFiniteError(
            f"the {what} is {value} in step {self.done + 1} of {self.steps} (epoch {epoch}); training stopped, and the "
            f"model is as it was after step {self.done}: lower the learning rates or leave bf16 out",
            self.done,
        )

    def evaluate(self, data: Data | None = None, splits: Mapping[str, Batches] | None = None) -> dict[str, float]:
        """The scores on the dev set, or on another; the mode of the model is restored."""
        data, splits = data or self.data, splits or self.dev
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if isinstance(data, TextData):
                    return _perplexities(self.model, splits["valid"], self.settings, text_bytes(data))
                predictions = {
                    split: _predict(self.model, batches, self.settings, data.task.is_regression)
                    for split, batches in splits.items()
                }
                return data.scores(predictions)
        finally:
            self.model.train(training)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear up over the share ``warmup`` of the steps, then linear down to zero after the last one.

    >>> [learning_rate_factor(k, 10, 0.2) for k in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1, steps - rising))


def start(source: str | Path, data: Data, method: Method, settings: Settings, track: Track | None = None) -> Run:
    """Load the model, make it ready for the method, and encode the task.

    Raises:
        MPOError: a model or tokenizer that cannot be read, a method that does not fit it.
    """
    say = track or _silent
    say("reading the model", 0, 1)
    tokenizer = load_tokenizer(source)
    num_labels = None if isinstance(data, TextData) else data.task.num_labels
    model = load_for_task(source, num_labels, settings.seed)
    if isinstance(data, TaskData):
        _describe_head(model, data, tokenizer)
    sizes = batch_sizes(model, settings)
    if isinstance(data, TextData):
        train = text_batches(data.train, tokenizer, **sizes, seed=settings.seed)
        dev = {"valid": text_batches(data.valid, tokenizer, **sizes)}
    else:
        train = task_batches(data.train, tokenizer, **sizes, seed=settings.seed)
        dev = {split: task_batches(rows, tokenizer, **sizes) for split, rows in data.dev.items()}
    prepared = prepare(model, method, seed=settings.seed, progress=lambda d, t, n: say(f"compressing {n}", d, t))
    prepared.model.to(settings.device)
    optimizer = torch.optim.AdamW(prepared.groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    steps = settings.max_steps or settings.epochs * train.per_epoch
    rate = partial(learning_rate_factor, steps=steps, warmup=settings.warmup)
    return Run(prepared, tokenizer, train, dev, data, settings, optimizer, steps, rate)


def batch_sizes(model: Any, settings: Settings) -> dict[str, int]:
    """The sizes that batches are made with; none is longer than the model reads."""
    limit = getattr(model.config, "max_position_embeddings", None) or settings.max_length
    return {"batch_size": settings.batch_size, "max_length": min(settings.max_length, limit)}


def _describe_head(model: Any, data: TaskData, tokenizer: Any) -> None:
    task = data.task
    if task.is_regression:
        model.config.problem_type = "regression"
    else:
        model.config.problem_type = "single_label_classification"
        model.config.id2label = dict(enumerate(task.labels))
        model.config.label2id = {label: k for k, label in enumerate(task.labels)}
    # Decoders find the last token of a sentence by what pads it.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or 0


def _logits(model: Any, batch: Batch, settings: Settings) -> torch.Tensor:
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=settings.bf16):
        return model(**batch.inputs).logits.float()


def _loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    if logits.ndim == 3:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    if batch.labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1), batch.labels)
    return functional.cross_entropy(logits, batch.labels)


def _predict(model: Any, batches: Batches, settings: Settings, is_regression: bool) -> np.ndarray:
    found = np.zeros(len(batches.rows), dtype=np.float64 if is_regression else np.int64)
    for batch in batches.in_order():
        logits = _logits(model, batch.to(settings.device), settings)
        predicted = logits.squeeze(-1) if is_regression else logits.argmax(-1)
        found[list(batch.examples)] = predicted.cpu().numpy()
    return found


def _perplexities(model: Any, batches: Batches, settings: Settings, size: int) -> dict[str, float]:
    total, tokens = 0.0, 0
    for batch in batches.in_order():
        scored = int((batch.labels[:, 1:] != -100).sum())
        moved = batch.to(settings.device)
        total += float(_loss(_logits(model, moved, settings), moved)) * scored
        tokens += scored
    return {"perplexity": _exp(total / tokens), "byte perplexity": _exp(total / size)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _silent(_what: str, _done: int, _total: int) -> None:
    """Track nothing."""
