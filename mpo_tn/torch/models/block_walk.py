"""walk_blocks: through a model block by block, with what its layers got in the dense model at hand.

Two streams of hidden states go through the blocks, x of the dense model and x' of the model as it is by then::

    dense     x_0 --[block 0]--> x_1 --[block 1]--> x_2 --> ...
                        | what its layers are given: y          Cx = E[y y'^T]
    changed   x'_0 -[block 0]--> x'_1 -[block 1]--> x'_2 -> ...
                        | what its layers are given: y'         S = E[y' y'^T]
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.progress import Progress, silent
from mpo_tn.torch.models.blocks import BlockSample, Recorded, find_blocks, record
from mpo_tn.torch.models.calibration import Calibration, Fingerprint, Moments
from mpo_tn.torch.models.feeding import Call, calls_of, is_encoder_decoder, only_looked_at
from mpo_tn.torch.models.gathering import Gatherer, Heard, OtherCallsError
from mpo_tn.torch.models.listening import Reader, find_readers, hooked


@dataclass(frozen=True, eq=False)
class Passage:
    """A block, or what lies before or after all of them, while it may be changed.

    Attributes:
        name: of the block in the model; ``"before the blocks"``, ``"after the blocks"`` or ``"the whole model"``.
        block: the module; None for what is no block.
        readers: the units in it, as they were when it was come to.
        inputs: of every unit that is reached the key under which its inputs were heard; in the order of the calls.
        samples: one for each batch; none for what is no block.
        heard: for each batch what the units were given in the dense model.
    """

    name: str
    block: nn.Module | None
    readers: Mapping[str, Reader]
    inputs: Mapping[str, str]
    samples: Sequence[BlockSample]
    heard: Sequence[Heard]
    _model: nn.Module
    _calls: Sequence[Call]
    _fingerprint: Fingerprint

    def calibration(self) -> Calibration:
        """Moments of what all units are given now, against what they were given in the dense model.

        Raises:
            MPOError: entries that are not finite, inputs of other shapes than in the dense model.
        """
        gatherer = Gatherer(self._model, self.readers)
        with only_looked_at(self._model):
            for place, call in enumerate(self._calls):
                gatherer.gather(call, self.run(place), self.heard[place])
        return gatherer.calibration(self._fingerprint)

    def moments(self, key: str) -> Moments | None:
        """The same of one key of :attr:`inputs`; runs end as soon as that much is known.

        Where a unit is sent other tokens than in the dense model, as experts are, there is nothing to compare with, and
        ``cross`` is None; None altogether where it is sent none.

        Raises:
            MPOError: entries that are not finite.
        """
        reader = {key: self.readers[key]}
        gatherer = Gatherer(self._model, reader)
        with only_looked_at(self._model):
            try:
                for place, call in enumerate(self._calls):
                    gatherer.gather_until_known(call, self.run(place), self.heard[place])
            except OtherCallsError:
                gatherer = Gatherer(self._model, reader)
                for place, call in enumerate(self._calls):
                    gatherer.gather(call, self.run(place))
        return gatherer.calibration(self._fingerprint).of(key) if gatherer.reached else None

    def run(self, place: int) -> Callable[[], object]:
        """What runs it, or the whole model, as it is by then on one batch."""
        call = self._calls[place]
        if self.block is None:
            return partial(self._model, *call.args, **call.kwargs)
        return partial(self.samples[place].run, self.block)


def walk_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Generator[Passage]:
    """Go through a model in the order of its forward pass; what is changed on the way is what later passages see.

    See :func:`~mpo_tn.torch.calibrate_blocks`, which takes the same arguments, for what comes when, and what it costs.
    A model without blocks is one passage.

    Raises:
        MPOError: as :func:`~mpo_tn.torch.calibrate`; blocks that are not called as in the first batch.
    """
    tell = progress or silent
    calls = list(calls_of(model, batches))
    wanted = find_readers(model, target_modules, exclude_modules)
    passing = partial(Passage, _model=model, _calls=calls, _fingerprint=Fingerprint.of(model))
    blocks = find_blocks(model, calls[0].batch)
    place_of, halves = places_of(wanted, blocks), is_encoder_decoder(model)

    def now(names: Iterable[str]) -> dict[str, Reader]:
        """The units as they are now: their modules may have been replaced."""
        own = set(names)
        found = find_readers(model, target_modules, exclude_modules) if own else {}
        return {name: reader for name, reader in found.items() if name in own}

    if not blocks:
        ears = Gatherer(model, wanted)
        with only_looked_at(model):
            heard: list[Heard] = []
            for done, call in enumerate(calls):
                tell(done, len(calls), f"batch {done + 1}")
                heard.append(ears.hear(call, partial(model, *call.args, **call.kwargs))[1])
        yield passing("the whole model", None, wanted, ears.inputs, (), heard)
        return

    tell(0, len(blocks) + 1, "before the blocks")
    early, late = early_and_late(model, blocks, calls[0], now(unit for unit in wanted if place_of[unit] is None))
    before, after = Gatherer(model, now(early)), Gatherer(model, now(late))
    recorded, heard_before, heard_after = _recorded(model, blocks, calls, before, after)
    streams = recorded
    if early:
        yield passing("before the blocks", None, now(early), before.inputs, (), heard_before)
        with only_looked_at(model):
            fresh = [record(model, blocks, call) for call in calls]
        streams = [old if old.same_as(new) else new for old, new in zip(recorded, fresh, strict=True)]
        del fresh

    dense, given = [at.hidden for at in recorded], [at.hidden for at in streams]
    for place, name in enumerate(blocks):
        tell(place, len(blocks) + 1, name)
        block = model.get_submodule(name)
        readers = now(unit for unit in wanted if place_of[unit] == place)
        inside = Gatherer(model, readers)
        outputs: list[torch.Tensor] = []
        heard = []
        with only_looked_at(model):
            for call, old, x in zip(calls, recorded, dense, strict=True):
                result, once = inside.hear(call, partial(old.calls[place].run, block, x))
                outputs.append(result.to("cpu"))
                heard.append(once)
        if readers:
            samples = tuple(
                BlockSample(x, out, y, call.mask_of(name, halves, x.shape[:-1]), new.calls[place])
                for call, new, x, out, y in zip(calls, streams, dense, outputs, given, strict=True)
            )
            yield passing(name, block, readers, inside.inputs, samples, heard)
            del samples
        del heard, inside
        if place + 1 < len(blocks):
            block = model.get_submodule(name)
            with only_looked_at(model):
                results = [new.calls[place].run(block, y).to("cpu") for new, y in zip(streams, given, strict=True)]
            given = [x if torch.equal(x, y) else y for x, y in zip(outputs, results, strict=True)]
            dense = outputs
    del dense, given, recorded, streams

    if late:
        tell(len(blocks), len(blocks) + 1, "after the blocks")
        yield passing("after the blocks", None, now(late), after.inputs, (), heard_after)
    tell(len(blocks) + 1, len(blocks) + 1, "all")


def _recorded(
    model: nn.Module, blocks: tuple[str, ...], calls: Sequence[Call], before: Gatherer, after: Gatherer
) -> tuple[list[Recorded], list[Heard], list[Heard]]:
    """One run of every batch: how the blocks are called, and what units before and after them are given."""
    recorded: list[Recorded] = []
    heard_before: list[Heard] = []
    heard_after: list[Heard] = []
    with only_looked_at(model):
        for listener in (before, after):
            listener.probe(partial(model, *calls[0].args, **calls[0].kwargs))
        for call in calls:
            # Both listen to one run.
            (once, first), last = after.hear(call, partial(before.hear, call, partial(record, model, blocks, call)))
            recorded.append(once)
            heard_before.append(first)
            heard_after.append(last)
    return recorded, heard_before, heard_after


def places_of(readers: dict[str, Reader], blocks: Sequence[str]) -> dict[str, int | None]:
    """In which block each unit lies; None for those outside, or in several."""
    found: dict[str, int | None] = {}
    for unit, reader in readers.items():
        names = [name for group in reader.names for name in group]
        at = {next((k for k, block in enumerate(blocks) if f"{name}.".startswith(f"{block}.")), None) for name in names}
        found[unit] = at.pop() if len(at) == 1 else None
    return found


def early_and_late(
    model: nn.Module, blocks: Sequence[str], call: Call, rest: dict[str, Reader]
) -> tuple[list[str], list[str]]:
    """Of the units in no block those that are done with before the first block, and the others."""
    if not rest:
        return [], []
    begun, early, late = False, dict[str, None](), dict[str, None]()

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = True

    def hear(reader: Reader, _module: nn.Module, _x: torch.Tensor) -> None:
        (late if begun else early).setdefault(reader.name)

    handle = model.get_submodule(blocks[0]).register_forward_pre_hook(begin)
    try:
        with only_looked_at(model), hooked(rest.values(), hear):
            model(*call.args, **call.kwargs)
    finally:
        handle.remove()
    first = [name for name in rest if name in early and name not in late]
    return first, [name for name in rest if name not in first]
