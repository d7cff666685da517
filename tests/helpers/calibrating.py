"""What tests of calibration share: padded batches, and the inputs of layers as plain NumPy sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from helpers.tiny_models import VOCAB
from mpo_tn.testing import C

Batch = dict[str, torch.Tensor]


def padded_batches(count: int = 3, seed: int = 0) -> list[Batch]:
    """Batches of other sizes and lengths; the sequences have other lengths, too."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Batch] = []
    for k in range(count):
        length = 7 + k
        ids = torch.randint(1, VOCAB, (3, length), generator=generator)
        mask = (torch.arange(length) < torch.tensor([[length], [4], [1]])).long()
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def inputs_of(model: nn.Module, name: str, batches: Sequence[Batch]) -> np.ndarray:
    """What the module ``name`` is given for the tokens that are no padding, (tokens, in), in float64."""
    rows: list[np.ndarray] = []
    mask: Any = None

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().double().numpy()
        rows.append(x[mask] if x.ndim == 3 else x)

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].bool().numpy()
            model(**batch)
    handle.remove()
    return np.concatenate(rows)


def near(actual: torch.Tensor, expected: np.ndarray, scale: float, eps: float = 2.3e-16) -> None:
    """Equal within ``C eps sqrt(size) scale`` in the Frobenius norm."""
    assert tuple(actual.shape) == expected.shape
    assert np.linalg.norm(actual.numpy() - expected) <= C * eps * np.sqrt(expected.size) * scale
