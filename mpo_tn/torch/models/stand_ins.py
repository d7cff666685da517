"""Stand-ins for the blocks of a model: what lies around them is run, and they are not, nor their weights read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.blocks import Recorded, find_blocks, record, slot_of
from mpo_tn.torch.models.feeding import Call, EnoughError, only_looked_at
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.sums import first_tensor

Gives = Callable[[int, torch.Tensor], torch.Tensor]
"""What the stand-in for the block at a place gives for the hidden states that it is given."""


def ended(_hidden: torch.Tensor) -> torch.Tensor:
    """In place of the last block: what comes after it is not wanted.

    Raises:
        EnoughError: always.
    """
    raise EnoughError


_Form = Callable[[torch.Tensor, int], Any]
"""What a block returns with these hidden states; other tensors beside them are left out, of so many entries."""

ELSEWHERE = "give moments that were made where the model fits into memory (Calibration.save, --calibration FILE)"


class StandIns:
    """Runs of a model on disk in which blocks are only stood in for.

    What a block returns beside hidden states is seen once for every class of blocks, from one that is really run. If
    what comes beside them are tensors, nothing may depend on them.
    """

    def __init__(self, weights: WeightsOnDisk) -> None:
        self.weights = weights
        self.model = weights.model
        self._forms: dict[type, _Form | None] = {}

    def find_blocks(self, batch: Any) -> tuple[str, ...]:
        """The names of the blocks, as :func:`~mpo_tn.torch.models.blocks.find_blocks` finds them.

        Raises:
            MPOError: there are none, or they hand on more than hidden states.
        """
        lists = _outermost(self.model)
        members = [member for module in lists.values() for member in module]
        with (
            self._explained(),
            self.weights.loaded(self.model, but=members),
            self._instead_of(members, lambda _, hidden: hidden.clone()),
        ):
            blocks = find_blocks(self.model, batch)
        kind = type(self.model).__name__
        # What is in a block that was stood in for was not seen as often as it is called.
        stood_in = [name for name, module in lists.items() if any(self._forms.get(type(part)) for part in module)]
        if not blocks or any(
            blocks[0].startswith(f"{name}.") and blocks[0].count(".") > name.count(".") + 1 for name in stood_in
        ):
            raise MPOError(
                f"a {kind} has no blocks that hidden states go through one after another, so it cannot be run block by "
                f"block: {ELSEWHERE}"
            )
        odd = [name for name in blocks if self._forms.get(type(self.model.get_submodule(name))) is None]
        if odd:
            raise MPOError(f"{odd[0]} of a {kind} hands on more than hidden states: {ELSEWHERE}")
        return blocks

    @contextmanager
    def between(
        self, blocks: Sequence[str], at_end: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    ) -> Generator[None]:
        """Around runs in which the blocks are stood in for; the last of them gives what ``at_end`` says."""

        def gives(place: int, hidden: torch.Tensor) -> torch.Tensor:
            return at_end(hidden) if place + 1 == len(blocks) else hidden.clone()

        with self._instead_of([self.model.get_submodule(name) for name in blocks], gives):
            yield

    def record(self, blocks: tuple[str, ...], call: Call) -> Recorded:
        """What the first block is given and how all are called, see :func:`~mpo_tn.torch.models.blocks.record`."""
        with only_looked_at(self.model), self.between(blocks, ended):
            return record(self.model, blocks, call)

    def check(self, blocks: tuple[str, ...], call: Call) -> None:
        """Refuse a model in which more depends on hidden states than the block that comes next.

        Raises:
            MPOError: it is so.
        """
        generator = torch.Generator().manual_seed(0)

        def other(place: int, hidden: torch.Tensor) -> torch.Tensor:
            if place + 1 == len(blocks):
                return torch.ones_like(hidden)
            return torch.rand(hidden.shape, generator=generator).to(hidden)

        def same(place: int, hidden: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(hidden) if place + 1 == len(blocks) else hidden.clone()

        found: list[tuple[Recorded, torch.Tensor | None]] = []
        modules = [self.model.get_submodule(name) for name in blocks]
        for beside, gives in enumerate((other, same)):
            outputs: list[Any] = []
            handle = self.model.register_forward_hook(lambda _m, _a, output, seen=outputs: seen.append(output))
            try:
                with self._explained(), only_looked_at(self.model), self._instead_of(modules, gives, beside):
                    recorded = record(self.model, blocks, call)
            finally:
                handle.remove()
            found.append((recorded, first_tensor(outputs[0])))
        (one, first), (two, second) = found
        equal = first is None or second is None or torch.equal(first, second)
        if not one.same_as(two) or not equal:
            raise MPOError(
                f"in a {type(self.model).__name__} more depends on the hidden states of a block than the next one, so "
                f"it cannot be run block by block: {ELSEWHERE}"
            )

    @contextmanager
    def _explained(self) -> Generator[None]:
        """Around runs with stand-ins of which it is not known yet that the model bears them."""
        try:
            yield
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if isinstance(error, MPOError):
                raise
            raise MPOError(
                f"a {type(self.model).__name__} cannot be run block by block, without what its blocks give "
                f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}): {ELSEWHERE}"
            ) from error

    @contextmanager
    def _instead_of(self, blocks: Sequence[nn.Module], gives: Gives, beside: int = 0) -> Generator[None]:
        try:
            for place, block in enumerate(blocks):
                block.forward = partial(self._forward, place, block, block.forward, gives, beside)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _forward(
        self, place: int, block: nn.Module, run: Callable[..., Any], gives: Gives, beside: int, /, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        slot = slot_of(args, kwargs)
        hidden = None if slot is None else args[slot] if isinstance(slot, int) else kwargs[slot]
        kind = type(block)
        if hidden is None or self._forms.get(kind, "unknown") in (None, "unknown"):
            with self.weights.loaded(block):
                output = run(*args, **kwargs)
            if kind not in self._forms:
                self._forms[kind] = None if hidden is None else _form_of(output, hidden)
            return output
        form = self._forms[kind]
        assert form is not None
        return form(gives(place, hidden), beside)


def _outermost(model: nn.Module) -> dict[str, nn.ModuleList]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}


def _form_of(output: Any, hidden: torch.Tensor) -> _Form | None:
    """How a block returns hidden states; None if they are not alone, or of another shape than it was given."""
    first = first_tensor(output)
    if first is None or first.shape != hidden.shape or first.dtype != hidden.dtype:
        return None
    if isinstance(output, torch.Tensor):
        return lambda tensor, _beside: tensor
    if type(output) in (tuple, list) and output[0] is first:
        rest = _without(output[1:])
        return lambda tensor, beside: type(output)([tensor]) + _without(rest, beside)
    return None


def _without(value: Any, size: int = 0) -> Any:
    """The same with so many zeros in the place of every tensor."""
    if isinstance(value, torch.Tensor):
        return value.new_zeros(size)
    if type(value) in (tuple, list):
        return type(value)(_without(part, size) for part in value)
    if type(value) is dict:
        return {key: _without(part, size) for key, part in value.items()}
    return value
