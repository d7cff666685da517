"""QuantizedCore: a core held in few bits. Its integers take no gradient, and no cast touches it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import check_core_bits
from mpo_tn.torch.layers.packing import Form, Packed, Shape, pack
from mpo_tn.torch.layers.scales import logarithms, rounded
from mpo_tn.torch.layers.tracing import is_traced
from mpo_tn.truncate.quantize import GROUP, Integers, quantize
from mpo_tn.truncate.scales import group_count

SCALE_LOGS = "weight_scale_logs"
"""The name of the parameter of a core whose scales train."""


def buffer_kinds(shape: Sequence[int], bits: int, group: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The names of the tensors that hold a core, with their shapes and dtypes.

    >>> buffer_kinds((2, 3, 4, 5), 4, 128)["weight_packed"]
    ((6, 3), torch.int32)
    """
    left, out, in_, right = shape
    rows, columns = left * out, in_ * right
    if bits == 16:
        return {"weight": ((left, out, in_, right), torch.float16)}
    return {
        "weight_packed": ((rows, -(-columns * bits // 32)), torch.int32),
        "weight_scale": ((rows, group_count(columns, group)), torch.float16),
        "weight_shape": ((2,), torch.int64),
    }


class QuantizedCore(nn.Module):
    """A core (left bond, out leg, in leg, right bond) in integers of 2 to 8 bits with scales, or in float16.

    It is the matrix (left out, in right): ``weight_packed`` holds its rows in int32 words, ``weight_scale`` a float16
    for every ``group`` columns of a row, ``weight_shape`` its rows and columns; the names are those of
    compressed-tensors. With 16 bits there is one ``weight`` in float16.

    Args:
        shape: of the core.
        bits: 2 to 8, or 16.
        group: columns that share a scale.
        device: of the empty buffers.
        dtype: of what is computed with, in which :meth:`dequantize` gives the core; the default dtype if not given.

    Its scales may train, see :meth:`train_scales`.

    Guarantee (bits-not-cast): ``half()``, ``to(dtype)``, ``double()`` and their like change :attr:`dtype` and no bit
    of what is held.

    Raises:
        MPOError: bits or a group out of range.

    >>> core = QuantizedCore.rounded(torch.tensor([[[[0.5, -1.0, 0.25]]]]), 3)
    >>> core.dequantize(), [name for name, _ in core.named_buffers()]
    (tensor([[[[ 0.5000, -1.0000,  0.2500]]]]), ['weight_packed', 'weight_scale', 'weight_shape'])
    """

    requires_grad = False

    def __init__(
        self,
        shape: Sequence[int],
        bits: int,
        group: int = GROUP,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.group = check_core_bits(bits, group)
        left, out, in_, right = shape
        self.shape: Shape = (left, out, in_, right)
        self.dtype = dtype or torch.get_default_dtype()
        for name, (size, kind) in buffer_kinds(self.shape, self.bits, self.group).items():
            value = torch.tensor([left * out, in_ * right], dtype=kind) if name == "weight_shape" else torch.empty(size)
            self.register_buffer(name, value.to(device, kind))

    @classmethod
    def from_integers(
        cls, integers: Integers, shape: Sequence[int], *, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedCore:  # fmt: skip
        """The core whose matrix (left out, in right) was quantised.

        Args:
            integers: of that matrix; NumPy or torch.
            shape: of the core.
            dtype: of what is computed with.
            device: where it is to lie; by default where the integers lie.

        Raises:
            MPOError: another number of rows or columns, scales of zero or that are not finite.
        """
        values, scales = torch.as_tensor(integers.values), torch.as_tensor(integers.scales)
        core = cls(shape, integers.bits, integers.group, device=values.device, dtype=dtype)
        left, out, in_, right = core.shape
        if tuple(values.shape) != (left * out, in_ * right):
            raise MPOError(
                f"integers of a matrix {tuple(values.shape)} for a core {core.shape}, which is one of "
                f"{(left * out, in_ * right)}"
            )
        core.weight_packed, core.weight_scale = pack(values, core.bits), scales
        core.check("a core from integers", "no matrix can be read from them")
        return core if device is None else core.to(device)

    @classmethod
    def rounded(cls, core: torch.Tensor, bits: int, group: int = GROUP, *, dtype: torch.dtype | None = None) -> Self:
        """A core in so many bits, every group with its best scale. See :func:`mpo_tn.truncate.quantize.quantize`.

        Raises:
            MPOError: entries that are not finite, or beyond what float16 can hold or scale.
        """
        core, dtype = core.detach(), dtype or core.dtype
        if bits != 16:
            left, out, in_, right = core.shape
            integers = quantize(core.reshape(left * out, in_ * right), bits, group)
            return cls.from_integers(integers, core.shape, dtype=dtype)  # pyright: ignore[reportReturnType]
        if core.is_complex():
            raise MPOError("a complex core cannot be held in 16 bits")
        largest = float(core.abs().max())
        if not largest <= torch.finfo(torch.float16).max:
            raise MPOError(f"entries of size {largest:.3g} are beyond float16: leave the core in {dtype}, or scale it")
        made = cls(core.shape, bits, group, device=core.device, dtype=dtype)
        made.weight = core.to(torch.float16).contiguous()
        return made

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device

    @property
    def ndim(self) -> int:
        """Four axes, as any core has."""
        return len(self.shape)

    def numel(self) -> int:
        """How many numbers the core has."""
        return math.prod(self.shape)

    def forward(self, dtype: torch.dtype | None = None) -> Packed:
        """What a layer computes with, in :attr:`dtype` or another."""
        names = ("weight",) if self.bits == 16 else ("weight_packed", "weight_scale")
        tensors = tuple(self._buffers[name] for name in names)
        if self._parameters:
            tensors = (tensors[0], self._trained_scales())
        return Packed(tensors, Form(self.shape, self.bits, self.group, dtype or self.dtype))  # pyright: ignore[reportArgumentType]

    @property
    def scale_logs(self) -> nn.Parameter | None:
        """The logarithms of the scales in float32, while they train."""
        return self._parameters.get(SCALE_LOGS)

    def train_scales(self, trains: bool = True) -> None:
        """Hold the scales as a parameter, too: their logarithms in float32, for gradients to change; or no longer.

        Guarantee (scales-as-held): the core is always computed with scales that are numbers of float16, finite and not
        zero, and with the same signs; those are in ``weight_scale`` whenever it is read by ``state_dict`` and after
        ``train_scales(False)``, so that what is measured in between is what is saved. The parameter is in no
        ``state_dict``, and no integer ever changes.

        With 16 bits there are no scales, and nothing happens.

        >>> core = QuantizedCore.rounded(torch.tensor([[[[0.5, -1.0, 0.25]]]]), 3)
        >>> core.train_scales()
        >>> [name for name, _ in core.named_parameters()], list(core.state_dict())
        (['weight_scale_logs'], ['weight_packed', 'weight_scale', 'weight_shape'])
        """
        if self.bits == 16:
            return
        if not trains:
            self._settle()
            self._parameters.pop(SCALE_LOGS, None)
        elif self.scale_logs is None:
            self.register_parameter(SCALE_LOGS, nn.Parameter(logarithms(self.get_buffer("weight_scale"))))

    def _trained_scales(self) -> torch.Tensor:
        logs = self._parameters[SCALE_LOGS]
        assert logs is not None
        if torch.compiler.is_compiling() or is_traced() or (torch.is_grad_enabled() and logs.requires_grad):
            return rounded(logs, self.get_buffer("weight_scale"))
        self._settle()  # the buffer itself, so that what is made of it can be kept as long as it does not change
        return self.get_buffer("weight_scale")

    def _settle(self) -> None:
        """Let the buffer hold what the trained scales are by now."""
        logs = self.scale_logs
        if logs is None or logs.is_meta:
            return
        with torch.no_grad():
            scales = rounded(logs, self.get_buffer("weight_scale")).half()
            if not torch.equal(scales, self.get_buffer("weight_scale")):
                self.get_buffer("weight_scale").copy_(scales)

    def _follow(self) -> None:
        """Let the trained scales be what the buffer holds by now."""
        if (logs := self.scale_logs) is not None:
            logs.data, logs.grad = logarithms(self.get_buffer("weight_scale")), None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The core itself, integers times scales, each number rounded once to the dtype."""
        return self.forward(dtype).core()

    def take(self, other: QuantizedCore) -> None:
        """Hold what another one of the same bits and group holds, in buffers that stay the same objects."""
        for name, value in other.named_buffers():
            buffer = self.get_buffer(name)
            buffer.data = value.to(buffer.device, copy=True)
        self.shape = other.shape
        self._follow()

    def check(self, name: str, why: str = "the file is damaged, or of another model") -> None:
        """Refuse buffers that no core can be read from, and say ``why``; those on the meta device pass.

        Raises:
            MPOError: one of another shape or dtype than is due, scales that are zero, NaN or infinite; it is named.
        """
        for own, buffer in self.named_buffers():
            if (wrong := self._damage(own, buffer)) is not None:
                raise MPOError(f"{name}.{own} {wrong}: {why}")

    def _damage(self, name: str, value: torch.Tensor) -> str | None:
        size, kind = buffer_kinds(self.shape, self.bits, self.group)[name]
        if tuple(value.shape) != size or value.dtype != kind:
            return f"is {value.dtype} {tuple(value.shape)} where {kind} {size} is due"
        if value.is_meta:
            return None
        if name == "weight_shape":
            left, out, in_, right = self.shape
            due = [left * out, in_ * right]
            return None if value.tolist() == due else f"is {value.tolist()} where {due} is due"
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return "has entries that are NaN or infinite"
        return "has scales of zero" if name == "weight_scale" and bool((value == 0).any()) else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # What a cast would do is asked of an empty tensor; only what moves them reaches the buffers.
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            if moved is not buffer:
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        if (logs := self.scale_logs) is not None:
            for held in (logs, logs.grad):
                if held is not None:
                    moved = fn(held.data)
                    held.data = moved if moved.dtype == held.dtype else held.data.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + SCALE_LOGS, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        wrong = {
            name: why
            for name in self._buffers
            if isinstance(value := state_dict.get(prefix + name), torch.Tensor)
            and (why := self._damage(name, value)) is not None
        }
        if wrong:
            error_msgs += [f"{prefix}{name} {why}" for name, why in wrong.items()]
            return
        logs = self._parameters.pop(SCALE_LOGS, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if logs is not None:
            self._parameters[SCALE_LOGS] = logs
            self._follow()

    def extra_repr(self) -> str:
        """The line that ``print(model)`` shows."""
        return f"{self.shape}, bits={self.bits}" + ("" if self.bits == 16 else f", group={self.group}")


def quantized_cores(model: nn.Module) -> dict[str, QuantizedCore]:
    """Every quantised core of a model, once, by the first of its names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedCore)}


def trained_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The logarithms of the scales that train, by name; no ``state_dict`` has them."""
    found = {f"{name}.{SCALE_LOGS}": core.scale_logs for name, core in quantized_cores(model).items()}
    return {name: logs for name, logs in found.items() if logs is not None}
