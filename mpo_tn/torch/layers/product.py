"""``y = x W^T + b`` from the cores of ``W``. For backward only ``x`` and the cores are kept; the rest is made again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch.amp import is_autocast_available  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional

from mpo_tn.planning.cost import Route
from mpo_tn.torch.layers.merging import any_wanted, merge_parts, merge_tree, merged_matrix, passing_product, spread
from mpo_tn.torch.layers.packing import Form, Held, apart, tensor_count, together
from mpo_tn.torch.layers.workspace import give_back, workspace

_NARROW = 64
"""Fewer columns than this make slow matrix products."""


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Contract in the dtype of the cores: autocast then rounds the weight once, as it does a dense one."""
    if autocast_dtype(device) is None:  # an autocast object takes longer to make than a small product
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Chain:
    """The sweep over the segments of a chain. Between two steps a state has the shape (batch, taken, beside).

    From the last segment, with what is left of ``x`` in the batch and what is there of ``y`` beside; each segment
    multiplies from the left in the layout it has, and only narrow states are ever transposed::

        (tokens i_1 ... i_k-1,  i_k bond_k,    o_k+1 ... o_n)  before
        (tokens i_1 ... i_k-1,  bond_k-1 o_k,  o_k+1 ... o_n)  after

    From the first segment the same with left and right swapped; there the segments, which are small, are transposed.
    """

    def __init__(self, route: Route, cores: Sequence[torch.Tensor]) -> None:
        self.from_last = route.from_last
        self.nodes = [merge_tree(tree, cores) for tree in route.segments]

    def matrix(self, k: int) -> torch.Tensor:
        """Segment k as the matrix that multiplies a state from the left."""
        left, out, in_, right = self.nodes[k][0].shape
        if self.from_last:
            return self.nodes[k][0].reshape(left * out, in_ * right)
        return self.nodes[k][0].permute(1, 3, 0, 2).reshape(out * right, left * in_)

    def gradient(self, k: int, of_matrix: torch.Tensor) -> torch.Tensor:
        """The gradient of segment k from that of its matrix."""
        left, out, in_, right = self.nodes[k][0].shape
        if self.from_last:
            return of_matrix.reshape(left, out, in_, right)
        return of_matrix.reshape(out, right, left, in_).permute(2, 0, 3, 1)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """The state before any segment: ``x`` (tokens, in)."""
        return self._shaped(x, 0, x.shape[0])

    def following(self, result: torch.Tensor, k: int, tokens: int) -> torch.Tensor:
        """What segment ``k - 1`` made, as the state that segment ``k`` takes."""
        return self._shaped(result, k, tokens)

    def _shaped(self, value: torch.Tensor, k: int, tokens: int) -> torch.Tensor:
        _, _, in_, right = self.nodes[k][0].shape
        left = self.nodes[k][0].shape[0]
        ahead = [node[0].shape[2] for node in self.nodes[k + 1 :]]
        behind = [node[0].shape[1] for node in self.nodes[:k]]
        if self.from_last:
            return value.reshape(tokens * _product(ahead), in_ * right, _product(behind))
        return value.reshape(tokens * _product(behind), left * in_, _product(ahead))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _full_size(cores: Sequence[torch.Tensor]) -> tuple[int, int]:
    """The rows and columns of the matrix before it is cropped."""
    return _product([core.shape[1] for core in cores]), _product([core.shape[2] for core in cores])


