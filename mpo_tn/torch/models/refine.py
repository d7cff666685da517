"""refine_blocks: block after block trained to give what it gave in the dense model, of what it is given by now.

Integers stay; what trains is continuous: cores in full numbers, scales of cores in integers, norms and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.models.block_walk import walk_blocks
from mpo_tn.torch.models.blocks import BlockSample, find_blocks
from mpo_tn.torch.models.feeding import only_looked_at
from mpo_tn.torch.models.places import put, there
from mpo_tn.torch.models.ranks import (
    add_gradients,
    agreed,
    check_equal,
    check_same,
    own_rows,
    spread,
    tensors_of,
    together,
    world,
)
from mpo_tn.torch.models.report import RefinedBlock
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.trainable import freeze, parameter_groups, scales_kept

Text = tuple[BlockSample, bool]
"""What this process takes of a batch, and whether it counts."""

EPOCHS = 6
_SCALE_RATE = 2e-2
"""Of logarithms of scales."""
_RATE = 2e-3
"""Of norms and biases."""
_CORE_RATE = 1e-2
"""Of cores in full numbers, relative to the root of the mean of their squares."""
_BETAS = (0.9, 0.95)


def check_refinable(model: nn.Module, samples: Samples | None) -> None:
    """Refuse what cannot be refined, before anything that takes long.

    Raises:
        MPOError: no text, or no blocks.
    """
    if samples is None:
        raise MPOError("refine=True trains block after block on text: give calibration=batches, not moments alone")
    if not find_blocks(model, samples.batches[0]):
        raise MPOError(
            f"refine=True trains block after block, and {type(model).__name__} has no blocks that hidden states go "
            "through one after another: leave it out, and heal the model instead"
        )


def refine_blocks(
    model: nn.Module, modules: Mapping[str, nn.Module], samples: Samples, undo: ExitStack, progress: Progress
) -> tuple[RefinedBlock, ...]:
    """Put modules in the places of those of the dense model, block by block, and train every block that gets some.

    Args:
        model: dense by now; afterwards it has those of ``modules`` that its blocks, and what is before them, hold.
        modules: by name.
        samples: text; what is held back says which of the epochs is kept.
        undo: is told how everything is undone.
        progress: told of every epoch.

    Guarantee (refine-never-worse): on the held-back text the relative squared distance of what a block gives from what
    it gave in the dense model, both of what it is given there, is nowhere above what it was before: ``after <= before``
    for every block; and no integer changes.

    Guarantee (refine-as-one): in a process group all processes do it together, each with its rows of the text, and end
    in the same bits, in what one process alone comes to up to rounding.

    Cost: about twenty forward passes a batch; memory as :func:`~mpo_tn.torch.calibrate_blocks`.

    Source: block-wise reconstruction as in BRECQ (Li et al., 2021), on the inputs of the compressed model.
    """
    undo.callback(put, model, there(model, modules))
    parts = agreed(lambda: [_own_part(batch) for batch in (*samples.batches, *samples.held_back)])
    counts = [found for _, found in parts]
    _share(model, modules)
    held, waiting, count = len(samples.held_back), dict(modules), len(find_blocks(model, samples.batches[0]))
    blocks: list[RefinedBlock] = []
    walk = walk_blocks(model, [own for own, _ in parts], target_modules=list(modules))
    while (passage := agreed(lambda: next(walk, None))) is not None:
        names = {name for reader in passage.readers.values() for group in reader.names for name in group}
        put(model, {name: waiting.pop(name) for name in names & waiting.keys()})
        if passage.block is None:
            continue

        def tell(epoch: int, name: str = passage.name) -> None:
            progress(len(blocks) * EPOCHS + epoch, count * EPOCHS, f"refining {name}, epoch {epoch + 1}")

        block = model.get_submodule(passage.name)  # which may be one of those just put there
        with _training(model, passage.name, waiting, undo) as trained:
            if trained:
                texts = [*zip(passage.samples, counts, strict=True)]
                found = _train(block, trained, texts[:-held], texts[-held:], tell)
                blocks.append(RefinedBlock(passage.name, *found))
        if blocks and blocks[-1].name == passage.name and blocks[-1].epoch:
            for module in block.modules():
                if isinstance(module, MPOLayer):
                    module.spec = replace(module.spec, rel_error=None, exact=False)
    check_equal("numbers in the refined model", tensors_of(model))
    return tuple(blocks)


def _own_part(batch: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """What this process takes of a batch; all of it, and that it does not count here, if that is nothing."""
    own = own_rows(batch)
    return (batch, False) if own is None else (own, True)


def _share(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Let several processes begin with the same numbers."""
    if world() == 1:
        return
    own = nn.ModuleList(dict.fromkeys(modules.values()))
    shapes = [(name, value.dtype, value.shape) for name, value in own.state_dict().items()]
    check_same({"matrices to put there": (list(modules), shapes)})
    check_equal("numbers in the model", tensors_of(model))
    spread(tensors_of(own))


