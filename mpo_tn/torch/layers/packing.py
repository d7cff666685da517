"""Integers of few bits in words of 32, as compressed-tensors packs them, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from mpo_tn.torch.layers.tracing import is_traced
from mpo_tn.torch.layers.workspace import is_open, scratch

Shape = tuple[int, int, int, int]


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (rows, columns) in int8 as rows of int32 words, ``bits`` bits each and none between them.

    >>> pack(torch.tensor([[-4, 3, 0]], dtype=torch.int8), 3)
    tensor([[312]], dtype=torch.int32)
    """
    # Eight integers are ``bits`` bytes, see unpack. compressed-tensors would load transformers into every worker.
    rows, columns = values.shape
    at_once = max(_PACKED_AT_ONCE // max(columns, 1), 1)
    parts = [_packed(values[start : start + at_once], bits) for start in range(0, rows, at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_PACKED_AT_ONCE = 2**18
"""Entries, which are worked on in 64 bits for eight of them."""


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    rows, columns = values.shape
    raw = torch.zeros((rows, columns + -columns % 8), dtype=torch.uint8, device=values.device)
    raw[:, :columns] = (values + (1 << (bits - 1))).view(torch.uint8)
    if bits < 8:
        eight = raw.view(torch.int64)
        for half in (1, 2, 4):
            width = half * bits
            lower = sum(((1 << width) - 1) << (16 * half * part) for part in range(4 // half))
            eight = (eight & lower) | ((eight >> (8 * half - width)) & (lower << width))
        raw = eight.view(torch.uint8).view(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    found = torch.zeros((rows, 4 * -(-columns * bits // 32)), dtype=torch.uint8, device=values.device)
    common = min(found.shape[1], raw.shape[1])
    found[:, :common] = raw[:, :common]
    return found.view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack`, ten times as fast as that of compressed-tensors where bits are not 4 or 8.

    Eight integers are ``bits`` bytes, whatever ``bits`` is: as one number of 64 bits they are spread over its bytes in
    three steps, each of which moves the upper half of every part to where the upper half of a twice as wide one is.
    It makes no decision by data, so it can be traced.

    >>> unpack(torch.tensor([[312]], dtype=torch.int32), 3, 3)
    tensor([[-4,  3,  0]], dtype=torch.int8)
    """
    if is_traced():
        return _picked(packed, bits, columns)
    rows = packed.shape[0]
    raw = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return (raw ^ 0x80).view(torch.int8)[:, :columns]
    if raw.shape[1] % bits:
        raw = functional.pad(raw, (0, -raw.shape[1] % bits))
    if bits in (2, 4):
        eight = raw.view(torch.int16 if bits == 2 else torch.int32).long()
    else:
        eight = functional.pad(raw.view(-1, bits), (0, 8 - bits)).view(torch.int64)
    for half in (4, 2, 1):
        width = half * bits
        lower = sum(((1 << width) - 1) << (16 * half * part) for part in range(4 // half))
        upper = eight & (lower << width)
        eight = (eight & lower) | (upper << (8 * half - width))
    return eight.view(torch.int8).view(rows, -1)[:, :columns] - (1 << (bits - 1))


def _picked(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The same, each integer picked from the two words that it may lie in: ``torch.jit.trace`` reads no bytes anew."""
    starts = bits * torch.arange(columns, device=packed.device)
    words = functional.pad(packed.long() & 0xFFFFFFFF, (0, 1))
    both = words[:, starts // 32] | (words[:, starts // 32 + 1] << 32)
    return (((both >> (starts % 32)) & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int8)


@dataclass(frozen=True)
class Form:
    """How the tensors that hold a core are to be read.

    Attributes:
        shape: of the core, (left bond, out leg, in leg, right bond).
        bits: 2 to 8, or 16 for numbers in float16.
        group: columns of the matrix (left out, in right) that share a scale.
        dtype: of what is computed with.
    """

    shape: Shape
    bits: int
    group: int
    dtype: torch.dtype

    @property
    def columns(self) -> int:
        """Of the matrix (left out, in right)."""
        return self.shape[2] * self.shape[3]

    def core(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The core itself, each number rounded once to the dtype; in the workspace if that is open."""
        return self.matrix(tensors).view(self.shape)

    def slices(self, tensors: Sequence[torch.Tensor], digits: torch.Tensor) -> torch.Tensor:
        """``core[:, digit]`` for each of ``digits``, (digits, left, in right), unpacking no other rows."""
        left, out, _, _ = self.shape
        rows = (digits[:, None] + out * torch.arange(left, device=digits.device)).reshape(-1)
        picked = [tensor.reshape(left * out, -1)[rows] for tensor in tensors]
        return self.matrix(picked).view(-1, left, self.columns)

    def matrix(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of the matrix (left out, in right), from the same rows of what holds it."""
        if self.bits == 16:
            return self._room(tensors[0]).copy_(tensors[0])
        packed, scales = tensors
        if scales.requires_grad and torch.is_grad_enabled() and not is_traced():
            return _Scaled.apply(packed, scales, self)  # pyright: ignore[reportReturnType]
        values = unpack(packed, self.bits, self.columns)
        # An integer times a scale is exact in float32; in fewer digits the scale would be rounded first.
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        wide, scales = self._room(values, exact).copy_(values), scales.to(exact)
        whole = self.columns // self.group
        if whole:
            blocks = wide[:, : whole * self.group].unflatten(1, (whole, self.group))
            blocks.mul_(scales[:, :whole, None])
        if whole * self.group < self.columns:
            wide[:, whole * self.group :].mul_(scales[:, whole:])
        return wide if self.dtype == exact else self._room(wide).copy_(wide)

    def of_scales(self, packed: torch.Tensor, of_matrix: torch.Tensor) -> torch.Tensor:
        """The gradient of the scales (rows, groups) from that of the matrix that the integers and they stand for."""
        values = unpack(packed, self.bits, self.columns)
        shares = of_matrix.reshape(values.shape) * values
        whole = self.columns // self.group
        parts = [shares[:, : whole * self.group].unflatten(1, (whole, self.group)).sum(2)] if whole else []
        if whole * self.group < self.columns:
            parts.append(shares[:, whole * self.group :].sum(1, keepdim=True))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _room(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype
        if is_open():
            return scratch.take(math.prod(like.shape), dtype).view(like.shape)
        return torch.empty(like.shape, dtype=dtype, device=like.device)


class _Scaled(torch.autograd.Function):
    """The matrix, for gradients of the scales: what is kept for backward is the integers as they are held."""

    @staticmethod
    def forward(packed: torch.Tensor, scales: torch.Tensor, form: Form) -> torch.Tensor:
        return form.matrix((packed, scales))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        packed, scales, ctx.form = inputs
        ctx.kind = scales.dtype
        ctx.save_for_backward(packed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (packed,) = ctx.saved_tensors
        return None, ctx.form.of_scales(packed, gradients[0]).to(ctx.kind), None


@dataclass(frozen=True)
class Packed:
    """A core that is held in few bits, as a layer computes with it: what is held, and how it is read."""

    tensors: tuple[torch.Tensor, ...]
    form: Form

    @property
    def requires_grad(self) -> bool:
        """Whether its scales train."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def shape(self) -> Shape:
        """Of the core."""
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is read as."""
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensors[0].device

    def core(self) -> torch.Tensor:
        """The core itself."""
        return self.form.core(self.tensors)


Held = torch.Tensor | Packed
"""A core as a layer holds it."""


def apart(cores: Sequence[Held]) -> tuple[tuple[torch.Tensor, ...], tuple[Form | None, ...]]:
    """The tensors that hold some cores, and how they are read; no forms at all if every core is a tensor itself."""
    if all(isinstance(core, torch.Tensor) for core in cores):
        return tuple(cores), ()  # pyright: ignore[reportReturnType]
    tensors: list[torch.Tensor] = []
    for core in cores:
        tensors += [core] if isinstance(core, torch.Tensor) else core.tensors
    return tuple(tensors), tuple(None if isinstance(core, torch.Tensor) else core.form for core in cores)


def together(tensors: Sequence[torch.Tensor], forms: Sequence[Form | None]) -> Sequence[torch.Tensor]:
    """The cores, from what :func:`apart` gave."""
    if not forms:
        return tensors
    cores: list[torch.Tensor] = []
    start = 0
    for form in forms:
        count = tensor_count(form)
        cores.append(tensors[start] if form is None else form.core(tensors[start : start + count]))
        start += count
    return cores


def tensor_count(form: Form | None) -> int:
    """How many tensors hold a core."""
    return 1 if form is None or form.bits == 16 else 2
