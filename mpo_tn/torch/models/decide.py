"""plan: decide what every matrix of a model becomes, before anything is done."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.entries import ACTIVATION, FROBENIUS, LeftDense, UnitPlan
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.planning.structure import structure
from mpo_tn.progress import Progress
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.models.auto import plan_for_budget
from mpo_tn.torch.models.calibration import Calibration
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import DenseUnit, check_overrides, survey, survey_named
from mpo_tn.truncate.spectra import unfolding_spectra


def plan(
    model: nn.Module,
    config: MPOConfig,
    *,
    spectra: bool = False,
    calibration: Iterable[Any] | Calibration | Samples | None = None,
    anchored: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Decide what every matrix of ``model`` becomes; the model stays as it is.

    Args:
        model: any ``torch.nn.Module`` without MPO modules. On the meta device it needs no weights.
        config: which modules, which legs, how much to keep.
        spectra: for a ``tolerance``, look at the singular values for the widest bonds that it can leave; without, those
            are the full bonds. Costs about as much as compressing; nothing is looked at where there is no tolerance.
        calibration: batches (mappings of tensors, as a tokenizer gives them), of which every fifth is held back to
            judge by; or a :class:`~mpo_tn.torch.Calibration`. Matrices are then fitted in the metric of what their
            layers get, and for a budget (``size``, ``bits_per_weight``, ``max_flops``, or ``keep`` where structures are
            left open) structure and bits of each are chosen by what the model does on the text that was held back;
            without text errors alone choose.
        anchored: for a budget, with text: whether plans that are close are also fitted layer after layer before one of
            them is taken, as :func:`compress` does by default. It takes longer.
        progress: told of every step.

    Returns:
        The :class:`Plan`: legs, bonds, parameters and bytes of every matrix, and for every other module with parameters
        the reason why it stays. ``compress(model, plan)`` carries it out.

    Guarantee (plan-is-what-comes): with ``keep``, one ``bond`` for all, or full bonds, the parameters and bytes are
    those that come out. With a tolerance, or bonds given one by one, they are the most that can; a matrix that a
    tolerance would not make smaller stays dense.
    Guarantee (share-of-all): with ``keep`` and a calibration, and structures left open, the numbers of all matrices
    together, those left dense included, are at most that share of what they were.
    Guarantee (never-worse): for a budget, the plan is the one of least D on held-back text among the plans compared;
    the best uniform plan of integers and that of low rank, if the families have them, are always among them, and with
    chains what would be chosen without.

    Warns:
        UserWarning: ``keep`` is more than 1, with which cores may take more room than the matrices do.

    Raises:
        MPOError: a budget without a calibration, or one that cannot be met or is more than the model takes; a pattern
            that matches nothing, legs that do not fit, a ratio that cannot be reached (the message
            names the module), or a model that holds MPO modules already.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.LayerNorm(16384))
    >>> found = plan(model, MPOConfig(keep=0.5))
    >>> found.units[0].spec.bonds, round(found.kept, 3), [(part.name, part.reason) for part in found.left]
    ((4, 45, 45, 4), 0.494, [('1', 'a LayerNorm is not a linear layer or an embedding')])
    """
    refuse_compressed(model)
    if config.keep is not None and config.keep > 1:
        warnings.warn(
            f"keep={config.keep:g} lets cores take more room than the matrices do: give less than 1, or no size for "
            "chains that are exact",
            stacklevel=2,
        )
    source = samples_of(calibration)
    if config.has_budget or (config.shares_keep and source is not None):
        if source is None:
            raise MPOError("a budget is spent by what the model does on text: give calibration=batches")
        return plan_for_budget(model, config, source, progress, anchored=anchored)
    found = survey(model, config.target_modules, config.exclude_modules)
    check_overrides(model, config.overrides, found)
    units: list[UnitPlan] = []
    for unit in found.units:
        own = config.for_module(*unit.asked_names)
        out, in_ = (int(size) for size in unit.matrix().shape)
        try:
            spec = structure(unit.kinds[0], out, in_, own, unit.blocks)
            if spectra and own.tolerance is not None:
                spec = _within(unit, spec, own.tolerance)
            beside = found.beside[unit.name]
            # What reads a parameter is not called with what it multiplies.
            metric = ACTIVATION if source is not None and unit.readers else FROBENIUS
            units.append(UnitPlan(unit.all_names, spec, unit.storage, own.tolerance, *beside, metric))
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
    return Plan(type(model).__name__, config, tuple(units), found.left, calibration=source)


