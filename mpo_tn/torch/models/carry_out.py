"""The matrices of a plan fitted in their metrics, from what is known or found out by then."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.progress import Progress, doing
from mpo_tn.torch.models.anchoring import best_fits
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.calibration import Calibration
from mpo_tn.torch.models.fitting import Fitted
from mpo_tn.torch.models.samples import Judge, Samples
from mpo_tn.torch.models.survey import DenseUnit
from mpo_tn.torch.models.trial import Trial

Pairs = Sequence[tuple[UnitPlan, DenseUnit]]


def fit_units(
    model: nn.Module,
    pairs: Pairs,
    source: Trial | Samples | Calibration,
    progress: Progress,
    *,
    anchored: bool | None = None,
) -> dict[str, Fitted]:
    """What every unit of a plan becomes, by name; the model is left as it was.

    Every matrix is fitted on its own, to what its layer gets in the dense model; if ``anchored``, held-back text says
    whether that is kept, or what comes of fitting them layer after layer.

    Raises:
        MPOError: a calibration of another model, nothing known of a layer; ``anchored=True`` without text.
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
    wanted = {unit.name: (unit, planned.spec) for planned, unit in pairs}
    for done, (name, (unit, spec)) in enumerate(wanted.items()):
        progress(done, len(wanted), f"fitting {name}")
        trial.fit(unit, spec)
    if anchored is False or (anchored is None and trial.samples is None):
        return {name: trial.fit(unit, spec) for name, (unit, spec) in wanted.items()}
    if trial.samples is None:
        raise MPOError("anchored=True goes through the model block by block: give batches, not moments alone")
    if trial.finished is not None and {name: spec for name, (_, spec) in wanted.items()} == trial.finished[0]:
        return trial.finished[1]
    return best_fits(model, wanted, trial, Judge(model, trial.samples.held_back), progress)[0]
