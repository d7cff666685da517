"""Merging neighbouring cores, and taking gradients of the result back to them, as plain matrix products.

::

      o_1    o_2             o_1 o_2
       |      |                 |
    --T_1----T_2--   ->   -----T_12-----
       |      |                 |
      i_1    i_2             i_1 i_2
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from mpo_tn.planning.cost import Tree

_BLOCK_BYTES = 2**20
_BLOCK_ROWS = 64  # fewer make slow matrix products
_MOST_KEPT_BYTES = 2**28

Node = tuple[torch.Tensor, Any]
"""A merged tensor (left, out, in, right) and the two nodes it was merged from, None for a core."""


class _Workspace(threading.local):
    """Memory for what is merged on the CPU, kept by each thread for the next time.

    Fresh memory of the size of a matrix comes from the system page by page, which takes longer than filling it: 3.5 ms
    for 768 x 3072 numbers against 3 ms for the product of two cores that they are. What is kept is what one layer
    needs at one time.
    """

    def __init__(self) -> None:
        self.open = False
        self._idle: list[torch.Tensor] = []
        self._busy: list[torch.Tensor] = []

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *error: object) -> None:
        self.open = False
        self._idle += [buffer for buffer in self._busy if buffer.numel() <= _MOST_KEPT_BYTES]
        self._busy = []

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A one-dimensional tensor of whatever lies there, until it is given back or the workspace is closed."""
        size = count * dtype.itemsize
        fitting = [buffer for buffer in self._idle if buffer.numel() >= size]
        if fitting:
            buffer = min(fitting, key=torch.Tensor.numel)
            self._idle = [other for other in self._idle if other is not buffer]
        else:
            if self._idle:  # it was too small, and another one like it would only add up
                smallest = min(self._idle, key=torch.Tensor.numel)
                self._idle = [other for other in self._idle if other is not smallest]
            with torch.inference_mode(False):  # tensors made in inference mode cannot be written outside of it
                buffer = torch.empty(size, dtype=torch.uint8)
        self._busy.append(buffer)
        return buffer[:size].view(dtype)

    def drop(self) -> None:
        """Forget the memory that is not in use."""
        self._idle = []

    def give_back(self, value: torch.Tensor) -> None:
        """Let the memory of what :meth:`take` gave be used again."""
        for buffer in self._busy:
            if buffer.data_ptr() == value.data_ptr():
                self._busy = [other for other in self._busy if other is not buffer]
                self._idle.append(buffer)
                return


_workspace = _Workspace()


def free_workspace() -> None:
    """Give the memory back that this thread keeps for merging."""
    _workspace.drop()


