"""The routes of a layer's forward pass, each planned when it is first needed; also while torch traces."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from mpo_tn.planning.cost import Choices, Shape, choices

Case = tuple[str, int, bool]
"""A device type, the bytes of a number, and whether a backward pass follows."""


class Routes:
    """What layers of one structure take in one mode: for every case the routes by number of tokens.

    Made by :func:`routes_of`. A case is planned when it is first asked for: that takes milliseconds, and a layer on one
    device in one dtype asks for two.
    """

    def __init__(self, shapes: tuple[Shape, ...], size: tuple[int, int], mode: str) -> None:
        self._made_of = shapes, size, mode
        self._planned: dict[Case, Choices] = {}

    def of(self, case: Case) -> Choices:
        """The routes of a case, by number of tokens."""
        # A graph cannot plan. Torch has to make the call before it looks at what is planned, or it would not see it.
        if torch.compiler.is_compiling() or case not in self._planned:
            self._plan(*case)
        return self._planned[case]

    def _plan(self, device_type: str, itemsize: int, training: bool) -> bool:
        """Whether the case is planned, as it is afterwards."""
        case = (device_type, itemsize, training)
        if case not in self._planned:
            shapes, size, mode = self._made_of
            self._planned[case] = choices(
                shapes, *size, mode, training=training, device_type=device_type, itemsize=itemsize
            )
        return True

    # Torch then makes the call while it traces, and traces nothing of it. That is what the decorator
    # torch.compiler.assume_constant_result sets, which would load the compiler: 35 MB in every worker.
    _plan._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

    def __reduce__(self) -> tuple[Any, ...]:
        return routes_of, self._made_of


@lru_cache(maxsize=1024)
def routes_of(shapes: tuple[Shape, ...], size: tuple[int, int], mode: str) -> Routes:
    """The routes of all layers whose cores have these shapes.

    They are shared, so that a graph that torch compiled for one layer, whose guards look at what was planned, serves
    the next one of the same structure.

    Args:
        shapes: of the cores.
        size: (out, in), the matrix cropped.
        mode: ``"auto"``, ``"chain"`` or ``"rebuild"``.
    """
    return Routes(shapes, size, mode)