def _apply(matrix: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """``matrix`` (given, taken) times every member of ``state`` (batch, taken, beside)."""
    batch, taken, beside = state.shape
    if beside == 1:
        return torch.mm(state.reshape(batch, taken), matrix.T).unsqueeze(2)
    if batch > 1 and beside < _NARROW:  # one product that reads the matrix once, for a copy of the state
        flat = torch.mm(state.transpose(1, 2).reshape(batch * beside, taken), matrix.T)
        return flat.view(batch, beside, matrix.shape[0]).transpose(1, 2)
    return torch.bmm(matrix.unsqueeze(0).expand(state.shape[0], -1, -1), state)


def apply_chain(x: torch.Tensor, cores: Sequence[torch.Tensor], route: Route) -> torch.Tensor:
    """``x`` (tokens, all columns) to (tokens, all rows) by the sweep of ``route``; differentiable."""
    rows = _product([core.shape[1] for core in cores])
    return _states(x, _Chain(route, cores))[-1].reshape(x.shape[0], rows)


def _states(x: torch.Tensor, chain: _Chain, steps: int | None = None) -> list[torch.Tensor]:
    """The states that the segments take, and last what the final one gives."""
    states = [chain.first(x)]
    steps = len(chain.nodes) if steps is None else steps
    for k in range(steps):
        result = _apply(chain.matrix(k), states[-1])
        states.append(result if k == len(chain.nodes) - 1 else chain.following(result, k + 1, x.shape[0]))
    return states


class _Product(torch.autograd.Function):
    """``linear(x, W, b)`` that saves ``x`` and the cores, and computes gradients for the cores that want one.

    Cores in few bits are saved as they are held and dequantised again in backward; their scales may want gradients.
    """

    @staticmethod
    def forward(
        x: torch.Tensor, bias: torch.Tensor | None, route: Route, size: tuple[int, int], dtype: torch.dtype | None,
        forms: tuple[Form | None, ...], *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        y = product(x, bias, route, size, dtype, forms, tensors)
        # Torch lets nobody write into a view that was made in here, and residuals are added in place.
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, _, ctx.route, ctx.size, ctx.dtype, ctx.forms, *tensors = inputs
        # As for a dense layer: without a gradient for the weight, x is not needed.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[6:]) else None, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        want_x, want_bias, _, _, _, _, *wanted = ctx.needs_input_grad
        starts = _starts(ctx.forms) if ctx.forms else range(len(tensors))
        counts = [*starts, len(tensors)]
        want_cores = [any(wanted[start:end]) for start, end in pairwise(counts)]
        g = gradients[0]
        # The backward pass of a step can run inside of autocast.
        with no_autocast(g.device), workspace(tensors[0]):
            of_x: torch.Tensor | None = None
            of_cores: list[torch.Tensor | None] = [None] * len(want_cores)
            if want_x or any(want_cores):
                cores = together(tensors, ctx.forms)
                backward = _rebuild_backward if ctx.route.mode == "rebuild" else _chain_backward
                of_x = backward(ctx, g, x, cores, want_x, want_cores, of_cores)
            of_bias = g.sum(0) if want_bias else None
        of_tensors: list[torch.Tensor | None] = [None] * len(tensors)
        for k, (start, of_core) in enumerate(zip(starts, of_cores, strict=True)):
            form = ctx.forms[k] if ctx.forms else None
            if of_core is not None and form is not None:
                packed, scales = tensors[start : start + 2]
                of_tensors[start + 1] = form.of_scales(packed, of_core).to(scales.dtype)
            else:
                of_tensors[start] = of_core
        return of_x, of_bias, None, None, None, None, *of_tensors


def _starts(forms: Sequence[Form | None]) -> list[int]:
    """At which tensor each core begins."""
    counts = [tensor_count(form) for form in forms]
    return [sum(counts[:k]) for k in range(len(counts))]


def _rebuild_backward(
    ctx: Any, g: torch.Tensor, x: torch.Tensor | None, cores: Sequence[torch.Tensor], want_x: bool,
    want_cores: Sequence[bool], of_cores: list[torch.Tensor | None],
) -> torch.Tensor | None:  # fmt: skip
    tree = ctx.route.segments[0]
    parts = merge_parts(tree, cores)
    of_x = None
    if want_x:
        matrix = merged_matrix(parts, cores[0], ctx.size, ctx.dtype)
        of_x = torch.mm(g, matrix.conj())
        give_back(matrix)
    if x is not None:
        rows, columns = _full_size(cores)
        of_matrix = passing_product(g.T, x.conj(), kept=isinstance(tree, int))
        if of_matrix.dtype != cores[0].dtype:
            of_matrix = of_matrix.to(cores[0].dtype)
        if (rows, columns) != ctx.size:
            of_matrix = functional.pad(of_matrix, (0, columns - ctx.size[1], 0, rows - ctx.size[0]))
        spread(tree, parts, of_matrix.view(1, rows, columns, 1), want_cores, of_cores)
    return of_x


def _chain_backward(
    ctx: Any, g: torch.Tensor, x: torch.Tensor | None, cores: Sequence[torch.Tensor], want_x: bool,
    want_cores: Sequence[bool], of_cores: list[torch.Tensor | None],
) -> torch.Tensor | None:  # fmt: skip
    chain = _Chain(ctx.route, cores)
    wanted = [any_wanted(tree, want_cores) for tree in ctx.route.segments]
    # The states before the segments that want a gradient; nothing after the last of them is needed.
    last = max([0, *[k for k, want in enumerate(wanted) if want]])
    rows, columns = _full_size(cores)
    states = [] if x is None else _states(_padded(x, columns), chain, last)
    gradient = _padded(g, rows)
    for k in range(len(chain.nodes) - 1, -1, -1):
        matrix = chain.matrix(k)
        beside = _product([node[0].shape[1 if chain.from_last else 2] for node in (
            chain.nodes[:k] if chain.from_last else chain.nodes[k + 1 :])])  # fmt: skip
        gradient = gradient.reshape(gradient.numel() // (matrix.shape[0] * beside), matrix.shape[0], beside)
        if wanted[k]:
            of_matrix = torch.mm(
                gradient.transpose(0, 1).reshape(matrix.shape[0], gradient.shape[0] * beside),
                states[k].transpose(0, 1).reshape(matrix.shape[1], gradient.shape[0] * beside).mH,
            )
            spread(ctx.route.segments[k], chain.nodes[k][1], chain.gradient(k, of_matrix), want_cores, of_cores)
        if not want_x and not any(wanted[:k]):
            break
        gradient = _apply(matrix.mH, gradient)
    return gradient.reshape(g.shape[0], columns)[:, : ctx.size[1]] if want_x else None


def _padded(value: torch.Tensor, size: int) -> torch.Tensor:
    return value if value.shape[1] == size else functional.pad(value, (0, size - value.shape[1]))


def product(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    route: Route,
    size: tuple[int, int],
    dtype: torch.dtype | None,
    forms: Sequence[Form | None],
    tensors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """``x`` (tokens, in) to (tokens, out), without a gradient of its own; the cores as ``apart`` gives them."""
    with workspace(tensors[0]):
        cores = together(tensors, forms)
        if route.mode == "rebuild":
            matrix = merged_matrix(merge_parts(route.segments[0], cores), cores[0], size, dtype)
            return functional.linear(x, matrix, bias)
        y = apply_chain(_padded(x, _product([core.shape[2] for core in cores])), cores, route)
        y = y[:, : size[0]]
        return y.contiguous() if bias is None else y + bias


def mpo_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    route: Route,
    size: tuple[int, int],
    cores: Sequence[Held],
) -> torch.Tensor:
    """``y = x W^T + b`` for ``x`` (..., in), by ``route``.

    Args:
        x: (..., in) in the dtype of the cores, or any floating dtype inside of autocast.
        bias: (out,) or None.
        route: how; see :class:`~mpo_tn.planning.cost.Route`.
        size: (out, in), the matrix cropped.
        cores: first to last; those in few bits as they are held.

    Guarantee (x-and-cores): what is kept for backward is ``x`` and the cores as they are held.
    Guarantee (frozen-for-nothing): cores that do not require a gradient get none, and no product is made for it.
    Guarantee (second-derivatives): it can be differentiated twice.
    """
    device = x.device
    rounded = autocast_dtype(device)
    if rounded is None:
        return _mpo_linear(x, bias, route, size, None, cores)
    with no_autocast(device):
        if route.mode == "rebuild":
            dtype = rounded if _castable(cores[0].dtype) else None
            bias = None if bias is None else _cast(bias, rounded)
            return _cast(_mpo_linear(_cast(x, rounded), bias, route, size, dtype, cores), rounded)
        # A chain is contracted in the dtype of the cores as well, and the result rounded.
        return _cast(_mpo_linear(x.to(cores[0].dtype), bias, route, size, None, cores), rounded)


def _mpo_linear(
    x: torch.Tensor, bias: torch.Tensor | None, route: Route, size: tuple[int, int], dtype: torch.dtype | None,
    cores: Sequence[Held],
) -> torch.Tensor:  # fmt: skip
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    tensors, forms = apart(cores)
    if torch.is_grad_enabled():
        y: torch.Tensor = _Product.apply(flat, bias, route, size, dtype, forms, *tensors)  # pyright: ignore
    else:
        y = product(flat, bias, route, size, dtype, forms, tensors)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], size[0])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast rounds the operands of a matrix product, None outside of it."""
    kind = device.type
    if not is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _castable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype) if _castable(value.dtype) else value
