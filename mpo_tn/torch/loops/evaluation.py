"""What a caller's functions give: a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError


def evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Any]) -> float:
    """What ``evaluate`` gives for the model, which is left in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return as_number(evaluate(model), "evaluate")


def as_number(value: Any, source: str) -> float:
    """What a caller's function returned, as a float."""
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except OverflowError:
        raise MPOError(f"{source} returned a number that is too large for a float: return a float") from None
    except (TypeError, ValueError, RuntimeError):
        raise MPOError(f"{source} returned {value!r}, which is no number: return a float") from None
