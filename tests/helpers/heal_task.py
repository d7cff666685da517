"""A small model to heal, its teacher, and batches of random tokens."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import nn

from helpers.adapter import small
from helpers.squeeze_task import plain
from helpers.tiny_models import VOCAB, tiny
from mpo_tn.torch import HealResult, heal


def batch(seed: int, *, rows: int = 6, length: int = 9) -> dict[str, torch.Tensor]:
    """Random tokens; the second half of the rows is padded."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    mask[rows // 2 :, length - 3 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


BATCHES = [batch(seed) for seed in range(5)]
DEV = [batch(seed) for seed in (100, 101)]


COUNTING = [{"input_ids": (part["input_ids"][:, :1] + torch.arange(9)) % VOCAB} for part in BATCHES]
"""What a language model can learn: every token is the one before it and one more."""


@cache
def _made(family: str, bits: int | None = None) -> tuple[Any, Any]:
    """Made once and copied: a factorisation may round by where its operands lie, and runs are compared bit for bit."""
    how: dict[str, Any] = {"bond": 4} if bits is None else {"sites": 1, "bits": bits, "group": 8}
    return small(family, target_modules="all-linear", **how), tiny(family)


class Task:
    """A compressed model, the dense one it was made of, and a healing of a few steps."""

    def __init__(self, family: str = "bert", bits: int | None = None) -> None:
        self.model, self.teacher = copy.deepcopy(_made(family, bits))

    def run(self, **options: Any) -> HealResult:
        given: dict[str, Any] = {"batches": BATCHES, "dev": DEV, "steps": 12, "tensor_lr": 3e-3, **options}
        return heal(self.model, given.pop("teacher", self.teacher), given.pop("batches"), **given)


def bits(model: nn.Module) -> dict[str, Any]:
    """Every tensor of a model, to be compared with ``==``."""
    return plain(model.state_dict())


def without_seconds(result: HealResult) -> dict[str, Any]:
    return {**result.to_dict(), "seconds": 0, "step_seconds": 0}
