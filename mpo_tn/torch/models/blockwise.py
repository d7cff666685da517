"""calibrate_blocks: calibrate a model block by block, each on what the changed blocks before it give.

Two streams of hidden states go through the blocks, x of the dense model and x' of the model as it is by then::

    dense     x_0 --[block 0]--> x_1 --[block 1]--> x_2 --> ...
                        | what its layers are given: y          Cx = E[y y'^T]
    changed   x'_0 -[block 0]--> x'_1 -[block 1]--> x'_2 -> ...
                        | what its layers are given: y'         S = E[y' y'^T]
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.progress import Progress, silent
from mpo_tn.torch.models.blocks import BlockSample, Recorded, find_blocks, record
from mpo_tn.torch.models.calibration import Calibration, Fingerprint
from mpo_tn.torch.models.feeding import Call, calls_of, is_encoder_decoder, only_looked_at
from mpo_tn.torch.models.gathering import Gatherer, Heard
from mpo_tn.torch.models.listening import Reader, find_readers, hooked


@dataclass(frozen=True, eq=False)
class BlockStep:
    """What of a model is calibrated now, and may be changed before the rest is.

    Attributes:
        name: of the block in the model; ``"before the blocks"``, ``"after the blocks"`` or ``"the whole model"``.
        block: the module; None for what is no block.
        calibration: of the units in it.
        samples: one for each batch; none for what is no block.
    """

    name: str
    block: nn.Module | None
    calibration: Calibration
    samples: Sequence[BlockSample]


def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Generator[BlockStep]:
    """Calibrate a model block by block; whoever goes through the steps may change each block before the next one.

    The steps come in the order of the forward pass: units before the blocks, each block, units after them. A step has
    the calibration of its own units, and of no others. What is changed meanwhile (units replaced by MPO modules, cores
    trained) is what the steps that follow see. A model in which no blocks are found (see
    :func:`~mpo_tn.torch.models.blocks.find_blocks`) is one step.

    Args:
        model: its state when the generator starts is "the dense model".
        batches: as for :func:`~mpo_tn.torch.calibrate`; they are kept.
        target_modules: as there.
        exclude_modules: as there.
        progress: told of every step.

    Yields:
        A :class:`BlockStep`. Of its moments ``second`` is ``S = E[y' y'^T]`` of what a layer gets now and ``cross``
        ``Cx = E[y y'^T]`` against what it got in the dense model, token by token; None while both are the same bits.
        Inside a block all layers count as not changed yet. ``samples`` hold for every batch what the block got and gave
        in the dense model, and what it gets now: what a refinement of the whole block needs.

    Guarantee (blocks-are-the-model): if nothing is changed, the moments are those of :func:`~mpo_tn.torch.calibrate`,
    to rounding, and ``cross`` is None.

    Cost: about four forward passes a batch, five once something is changed. Memory: the moments of one block at a
    time; on the host the hidden states of all tokens three times, what else the blocks are called with (masks of
    attention, positions), and what the units after the blocks are given.

    Raises:
        MPOError: as :func:`~mpo_tn.torch.calibrate`; blocks that are not called as in the first batch.

    Source: the anchored moments of AA-SVD, arXiv 2604.02119.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> [(step.name, step.calibration.units) for step in calibrate_blocks(model, [torch.ones(2, 4)])]
    [('the whole model', ('0', '1'))]
    """
    tell = progress or silent
    calls = list(calls_of(model, batches))
    wanted = find_readers(model, target_modules, exclude_modules)
    fingerprint = Fingerprint.of(model)
    blocks = find_blocks(model, calls[0].batch)
    place_of, halves = _places(wanted, blocks), is_encoder_decoder(model)

    def now(names: Iterable[str]) -> dict[str, Reader]:
        """The units as they are now: their modules may have been replaced."""
        own = set(names)
        found = find_readers(model, target_modules, exclude_modules) if own else {}
        return {name: reader for name, reader in found.items() if name in own}

    if not blocks:
        whole = Gatherer(model, wanted)
        with only_looked_at(model):
            for done, call in enumerate(calls):
                tell(done, len(calls), f"batch {done + 1}")
                whole.gather(call, partial(model, *call.args, **call.kwargs))
        yield BlockStep("the whole model", None, whole.calibration(fingerprint), ())
        return

    tell(0, len(blocks) + 1, "before the blocks")
    early, late = _early_and_late(model, blocks, calls[0], now(unit for unit in wanted if place_of[unit] is None))
    before, after = Gatherer(model, now(early)), Gatherer(model, now(late))
    recorded: list[Recorded] = []
    dense_after: list[Heard] = []
    with only_looked_at(model):
        forward = partial(model, *calls[0].args, **calls[0].kwargs)
        before.probe(forward)
        after.probe(forward)
        for call in calls:
            # Both listen to one run.
            once, heard = after.hear(call, partial(before.gather, call, partial(record, model, blocks, call)))
            recorded.append(once)
            dense_after.append(heard)
    streams = recorded
    if early:
        yield BlockStep("before the blocks", None, before.calibration(fingerprint), ())
        with only_looked_at(model):
            fresh = [record(model, blocks, call) for call in calls]
        streams = [old if old.same_as(new) else new for old, new in zip(recorded, fresh, strict=True)]
        del fresh
    del before, after

    dense, given = [at.hidden for at in recorded], [at.hidden for at in streams]
    for place, name in enumerate(blocks):
        tell(place, len(blocks) + 1, name)
        block = model.get_submodule(name)
        gatherer = Gatherer(model, now(unit for unit in wanted if place_of[unit] == place))
        outputs: list[torch.Tensor] = []
        with only_looked_at(model):
            for call, old, new, x, y in zip(calls, recorded, streams, dense, given, strict=True):
                run = partial(new.calls[place].run, block, y)
                if x is y and old is new:
                    result = gatherer.gather(call, run)
                else:
                    result, heard = gatherer.hear(call, partial(old.calls[place].run, block, x))
                    gatherer.gather(call, run, heard)
                outputs.append(result.to("cpu"))
        if gatherer.readers:
            samples = tuple(
                BlockSample(x, out, y, call.mask_of(name, halves, x.shape[:-1]), new.calls[place])
                for call, new, x, out, y in zip(calls, streams, dense, outputs, given, strict=True)
            )
            yield BlockStep(name, block, gatherer.calibration(fingerprint), samples)
            del samples
        if place + 1 < len(blocks):
            block = model.get_submodule(name)
            with only_looked_at(model):
                results = [new.calls[place].run(block, y).to("cpu") for new, y in zip(streams, given, strict=True)]
            given = [x if torch.equal(x, y) else y for x, y in zip(outputs, results, strict=True)]
            dense = outputs
    del dense, given, recorded, streams

    if late:
        tell(len(blocks), len(blocks) + 1, "after the blocks")
        final = Gatherer(model, now(late))
        with only_looked_at(model):
            for call, heard in zip(calls, dense_after, strict=True):
                final.gather(call, partial(model, *call.args, **call.kwargs), heard)
        yield BlockStep("after the blocks", None, final.calibration(fingerprint), ())
    tell(len(blocks) + 1, len(blocks) + 1, "all")


def _places(readers: dict[str, Reader], blocks: Sequence[str]) -> dict[str, int | None]:
    """In which block each unit lies; None for those outside, or in several."""
    found: dict[str, int | None] = {}
    for unit, reader in readers.items():
        names = [name for group in reader.names for name in group]
        at = {next((k for k, block in enumerate(blocks) if f"{name}.".startswith(f"{block}.")), None) for name in names}
        found[unit] = at.pop() if len(at) == 1 else None
    return found


def _early_and_late(
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