def samples_of(given: Iterable[Any] | Calibration | Samples | None) -> Calibration | Samples | None:
    """Text or moments to decide on, from what a caller gave."""
    return given if given is None or isinstance(given, Calibration | Samples) else Samples.of(given)


def units_of_plan(model: nn.Module, decided: Plan) -> list[tuple[UnitPlan, DenseUnit]]:
    """The units of a plan with those of the model that it is carried out on.

    Raises:
        MPOError: the plan is of another model, or asks for what cannot be; the message names the module.
    """
    refuse_compressed(model)
    if not decided.units:
        raise MPOError('the plan compresses nothing: move what is to be an MPO from "left" to "units"')
    found = survey_named(model, {name for unit in decided.units for name in unit.names})
    here = {name: unit for unit in found.units for name in unit.all_names}
    stays = {part.name: part for part in found.left}
    pairs: list[tuple[UnitPlan, DenseUnit]] = []
    for planned in decided.units:
        unit = here.get(planned.name)
        if unit is None:
            part = stays.get(planned.name)
            if part is not None and part.matched:
                raise MPOError(f"the plan makes an MPO of {planned.name}, which cannot be one: {part.reason}")
            raise _other_model(model, decided, f"this one has no {planned.name}")
        out, in_ = (int(size) for size in unit.matrix().shape)
        for what, there, own in (
            ("is used by", sorted(planned.names), sorted(unit.all_names)),
            ("is of kind", planned.spec.kind, unit.kinds[0]),
            ("has the shape", (planned.spec.out_features, planned.spec.in_features), (out, in_)),
        ):
            if there != own:
                raise _other_model(model, decided, f"{planned.name} {what} {own} here and {there} in the plan")
        if planned.storage != unit.storage:
            raise MPOError(
                f"the plan stores {planned.name} as {planned.storage}, and its weight is {unit.storage}: cores are "
                "stored in the dtype of the weight, so cast the model first, or make the plan anew"
            )
        if (planned.bias, planned.bias_bytes) != found.beside[unit.name]:
            numbers, room = found.beside[unit.name]
            raise _other_model(
                model,
                decided,
                f"{planned.name} has {numbers} numbers in {room} bytes beside it here, and {planned.bias} in "
                f"{planned.bias_bytes} in the plan",
            )
        pairs.append((planned, unit))
    _check_left(model, decided, stays)
    return pairs


def _check_left(model: nn.Module, decided: Plan, stays: Mapping[str, LeftDense]) -> None:
    """The plan speaks of every module with parameters, and of no other."""
    listed = {part.name: part for part in decided.left}
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name, part in listed.items():
        if name not in names:
            raise _other_model(model, decided, f"this one has no {name}")
        own = (stays[name].parameters, stays[name].bytes) if name in stays else (0, 0)
        if (part.parameters, part.bytes) != own:
            raise _other_model(
                model,
                decided,
                f"{name or 'the model itself'} has {own[0]} parameters in {own[1]} bytes here, and {part.parameters} "
                f"in {part.bytes} in the plan",
            )
    for name, part in stays.items():
        if name not in listed:
            raise _other_model(
                model, decided, f"it says nothing of {name or 'the model itself'} with its {part.parameters} parameters"
            )


def _other_model(model: nn.Module, decided: Plan, why: str) -> MPOError:
    return MPOError(
        f"the plan, of a {decided.model}, does not fit this {type(model).__name__}: {why}; make a plan of this model, "
        'or mend "units" and "left"'
    )


def refuse_compressed(model: nn.Module) -> None:
    """Refuse a model that is compressed already.

    Raises:
        MPOError: it is.
    """
    if any(isinstance(module, MPOLayer) for module in model.modules()):
        raise MPOError("the model holds MPO modules already: compress the dense model with one configuration")


def _within(unit: DenseUnit, spec: ModuleSpec, tolerance: float) -> ModuleSpec:
    """The widest bonds that a sweep can leave within a tolerance.

    Every bond may spend at least an equal share of the squared budget, and what the bonds before it cut only lowers the
    singular values that are left (they are those of a projection), so that no bond keeps more values than the original
    spectrum needs for an equal share.
    """
    known = unfolding_spectra(unit.padded(spec.sites), spec.sites)
    share = tolerance * known.norm / math.sqrt(max(len(known), 1)) * (1 - 1e-9)
    bonds: list[int] = []
    for k, full in enumerate(spec.bonds):
        enough = next((bond for bond in range(1, full) if known.tail(k, bond) <= share), full)
        bonds.append(enough)
    return replace(spec, bonds=tuple(bonds))
