"""The engine of healing: steps, what held-out batches say, the best state, and what is needed to go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.loops.feeding import Fed, Feed
from mpo_tn.torch.loops.objectives import Measured, Objective, Targets, Term
from mpo_tn.torch.loops.recipe import Recipe, share_of_rate
from mpo_tn.torch.models.evaluating import set_training, training_flags
from mpo_tn.torch.models.ranks import add_gradients, check_equal, of_first, together, world
from mpo_tn.torch.models.trainable import parameter_groups, scales_kept
from mpo_tn.torch.state.training_state import TrainingState, capture, restore

# Enough steps to see past the lengths of single batches, few enough not to be felt.
_TRIAL_STEPS = 5
_PRECISION_STEPS = 3


@dataclass
class TargetCache:
    """What the teacher said of batches that come again, as long as it fits into ``limit`` bytes."""

    limit: int
    used: int = 0
    held: dict[tuple[str, int], Targets] = field(default_factory=dict[tuple[str, int], Targets])

    def get(self, feed: str, batch: Fed, make: Callable[[], Targets]) -> Targets:
        """The targets of a batch of a feed, from ``make()`` if they are not held."""
        if batch.key is None:
            return make()
        place = feed, batch.key
        if place in self.held:
            return self.held[place]
        found = make()
        size = sum(part.numel() * part.element_size() for part in found)
        if self.used + size <= self.limit:
            self.held[place] = found
            self.used += size
        return found


@dataclass
class Progressed:
    """What has been done so far; with the state of the model and the optimiser all that it takes to go on."""

    losses: list[float] = field(default_factory=list[float])
    held_out: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    best_step: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0


class Healer:
    """One healing of one model, in place. What may train has been chosen before (``requires_grad``).

    In a process group every process has one, and takes its part of every batch; what is summed over them decides.

    Args:
        model: in evaluation mode, so that there is no dropout.
        teacher: in evaluation mode; None if the objective needs none.
        objective: what is brought down.
        recipe: the numbers.
        train, dev: the batches.
        cache_bytes: what may be held of the teacher's outputs.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, objective: Objective, recipe: Recipe, train: Feed,
        dev: Feed | None, cache_bytes: int,
    ) -> None:  # fmt: skip
        self.model, self.teacher, self.objective, self.recipe = model, teacher, objective, recipe
        self._train, self._dev, self._cache = train, dev, TargetCache(cache_bytes)
        self.device = next(model.parameters()).device
        self.optimizer = self._new_optimizer()
        self.precision = "float32" if recipe.precision == "auto" else recipe.precision
        self.steps = recipe.steps or 0
        self.done = Progressed()
        self.best: TrainingState | None = None
        self.notes: list[str] = []

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def every(self) -> int:
        """Steps between two measurements of the held-out batches."""
        return self.recipe.every or max(1, min(200, self.steps // 10))

    def check(self) -> None:
        """Measure the first batch, to see that model, teacher and batches belong together; each process by itself.

        Raises:
            MPOError: they do not, or what is measured is not finite.
        """
        with torch.no_grad():
            try:
                measured = self._measure(self._train.at(0), "train")
            except MPOError:
                raise
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                text = str(error).strip().splitlines() or [type(error).__name__]
                raise MPOError(
                    f"the first batch cannot go through the model and the teacher ({text[0]}): they have to take what "
                    "is in it, and to know its tokens"
                ) from error
        if not math.isfinite(measured.total):
            raise MPOError(
                f"{self.objective.unit} is {measured.total} before the first step: look for NaN in the model and the "
                "teacher"
            )

    def decide(self) -> None:
        """Choose precision and number of steps where the recipe leaves them open, by doing a few and undoing them."""
        recipe, minutes = self.recipe, self.recipe.minutes
        if recipe.precision == "auto":
            times = {name: self._seconds_per_step(name, _PRECISION_STEPS) for name in ("float32", "bfloat16")}
            self.precision = of_first(lambda: min(times, key=lambda name: times[name]))
            shown = ", ".join(f"{1000 * seconds:.0f} ms in {name}" for name, seconds in times.items())
            self.notes.append(f"precision: a step takes {shown} here, so it is {self.precision}")
        if minutes is not None:
            step = self._seconds_per_step(self.precision, _TRIAL_STEPS)
            measuring = time.perf_counter()
            self._measure_dev()
            measuring = time.perf_counter() - measuring
            # Ten measurements and the one before the first step, if every is left to us.
            rate = step + (measuring / recipe.every if recipe.every else 0)
            fixed = measuring if recipe.every else 11 * measuring
            self.steps = of_first(lambda: max(1, int((60 * minutes - fixed) / rate)))
            self.notes.append(f"{minutes:g} minutes are {self.steps} steps here, at {step:.3f} s")
        self.notes = of_first(lambda: self.notes)

    def begin(self) -> None:
        """Measure the held-out batches before the first step; the model as it is is the best so far.

        Raises:
            MPOError: what is measured is not finite.
        """
        value = self._measure_dev()
        if value is not None:
            if not math.isfinite(value):
                raise MPOError(f"{self.objective.unit} is {value} on dev before the first step: look for NaN in there")
            self.done.held_out.append((0, value))
        self.best = self.captured()

    def captured(self) -> TrainingState:
        """The state of model and optimiser, to go on from or to go back to."""
        return capture(self.model, self.optimizer)

    def step(self) -> float:
        """One step. If anything is not finite the parameters stay as they were.

        Raises:
            MPOError: the loss or its gradient is NaN or infinite.
        """
        start, number = time.perf_counter(), len(self.done.losses)
        share = share_of_rate(number, self.steps, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        value = self._step(number, self.optimizer)
        self.done.losses.append(value)
        self.done.step_seconds += time.perf_counter() - start
        return value

    def measure(self) -> bool:
        """Measure the held-out batches; without any the last state is the best. Returns whether it is the best yet.

        Raises:
            MPOError: the processes have not the same numbers any more.
        """
        check_equal(f"numbers after step {len(self.done.losses)}", self.trained)
        done, value = self.done, self._measure_dev()
        best = True
        if value is not None:
            lowest = dict(done.held_out)[done.best_step]
            done.held_out.append((len(done.losses), value))
            best = value < lowest
        if best:
            done.best_step, self.best = len(done.losses), self.captured()
        return best

    def go_back(self) -> None:
        """Bring the model to the best state, bit for bit."""
        if self.best is not None:
            restore(self.best, self.model)

    def _new_optimizer(self) -> torch.optim.AdamW:
        recipe = self.recipe
        groups = parameter_groups(
            self.model, recipe.lr, recipe.tensor_lr, weight_decay=0.0, scale_lr=recipe.scale_lr
        )  # fmt: skip
        optimizer = torch.optim.AdamW(groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def _step(self, number: int, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad(set_to_none=True)
        terms: list[Term] = []

        def forward() -> list[tuple[float, float]]:
            terms[:] = self._measure(self._train.at(number), "train").terms
            return [(float(term.mean.detach()), term.weight) for term in terms]

        parts = together(forward)
        weights = [sum(part[k][1] for part in parts) for k in range(len(terms))]

        def share(k: int, weight: float) -> float:
            return terms[k].factor * weight / weights[k] if weights[k] else math.nan

        value = sum(share(k, weight) * mean for part in parts for k, (mean, weight) in enumerate(part) if weight)
        if not math.isfinite(value):
            raise self._stopped("loss", value, number)
        shares = [torch.full_like(term.mean, share(k, term.weight)) for k, term in enumerate(terms)]
        add_gradients(self.trained, lambda: torch.autograd.backward([term.mean for term in terms], shares))
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        length = nn.utils.get_total_norm(gradients)
        norm = together(lambda: float(length))[0]  # of the first, as threads change the last digit
        if not math.isfinite(norm):
            raise self._stopped("norm of the gradient", norm, number)
        nn.utils.clip_grads_with_norm_(self.trained, self.recipe.clip, length.new_tensor(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    def _stopped(self, what: str, value: float, number: int) -> MPOError:
        of = f" of {self.steps}" if self.steps else ""
        return MPOError(
            f"the {what} is {value} in step {number + 1}{of}; no step was taken, and the model is in the best state "
            f"before it, after step {self.done.best_step}: lower lr and tensor_lr, or use precision='float32'"
        )

    def _measure(self, batch: Fed, feed: str) -> Measured:
        """How far off the model is on what of a batch this process takes."""
        part = batch.own_part()
        if part is None or (world() > 1 and not self.objective.counts(self.model, part)):
            # All processes have to take the same path, but what this one takes has no text in it.
            found = self._measure_all(batch, f"{feed}, all")
            return Measured(0.0, 0.0, tuple(replace(term, weight=0.0) for term in found.terms))
        return self._measure_all(part, feed)

    def _measure_all(self, batch: Fed, feed: str) -> Measured:
        batch = batch.to(self.device)
        targets = self._cache.get(feed, batch, lambda: self._targets(batch))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.objective.measure(self.model, batch, targets)

    def _targets(self, batch: Fed) -> Targets:
        if self.teacher is None:
            return ()
        place = next((parameter.device for parameter in self.teacher.parameters()), self.device)
        with torch.no_grad():
            return tuple(part.to(self.device) for part in self.objective.targets(self.teacher, batch.to(place)))

    def _measure_dev(self) -> float | None:
        held = self._dev
        if held is None:
            return None

        def measure() -> tuple[float, float]:
            total = weight = 0.0
            for batch in held.in_order():
                measured = self._measure(batch, "dev")
                total, weight = total + measured.total, weight + measured.weight
            return total, weight

        with torch.no_grad():
            parts = together(measure)
        return sum(total for total, _ in parts) / sum(weight for _, weight in parts)

    def _seconds_per_step(self, precision: str, steps: int) -> float:
        before, chosen, optimizer = capture(self.model), self.precision, self._new_optimizer()
        try:
            self.precision = precision
            self._step(0, optimizer)  # the first makes what the others reuse
            start = time.perf_counter()
            for number in range(1, steps + 1):
                self._step(number, optimizer)
            return (time.perf_counter() - start) / steps
        finally:
            self.precision = chosen
            restore(before, self.model)


@contextmanager
def lent(model: nn.Module, teacher: nn.Module | None) -> Generator[None]:
    """Both in evaluation mode; afterwards every module and every parameter has the flags it had.

    Cores have their scales as parameters only if they had before.
    """
    networks = [model] if teacher is None else [model, teacher]
    modes = [training_flags(network) for network in networks]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for network in networks:
            network.eval()
        with scales_kept(model):
            yield
    finally:
        for mode in modes:
            set_training(mode)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
