"""Sample text for deciding: what a calibration is made of, and what is held back to judge by."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.survey import DenseUnit

_HELD_BACK = 5
"""Every fifth batch is held back."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Batches to calibrate on, and others to judge by.

    Args:
        batches: for moments.
        held_back: on which alternatives are compared; what is fitted never sees them.
        remembered: what was measured with them, so that a second budget for the same model costs less.
    """

    batches: tuple[Mapping[str, Any], ...]
    held_back: tuple[Mapping[str, Any], ...]
    remembered: list[Any] = field(default_factory=list[Any], repr=False)

    @classmethod
    def of(cls, batches: Iterable[Any]) -> Samples:
        """Every fifth batch is held back, of two to four the second, and a single one serves for both.

        Raises:
            MPOError: no batches, or batches that are no mappings of tensors.
        """
        if isinstance(batches, (Mapping, torch.Tensor, str)):
            raise MPOError(f"batches is one {type(batches).__name__}, not several batches: put it into a list")
        given = tuple(batches)
        if not given:
            raise MPOError("there is no batch to calibrate on: give at least two")
        for batch in given:
            if not isinstance(batch, Mapping) or not any(isinstance(part, torch.Tensor) for part in batch.values()):
                raise MPOError(
                    f"a batch is {_said(batch)}: give mappings of tensors by argument of the model, as a "
                    "tokenizer does, so that the distance to the dense model can be measured; or give "
                    "calibrate(model, batches), which takes any batches, and errors alone choose"
                )
        if len(given) == 1:
            return cls(given, given)
        last = _HELD_BACK - 1 if len(given) >= _HELD_BACK else 1
        held = tuple(batch for k, batch in enumerate(given) if k % _HELD_BACK == last)
        return cls(tuple(batch for k, batch in enumerate(given) if k % _HELD_BACK != last), held)


def _said(batch: Any) -> str:
    return "a mapping without tensors" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"


class Judge:
    """The distance to the dense model on text that is held back.

    Args:
        model: the dense model, as it is now.
        batches: to judge on; taken until there are ``tokens``.
        tokens: so many at least, if there are.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], tokens: int | None = None) -> None:
        self.model = model
        self.batches: list[Mapping[str, Any]] = []
        count = 0
        for batch in batches:
            if tokens is not None and count >= tokens:
                break
            self.batches.append(batch)
            count += _positions(batch)
        self._wanted = list(outputs(model, self.batches))

    def __call__(self) -> float:
        """D of the model as it is by now."""
        return float(distance(self.model, self._wanted, self.batches))


def _positions(batch: Mapping[str, Any]) -> int:
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor):
        return int(mask.sum())
    return next((value.numel() for value in batch.values() if isinstance(value, torch.Tensor)), 0)


@contextmanager
def replaced(unit: DenseUnit, matrix: torch.Tensor, shift: torch.Tensor | None = None) -> Generator[None]:
    """The model with another matrix (out, in) in the place of a unit's, and its biases shifted.

    Afterwards the unit is as it was, in the same memory; if something is wrong with the matrix it never changes.
    """
    held = [bias if isinstance(bias := getattr(m, "bias", None), nn.Parameter) else None for m in unit.modules]
    biases = {bias: bias.data for bias in held if bias is not None}
    weight = unit.weight.data
    found = unit.stored(matrix.to(weight))
    shifted = {bias: data if shift is None else (data + shift).to(data.dtype) for bias, data in biases.items()}
    # All is computed by now: from here on nothing raises.
    unit.weight.data = found
    for bias, data in shifted.items():
        bias.data = data
    try:
        yield
    finally:
        unit.weight.data = weight
        for bias, data in biases.items():
            bias.data = data


def is_biased(unit: DenseUnit) -> bool:
    """Whether every module of the unit has a bias, which nobody else uses: it can take up the mean of an error."""
    return (
        not unit.lends_bias
        and unit.readers == unit.modules
        and all(isinstance(getattr(module, "bias", None), nn.Parameter) for module in unit.modules)
    )
