"""What an optimiser knows of a core, carried through a linear change of the core."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from mpo_tn.exceptions import MPOError

OptimizerLike = Any
"""A ``torch.optim.Optimizer``, or a wrapper that holds one as ``.optimizer`` (accelerate)."""

_LINEAR = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})


def unwrapped(optimizer: OptimizerLike) -> torch.optim.Optimizer:
    """The torch optimiser inside a wrapper."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise MPOError(f"{type(optimizer).__name__} is not a torch optimiser: pass a torch.optim.Optimizer")
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: OptimizerLike, model: nn.Module) -> None:
    """Refuse, before any training, an optimiser whose state cannot follow a cut.

    Raises:
        MPOError: state sharded over processes (FSDP, DeepSpeed, ZeRO), state that is not kept per parameter (L-BFGS),
            or parameters that are not those of the model.
    """
    kind = type(optimizer)
    inner = unwrapped(optimizer) if not kind.__module__.startswith("deepspeed") else optimizer
    name = type(inner).__name__
    if type(inner).__module__.startswith("deepspeed") or name == "ZeroRedundancyOptimizer":
        raise MPOError(
            f"{name} keeps its state sharded over processes, and a cut needs a core and its state whole: use a plain "
            "torch optimiser in one process"
        )
    if isinstance(inner, torch.optim.LBFGS):
        raise MPOError("LBFGS keeps its history as flat vectors that cannot follow a cut: use Adam or SGD")
    own = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter in held:
        if hasattr(parameter, "placements") or hasattr(parameter, "_is_flat_param") or hasattr(parameter, "ds_id"):
            raise MPOError(
                f"{name} holds parameters that are sharded over processes (FSDP or DeepSpeed), and a cut needs a core "
                "and its state whole: squeeze without sharding"
            )
    if not any(id(parameter) in own for parameter in held):
        raise MPOError(
            f"{name} holds none of the model's parameters: make the optimiser after compress, from model.parameters()"
        )


def map_moments(
    optimizer: OptimizerLike, parameter: nn.Parameter, matrix: np.ndarray, *, axis: int, name: str
) -> list[str]:
    """Carry the state of ``parameter`` through ``g -> sum_i matrix[i, j] g[.., i, ..]``, as its gradient goes.

    Guarantee (moments-follow): first moments (``exp_avg``, ``momentum_buffer``, ``grad_avg``) are those that the new
    cores would have had, up to rounding. Second moments follow with squared entries, which would be exact for gradients
    of independent entries and is an approximation otherwise; they stay non-negative. Numbers (``step``) are kept. State
    of another kind cannot follow, nor can that of complex cores: then all of the parameter's state is dropped, so that
    the optimiser starts it afresh, and a note says so.

    Args:
        optimizer: whose ``state`` holds the parameter, or not.
        parameter: before the cut.
        matrix: (old size, new size) of the axis.
        axis: of the parameter.
        name: for the note.
    """
    inner = unwrapped(optimizer)
    if parameter not in inner.state:
        return []
    state = inner.state[parameter]
    mapped: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == (1,):  # step, however it is kept
            continue
        if value.shape != parameter.shape or key not in _LINEAR | _SQUARED or value.is_complex():
            del inner.state[parameter]
            return [f"{type(inner).__name__} state {key!r} of {name} cannot follow a cut and was dropped"]
        weights = matrix if key in _LINEAR else matrix**2
        mapped[key] = _along(value, weights, axis)
    state.update(mapped)
    return []


def _along(value: torch.Tensor, matrix: np.ndarray, axis: int) -> torch.Tensor:
    device = torch.device("cpu") if value.device.type == "mps" else value.device
    wide = value.to(device).double().movedim(axis, -1) @ torch.as_tensor(matrix, device=device)
    return wide.movedim(-1, axis).to(value.device, value.dtype).contiguous()