def workspace(core: torch.Tensor) -> AbstractContextManager[None]:
    """Inside of it what is merged lies in the workspace, and lasts until the end; only where no graph is recorded."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or core.device.type != "cpu"
        or type(core) not in (torch.Tensor, nn.Parameter)
    ):
        return nullcontext()
    return _workspace


def give_back(value: torch.Tensor) -> None:
    """Inside of :func:`workspace`, say that a merged tensor is no longer needed; elsewhere nothing happens."""
    if _is_open():
        _workspace.give_back(value)


def _is_open() -> bool:
    return not torch.compiler.is_compiling() and _workspace.open


def merge_tree(tree: Tree, cores: Sequence[torch.Tensor]) -> Node:
    """The cores of ``tree`` as one, and what it was merged from; differentiable outside of :func:`workspace`."""
    if isinstance(tree, int):
        return cores[tree], None
    parts = merge_parts(tree, cores)
    assert parts is not None
    return merge(parts[0][0], parts[1][0]), parts


def merge_parts(tree: Tree, cores: Sequence[torch.Tensor]) -> tuple[Node, Node] | None:
    """The two nodes at the root of a tree, not merged themselves; None for a single core."""
    return None if isinstance(tree, int) else (merge_tree(tree[0], cores), merge_tree(tree[1], cores))


def dense_matrix(cores: Sequence[torch.Tensor], tree: Tree, size: tuple[int, int]) -> torch.Tensor:
    """The matrix (out, in) of the cores, merged in the order of ``tree`` and cropped to ``size``; differentiable."""
    return _cropped(merge_tree(tree, cores)[0], size)


def merged_matrix(
    parts: Sequence[Node] | None, core: torch.Tensor, size: tuple[int, int], dtype: torch.dtype | None
) -> torch.Tensor:
    """The same from the nodes at the root, rounded to ``dtype``; in the workspace if that is open."""
    if parts is None:
        matrix = _cropped(core, size)
        return matrix if dtype is None else matrix.to(dtype)
    return _cropped(merge(parts[0][0], parts[1][0], dtype), size)


def _cropped(merged: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return merged.reshape(merged.shape[1], merged.shape[2])[: size[0], : size[1]]


def merge(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Two neighbours (left, out, in, bond) and (bond, out, in, right) as one, rounded to ``dtype``."""
    left, out_a, in_a, bond = a.shape
    _, out_b, in_b, right = b.shape
    shape = (left, out_a * out_b, in_a * in_b, right)
    rows, columns = left * out_a, in_b * right
    a, b = a.reshape(rows * in_a, bond), b.reshape(bond, out_b * columns)
    if not _is_open():
        ordered = torch.mm(a, b).view(rows, in_a, out_b, columns).transpose(1, 2).reshape(shape)
        return ordered if dtype is None else ordered.to(dtype)
    entries = in_a * out_b * columns
    ordered = _workspace.take(rows * entries, dtype or a.dtype).view(rows, out_b, in_a, columns)
    if (in_a == 1 or out_b == 1) and ordered.dtype == a.dtype:  # in order already
        torch.mm(a, b, out=ordered.view(rows * in_a, out_b * columns))
        return ordered.view(shape)
    # In blocks: each is put in order while it is in the cache.
    at_once = min(rows, max(1, _BLOCK_BYTES // (entries * a.element_size()), _BLOCK_ROWS // in_a))
    block = _workspace.take(at_once * entries, a.dtype).view(at_once * in_a, out_b * columns)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        product = block[: count * in_a]
        torch.mm(a[start * in_a : (start + count) * in_a], b, out=product)
        ordered[start : start + count] = product.view(count, in_a, out_b, columns).transpose(1, 2)
    _workspace.give_back(block)
    return ordered.view(shape)


def spread(
    tree: Tree, parts: Sequence[Node] | None, gradient: torch.Tensor, wanted: Sequence[bool],
    found: list[torch.Tensor | None],
) -> None:  # fmt: skip
    """Carry the gradient of a merged tensor to the wanted cores it was merged from; the others cost nothing.

    Args:
        tree: of the merged tensor.
        parts: the nodes it was merged from, None for a core.
        gradient: its gradient, which inside of :func:`workspace` is used up.
        wanted: for every core whether it wants its gradient.
        found: where the gradients of the wanted cores are put.
    """
    if parts is None:
        found[tree] = gradient
        return
    a, b = parts[0][0], parts[1][0]
    left, out_a, in_a, bond = a.shape
    _, out_b, in_b, right = b.shape
    rows, columns = left * out_a, in_b * right
    ordered = gradient.reshape(rows, out_b, in_a, columns).transpose(1, 2)
    if _is_open() and not ordered.is_contiguous():
        product = _workspace.take(ordered.numel(), ordered.dtype).view(ordered.shape).copy_(ordered)
        give_back(gradient)
    else:
        product = ordered
    product = product.reshape(rows * in_a, out_b * columns)
    both = any_wanted(tree[1], wanted)
    if any_wanted(tree[0], wanted):
        part = passing_product(product, b.reshape(bond, out_b * columns).mH, kept=parts[0][1] is None)
        if not both:
            give_back(product)
        spread(tree[0], parts[0][1], part.view(a.shape), wanted, found)
    if both:
        part = passing_product(a.reshape(rows * in_a, bond).mH, product, kept=parts[1][1] is None)
        give_back(product)
        spread(tree[1], parts[1][1], part.view(b.shape), wanted, found)


def passing_product(a: torch.Tensor, b: torch.Tensor, *, kept: bool) -> torch.Tensor:
    """A matrix product, in the workspace if that is open and the result is not ``kept``."""
    if kept or not _is_open():
        return torch.mm(a, b)
    out = _workspace.take(a.shape[0] * b.shape[1], a.dtype).view(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out)


def any_wanted(tree: Tree, wanted: Sequence[bool]) -> bool:
    """Whether a core of ``tree`` is wanted."""
    return wanted[tree] if isinstance(tree, int) else any_wanted(tree[0], wanted) or any_wanted(tree[1], wanted)
