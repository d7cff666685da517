"""Moments of a model of any size: forwards and back through its blocks, one of them in memory at a time.

Forwards the hidden states that every block is given go to files. Backwards every block is run once more, from its
file, with what its units are given and the gradients at their outputs heard, as one run of the whole model hears them::

    x_0 --[block 0]--> x_1 --[block 1]--> x_2 --[what lies after]--> the distance to what the model gives
    g_0 <-[block 0]--- g_1 <-[block 1]--- g_2 <-[what lies after]---
           S, G               S, G                  S, G
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.torch.models.backward import Backward
from mpo_tn.torch.models.block_walk import early_and_late, places_of
from mpo_tn.torch.models.blocks import BlockCall, slot_of, takes_gradient
from mpo_tn.torch.models.calibration import Fingerprint
from mpo_tn.torch.models.feeding import Call, EnoughError, calls_of, is_encoder_decoder, only_looked_at
from mpo_tn.torch.models.gathering import Gatherer
from mpo_tn.torch.models.listening import Reader, find_readers, is_table
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.stand_ins import ELSEWHERE, StandIns
from mpo_tn.torch.models.walk_files import PartFiles, WalkFiles

BEFORE = -1
"""The place of what lies before the blocks."""

Run = Callable[[torch.Tensor], torch.Tensor]
"""A block with all that it is called with, but the hidden states."""

NOBODY = Fingerprint("", {}, "")


@dataclass(frozen=True, eq=False)
class Stream:
    """Text on its way through the blocks: files of its hidden states, and how the blocks are called in every batch."""

    kind: str
    calls: Sequence[Call]
    ways: Sequence[Sequence[BlockCall]]

    def block(self, walk: StreamWalk, place: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a block makes of hidden states in one batch."""
        return self.ways[batch][place].run(walk.modules[place], hidden)


