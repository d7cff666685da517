"""SqueezeCallback: dimension squeezing inside ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.ranking import Score
from mpo_tn.torch.loops.evaluation import as_number, evaluated
from mpo_tn.torch.loops.policy import Policy
from mpo_tn.torch.loops.rounds import SqueezeResult
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.models.evaluating import set_training, training_flags

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
        self.policy = Policy(
            delta=delta, higher_is_better=higher_is_better, max_steps=rounds, cuts_per_round=cuts_per_round,
            tune_steps=every_steps, score=score, keep=keep, minimum_bond=minimum_bond,
        )  # fmt: skip
        self.metric, self.evaluate, self.every_steps, self.reference = metric, evaluate, every_steps, reference
        self.result: SqueezeResult | None = None
        self._squeezer: Squeezer | None = None
        self._ended = False  # no cut is made any more, and nothing is evaluated for one
        self._asked: int | None = None
        self._seen: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before any step is done."""
        _check_trainer(args, state)
        squeezer = Squeezer(kwargs["model"], self.policy, kwargs["optimizer"], reference=self.reference)
        squeezer.mark_good()
        self._squeezer = squeezer
        self.result, self._ended, self._asked, self._seen = None, False, None, []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate where it is time to, or ask Trainer to."""
        squeezer, step = self._squeezer, state.global_step
        if squeezer is None or self._ended:
            return
        self._check_answered()
        if step % self.every_steps:
            return
        if self.evaluate is None:
            self._asked, control.should_evaluate = step, True
            return
        flags = training_flags(squeezer.model)
        try:
            value = evaluated(squeezer.model, self.evaluate)
        finally:
            set_training(flags)
        self._decide(squeezer, value, state, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Decide, if it was this evaluation that was asked for."""
        squeezer = self._squeezer
        if squeezer is None or self._asked != state.global_step:
            return
        if metrics is None or self.metric not in metrics:  # with several datasets another evaluation follows
            self._seen += list(metrics or {})
            return
        self._asked, self._seen = None, []
        self._decide(squeezer, as_number(metrics[self.metric], self.metric), state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back if the last cut was not judged any more, and sum up."""
        if self._squeezer is None:
            return
        self._check_answered()
        self.result, self._squeezer = self._squeezer.finish(), None

    def _decide(self, squeezer: Squeezer, value: float, state: TrainerState, control: TrainerControl) -> None:
        step = state.global_step
        squeezer.judge(value, position=step)
        stopped = squeezer.reason_to_stop()
        if stopped == "gap":
            squeezer.go_back()  # at once: Trainer may save a checkpoint at this step
            self._ended = control.should_training_stop = True
        elif squeezer.accepted and step + self.every_steps <= state.max_steps:  # else nothing would judge the cut
            self._ended = bool(stopped)
            if not stopped:
                squeezer.cut()

    def _check_answered(self) -> None:
        if self._asked is not None:
            raise MPOError(
                f"the evaluation at step {self._asked} did not report metric={self.metric!r}, only "
                f"{', '.join(self._seen) or 'nothing'}: name one of these"
            )


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
