"""How a model is healed, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, whole_number

PRECISIONS = ("float32", "bfloat16", "auto")
TRAINED = ("auxiliary", "cores")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices and numbers of a healing. ``steps`` and ``minutes``: one of the two is None."""

    objective: str
    train: str
    also: tuple[str, ...]
    steps: int | None
    minutes: float | None
    lr: float
    tensor_lr: float
    scale_lr: float
    warmup: float
    clip: float
    temperature: float
    blocks: float
    every: int | None
    precision: str
    seed: int

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise MPOError(f"train={self.train!r} is not one of {', '.join(TRAINED)}")
        if self.precision not in PRECISIONS:
            raise MPOError(f"precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.steps is not None and self.minutes is not None:
            raise MPOError(f"steps={self.steps} and minutes={self.minutes} both say how long: give one of them")
        for name in ("steps", "every"):
            value = getattr(self, name)
            if value is not None and (whole_number(value) or 0) < 1:
                raise MPOError(f"{name}={value!r} must be a whole number of at least 1")
        if (whole_number(self.seed) is None) or self.seed < 0:
            raise MPOError(f"seed={self.seed!r} must be a whole number of at least 0")
        for name in ("minutes", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not (is_real(value) and 0 < value < math.inf):
                raise MPOError(f"{name}={value!r} must be a finite number above 0")
        for name in ("lr", "tensor_lr", "scale_lr", "blocks"):
            value = getattr(self, name)
            if not (is_real(value) and 0 <= value < math.inf):
                raise MPOError(f"{name}={value!r} must be a finite number of at least 0")
        if not (is_real(self.warmup) and 0 <= self.warmup < 1):
            raise MPOError(f"warmup={self.warmup!r} must be a share of the steps, from 0 to below 1")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "also": list(self.also)}


def share_of_rate(step: int, steps: int, warmup: float) -> float:
    """Of the learning rates in a step counted from 0: up over the share ``warmup`` of the steps, then half a cosine
    down, which reaches 0 where the next step would be.

    >>> [round(share_of_rate(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


@dataclass(frozen=True)
class HealResult:
    """What :func:`~mpo_tn.torch.heal` did. The model is in the state after ``best_step`` of ``steps``; 0 is the start.

    ``losses`` are by step, ``held_out`` pairs of (steps done, value) of the held-out batches, the first before any
    step; ``before`` and ``after`` are the first of them and that of ``best_step``, all None without such batches.
    ``unit`` says what is measured. ``seconds`` counts everything, measuring too, ``step_seconds`` the steps alone.
    ``trainable`` of ``total`` parameters were trained; the scales of quantised cores count as trained.
    """

    objective: str
    unit: str
    train: str
    steps: int
    best_step: int
    before: float | None
    after: float | None
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    seconds: float
    step_seconds: float
    lr: float
    tensor_lr: float
    trainable: int
    total: int
    precision: str
    notes: tuple[str, ...] = ()
    scale_lr: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            **asdict(self),
            "losses": list(self.losses),
            "held_out": [list(pair) for pair in self.held_out],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HealResult:
        """The inverse of :meth:`to_dict`."""
        held_out = tuple((step, value) for step, value in values["held_out"])
        plain: dict[str, Any] = {
            **values, "losses": tuple(values["losses"]), "held_out": held_out, "notes": tuple(values["notes"])
        }  # fmt: skip
        return cls(**plain)

    def __str__(self) -> str:
        what = "auxiliary tensors" if self.train == "auxiliary" else "cores"
        recent = self.losses[-max(1, len(self.losses) // 20) :]
        loss = f"loss {self.losses[0]:.4g} -> {sum(recent) / len(recent):.4g} (mean of the last {len(recent)})"
        rate = f"{self.steps / self.step_seconds:.3g} steps a second" if self.step_seconds > 0 else "no time at all"
        lines = [
            f"healed {what}, {self.trainable:,} of {self.total:,} parameters, in {self.steps} steps and "
            f"{self.seconds:.1f} s ({rate}, {self.precision})",
            f"trained on {self.unit}: {loss}",
        ]
        if self.before is not None and self.after is not None:
            kept = "the last step" if self.best_step == self.steps else f"step {self.best_step}, the best"
            lines.append(f"held-out batches: {self.before:.4g} -> {self.after:.4g} after {kept}")
        return "\n".join([*lines, *self.notes])
