"""What one asks of a run besides its method: how long it trains, and how it is squeezed."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_tn.exceptions import MPOError


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