class StreamWalk:
    """A walk through a model whose weights are on disk.

    Args:
        weights: of the model.
        batches: as for :func:`~mpo_tn.torch.calibrate`.
        units: names of the units whose moments are wanted.
        files: what is kept between the steps.
        progress: told of every step.

    Guarantee (walk-same-moments): the moments are sums of the same terms in the same order as those of
    ``calibrate(model, batches, target_modules=units, gradients=True)`` of the loaded model: equal to
    ``c eps(dtype of the model)`` of their norm, c a small multiple of the number of blocks, because a product may round
    by where its operands lie in memory.
    Guarantee (walk-memory): of the weights one block is in memory, or what lies outside of all blocks; of the hidden
    states one batch, with what going back through one block needs; of the moments those of one block. What else
    blocks are called with (masks of attention, positions) is kept for all batches.

    Raises:
        MPOError: a model of two halves, without blocks, or whose blocks depend on more than each other; as
            :func:`~mpo_tn.torch.calibrate`.
    """

    def __init__(
        self, weights: WeightsOnDisk, batches: Iterable[Any], units: Sequence[str], files: WalkFiles, progress: Progress
    ) -> None:
        self.weights, self.model, self.files, self.progress = weights, weights.model, files, progress
        if is_encoder_decoder(self.model):
            raise MPOError(
                f"a {type(self.model).__name__} has an encoder and a decoder, and is not run block by block: "
                f"{ELSEWHERE}"
            )
        self.calls = list(calls_of(self.model, batches))
        self.stand_ins = StandIns(weights)
        progress(0, 1, "looking for the blocks")
        readers = find_readers(self.model, list(units))
        self.blocks = self.stand_ins.find_blocks(self.calls[0].batch)
        self.modules: list[nn.Module] = [self.model.get_submodule(name) for name in self.blocks]
        self.readers = self._by_place(readers)
        self.first = min(place for place, own in self.readers.items() if own)
        self._dense: Stream | None = None

    @property
    def end(self) -> int:
        """The place of what lies after the blocks."""
        return len(self.blocks)

    def parts(self) -> Generator[PartFiles]:
        """The parts that have units, from the last to the first, as soon as their moments are there.

        Whoever is given a part may delete its moments before the next is asked for. A walk that was broken off goes on
        with the part that it was broken off in.

        Raises:
            StaleWalkError: what an earlier walk left is damaged or missing.
        """
        self.files.open()
        known = {place: self.files.part(place) for place in range(self.end, self.first - 1, -1)}
        if known[self.end] is None:
            self._forwards()
        for step, place in enumerate(known):
            part = known[place]
            if part is None:
                self.progress(step, len(known), f"moments {self.name_of(place)}")
                part = self._backwards(place)
            if part.units:
                yield part
            self.files.forget("hidden", place)
            self.files.forget("gradients", place + 1)
        self.progress(len(known), len(known), "moments")

    def name_of(self, place: int) -> str:
        """What the part at a place is called."""
        return "before the blocks" if place < 0 else "after the blocks" if place == self.end else self.blocks[place]

    def _by_place(self, readers: dict[str, Reader]) -> dict[int, dict[str, Reader]]:
        places = places_of(readers, self.blocks)
        outside = {name: reader for name, reader in readers.items() if places[name] is None}
        for name, reader in outside.items():
            names = [own for group in reader.names for own in group]
            inside = [own for own in names if any(f"{own}.".startswith(f"{block}.") for block in self.blocks)]
            if inside:
                raise MPOError(
                    f"{name} is used in several blocks, or in one and outside of it ({inside[0]}), so what it is given "
                    "is not known block by block: leave it out (--exclude)"
                )
        with self.outside():
            self.stand_ins.check(self.blocks, self.calls[0])
            with self.stand_ins.between(self.blocks):
                early, _ = early_and_late(self.model, self.blocks, self.calls[0], outside)
        found: dict[int, dict[str, Reader]] = {place: {} for place in range(BEFORE, len(self.blocks) + 1)}
        for name, reader in readers.items():
            place = places[name]
            found[BEFORE if name in early else self.end if place is None else place][name] = reader
        return found

    def outside(self) -> AbstractContextManager[None]:
        """With the weights of all that lies outside of the blocks."""
        return self.weights.loaded(self.model, but=self.modules)

    def begin(self, kind: str, calls: Sequence[Call]) -> Stream:
        """What the first block is given by the model as it is by now, into files of this kind."""
        ways: list[tuple[BlockCall, ...]] = []
        with self.outside():
            for batch, call in enumerate(calls):
                self.progress(batch, len(calls), "before the blocks")
                found = self.stand_ins.record(self.blocks, call)
                if not self.files.there(kind, 0, batch):
                    self.files.write(kind, 0, batch, found.hidden)
                ways.append(found.calls)
        return Stream(kind, calls, ways)

    def advance(self, stream: Stream, place: int) -> None:
        """Through one block, which is loaded, as it is by now; batches that are there already are not done again."""
        with only_looked_at(self.modules[place]):
            for batch in range(len(stream.calls)):
                if not self.files.there(stream.kind, place + 1, batch):
                    hidden = self.files.read(stream.kind, place, batch)
                    self.files.write(stream.kind, place + 1, batch, stream.block(self, place, batch, hidden))

    @property
    def dense(self) -> Stream:
        """The text in the dense model."""
        if self._dense is None:
            self._dense = self.begin("hidden", self.calls)
        return self._dense

    def is_through(self, stream: Stream, place: int) -> bool:
        """Whether all batches are through a block."""
        return all(self.files.there(stream.kind, place + 1, batch) for batch in range(len(stream.calls)))

    def _forwards(self) -> None:
        """The hidden states that every block is given, and what the last gives."""
        stream = self.dense
        for place, block in enumerate(self.modules):
            if not self.is_through(stream, place):
                self.progress(place, self.end, f"forwards through {self.blocks[place]}")
                with self.weights.loaded(block):
                    self.advance(stream, place)

    def _backwards(self, place: int) -> PartFiles:
        """Moments of one part, and what gradients there are before it."""
        readers = self.readers[place]
        gatherer, backward = Gatherer(self.model, readers), Backward(self.model, readers, True, 0)
        if place == self.end or place == BEFORE:
            run = self._after if place == self.end else self._before
            with self.outside():
                for batch, call in enumerate(self.calls):
                    run(batch, call, gatherer, backward)
        else:
            stream = self.dense
            with self.weights.loaded(self.modules[place]):
                for batch in range(len(self.calls)):
                    self._block(place, batch, partial(stream.block, self, place, batch), gatherer, backward)
        found = gatherer.calibration(NOBODY) if gatherer.reached else None
        return self.files.keep_part(place, readers, found, backward.outers())

    def _after(self, batch: int, call: Call, gatherer: Gatherer, backward: Backward) -> None:
        hidden = self.files.read("hidden", self.end, batch).requires_grad_()
        run = partial(self.run_after, call, hidden)
        with only_looked_at(self.model):
            gatherer.probe(run)
        around = Backward(self.model, self._early_layers(), True, 0)
        with only_looked_at(self.model, gradients=True), backward.listening(call), around.listening(call):
            backward.run(call, gatherer.gather(call, run))
        if around.sums:
            raise self._early(next(iter(around.sums)), "what comes after the blocks depends on")
        self._keep_gradient(self.end, batch, hidden)

    def _block(self, place: int, batch: int, run: Run, gatherer: Gatherer, backward: Backward) -> None:
        call, hidden, block = self.calls[batch], self.files.read("hidden", place, batch), self.modules[place]
        with only_looked_at(block):
            gatherer.probe(partial(run, hidden))
        if place > self.first:
            hidden.requires_grad_()
        with only_looked_at(block, gradients=True), backward.listening(call):
            output = gatherer.gather(call, partial(run, hidden))
            if output.requires_grad:
                output.backward(self.files.read("gradients", place + 1, batch))
        if place > self.first:
            self._keep_gradient(place, batch, hidden)

    def _before(self, batch: int, call: Call, gatherer: Gatherer, backward: Backward) -> None:
        run = partial(self.run_before, call)
        with only_looked_at(self.model):
            gatherer.probe(run)
        with only_looked_at(self.model, gradients=True), backward.listening(call):
            hidden = gatherer.gather(call, run)
            if self._early_layers():
                if not hidden.requires_grad:
                    raise self._early(next(iter(self._early_layers())), "the blocks do not come after")
                hidden.backward(self.files.read("gradients", 0, batch))

    def run_after(self, call: Call, hidden: torch.Tensor) -> Any:
        """What the model makes of what the last block gives."""
        with self.stand_ins.between(self.blocks, lambda _: hidden.clone()):
            return self.model(*call.args, **call.kwargs)

    def run_before(self, call: Call) -> torch.Tensor:
        """What the first block is given."""
        given: list[torch.Tensor] = []

        def hear(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slot = slot_of(args, kwargs)
            named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            if any(key != slot and takes_gradient(value) for key, value in named):
                raise self._early(next(iter(self._early_layers())), "more than the hidden states of blocks depends on")
            given.extend(value for key, value in named if key == slot)
            raise EnoughError

        handle = self.modules[0].register_forward_pre_hook(hear, with_kwargs=True)
        try:
            with suppress(EnoughError):
                self.model(*call.args, **call.kwargs)
        finally:
            handle.remove()
        return given[0]

    def _early_layers(self) -> dict[str, Reader]:
        """Units before the blocks that are no tables: gradients come back to them through the first block alone."""
        early = self.readers[BEFORE]
        return {name: own for name, own in early.items() if not all(is_table(module) for module in own.modules)}

    def _early(self, name: str, why: str) -> MPOError:
        return MPOError(
            f"{why} {name}, which is called before them, so gradients do not come back to it block by block: leave it "
            f"out (--exclude), or {ELSEWHERE}"
        )

    def _keep_gradient(self, place: int, batch: int, hidden: torch.Tensor) -> None:
        if hidden.grad is None:
            raise MPOError(f"no gradient comes back to {self.name_of(place)}: does the output depend on it?")
        self.files.write("gradients", place, batch, hidden.grad)
