"""What healing brings closer: hidden states or logits to those of a teacher, or the model's own loss down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.loops.feeding import Fed

OBJECTIVES = ("features", "logits", "loss")

Targets = tuple[torch.Tensor, ...]
"""What a teacher says of a batch."""


@dataclass(frozen=True)
class Term:
    """A part of a loss: a mean over ``weight`` of something, which has a gradient where there is one."""

    mean: torch.Tensor
    weight: float
    factor: float = 1.0


@dataclass(frozen=True)
class Measured:
    """How far off a model is on one batch. Over several batches it is the sum of ``total`` over that of ``weight``.

    The loss, which is what is brought down, is the sum of the ``terms``, each times its factor.
    """

    total: float
    weight: float
    terms: tuple[Term, ...]


class Objective:
    """What is measured, and what is said of it in reports. ``needs_teacher`` unless the model's own loss is enough."""

    needs_teacher = True
    unit = ""

    def targets(self, teacher: nn.Module, batch: Fed) -> Targets:
        """What the teacher says of the batch, on its device."""
        raise NotImplementedError

    def measure(self, model: nn.Module, batch: Fed, targets: Targets) -> Measured:
        """How far the model is from it."""
        raise NotImplementedError

    def counts(self, model: nn.Module, batch: Fed) -> bool:
        """Whether anything is measured in a part of a batch that is not all padding."""
        return True


class Features(Objective):
    """``|h - h_t|^2 / |h_t|^2`` of the last hidden states, over all positions that hold text.

    With ``blocks`` that much of the same, averaged over the outputs of all blocks but the last, is added to the loss;
    what is measured stays the distance of the last.
    """

    unit = "D, relative squared distance of the last hidden states"

    def __init__(self, blocks: float = 0.0) -> None:
        self.blocks = blocks

    def targets(self, teacher: nn.Module, batch: Fed) -> Targets:
        """The last hidden states, then those between if they count."""
        return self._states(teacher, batch, "the teacher")

    def measure(self, model: nn.Module, batch: Fed, targets: Targets) -> Measured:
        """The distance, and its gradient."""
        states = self._states(model, batch, "the model")
        check_shapes(states, targets, "hidden states")
        found = [_distance(own, other, batch.mask) for own, other in zip(states, targets, strict=True)]
        factors = [1.0, *[self.blocks / (len(states) - 1)] * (len(states) - 1)] if len(states) > 1 else [1.0]
        terms = [Term(off / size, float(size), by) for (off, size), by in zip(found, factors, strict=True)]
        return Measured(float(found[0][0].detach()), terms[0].weight, tuple(terms))

    def _states(self, model: nn.Module, batch: Fed, who: str) -> Targets:
        prefix = getattr(model, "base_model_prefix", "")
        body = getattr(model, prefix, model) if prefix else model  # without the head, whose logits would be thrown away
        output: Any = body(**batch.inputs, **({"output_hidden_states": True} if self.blocks else {}))
        last = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        if last is None:
            raise MPOError(
                f"{who}, a {type(model).__name__}, gives no last_hidden_state: use objective='logits' or 'loss'"
            )
        if not self.blocks:
            return (last,)
        states = getattr(output, "hidden_states", None)
        if states is None or len(states) < 3:
            raise MPOError(f"{who}, a {type(model).__name__}, gives no hidden states between blocks: leave blocks=0")
        return (last, *states[1:-1])


class Logits(Objective):
    """``KL(teacher || model)`` of the logits in nats, times the square of the temperature, a mean over positions."""

    unit = "KL from the teacher, nats a position"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def targets(self, teacher: nn.Module, batch: Fed) -> Targets:
        """Its logits."""
        return (self._logits(teacher, batch, "the teacher"),)

    def measure(self, model: nn.Module, batch: Fed, targets: Targets) -> Measured:
        """The divergence, and its gradient."""
        own = self._logits(model, batch, "the model")
        check_shapes((own,), targets, "logits")
        there = functional.log_softmax(targets[0].float() / self.temperature, dim=-1)
        here = functional.log_softmax(own.float() / self.temperature, dim=-1)
        apart = self.temperature**2 * (there.exp() * (there - here)).sum(-1)
        chosen = batch.mask if batch.mask is not None and batch.mask.shape == apart.shape else torch.ones_like(apart)
        weight = float(chosen.sum())
        total = (apart * chosen).sum()
        return Measured(float(total.detach()), weight, (Term(total / weight, weight),))

    def _logits(self, model: nn.Module, batch: Fed, who: str) -> torch.Tensor:
        output: Any = model(**batch.inputs)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
        if logits is None:
            raise MPOError(f"{who}, a {type(model).__name__}, gives no logits: use objective='features'")
        return logits