@contextmanager
def _training(
    model: nn.Module, name: str, waiting: Mapping[str, nn.Module], undo: ExitStack
) -> Generator[list[dict[str, Any]]]:
    """The groups of what may train in a block: nothing that is used elsewhere, too, or is still to be replaced."""
    block = model.get_submodule(name)
    own = {id(module) for module in block.modules()}
    elsewhere = [module for path, module in model.named_modules(remove_duplicate=False) if not _within(path, name)]
    others = {id(p) for module in elsewhere for p in module.parameters(recurse=False)}
    for thing in there(model, waiting).values():
        others |= {id(thing)} if isinstance(thing, nn.Parameter) else {id(p) for p in thing.parameters()}
    grads = [(parameter, parameter.grad) for parameter in block.parameters()]
    values = [(parameter, parameter.detach().clone()) for parameter in block.parameters()]
    undo.callback(_write, values)
    with only_looked_at(model, gradients=True), scales_kept(block):
        has_cores = any(isinstance(module, MPOLayer) for module in block.modules())
        freeze(block, "cores" if has_cores else "none", also=("norms", "biases", "scales"))
        for module in elsewhere:
            if id(module) in own and isinstance(module, QuantizedCore):
                module.train_scales(False)
        for parameter in block.parameters():
            parameter.grad = None
            if id(parameter) in others:
                parameter.requires_grad_(False)
        try:
            yield _groups(block) if any(parameter.requires_grad for parameter in block.parameters()) else []
        finally:
            for parameter, grad in grads:
                parameter.grad = grad


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _groups(block: nn.Module) -> list[dict[str, Any]]:
    """Groups with their rates; every core has a group of its own, for a rate in proportion to its entries."""
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(block, _RATE, 1.0, weight_decay=0.0, scale_lr=_SCALE_RATE):
        if group["name"] != "tensors":
            groups.append({"params": group["params"], "lr": group["lr"]})
            continue
        for core in group["params"]:
            size = float(core.detach().float().square().mean().sqrt())
            groups.append({"params": [core], "lr": _CORE_RATE * size})
    return groups


def _train(
    block: nn.Module, groups: list[dict[str, Any]], samples: Sequence[Text], held_back: Sequence[Text],
    tell: Callable[[int], None],
) -> tuple[float, float, int]:  # fmt: skip
    """The distance on held-back text before and after, and the epoch that is kept; 0 is none of them."""
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    random = torch.Generator().manual_seed(0)
    before = least = _distance(block, held_back)
    best, kept = _read(trained), 0
    step, steps = 0, EPOCHS * len(samples)
    try:
        for epoch in range(EPOCHS):
            agreed(partial(tell, epoch))
            for place in torch.randperm(len(samples), generator=random).tolist():
                share = 0.5 * (1 + math.cos(math.pi * step / steps))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                _step(block, samples[place], optimizer, trained)
                step += 1
            value = _distance(block, held_back)
            if value < least:
                least, kept, best = value, epoch + 1, _read(trained)
    finally:
        _write(best)
    return before, least, kept


def _step(block: nn.Module, text: Text, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]) -> None:
    """One step down the relative distance on a batch, of which each process has its own rows."""
    held: list[torch.Tensor] = []

    def forward() -> float:
        held[:] = _squares(block, text)
        return float(held[1])

    size = sum(together(forward))
    optimizer.zero_grad()
    add_gradients(trained, lambda: (held[0] / size).backward())
    optimizer.step()


def _squares(block: nn.Module, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms over the tokens: of what the block misses, and of what it gave in the dense model.

    Zeros for a batch that does not count here.
    """
    sample, counts = text
    result = sample.run(block)
    wanted = sample.dense_output.to(result)
    if sample.mask is not None:
        mask = sample.mask.to(result.device)
        result, wanted = result[mask], wanted[mask]
    found = (result.float() - wanted.float()).square().sum(), wanted.float().square().sum()
    return found if counts else (found[0] * 0, found[1] * 0)


def _distance(block: nn.Module, texts: Sequence[Text]) -> float:
    def measure() -> tuple[float, float]:
        parts = [_squares(block, text) for text in texts]
        return sum(float(part) for part, _ in parts), sum(float(part) for _, part in parts)

    with torch.no_grad():
        told = together(measure)
    size = sum(part for _, part in told)
    return sum(part for part, _ in told) / size if size > 0 else 0.0


def _read(parameters: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    return [(parameter, parameter.detach().clone()) for parameter in parameters]


def _write(values: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    with torch.no_grad():  # in place, so that what layers keep of them is seen to be old
        for parameter, value in values:
            parameter.copy_(value)
