"""Several processes that do one thing together: who is who, what they tell each other, and that they stay equal.

All of them are called with the same arguments and end with the same result; each does the work of some rows of every
batch. Without a process group of torch.distributed, or with one process in it, nothing here does anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.models.feeding import entries_of

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


def check_equal(what: str, tensors: Iterable[torch.Tensor]) -> None:
    """Refuse processes whose tensors are not the same, bit for bit.

    Raises:
        MPOError: they are not.
    """
    if world() > 1:
        check_same({what: bytes_digest(map(entries_of, tensors))})


def spread(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the numbers of the first, bit for bit, in place."""
    if world() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            sent = tensor.detach().to(_way(tensor.device), copy=True).contiguous()
            with _answered():
                distributed.broadcast(sent.view(-1).view(torch.uint8), src=0)  # of any dtype
            if rank():
                tensor.copy_(sent)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return [*model.parameters(), *model.buffers()]


def add_gradients(parameters: Sequence[nn.Parameter], backward: Callable[[], object]) -> None:
    """Call ``backward()`` and replace the gradients it leaves by their sums over the processes.

    Who has none of a parameter that others have one of adds zeros; who is alone only calls it.

    Raises:
        MPOError: it raised in another process, or that is gone.
    """

    def reach() -> list[bool]:
        backward()
        return [parameter.grad is not None for parameter in parameters]

    reached = together(reach)
    if world() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter, *which in zip(parameters, *reached, strict=True):
        if any(which):
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in kinds.values():
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        total = torch.cat([part.reshape(-1) for part in parts])
        sent = total.to(_way(total.device))
        with _answered():
            distributed.all_reduce(sent)
        total.copy_(sent)
        for parameter, own in zip(group, total.split([part.numel() for part in parts]), strict=True):
            parameter.grad = own.view_as(parameter)


def own_rows(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a batch the rows that this process takes: every so many-th, as many as there are processes.

    Rows are those of ``input_ids``, of ``attention_mask``, or else of the first tensor.

    Returns:
        None if there are fewer rows than processes, and none for this one, or if those are all padding.

    Raises:
        MPOError: a tensor whose first dimension is neither the number of rows nor 1, for what all rows share.
    """
    number, every = rank(), world()
    if every == 1:
        return dict(batch)
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim}
    mask = tensors.get("attention_mask")
    counted = tensors.get("input_ids", next(iter(tensors.values()), None) if mask is None else mask)
    rows = 1 if counted is None else counted.shape[0]
    for name, value in tensors.items():
        if value.shape[0] not in (1, rows):
            raise MPOError(
                f"{name} has the shape {list(value.shape)} in a batch of {rows} rows, so it is not known which of it "
                f"belongs to which row, and {every} processes cannot share the batch: use one process"
            )
    if number >= rows:
        return None
    own = {name: value[number::every] for name, value in tensors.items() if value.shape[0] == rows}
    if mask is not None and not bool(own.get("attention_mask", mask).any()):
        return None
    return {**batch, **own}


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters processes hold in parts, or nobody.

    Raises:
        MPOError: it is sharded, or on the meta device.
    """
    for name, parameter in model.named_parameters():
        check_loaded(parameter, name)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return unwrapped(model.module) if isinstance(model, DistributedDataParallel) else model


def _way(device: torch.device) -> torch.device:
    """The device by which numbers of another one travel: NCCL alone knows none but its own."""
    kinds = [part.partition(":")[0] for part in distributed.get_backend_config().split(",")]
    return device if device.type in kinds else torch.device(kinds[0], torch.accelerator.current_device_index())


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
