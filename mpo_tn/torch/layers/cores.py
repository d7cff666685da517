"""The cores of a module. :meth:`Cores.forward` is the one door through which they are read to compute with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Cores(nn.ParameterList):
    """The cores of a module, read through :meth:`forward`.

    accelerate keeps what it offloads on the meta device and fetches it when ``forward`` of its owner runs; read
    without that, offloaded cores would turn results into noise.
    """

    def __init__(self, cores: Sequence[nn.Parameter]) -> None:
        super().__init__(cores)
        self._names = tuple(map(str, range(len(cores))))

    def forward(self) -> tuple[torch.Tensor, ...]:
        """The cores, first to last."""
        held = self._parameters
        # Looking them up one by one takes longer than a small product.
        return tuple(held.values()) if tuple(held) == self._names else tuple(self)  # pyright: ignore[reportReturnType]
