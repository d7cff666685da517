"""What a run does one after another, decided before anything is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpo_tn.exceptions import MPOError
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.settings import Settings, Squeezing


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear up over the share ``warmup`` of the steps, then linear down to zero after the last one.

    >>> [learning_rate_factor(k, 10, 0.2) for k in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1, steps - rising))


@dataclass(frozen=True)
class TrainPhase:
    """Train for some epochs, with learning rates that fall to zero at the end.

    Args:
        epochs: passes over the training set.
        max_steps: so many steps instead, if given.
        share: of the learning rates, at their highest.
        warmup: share of the steps in which they rise to it from zero.
        scored: whether the dev set is scored after every epoch and at the end.

    >>> print(TrainPhase(3, warmup=0.06))
    train 3 epochs at rates that rise over 0.06 of the steps and fall to zero
    >>> print(TrainPhase(1, share=0.1))
    train 1 epoch at rates that fall from 0.1 of theirs to zero
    """

    epochs: int
    max_steps: int | None = None
    share: float = 1.0
    warmup: float = 0.0
    scored: bool = True

    def steps(self, per_epoch: int) -> int:
        """How many steps it has, at so many an epoch."""
        return self.max_steps or self.epochs * per_epoch

    def rate(self, step: int, per_epoch: int) -> float:
        """The share of the learning rates in a step, counted from the first of the phase.

        >>> [TrainPhase(2, share=0.5).rate(step, per_epoch=2) for step in (0, 2, 3)]
        [0.5, 0.25, 0.125]
        """
        return self.share * learning_rate_factor(step, self.steps(per_epoch), self.warmup)

    def __str__(self) -> str:
        length = _count(self.epochs, "epoch") if self.max_steps is None else _count(self.max_steps, "step")
        rise = f"rise over {self.warmup:g} of the steps and " if self.warmup else ""
        top = f" from {self.share:g} of theirs" if self.share != 1 else ""
        return f"train {length} at rates that {rise}fall{top} to zero"


@dataclass(frozen=True)
class SqueezePhase:
    """Cut bonds and tune in turn, until the score has fallen too far. How many steps that takes is known afterwards.

    Args:
        how: what is cut, when it ends, and the share of the learning rates in its steps.
        scored: whether the dev set is scored after the last cut.

    >>> print(SqueezePhase(Squeezing(delta=2, keep=0.6)))
    squeeze by 50 cuts and 10 steps at 0.1 of the rates a round, until the score is worse by 2 or 0.6 is kept
    """

    how: Squeezing
    scored: bool = True

    def steps(self, per_epoch: int) -> None:
        """Not known before."""

    def rate(self, step: int, per_epoch: int) -> float:
        """The same share of the learning rates in every step, since their number is not known."""
        return self.how.rate

    def __str__(self) -> str:
        how = self.how
        tune = f" and {_count(how.tune_steps, 'step')} at {how.rate:g} of the rates" if how.tune_steps else ""
        kept = "" if how.keep is None else f" or {how.keep:g} is kept"
        cuts = _count(how.cuts_per_round, "cut")
        return f"squeeze by {cuts}{tune} a round, until the score is worse by {how.delta:g}{kept}"


Phase = TrainPhase | SqueezePhase


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def phases_of(method: Method, settings: Settings, squeezing: Squeezing | None = None) -> tuple[Phase, ...]:
    """What a run does, first to last. The method ``squeeze`` has a squeezing, by default ``Squeezing()``.

    Raises:
        MPOError: a squeezing with another method; nothing to do at all.

    >>> for phase in phases_of(Method("squeeze"), Settings(), Squeezing(final_epochs=1)):
    ...     print(phase)
    train 3 epochs at rates that rise over 0.06 of the steps and fall to zero
    squeeze by 50 cuts and 10 steps at 0.1 of the rates a round, until the score is worse by 1
    train 1 epoch at rates that fall from 0.1 of theirs to zero
    """
    if method.name != "squeeze" and squeezing is not None:
        raise MPOError(f"squeezing is given and the method is {method.name}: use the method squeeze")
    phases: list[Phase] = []
    if settings.epochs or settings.max_steps is not None:
        phases.append(TrainPhase(settings.epochs, settings.max_steps, warmup=settings.warmup))
    if method.name == "squeeze":
        how = squeezing or Squeezing()
        phases.append(SqueezePhase(how, scored=not how.final_epochs))
        if how.final_epochs:
            phases.append(TrainPhase(how.final_epochs, share=how.rate))
    if not phases:
        raise MPOError("epochs=0: train for at least one")
    return tuple(phases)


def squeezing_of(phases: tuple[Phase, ...]) -> Squeezing | None:
    """How a run is squeezed, the last time if there are several."""
    return next((phase.how for phase in reversed(phases) if isinstance(phase, SqueezePhase)), None)
