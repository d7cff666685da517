"""One run: a model, its batches and its optimiser, the phases it goes through, and what it has done so far."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress, doing, silent
from mpo_tn.torch import SqueezeResult
from mpo_tn.torch.hf.folder import load_for_task, load_tokenizer
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.torch.state.training_state import TrainingState, capture, load_state, restore
from mpo_tn.tuning.methods import Method, Prepared, prepare
from mpo_tn.tuning.phases import Phase, phases_of
from mpo_tn.tuning.scoring import logits_of, loss_of, scores_of
from mpo_tn.tuning.settings import Settings
from mpo_tn.tuning.tasks.batches import Batches, task_batches, text_batches
from mpo_tn.tuning.tasks.data import Data, TaskData, TextData


class NotFiniteError(MPOError):
    """The loss or the gradient stopped being a number. ``step`` is where; the model is as it was before that step."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Record:
    """What a run has done so far: with the tensors of a model and an optimiser, all that it takes to go on.

    ``done`` counts training steps, ``tokens`` the positions that held text in them; ``seconds`` and ``losses`` are by
    step, ``epoch_losses`` and ``scores`` by scoring of the dev set. ``ended`` are the steps after which the phases
    ended that are behind; ``squeezed`` is the trajectory of a squeezing that is.
    """

    done: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list[float])
    losses: list[float] = field(default_factory=list[float])
    epoch_losses: list[float] = field(default_factory=list[float])
    scores: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    ended: list[int] = field(default_factory=list[int])
    squeezed: dict[str, Any] | None = None


@dataclass(frozen=True)
class Mark:
    """A place in a run to go back to."""

    phases: tuple[Phase, ...]
    record: Record
    state: TrainingState


