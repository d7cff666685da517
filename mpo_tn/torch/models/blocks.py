"""The blocks of a model that hidden states go through one after another: found, recorded, and run on their own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.feeding import Call, EnoughError, calls_of, only_looked_at
from mpo_tn.torch.models.listening import Seen
from mpo_tn.torch.models.sums import first_tensor


@dataclass(frozen=True)
class BlockCall:
    """How a model calls one of its blocks: everything but the hidden states, whose place is ``slot``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that ``block`` makes of ``hidden``, on the device of the block; differentiable.

        ``hidden`` is copied, because some blocks change it in place.
        """
        device = next((parameter.device for parameter in block.parameters()), hidden.device)
        args = list(_moved(self.args, device, {}))
        kwargs: dict[str, Any] = _moved(dict(self.kwargs), device, {})
        places: Any = args if isinstance(self.slot, int) else kwargs
        places[self.slot] = hidden.to(device).clone()
        result = first_tensor(block(*args, **kwargs))
        if result is None:
            raise MPOError(
                f"a {type(block).__name__} returned no hidden states: let blocks return what they did before"
            )
        return result


@dataclass(frozen=True, eq=False)
class BlockSample:
    """One batch at one block: hidden states (batch, length, width) on the host, and how the block is called.

    Attributes:
        dense_input: what the block was given in the dense model.
        dense_output: what it made of that.
        given: what it is given now, after what was done to the blocks before it; the same tensor if nothing was.
        mask: (batch, length), True for tokens, on the device of the model; None if there is no padding.
        call: everything else it is called with now.
    """

    dense_input: torch.Tensor
    dense_output: torch.Tensor
    given: torch.Tensor
    mask: torch.Tensor | None
    call: BlockCall

    def run(self, block: nn.Module) -> torch.Tensor:
        """What ``block`` makes of what it is :attr:`given`, on the device of the block; differentiable."""
        return self.call.run(block, self.given)


@dataclass(frozen=True, eq=False)
class Recorded:
    """One batch of one run: the hidden states that the first block was given, and how each block was called."""

    hidden: torch.Tensor
    calls: tuple[BlockCall, ...]

    def same_as(self, other: Recorded) -> bool:
        """Whether all tensors have the same bits."""
        known: set[tuple[int, int]] = set()
        return torch.equal(self.hidden, other.hidden) and all(
            _equal((a.args, a.kwargs), (b.args, b.kwargs), known) for a, b in zip(self.calls, other.calls, strict=True)
        )


def find_blocks(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """The names of the blocks that hidden states go through one after another; none if the model has no such.

    They are the members of the longest ``nn.ModuleList``, not inside another such, that are each called once, in order,
    each with the very tensor that the one before returned, of one shape; of several lists the last that is called (the
    decoder's).

    Args:
        model: any model; it is run once and left as it was.
        batch: as for :func:`~mpo_tn.torch.calibrate`.

    >>> class Stack(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    ...     def forward(self, x):
    ...         for layer in self.layers:
    ...             x = layer(x)
    ...         return x
    >>> find_blocks(Stack(), torch.ones(2, 4))
    ('layers.0', 'layers.1', 'layers.2')
    """
    (call,) = calls_of(model, [batch])
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    seen = Seen()
    log: dict[str, list[tuple[int, int, int]]] = {}  # of each list: which member, what came in, what went out
    alive: list[Any] = []  # a number is only good while its tensor lives
    handles: list[Any] = []

    def listen(owner: str, place: int, member: nn.Module) -> None:
        came_in: list[tuple[torch.Size | None, int]] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = _hidden(args, kwargs)
            alive.append(hidden)
            came_in.append((None, 0) if hidden is None else (hidden.shape, seen.number(hidden)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            out = first_tensor(output)
            shape, number = came_in.pop()
            alive.append(out)
            fits = out is not None and out.shape == shape
            log.setdefault(owner, []).append(
                (place, number, seen.number(out)) if fits and out is not None else (-1, 0, 0)
            )

        handles.append(member.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(member.register_forward_hook(after))

    try:
        for name, members in lists.items():
            for place, member in enumerate(members):
                listen(name, place, member)
        with only_looked_at(model):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    chained = [
        name
        for name, calls in log.items()
        if [place for place, _, _ in calls] == list(range(len(lists[name])))
        and all(first[2] == then[1] for first, then in pairwise(calls))
    ]
    outer = [name for name in chained if not any(name.startswith(f"{other}.") for other in chained)]
    if not outer:
        return ()
    longest = max(len(lists[name]) for name in outer)
    name = [name for name in outer if len(lists[name]) == longest][-1]
    return tuple(f"{name}.{k}".removeprefix(".") for k in range(longest))


def record(model: nn.Module, blocks: tuple[str, ...], call: Call) -> Recorded:
    """Run the model and keep how it calls its blocks; what they have in common is kept once, on the host.

    The run may be broken off (:class:`~mpo_tn.torch.models.feeding.EnoughError`) once the last block was called.

    Raises:
        MPOError: a block is not called exactly once, or without hidden states.
    """
    found: dict[int, BlockCall] = {}
    first: list[torch.Tensor] = []
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles: list[Any] = []
    times = dict.fromkeys(range(len(blocks)), 0)

    def listen(place: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            times[place] += 1
            slot = slot_of(args, kwargs)
            if slot is None:
                return
            if place == 0:
                hidden = args[slot] if isinstance(slot, int) else kwargs[slot]
                first.append(hidden.detach().to("cpu", copy=True))
            host = torch.device("cpu")
            others = tuple(None if k == slot else value for k, value in enumerate(args))
            named = {key: None if key == slot else value for key, value in kwargs.items()}
            found[place] = BlockCall(_moved(others, host, kept), _moved(named, host, kept), slot)

        return model.get_submodule(blocks[place]).register_forward_pre_hook(hook, with_kwargs=True)

    try:
        handles += [listen(place) for place in range(len(blocks))]
        with suppress(EnoughError):
            model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    odd = [name for place, name in enumerate(blocks) if times[place] != 1 or place not in found]
    if odd:
        raise MPOError(
            f"{odd[0]} is called {times[blocks.index(odd[0])]} times in one batch and once in the first: calibrate the "
            "whole model at once"
        )
    return Recorded(first[0], tuple(found[place] for place in range(len(blocks))))


def slot_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the hidden states are: the first argument that is a tensor of floating point numbers."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next(
        (
            key
            for key, value in named
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
        ),
        None,
    )


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    slot = slot_of(args, kwargs)
    return None if slot is None else args[slot] if isinstance(slot, int) else kwargs[slot]


def _moved(value: Any, device: torch.device, kept: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """The same with every tensor on a device, one that comes twice moved once; other objects as they are."""
    if isinstance(value, torch.Tensor):
        if id(value) not in kept:  # beside it the tensor itself, so that no other gets its number
            kept[id(value)] = (value, value.detach().to(device))
        return kept[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(_moved(part, device, kept) for part in value)
    if type(value) is dict:
        return {key: _moved(part, device, kept) for key, part in value.items()}
    return value


def _equal(a: Any, b: Any, known: set[tuple[int, int]]) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (id(a), id(b)) not in known:
            if a.shape != b.shape or not torch.equal(a, b):
                return False
            known.add((id(a), id(b)))
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y, known) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], known) for key in a)
    return type(a) is type(b)


def takes_gradient(value: Any) -> bool:
    """Whether a tensor in what a block is called with takes a gradient."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return any(takes_gradient(part) for part in value)
    return isinstance(value, torch.Tensor) and value.requires_grad
