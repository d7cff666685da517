"""The matrices of a plan fitted in their metrics: each on its own, or block by block after what came before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.progress import Progress, doing
from mpo_tn.torch.models.auto import Trial
from mpo_tn.torch.models.blockwise import calibrate_blocks
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.calibration import Calibration, Moments
from mpo_tn.torch.models.fitting import Fitted, fit_matrix
from mpo_tn.torch.models.samples import Judge, Samples, Undo, is_biased, put
from mpo_tn.torch.models.units import DenseUnit

ANCHOR = 0.5
"""Halfway between what fits the matrix and what fits the outputs of the dense model: all the way overfits the text."""

Pairs = Sequence[tuple[UnitPlan, DenseUnit]]


def fit_units(
    model: nn.Module, pairs: Pairs, source: Trial | Samples | Calibration, progress: Progress, *, anchored: bool = False
) -> dict[str, Fitted]:
    """What every unit of a plan becomes, by name; the model is left as it was.

    Every matrix is fitted on its own, to what its layer gets in the dense model. If ``anchored`` it is fitted again
    block by block, to what it gets now that the blocks before are changed, halfway to what the dense model made of it;
    held-back text says which of the two is kept.

    On the encoder of MiniLM at 2.3 bits per weight the second way took most of the time and was worse on every try
    (D .165 against .132 at best), so it is not the default; with one family of integers of 3 bits, layer after layer
    instead of block after block, it had been better (.055 against .064).

    Raises:
        MPOError: a calibration of another model, nothing known of a layer; ``anchored`` without text.
    """
    if not pairs:
        return {}
    names = [unit.name for _, unit in pairs]
    if isinstance(source, Calibration):
        source.check(model)
        trial = Trial(None, source, {})
    elif isinstance(source, Samples):
        found = calibrate(
            model, source.batches, target_modules=names, gradients=True, progress=doing("calibrating", progress)
        )  # fmt: skip
        trial = Trial(source, found, {})
    else:
        trial = source
    alone = _alone(pairs, trial, progress)
    if not anchored:
        return alone
    if trial.samples is None:
        raise MPOError("anchored=True goes through the model block by block: give batches, not moments alone")
    judge = Judge(model, trial.samples.held_back)
    after = _block_by_block(model, pairs, trial, trial.samples, progress)
    return min((alone, after), key=lambda fits: _judged(pairs, fits, judge))


def _alone(pairs: Pairs, trial: Trial, progress: Progress) -> dict[str, Fitted]:
    fits: dict[str, Fitted] = {}
    for done, (planned, unit) in enumerate(pairs):
        progress(done, len(pairs), f"fitting {unit.name}")
        fits[unit.name] = trial.fit(unit, planned.spec)
    return fits


def _block_by_block(
    model: nn.Module, pairs: Pairs, trial: Trial, samples: Samples, progress: Progress
) -> dict[str, Fitted]:
    planned = {unit.name: (plan, unit) for plan, unit in pairs}
    fits: dict[str, Fitted] = {}
    undo: list[Undo] = []
    try:
        for step in calibrate_blocks(model, samples.batches, target_modules=list(planned)):
            for name in step.calibration.units:
                progress(len(fits), len(planned), f"fitting {name} after what came before")
                plan, unit = planned[name]
                known, dense = step.calibration.of(name) or Moments(0), trial.calibration.of(name)
                known = replace(known, outer=None if dense is None else dense.outer)
                with torch.no_grad():
                    fits[name] = fit_matrix(unit.matrix(), plan.spec, known, anchor=ANCHOR, biased=is_biased(unit))
                undo.append(put(unit, fits[name].rebuilt(), fits[name].shift))
    finally:
        for done in reversed(undo):
            done.back()
    missing = [name for name in planned if name not in fits]
    if missing:
        raise MPOError(f"{missing[0]} was not reached block by block")
    return fits


def _judged(pairs: Pairs, fits: Mapping[str, Fitted], judge: Judge) -> float:
    undo: list[Undo] = []
    try:
        undo += [put(unit, fits[unit.name].rebuilt(), fits[unit.name].shift) for _, unit in pairs]
        return judge()
    finally:
        for done in reversed(undo):
            done.back()
