"""Merging neighbouring cores, and taking gradients of the result back to them, as plain matrix products.

::

      o_1    o_2             o_1 o_2
       |      |                 |
    --T_1----T_2--   ->   -----T_12-----
       |      |                 |
      i_1    i_2             i_1 i_2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpo_tn.planning.cost import Tree
from mpo_tn.torch.layers.workspace import give_back, is_open, scratch

_BLOCK_BYTES = 2**20
_BLOCK_ROWS = 64  # fewer make slow matrix products

Node = tuple[torch.Tensor, Any]
"""A merged tensor (left, out, in, right) and the two nodes it was merged from, None for a core."""


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
    if not is_open():
        ordered = torch.mm(a, b).view(rows, in_a, out_b, columns).transpose(1, 2).reshape(shape)
        return ordered if dtype is None else ordered.to(dtype)
    entries = in_a * out_b * columns
    ordered = scratch.take(rows * entries, dtype or a.dtype).view(rows, out_b, in_a, columns)
    if (in_a == 1 or out_b == 1) and ordered.dtype == a.dtype:  # in order already
        torch.mm(a, b, out=ordered.view(rows * in_a, out_b * columns))
        return ordered.view(shape)
    # In blocks: each is put in order while it is in the cache.
    at_once = min(rows, max(1, _BLOCK_BYTES // (entries * a.element_size()), _BLOCK_ROWS // in_a))
    block = scratch.take(at_once * entries, a.dtype).view(at_once * in_a, out_b * columns)
    for start in range(0, rows, at_once):
        count = min(at_once, rows - start)
        product = block[: count * in_a]
        torch.mm(a[start * in_a : (start + count) * in_a], b, out=product)
        ordered[start : start + count] = product.view(count, in_a, out_b, columns).transpose(1, 2)
    scratch.give_back(block)
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
    if is_open() and not ordered.is_contiguous():
        product = scratch.take(ordered.numel(), ordered.dtype).view(ordered.shape).copy_(ordered)
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
    if kept or not is_open():
        return torch.mm(a, b)
    out = scratch.take(a.shape[0] * b.shape[1], a.dtype).view(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out)


def any_wanted(tree: Tree, wanted: Sequence[bool]) -> bool:
    """Whether a core of ``tree`` is wanted."""
    return wanted[tree] if isinstance(tree, int) else any_wanted(tree[0], wanted) or any_wanted(tree[1], wanted)
