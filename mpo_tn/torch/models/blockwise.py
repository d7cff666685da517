"""calibrate_blocks: calibrate a model block by block, each on what the changed blocks before it give."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpo_tn.progress import Progress
from mpo_tn.torch.models.block_walk import walk_blocks
from mpo_tn.torch.models.blocks import BlockSample
from mpo_tn.torch.models.calibration import Calibration


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

    Cost: about five forward passes a batch. Memory: the moments of one block at a time; on the host the hidden states
    of all tokens three times, what else the blocks are called with (masks of attention, positions), and what the units
    of one block, and those after the blocks, are given.

    Raises:
        MPOError: as :func:`~mpo_tn.torch.calibrate`; blocks that are not called as in the first batch.

    Source: the anchored moments of AA-SVD, arXiv 2604.02119.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> [(step.name, step.calibration.units) for step in calibrate_blocks(model, [torch.ones(2, 4)])]
    [('the whole model', ('0', '1'))]
    """
    for passage in walk_blocks(
        model, batches, target_modules=target_modules, exclude_modules=exclude_modules, progress=progress
    ):
        yield BlockStep(passage.name, passage.block, passage.calibration(), passage.samples)
