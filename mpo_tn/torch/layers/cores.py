"""The cores of a module. :meth:`Cores.forward` is the one door through which they are read to compute with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpo_tn.torch.layers.quantized import QuantizedCore

Core = nn.Parameter | QuantizedCore
"""What a module holds as a core: numbers that may train, or few bits that do not."""


class Cores(nn.ParameterList):
    """The cores of a module, read through :meth:`forward`; as a sequence it gives what is held.

    accelerate keeps what it offloads on the meta device and fetches it when ``forward`` of its owner runs; read
    without that, offloaded cores would turn results into noise.
    """

    def __init__(self, cores: Sequence[Core]) -> None:
        super().__init__(cores)
        self._names = tuple(map(str, range(len(cores))))

    def __iter__(self) -> Iterator[Core]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__iter__()  # pyright: ignore[reportReturnType]

    def forward(self, *, packed: bool = False) -> tuple[Any, ...]:
        """The cores, first to last, as tensors; with ``packed`` those in few bits as they are held.

        What is held in few bits is read in the dtype of the cores beside it, or, where there are none, in the dtype
        that it was last cast to.
        """
        held = self._parameters
        # Looking them up one by one takes longer than a small product.
        if tuple(held) == self._names:
            return tuple(held.values())
        if not self._modules:
            return tuple(self)
        dtype = next((core.dtype for core in self if isinstance(core, torch.Tensor)), None)
        cores = [core if isinstance(core, torch.Tensor) else core.forward(dtype) for core in self]
        return tuple(cores) if packed else tuple(c if isinstance(c, torch.Tensor) else c.core() for c in cores)

    def extra_repr(self) -> str:
        """The cores that are parameters; the others are modules, which ``print`` shows by themselves."""
        return "\n".join(line for line in super().extra_repr().split("\n") if QuantizedCore.__name__ not in line)


def held_tensors(core: Core, name: str) -> dict[str, torch.Tensor]:
    """The tensors that hold a core, by their names where that of the core is ``name``."""
    if isinstance(core, QuantizedCore):
        return {f"{name}.{own}": buffer for own, buffer in core.named_buffers()}
    return {name: core}
