"""Scales that train: logarithms in float32 beside the float16 numbers that they stand for.

A step of the same size is then the same share of any scale, and none ever changes its sign or becomes zero.
"""

from __future__ import annotations

from typing import Any

import torch

from mpo_tn.torch.layers.tracing import is_traced

_LEAST, _MOST = 2.0**-24, torch.finfo(torch.float16).max
"""The least and the largest number of float16."""


def logarithms(scales: torch.Tensor) -> torch.Tensor:
    """What :func:`rounded` makes these very float16 numbers of.

    >>> scales = torch.tensor([0.1, -3.0, 6e-8], dtype=torch.float16)
    >>> torch.equal(rounded(logarithms(scales), scales), scales.float())
    True
    """
    return scales.detach().float().abs().log()


def rounded(logs: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """``exp(logs)`` with the signs of ``signs``, as numbers of float16, neither zero nor infinite, held in float32.

    Differentiable as if nothing were rounded: in float16 a gradient would be.
    """
    if is_traced():  # which sees into no autograd function: the same value and gradient in plain operations
        value = _Rounded.forward(logs.detach(), signs)
        return value + value * (logs - logs.detach())
    return _Rounded.apply(logs, signs)  # pyright: ignore[reportReturnType]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(logs: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        return logs.exp().clamp(_LEAST, _MOST).half().float().copysign(signs.float())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.saved_tensors[0], None
