"""Layers of given structure for the tests of the forward modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from helpers.adapter import close, cores_norm
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch import MPOEmbedding, MPOLinear

COMPUTING = ("auto", "chain", "rebuild")
MODES = (*COMPUTING, "cached")


def layer_of(
    spec: ModuleSpec, mode: str = "auto", *, dtype: torch.dtype = torch.float64, frozen: tuple[int, ...] = (),
    seed: int = 0,
) -> Any:  # fmt: skip
    """A layer of Gaussian cores."""
    generator = torch.Generator().manual_seed(seed)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator, dtype=dtype))

    cores = [parameter(*shape) for shape in spec.core_shapes]
    for k in frozen:
        cores[k].requires_grad_(False)
    if spec.kind == "embedding":
        layer: Any = MPOEmbedding(spec, cores)
    else:
        layer = MPOLinear(spec, cores, parameter(spec.out_features) if spec.bias else None)
    layer.mode = mode
    return layer


def agrees(layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """``y`` is ``x W^T + b`` within ``C eps sqrt(size)`` of the norms of what was multiplied.

    Any order of contraction rounds against the product of the norms of the cores, not against that of the matrix.
    """
    wanted = functional.linear(x, layer.dense_weight(), layer.bias).detach()
    bias = 0.0 if layer.bias is None else layer.bias.detach().norm()
    close(y, wanted, x.detach().abs().double().norm() * cores_norm(layer) + bias)