class OwnLoss(Objective):
    """The loss that the model itself computes from labels; of a language model without them, that of the next token."""

    needs_teacher = False
    unit = "the model's own loss"

    def targets(self, teacher: nn.Module, batch: Fed) -> Targets:
        """None are needed."""
        return ()

    def measure(self, model: nn.Module, batch: Fed, targets: Targets) -> Measured:
        """The loss, and its gradient. A batch counts by its scored labels."""
        labels, weight = self._scored(model, batch)
        loss = getattr(model(**batch.inputs, labels=labels), "loss", None)
        if loss is None:
            raise MPOError(
                f"a {type(model).__name__} gives no loss for labels: use objective='features', or a model with a head"
            )
        if weight == 0:
            raise MPOError("a batch has no label that is scored: every one of them is -100, or there is one token only")
        return Measured(float(loss.detach()) * weight, weight, (Term(loss, weight),))

    def counts(self, model: nn.Module, batch: Fed) -> bool:
        """Whether any label is scored."""
        return self._scored(model, batch)[1] > 0

    def _scored(self, model: nn.Module, batch: Fed) -> tuple[torch.Tensor, float]:
        """The labels, and how many of them are scored."""
        writes = getattr(model, "can_generate", None)
        causal, labels = bool(writes and writes()), batch.labels
        if labels is None:
            if not causal:
                raise MPOError(
                    f"objective='loss' needs labels in the batches, as a {type(model).__name__} does not predict the "
                    "next token: give them, or use another objective"
                )
            labels = batch.inputs["input_ids"]
            labels = labels if batch.mask is None else labels.masked_fill(batch.mask == 0, -100)
        scored = labels[:, 1:] if causal and labels.ndim == 2 else labels
        return labels, float((scored != -100).sum())


def objective_of(name: str, *, temperature: float, blocks: float) -> Objective:
    """The objective of that name.

    Raises:
        MPOError: there is none, or a number that is not its own.
    """
    if name not in OBJECTIVES:
        raise MPOError(f"objective={name!r} is not one of {', '.join(OBJECTIVES)}")
    if temperature != 1 and name != "logits":
        raise MPOError(f"temperature={temperature} is of objective='logits', and the objective is {name!r}")
    if blocks and name != "features":
        raise MPOError(f"blocks={blocks} is of objective='features', and the objective is {name!r}")
    kinds: dict[str, Callable[[], Objective]] = {
        "features": lambda: Features(blocks), "logits": lambda: Logits(temperature), "loss": OwnLoss
    }  # fmt: skip
    return kinds[name]()


def check_shapes(own: Targets, others: Targets, what: str) -> None:
    """Refuse a teacher that is not the model's.

    Raises:
        MPOError: another width, another vocabulary or another number of blocks.
    """
    if len(own) != len(others):
        raise MPOError(f"the model has {len(own)} blocks and the teacher {len(others)}: give blocks=0")
    for mine, theirs in zip(own, others, strict=True):
        if mine.shape != theirs.shape:
            raise MPOError(
                f"the {what} of the model have shape {list(mine.shape)} and the teacher's {list(theirs.shape)}: give "
                "the dense model that it was compressed from"
            )


def _distance(own: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``|own - other|^2`` and ``|other|^2`` where there is text, in float32 at least."""
    wide = torch.promote_types(other.dtype, torch.float32)
    own, other = own.to(wide), other.to(wide)
    apart = own - other
    if mask is not None and mask.shape == other.shape[:-1]:
        chosen = mask.unsqueeze(-1).to(wide)
        apart, other = apart * chosen, other * chosen
    size = other.square().sum()
    if float(size) == 0:
        raise MPOError("the hidden states of the teacher are all zero: a relative distance from them means nothing")
    return apart.square().sum(), size
