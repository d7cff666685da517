"""A small task to squeeze on, and what is compared after it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from mpo_tn.torch import MPOConfig, SqueezeResult, compress, squeeze
from mpo_tn.torch.models.units import all_bonds, mpo_units


class Task:
    """A student that starts as its own teacher, so that every cut hurts."""

    def __init__(self, *, lr: float = 1e-3, frozen: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.x = torch.randn(64, 12)
        self.y = self.model(self.x).detach()
        compress(self.model, MPOConfig(target_modules=["0", "2"], sites=3))
        if frozen:
            for unit in mpo_units(self.model).values():
                unit.cores[1].requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=lr)
        self.seen: list[int] = []

    def train_step(self, step: int) -> torch.Tensor:
        self.seen.append(step)
        rows = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        loss = (self.model(self.x[rows]) - self.y[rows]).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def evaluate(self, model: nn.Module) -> torch.Tensor:
        assert not model.training
        return (model(self.x) - self.y).square().mean()

    def run(self, **options: Any) -> SqueezeResult:
        defaults = {
            "evaluate": self.evaluate,
            "train_step": self.train_step,
            "optimizer": self.optimizer,
            "score": "error",
        }
        return squeeze(self.model, **{"delta": 0.02, "higher_is_better": False, "tune_steps": 3, **defaults, **options})

    def bonds(self) -> dict[str, tuple[int, ...]]:
        return all_bonds(mpo_units(self.model))


def without_seconds(result: SqueezeResult) -> dict[str, Any]:
    values = result.to_dict()
    return {**values, "rounds": [{**part, "seconds": 0} for part in values["rounds"]]}


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> Any:
    """Every bit that training depends on, to be compared with ``==``."""
    return plain(
        {
            "parameters": dict(model.named_parameters()),
            "buffers": dict(model.named_buffers()),
            "bonds": all_bonds(mpo_units(model)),
            "optimizer": optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],  # noqa: NPY002
        }
    )


def plain(value: Any) -> Any:
    """Nested values with tensors and arrays as their dtype, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value
