"""How far a model is from the dense one it was made from, by what the two compute on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.evaluating import device_of, evaluating
from mpo_tn.torch.models.feeding import is_encoder_decoder

Inputs = Mapping[str, Any]
"""What a model is called with: ``input_ids`` and, where texts differ in length, ``attention_mask``."""

# Numbers that are looked at in double precision at a time: 128 MB.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Distance:
    """The distance D to the dense model.

    ``measure`` says of what: ``"hidden"``, ``|h - h_dense|^2 / |h_dense|^2`` of the last hidden states; ``"logits"``,
    the mean over positions of ``KL(dense || model)`` in nats; ``"score"``, as hidden, of heads with one output.
    ``standard_error`` is that of a draw of as many sequences (of a ratio of sums: by the delta method), NaN for one.
    """

    value: float
    standard_error: float
    measure: str
    positions: int
    sequences: int

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def distance(model: nn.Module, reference: nn.Module | Iterable[torch.Tensor], batches: Iterable[Inputs]) -> Distance:
    """D of a model on some text: 0 for the dense model itself, infinite where the model gives what is no number.

    Args:
        model: one of transformers, or any module whose output has ``last_hidden_state`` or else ``logits``; an output
            that is a tensor counts as hidden states.
        reference: the dense model, which is run beside it; or what :func:`outputs` gave for the same batches, which
            costs memory (positions x width) and saves time where several models are compared.
        batches: the arguments of the models, one mapping of tensors a batch. Positions that ``attention_mask`` leaves
            out do not count; of a model with a decoder, those that ``decoder_attention_mask`` does.

    Guarantee (distance-padding): texts put into other batches give the same D, to rounding: padding does not count.
    Guarantee (distance-definition): it is the formula of its ``measure``, summed in double precision.

    Cost: a forward pass of the model, and of the reference if it is one.

    Raises:
        MPOError: no batch, a reference of other batches or another width, or one that is not finite or zero everywhere.

    >>> from types import SimpleNamespace
    >>> class Table(nn.Embedding):
    ...     def forward(self, input_ids):
    ...         return SimpleNamespace(last_hidden_state=super().forward(input_ids))
    >>> dense = Table(5, 3)
    >>> half = Table(5, 3, _weight=dense.weight.detach() / 2)
    >>> float(distance(half, dense, [{"input_ids": torch.arange(4).reshape(1, 4)}]))
    0.25
    """
    batches = list(batches)
    expected = outputs(reference, batches) if isinstance(reference, nn.Module) else iter(reference)
    found = _Sums()
    with evaluating(model):
        for number, batch in enumerate(batches):
            wanted = next(expected, None)
            if wanted is None:
                raise MPOError(f"the reference ends after {number} of {len(batches)} batches: make it of the same ones")
            found.add(*_output(model, batch), wanted)
    return found.result()


def outputs(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[torch.Tensor]:
    """The last hidden states, or else the logits, of every batch; shape (positions that hold text, width), on the CPU.

    Raises:
        MPOError: an output that has neither.
    """
    for batch in batches:
        with evaluating(model):
            rows = _output(model, batch)[1].cpu()
        yield rows


def _output(model: nn.Module, batch: Inputs) -> tuple[str, torch.Tensor, torch.Tensor]:
    """What is compared, its rows, sequence after sequence, and how many of them each has: a classifier gives one."""
    device = device_of(model)
    with torch.no_grad():
        here = {k: part.to(device) if isinstance(part, torch.Tensor) else part for k, part in batch.items()}
        result = model(**here)
    hidden = getattr(result, "last_hidden_state", None)
    if hidden is None and isinstance(result, torch.Tensor):
        hidden = result
    found = getattr(result, "logits", None) if hidden is None else hidden
    if not isinstance(found, torch.Tensor) or found.ndim not in (2, 3):
        raise MPOError(
            f"a {type(model).__name__} gives neither last_hidden_state nor logits, of which D could be taken: an "
            "encoder gives the one, a language model or a classifier the other"
        )
    measure = "hidden" if hidden is not None else "score" if found.shape[-1] == 1 else "logits"
    if found.ndim == 2:
        return measure, found.float(), torch.ones(len(found), dtype=torch.int64)
    mask = batch.get("decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask")
    mask = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return measure, found[mask.to(device)].float(), mask.sum(1).cpu()


class _Sums:
    """Numerator and denominator of D by sequence."""

    def __init__(self) -> None:
        self.measure = ""
        self.above: list[torch.Tensor] = []
        self.below: list[torch.Tensor] = []
        self.positions = 0

    def add(self, measure: str, found: torch.Tensor, lengths: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take a batch in."""
        self.measure = measure
        if found.shape != wanted.shape:
            raise MPOError(
                f"the model gives {tuple(found.shape)} numbers and the reference has {tuple(wanted.shape)}: D needs a "
                "reference of the same batches, and as wide"
            )
        if not bool(torch.isfinite(wanted).all()):
            raise MPOError("the dense model gives what is not finite on this text: there is nothing to be near to")
        step = max(1, _AT_ONCE // max(1, found.shape[-1]))
        parts = [
            (_divergence if measure == "logits" else _squares)(
                found[k : k + step].double(), wanted[k : k + step].to(found.device).double()
            )
            for k in range(0, len(found), step)
        ]
        above, below = (torch.cat([part[side] for part in parts]).cpu() for side in (0, 1))
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        for sums, rows in ((self.above, above), (self.below, below)):
            sums.append(torch.zeros(len(lengths), dtype=torch.float64).index_add(0, owner, rows))
        self.positions += int(lengths.sum())

    def result(self) -> Distance:
        """D of all batches."""
        if not self.above:
            raise MPOError("there is no batch to take D of: give at least one")
        above, below = torch.cat(self.above), torch.cat(self.below)
        count, whole = len(above), float(below.sum())
        if whole == 0:
            raise MPOError("the dense model gives zeros everywhere on this text: no distance is relative to that")
        value = float(above.sum()) / whole
        if not math.isfinite(value):
            return Distance(math.inf, math.nan, self.measure, self.positions, count)
        spread = float((above - value * below).square().sum())
        error = math.sqrt(spread * count / (count - 1)) / whole if count > 1 else math.nan
        return Distance(value, error, self.measure, self.positions, count)


def _squares(found: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (found - wanted).square().sum(-1), wanted.square().sum(-1)


def _divergence(found: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(wanted || found) of each row, and a one for each, so that the ratio of sums is a mean."""
    logp, logq = wanted.log_softmax(-1), found.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1), torch.ones(len(found), dtype=torch.float64, device=found.device)