class Run:
    """A model, its batches and its optimiser, and the phases it goes through. Made by :func:`start`.

    ``step()`` is one step of training; ``evaluate()`` the scores on the dev set. What is done changes by the methods
    here and by nothing else.
    """

    def __init__(
        self, source: str, data: Data, method: Method, settings: Settings, phases: Sequence[Phase], *,
        prepared: Prepared, tokenizer: Any, train: Batches, dev: Mapping[str, Batches],
    ) -> None:  # fmt: skip
        self.source, self.data, self.method, self.settings = source, data, method, settings
        self.prepared, self.tokenizer, self.train, self.dev = prepared, tokenizer, train, dev
        self.optimizer = torch.optim.AdamW(prepared.groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self._phases, self._record = tuple(phases), Record()
        self._resumed_at: int | None = None

    @property
    def model(self) -> Any:
        """The model in training."""
        return self.prepared.model

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What it goes through, first to last."""
        return self._phases

    @property
    def phase(self) -> Phase | None:
        """The phase it is in; none if all are behind it."""
        ended = len(self._record.ended)
        return self._phases[ended] if ended < len(self._phases) else None

    @property
    def begin(self) -> int:
        """How many steps were done when the phase it is in began."""
        return self._record.ended[-1] if self._record.ended else 0

    @property
    def end(self) -> int | None:
        """How many are done when that phase ends, if it is known."""
        steps = self.phase.steps(self.train.per_epoch) if self.phase else 0
        return None if steps is None else self.begin + steps

    @property
    def done(self) -> int:
        """How many steps are done."""
        return self._record.done

    @property
    def losses(self) -> Sequence[float]:
        """By step, those of rounds that were undone too."""
        return self._record.losses

    @property
    def squeezed(self) -> Mapping[str, Any] | None:
        """The trajectory of the last squeezing that is behind it, see :meth:`~mpo_tn.torch.SqueezeResult.to_dict`."""
        return self._record.squeezed

    @property
    def resumed_at(self) -> int | None:
        """How many steps were done where it went on from a checkpoint, if it did."""
        return self._resumed_at

    def step(self) -> float:
        """One step of training on the batch that belongs to it; returns the loss.

        Guarantee (nan-spoils-nothing): if the loss or the gradient is NaN or infinite the parameters are left as they
        were before the step.

        Raises:
            NotFiniteError: the loss or the gradient is NaN or infinite.
            MPOError: no phase is left.
        """
        settings, record, place = self.settings, self._record, self.done
        if self.phase is None:
            raise MPOError(f"all {len(self.phases)} phases of the run are behind it: go on with another")
        start = time.perf_counter()
        # Seeded by the step, so that dropout after a restart is what it would have been.
        torch.manual_seed(settings.seed * 1_000_003 + place)
        rate = self.phase.rate(place - self.begin, self.train.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        self.model.train()
        batch = self.train.at(place).to(settings.device)
        loss = loss_of(logits_of(self.model, batch, settings), batch)
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
        record.done += 1
        record.seconds.append(time.perf_counter() - start)
        record.losses.append(value)
        record.tokens += batch.tokens
        return value

    def _stopped(self, what: str, value: float) -> NotFiniteError:
        epoch = self.done // self.train.per_epoch + 1
        of = "" if self.end is None else f" of {self.end}"
        return NotFiniteError(
            f"the {what} is {value} in step {self.done + 1}{of} (epoch {epoch}); training stopped, and the model is as "
            f"it was after step {self.done}: lower the learning rates or leave bf16 out",
            self.done,
        )

    def evaluate(self, data: Data | None = None, splits: Mapping[str, Batches] | None = None) -> dict[str, float]:
        """The scores on the dev set, or on another; the mode of the model is restored."""
        data, splits = data or self.data, splits or self.dev
        return scores_of(self.model, data, splits, self.settings)

    def score(self) -> None:
        """Score the dev set, and keep the scores."""
        self._record.scores.append(self.evaluate())

    def end_epoch(self) -> None:
        """Keep the mean loss of the steps since the last epoch of the phase, and the scores on the dev set."""
        recent = self.losses[-((self.done - self.begin - 1) % self.train.per_epoch + 1) :]
        self._record.epoch_losses.append(sum(recent) / len(recent))
        self.score()

    def go_to(self, done: int) -> None:
        """Count from ``done``: the next step is on the batch after so many."""
        self._record.done = done

    def end_phase(self, squeezed: SqueezeResult | None = None) -> None:
        """Put the phase it is in behind it, with its trajectory if that was one of squeezing."""
        self._record.ended.append(self.done)
        if squeezed is not None:  # the same as after a restart: no tuples
            self._record.squeezed = json.loads(json.dumps(squeezed.to_dict()))

    def go_on_with(self, *phases: Phase) -> None:
        """More phases after those it has."""
        self._phases += phases

    def record(self) -> Record:
        """A copy of what it has done so far."""
        return copy.deepcopy(self._record)

    def take_up(self, record: Record) -> None:
        """Have done what ``record`` says. See :meth:`load` for the tensors that belong to it."""
        self._record, self._resumed_at = copy.deepcopy(record), record.done

    def load(self, folder: Path) -> dict[str, Any]:
        """Bring model and optimiser to a saved state, but for the learning rates; returns what else is saved there.

        Raises:
            MPOError: it is damaged, or of another model or optimiser.
        """
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        extra = load_state(folder, model=self.model, optimizer=self.optimizer)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate
        return extra

    def mark(self) -> Mark:
        """The place where it is, to :meth:`go_back` to."""
        return Mark(self._phases, self.record(), capture(self.model, self.optimizer))

    def go_back(self, mark: Mark) -> None:
        """Be where it was: model, optimiser, phases, and what is done."""
        restore(mark.state, self.model, self.optimizer)
        self._phases, self._record = mark.phases, copy.deepcopy(mark.record)

    def matrix_counts(self) -> tuple[int, int]:
        """Parameters of the targeted matrices as they are now, and how many of them train."""
        units = mpo_units(self.model, required=False).values()
        if not units:
            return self.prepared.matrix_parameters, self.prepared.matrix_trainable
        cores = [core for unit in units for core in unit.cores]
        return (
            sum(unit.spec.num_parameters for unit in units),
            sum(core.numel() for core in cores if core.requires_grad),
        )


def start(
    source: str | Path,
    data: Data,
    method: Method,
    settings: Settings,
    phases: Sequence[Phase] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Load the model, make it ready for the method, and encode the task.

    Args:
        source: a model folder or a hub name.
        data: what it is trained and scored on.
        method: what is compressed and what trains.
        settings: how it trains.
        phases: what it goes through; by default :func:`~mpo_tn.tuning.phases.phases_of` the other two.
        progress: told of each matrix that is compressed.

    Raises:
        MPOError: a model or tokenizer that cannot be read, a method that does not fit it.
    """
    phases = phases_of(method, settings) if phases is None else phases
    say = progress or silent
    say(0, 1, "reading the model")
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
    prepared = prepare(model, method, seed=settings.seed, progress=doing("compressing", say))
    prepared.model.to(settings.device)
    return Run(
        str(source), data, method, settings, phases, prepared=prepared, tokenizer=tokenizer, train=train, dev=dev
    )


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
