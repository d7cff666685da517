"""squeeze: lower bonds one by one where it hurts least, tuning after each cut, until the gap is too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.ranking import Score
from mpo_tn.progress import Progress
from mpo_tn.storage.places import claimed_if
from mpo_tn.torch.loops.evaluation import as_number, evaluated
from mpo_tn.torch.loops.policy import Policy
from mpo_tn.torch.loops.rounds import SqueezeResult, SqueezeRound
from mpo_tn.torch.loops.run_folder import RunFolder
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.models.evaluating import set_training, training_flags
from mpo_tn.torch.models.moments import OptimizerLike, unwrapped
from mpo_tn.torch.models.ranks import world


def squeeze(
    model: nn.Module,
    *,
    evaluate: Callable[[nn.Module], Any],
    delta: float,
    train_step: Callable[[int], Any] | None = None,
    optimizer: OptimizerLike | None = None,
    scheduler: Any = None,
    higher_is_better: bool = True,
    max_steps: int = 100,
    cuts_per_round: int = 1,
    tune_steps: int = 10,
    score: Score = "error_per_parameter",
    keep: float | None = None,
    minimum_bond: int = 1,
    reference: float | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    on_round: Callable[[SqueezeRound], None] | None = None,
) -> SqueezeResult:
    """Squeeze the bonds of a model, in place: cut, tune, evaluate, until it is worse by more than ``delta``.

    Algorithm 2 of Liu, Gao et al. (ACL 2021). Each round computes the spectra of all bonds as they are now, cuts the
    ``cuts_per_round`` bonds of least score by one, tunes and evaluates.

    Args:
        model: with MPO modules, see :func:`~mpo_tn.torch.compress`. What may train is up to the caller.
        evaluate: ``evaluate(model)`` gives a number. The model is in evaluation mode, and gradients are off.
        delta: how much worse than the reference is still good, in the units of what ``evaluate`` returns.
        train_step: ``train_step(step)`` does one optimiser step and returns its loss. ``step`` counts from 0 over the
            whole run, and the batch has to be a function of it (and of the random generators) so that a run can be
            resumed. Modules have the training flags they had when this was called. ``None`` cuts without tuning.
        optimizer: the one that ``train_step`` uses; its state follows the cuts.
        scheduler: the one that ``train_step`` steps; rolled back and resumed with the rest.
        higher_is_better: of what ``evaluate`` returns.
        max_steps: the most rounds.
        cuts_per_round: cuts by one in each round.
        tune_steps: calls of ``train_step`` in each round.
        score: ``"error_per_parameter"``, ``"error"`` or a callable, see :class:`~mpo_tn.planning.ranking.Ranking`. By
            ``"error"`` the bonds beside small cores go first, which hardly makes the model smaller (docs/results.md).
        keep: stop at this kept ratio of the decomposed matrices.
        minimum_bond: no bond goes below this.
        reference: the value to count the gap from; ``None`` evaluates the model as it is given.
        folder: for a log of every round, ``log.json``, and the state to resume from.
        resume: go on with the run in ``folder``, if there is one; else start it afresh.
        progress: called after each round, with how many are done, how many there may be, and what the last one did.
        on_round: called after each round with what was logged of it.

    Guarantee (last-good-state): the model, the optimiser and the scheduler end in the state after the last round whose
    gap was within ``delta``, also if anything raises.
    Guarantee (killed-same-bits): killed at any point and called again with the same arguments and ``folder``, the run
    ends in the same bonds and bits.

    Returns:
        Every round, the bonds, and why it stopped.

    Raises:
        MPOError: a bad argument, a model without MPO modules or without a bond to cut, an optimiser that cannot follow,
            a loss that is NaN or infinite, a ``folder`` of another run; several processes, whose ranks would have to
            cut the same bonds.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> weight = model[0].dense_weight().detach()
    >>> def distance(model):
    ...     return float((model[0].dense_weight() - weight).norm() / weight.norm())
    >>> result = squeeze(model, evaluate=distance, delta=0.3, higher_is_better=False)
    >>> result.stopped, result.value <= 0.3, result.bonds == {"0": model[0].spec.bonds}
    ('gap', True, True)
    """
    refuse_several_processes()
    policy = Policy(
        delta=delta, higher_is_better=higher_is_better, max_steps=max_steps, cuts_per_round=cuts_per_round,
        tune_steps=tune_steps if train_step else 0, score=score, keep=keep, minimum_bond=minimum_bond,
    )  # fmt: skip
    squeezer = Squeezer(model, policy, optimizer, scheduler, reference)
    with claimed_if(folder):
        home = None
        if folder is not None:
            settings: dict[str, Any] = {
                **policy.to_dict(),
                "tuned": train_step is not None,
                "optimizer": None if optimizer is None else type(unwrapped(optimizer)).__name__,
                "scheduler": None if scheduler is None else type(scheduler).__name__,
                "reference": reference,
            }
            home = RunFolder(folder, settings, resume=resume)
        return _Run(squeezer, evaluate, train_step, home).go(progress, on_round)


def refuse_several_processes() -> None:
    """Refuse to squeeze where torch is spread over processes: each would decide on its own.

    Guarantee (squeeze-alone): returning means that this process is the only one.

    Raises:
        MPOError: it is not.
    """
    if world() > 1:
        raise MPOError(
            f"this is one of {world()} processes, and each would cut the bonds that its own evaluation says: squeeze "
            "in one process, and spread only the tuning afterwards"
        )


class _Run:
    """Tuning, evaluating, writing and telling: all of a run but its decisions, which the engine makes."""

    def __init__(
        self, squeezer: Squeezer, evaluate: Callable[[nn.Module], Any], train_step: Callable[[int], Any] | None,
        home: RunFolder | None,
    ) -> None:  # fmt: skip
        self.squeezer, self.evaluate, self.train_step, self.home = squeezer, evaluate, train_step, home
        self.flags = training_flags(squeezer.model)

    def go(self, progress: Progress | None, on_round: Callable[[SqueezeRound], None] | None) -> SqueezeResult:
        squeezer, home = self.squeezer, self.home
        try:
            if home is not None and home.log is not None:
                home.resume(squeezer)
                if home.finished:
                    return squeezer.finish()
            else:
                if squeezer.reference is None:
                    squeezer.judge(evaluated(squeezer.model, self.evaluate), position=0)
                self.save()
            try:
                while not squeezer.reason_to_stop():
                    part = self.round()
                    self.save()
                    if on_round:
                        on_round(part)
                    if progress:
                        progress(part.number, squeezer.policy.max_steps, _line(part))
            except BaseException:  # an interrupt, too: whatever ends the run, the last good state is what is left
                squeezer.go_back()
                raise
            result = squeezer.finish()
            self.save(result)
            return result
        finally:
            set_training(self.flags)

    def round(self) -> SqueezeRound:
        squeezer = self.squeezer
        squeezer.cut()
        loss, position = self.tune()
        squeezer.judge(evaluated(squeezer.model, self.evaluate), position=position, loss=loss)
        return squeezer.rounds[-1]

    def tune(self) -> tuple[float | None, int]:
        """The mean loss of the training steps of a round, and how many there have been in all."""
        model, steps, begin = self.squeezer.model, self.squeezer.policy.tune_steps, self.squeezer.position
        if self.train_step is None:
            return None, begin
        set_training(self.flags)
        for parameter in model.parameters():
            parameter.grad = None
        total = 0.0
        for step in range(begin, begin + steps):
            loss = as_number(self.train_step(step), "train_step")
            if not math.isfinite(loss):
                done = len(self.squeezer.rounds)
                raise MPOError(
                    f"the loss of round {done + 1} is {loss} at step {step}: the model is back in the state after "
                    f"round {done}; try a smaller learning rate or more tune_steps"
                )
            total += loss
        return total / steps if steps else None, begin + steps

    def save(self, result: SqueezeResult | None = None) -> None:
        if self.home is not None:
            self.home.save(self.squeezer, result)


def _line(part: SqueezeRound) -> str:
    cuts: Sequence[str] = [f"{cut.unit}[{cut.bond}] {cut.before} -> {cut.after}" for cut in part.cuts]
    shown = ", ".join(cuts[:2]) + (f" and {len(cuts) - 2} more" if len(cuts) > 2 else "")
    return f"{shown}; kept {part.kept:.3f}, value {part.value:.6g}, gap {part.gap:.3g}"
