"""Memory for what is merged on the CPU, kept by each thread for the next time."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

_MOST_KEPT_BYTES = 2**28


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
        # The inner one would close the outer one, whose results would then be overwritten.
        assert not self.open, "the workspace of this thread is open already: it does not nest"
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


scratch = _Workspace()


def free_workspace() -> None:
    """Give the memory back that this thread keeps for merging."""
    scratch.drop()


def workspace(core: torch.Tensor) -> AbstractContextManager[None]:
    """Inside of it what is merged lies in the workspace, and lasts until the end; only where no graph is recorded."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or core.device.type != "cpu"
        or type(core) not in (torch.Tensor, nn.Parameter)
    ):
        return nullcontext()
    return scratch


def give_back(value: torch.Tensor) -> None:
    """Inside of :func:`workspace`, say that a merged tensor is no longer needed; elsewhere nothing happens."""
    if is_open():
        scratch.give_back(value)


def is_open() -> bool:
    """Whether this thread is inside of :func:`workspace`."""
    return not torch.compiler.is_compiling() and scratch.open
