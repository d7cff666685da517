"""Several processes that do one thing together: who is who, what they tell each other, and that they stay equal.

All of them are called with the same arguments and end with the same result; each does the work of some rows of every
batch. Without a process group of torch.distributed, or with one process in it, nothing here does anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mpo_tn.exceptions import MPOError

T = TypeVar("T")

_KNOWN = "known_to_all_processes"
"""The attribute of errors that all have been told of."""


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, counted from 0."""
    return distributed.get_rank() if world() > 1 else 0


def together(make: Callable[[], T]) -> list[T]:
    """What ``make()`` gives in every process, in their order. Nothing in it may wait for another process.

    Guarantee (ranks-fail-together): if it raises anywhere it raises everywhere, so that nobody waits for who has left.

    Raises:
        MPOError: it raised in another process, whose message is repeated, or that process is gone.
    """
    if world() == 1:
        return [make()]
    found: T | None = None
    raised: BaseException | None = None
    try:
        found = make()
    except BaseException as error:  # of whatever kind, the others have to be told
        raised = error
    told: list[Any] = [None] * world()
    with _answered():
        distributed.all_gather_object(told, (None if raised is None else _said(raised), found))
    failed = [f"process {number} of {world()} stopped: {said}" for number, (said, _) in enumerate(told) if said]
    if failed:
        error = raised or MPOError(failed[0])
        vars(error)[_KNOWN] = True
        raise error
    return [value for _, value in told]


@contextmanager
def agreeing() -> Generator[None]:
    """What is done in it by each process on its own raises in all if it raises in one. See :func:`together`."""
    raised: BaseException | None = None
    try:
        yield
    except BaseException as error:
        if world() == 1:
            raise
        raised = error

    def tell() -> None:
        if raised is not None:
            raise raised

    together(tell)


def agreed(make: Callable[[], T]) -> T:
    """What ``make()`` gives in this process, once it has not raised in any. See :func:`together`."""
    with agreeing():
        return make()


def is_known(error: BaseException) -> bool:
    """Whether all processes know of an error, so that it is enough if the first says it."""
    return bool(vars(error).get(_KNOWN))


def of_first(make: Callable[[], T]) -> T:
    """What ``make()`` gives in the first process, which alone calls it, in all of them.

    Raises:
        MPOError: it raised there.
    """
    if world() == 1:
        return make()
    held: list[Any] = [agreed(lambda: make() if rank() == 0 else None)]
    with _answered():
        distributed.broadcast_object_list(held, src=0)
    return held[0]


def check_same(things: Mapping[str, object]) -> None:
    """Refuse processes that were given, or have come to, different things.

    Raises:
        MPOError: what differs, and who has something else than the first.
    """
    told = together(lambda: dict(things))
    for name, value in told[0].items():
        others = [number for number, other in enumerate(told) if other.get(name) != value]
        if others:
            raise MPOError(
                f"process {others[0]} of {world()} has other {name} than the first: all of them have to be given the "
                "same, of which each takes its own rows, on machines of one kind"
            )


def spread(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first, bit for bit."""
    if world() == 1:
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            with _answered():
                distributed.broadcast(sent.view(-1).view(torch.uint8), src=0)  # of any dtype
            if rank():
                tensor.copy_(sent)


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their sums over the processes. Who has none of a parameter that others have one of adds 0.

    Raises:
        MPOError: a process is gone.
    """
    if world() == 1:
        return
    reached = together(lambda: [parameter.grad is not None for parameter in parameters])
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter, *which in zip(parameters, *reached, strict=True):
        if any(which):
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in kinds.values():
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        total = torch.cat([part.reshape(-1) for part in parts])
        with _answered():
            distributed.all_reduce(total)
        for parameter, own in zip(group, total.split([part.numel() for part in parts]), strict=True):
            parameter.grad = own.view_as(parameter)


def own_rows(inputs: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """Of a batch the rows that this process takes: every so many-th, as many as there are processes.

    Args:
        inputs: tensors whose first dimension counts ``rows``, or is 1 for what is the same for all of them, and others.
        rows: of the batch.

    Returns:
        None if there are fewer rows than processes, and none for this one.

    Raises:
        MPOError: a tensor with another first dimension.
    """
    number, every = rank(), world()
    if every == 1:
        return dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] not in (1, rows):
            raise MPOError(
                f"{name} has the shape {list(value.shape)} in a batch of {rows} rows, so it is not known which of it "
                f"belongs to which row, and {every} processes cannot share the batch: use one process"
            )
    if number >= rows:
        return None
    return {name: value[number::every] if _has_rows(value, rows) else value for name, value in inputs.items()}


def is_spread(tensors: Iterable[object]) -> bool:
    """Whether any of them is held in parts, each by another process, as ``fully_shard`` does it."""
    known = sys.modules.get("torch.distributed.tensor")  # who has one has loaded it
    return known is not None and any(isinstance(tensor, known.DTensor) for tensor in tensors)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return unwrapped(model.module) if isinstance(model, DistributedDataParallel) else model


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, MPOError) else f"{type(error).__name__}: {error}".rstrip(": ")


@contextmanager
def _answered() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL say it in many ways
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0]  # gloo says where in its source, and much more
        raise MPOError(
            f"another of the {world()} processes has ended or does not answer ({reason}): see what it said last"
        ) from error
