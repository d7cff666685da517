"""SqueezeCallback: dimension squeezing inside ``transformers.Trainer``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.ranking import RankedCut, Score
from mpo_tn.torch.loops.policy import Policy, as_number, cut_once, set_training, training_flags
from mpo_tn.torch.loops.rounds import Bonds, SqueezeResult, SqueezeRound, outcome
from mpo_tn.torch.models.moments import check_optimizer
from mpo_tn.torch.models.units import MPOUnit, all_bonds, count_parameters, kept_ratio, mpo_units
from mpo_tn.torch.state.training_state import TrainingState, capture, random_digest, restore

if TYPE_CHECKING:  # importing these takes a second
    from transformers import TrainerControl, TrainerState, TrainingArguments


class SqueezeCallback(TrainerCallback):
    """Squeeze the bonds of the model that a Trainer trains. See :func:`mpo_tn.torch.squeeze`.

    Every ``every_steps`` optimiser steps the model is evaluated. The first value is the reference. While the gap to it
    is at most ``delta``, the bonds of least score are cut and training goes on. Steps that are left once cutting has
    ended tune the model as it is.

    Guarantee (trainer-goes-back): once the gap is more than ``delta``, the model and the optimiser go back to where it
    was last within, bit for bit, and training stops. No cut is left that there was no evaluation after.

    Args:
        delta: how much worse than the reference is still good, in the units of the metric.
        metric: the one of Trainer's own evaluation (its ``eval_dataset`` and ``compute_metrics``) that decides.
        evaluate: ``evaluate(model)`` gives a number and takes the place of the metric.
        higher_is_better: ``None`` says so of every metric but one that ends with ``loss``, as Trainer does.
        every_steps: optimiser steps between evaluations.
        reference: the value to count gaps from. Nothing is cut before an evaluation comes within ``delta`` of it.
        cuts_per_round, score, keep, minimum_bond: as for :func:`~mpo_tn.torch.squeeze`.
        max_rounds: the most rounds, ``None`` for as many as there are steps for.

    ``result`` holds a :class:`~mpo_tn.torch.SqueezeResult` after training; the position of a round is the Trainer's
    step.

    Raises:
        MPOError: bad arguments; when training begins, a Trainer whose optimiser cannot follow a cut (FSDP, DeepSpeed,
            several processes), that would load its best model at the end, or that resumes from a checkpoint; later, an
            evaluation that does not report the metric.
    """

    def __init__(
        self,
        *,
        delta: float,
        metric: str = "eval_loss",
        evaluate: Callable[[nn.Module], Any] | None = None,
        higher_is_better: bool | None = None,
        every_steps: int = 50,
        reference: float | None = None,
        cuts_per_round: int = 1,
        score: Score = "error_per_parameter",
        keep: float | None = None,
        minimum_bond: int = 1,
        max_rounds: int | None = None,
    ) -> None:
        steps = whole_number(every_steps)
        if steps is None or steps < 1:
            raise MPOError(f"every_steps={every_steps!r} must be a whole number of at least 1")
        if higher_is_better is None:
            higher_is_better = evaluate is not None or not metric.endswith("loss")
        rounds = 2**62 if max_rounds is None else whole_number(max_rounds)
        if rounds is None or rounds < 1:
            raise MPOError(f"max_rounds={max_rounds!r} must be a whole number of at least 1, or None for no limit")
        self.policy = Policy(delta, higher_is_better, rounds, cuts_per_round, every_steps, score, keep, minimum_bond)
        self.metric, self.evaluate, self.every_steps, self.given_reference = metric, evaluate, every_steps, reference
        self.result: SqueezeResult | None = None
        self._run: _Run | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before any step is done."""
        _check_trainer(args, state)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        units = mpo_units(model)
        self.policy.check_start(units)
        check_optimizer(optimizer, model)
        self.result, self._run = None, _Run(model, optimizer, units, self.policy, self.given_reference)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate where it is time to, or ask Trainer to."""
        run, step = self._run, state.global_step
        if run is None or run.stopped:
            return
        self._missing(run)
        if step % self.every_steps:
            return
        if self.evaluate is None:
            run.asked, control.should_evaluate = step, True
        else:
            flags = training_flags(run.model)
            run.model.eval()
            with torch.no_grad():
                value = as_number(self.evaluate(run.model), "evaluate")
            set_training(flags)
            self._decide(run, value, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Decide, if it was this evaluation that was asked for."""
        run = self._run
        if run is None or run.asked != state.global_step:
            return
        if metrics is None or self.metric not in metrics:  # with several datasets another evaluation follows
            run.seen += list(metrics or {})
            return
        run.asked, run.seen = None, []
        self._decide(run, as_number(metrics[self.metric], self.metric), state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back if the last cut was not judged any more, and sum up."""
        run = self._run
        if run is None:
            return
        self._missing(run)
        if run.cuts:
            run.go_back()
        self.result, self._run = run.summary(), None

    def _decide(self, run: _Run, value: float, state: TrainerState, control: TrainerControl) -> None:
        good = run.judge(value, state.global_step)
        if run.stopped:
            control.should_training_stop = True
        elif good and state.global_step + self.every_steps <= state.max_steps:
            run.cut()

    def _missing(self, run: _Run) -> None:
        if run.asked is not None:
            raise MPOError(
                f"the evaluation at step {run.asked} did not report metric={self.metric!r}, only "
                f"{', '.join(run.seen) or 'nothing'}: name one of these"
            )


class _Run:
    """One training: the pending cuts, the last good state, the rounds so far."""

    def __init__(
        self, model: nn.Module, optimizer: Any, units: dict[str, MPOUnit], policy: Policy, reference: float | None
    ) -> None:
        self.model, self.optimizer, self.units, self.policy = model, optimizer, units, policy
        self.reference = reference
        self.start: Bonds = all_bonds(units)
        self.rounds: list[SqueezeRound] = []
        self.cuts: tuple[RankedCut, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.stopped = ""
        self.asked: int | None = None
        self.seen: list[str] = []
        self.began = time.perf_counter()
        self.good: TrainingState = capture(model, optimizer)

    def judge(self, value: float, step: int) -> bool:
        """Whether the model is good; if it is not any more, it goes back."""
        if self.reference is None:
            if not math.isfinite(value):
                raise MPOError(f"the reference at step {step} is {value}: the evaluation has to give a number")
            self.reference = value
        gap = self.policy.gap(value, self.reference)
        accepted = gap <= self.policy.delta
        if self.cuts:
            part = SqueezeRound(
                len(self.rounds) + 1, self.cuts, None, value, gap, accepted, kept_ratio(self.units.values()),
                count_parameters(self.model), step, random_digest(), time.perf_counter() - self.began, self.notes,
            )  # fmt: skip
            self.rounds.append(part)
            self.cuts, self.notes = (), ()
            if not accepted:
                self.stopped = "gap"
                self.go_back()
        if accepted:
            self.good = capture(self.model, self.optimizer)
        return accepted

    def cut(self) -> None:
        self.stopped = self.policy.satisfied(self.units)
        if not self.stopped and len(self.rounds) >= self.policy.max_steps:
            self.stopped = "max_steps"
        if not self.stopped:
            self.began = time.perf_counter()
            self.cuts, self.notes = cut_once(self.model, self.units, self.policy, self.optimizer)

    def go_back(self) -> None:
        restore(self.good, self.model, self.optimizer)

    def summary(self) -> SqueezeResult:
        reference = math.nan if self.reference is None else self.reference
        return outcome(self.model, self.units, self.rounds, self.stopped or "max_steps", reference, self.start)


def _check_trainer(args: TrainingArguments, state: TrainerState) -> None:
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise MPOError(
                f"{name} keeps parameters and optimiser state sharded over processes, and a cut needs a core and its "
                f"state whole: train without {name}, in one process"
            )
    if args.parallel_mode.value not in ("not_parallel", "not_distributed"):
        raise MPOError(
            f"training is spread over processes ({args.parallel_mode.value}), whose gradient buckets are laid out for "
            "the shapes at the start, and a cut changes them: train in one process"
        )
    if args.load_best_model_at_end:
        raise MPOError(
            "load_best_model_at_end would load a checkpoint with other bonds into the model: leave it off, the "
            "callback goes back to the best state by itself"
        )
    if state.global_step > 0:
        raise MPOError(
            f"training resumes at step {state.global_step}, and the callback keeps its last good state in memory only: "
            "start afresh, or use mpo_tn.torch.squeeze with a folder, which can be resumed"
        )
