"""A plan for a budget of bytes: structure and bits of every matrix chosen together, judged by what the model does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.cost import chain_routes
from mpo_tn.planning.entries import ACTIVATION, FROBENIUS, ITEMSIZES, Alternative, LeftDense, UnitPlan
from mpo_tn.planning.options import BITS, LOW_RANK, Option, options
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.search import USUAL, Candidate, Priced, candidates
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.progress import Progress, doing, silent
from mpo_tn.torch.models.anchoring import best_fits, judged
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.calibration import Calibration, Fingerprint
from mpo_tn.torch.models.fitting import Fitted
from mpo_tn.torch.models.samples import Judge, Samples
from mpo_tn.torch.models.survey import DenseUnit, Survey, check_overrides, survey, survey_named
from mpo_tn.torch.models.tradeoffs import Tradeoff, tradeoffs
from mpo_tn.torch.models.trial import Trial

_JUDGE_TOKENS = 400
"""Tokens on which single matrices are tried."""

_COMPARED = 4
"""So many plans are carried out and compared, the joint one among them."""

_CLOSE, _FINALISTS, _NEGLIGIBLE = 1.2, 2, 0.003
"""Of the plans whose D is within a fifth of the least, so many are also fitted layer after layer before one is taken;
not below a D that nobody would notice."""

LEFT_BY_PLAN = "left dense by the plan: within the budget it is worth its bytes"


def plan_for_budget(
    model: nn.Module,
    config: MPOConfig,
    source: Samples | Calibration,
    progress: Progress | None = None,
    *,
    anchored: bool = True,
) -> Plan:
    """Choose structure and bits of every matrix for a budget. See :func:`~mpo_tn.torch.plan`."""
    tell = progress or silent
    found = survey(model, config.target_modules, config.exclude_modules)
    check_overrides(model, config.overrides, found)
    check_weights(found.units)
    choices = [_options(unit, config, config.for_module(*unit.asked_names)) for unit in found.units]
    budget = _budget(found, config)
    _check_budget(found, choices, budget, config)
    samples = source if isinstance(source, Samples) else None
    calibration, measured = _measured(model, found, choices, config, source, tell)
    priced = [_priced(tradeoff, config) for tradeoff in measured]
    dense_flops = sum(2.0 * unit.matrix().numel() for unit in found.units)
    limit = None if config.max_flops is None else config.max_flops * dense_flops
    plans = candidates(priced, budget, max_flops=limit)
    trial = Trial(samples, calibration, {})
    if samples is None:
        best, considered = plans[0], [_alternative(plan, measured) for plan in plans]
    else:
        best, considered = _compare(model, found, measured, plans, trial, tell, finalists=_FINALISTS if anchored else 1)
    return _plan(model, config, found, measured, best, considered, trial)


def _measured(
    model: nn.Module, found: Survey, choices: Sequence[Sequence[Option]], config: MPOConfig,
    source: Samples | Calibration, tell: Progress,
) -> tuple[Calibration, list[Tradeoff]]:  # fmt: skip
    """What is known of the model and its matrices, whatever the budget; samples remember it for the next one."""
    if isinstance(source, Calibration):
        source.check(model)
        return source, tradeoffs(found.units, choices, source, None, config.group, doing("measuring", tell))
    names = [unit.name for unit in found.units]
    key = Fingerprint.of(model), names, [[str(option) for option in own] for own in choices], config.group
    for known, calibration, measured in source.remembered:
        if known == key:
            same = [replace(tradeoff, unit=unit) for tradeoff, unit in zip(measured, found.units, strict=True)]
            return calibration, same
    calibration = calibrate(
        model, source.batches, target_modules=names, gradients=True, progress=doing("calibrating", tell)
    )  # fmt: skip
    judge = Judge(model, source.held_back, _JUDGE_TOKENS)
    measured = tradeoffs(found.units, choices, calibration, judge, config.group, doing("measuring", tell))
    source.remembered.append((key, calibration, measured))
    return calibration, measured


def check_weights(units: Sequence[DenseUnit]) -> None:
    """Refuse weights without data, or with entries that are no numbers.

    Raises:
        MPOError: there is one; it names the unit.
    """
    for unit in units:
        check_loaded(unit.weight, f"the weight of {unit.name}")
        if not bool(torch.isfinite(unit.weight).all()):
            raise MPOError(f"{unit.name}: its weight has entries that are NaN or infinite: mend the model first")


def _budget(found: Survey, config: MPOConfig) -> int:
    """Bytes for the cores of all units, or numbers where ``keep`` is asked for."""
    weights = sum(unit.matrix().numel() for unit in found.units)
    if config.keep is not None:
        return int(config.keep * weights)
    if config.bits_per_weight is not None:
        return int(config.bits_per_weight * weights / 8)
    if config.size is None:
        return _dense_bytes(found)
    assert isinstance(config.size, int)
    return config.size - _beside(found)


def _dense_bytes(found: Survey) -> int:
    return sum(unit.matrix().numel() * ITEMSIZES[unit.storage] for unit in found.units)


def _beside(found: Survey) -> int:
    """Bytes of everything but the units."""
    return sum(part.bytes for part in found.left) + sum(room for _, room in found.beside.values())


def _options(unit: DenseUnit, config: MPOConfig, own: MPOConfig) -> list[Option]:
    out, in_ = (int(size) for size in unit.matrix().shape)
    itemsize = ITEMSIZES[unit.storage]
    by_bytes = config.size is not None or config.bits_per_weight is not None
    found = options(
        unit.kinds[0], out, in_, itemsize=itemsize, group=own.group, families=config.families, rounded=by_bytes
    )
    low, high = own.min_bits_per_weight or 0.0, own.max_bits_per_weight or float("inf")
    within = [o for o in found if low <= 8 * o.bytes(out * in_ * itemsize, itemsize) / (out * in_) <= high]
    if not within:
        raise MPOError(
            f"{unit.name}: nothing that a matrix {out} x {in_} can become has from {low} to {high} bits per weight: "
            "widen the bounds"
        )
    return within


def _bytes(unit: DenseUnit, option: Option) -> int:
    itemsize = ITEMSIZES[unit.storage]
    return option.bytes(unit.matrix().numel() * itemsize, itemsize)


def _size(unit: DenseUnit, option: Option, config: MPOConfig) -> int:
    """What an option takes of the budget."""
    return _bytes(unit, option) if config.keep is None else option.numbers(unit.matrix().numel())


def _check_budget(found: Survey, choices: Sequence[Sequence[Option]], budget: int, config: MPOConfig) -> None:
    """Refuse a budget that is met by nothing, or by everything."""
    weights = sum(unit.matrix().numel() for unit in found.units)
    least = sum(min(_size(unit, o, config) for o in own) for unit, own in zip(found.units, choices, strict=True))
    dense, beside = _dense_bytes(found), _beside(found)
    matrices = f"for {len(found.units)} matrices"
    if config.keep is not None:
        if budget < least:
            raise MPOError(
                f"keep={config.keep} leaves {budget} numbers {matrices}, and the least they can take is {least}: give "
                f"at least keep={math.ceil(1e4 * least / weights) / 1e4:.4g}"
            )
        if budget >= weights and config.max_flops is None:
            raise MPOError(f"keep={config.keep} leaves all numbers {matrices}: nothing has to be compressed; give less")
        return
    if config.size is None and config.bits_per_weight is None:
        assert config.max_flops is not None
        if config.max_flops >= 1:
            raise MPOError(f"max_flops={config.max_flops} is what they take as they are: give less than 1")
        return
    asked = f"size={config.size}" if config.size is not None else f"bits_per_weight={config.bits_per_weight}"
    if budget < least:
        raise MPOError(
            f"{asked} leaves {max(budget, 0)} bytes {matrices}, and the least they can take is {least}"
            + (
                f", beside {beside} bytes of everything else: give at least size={least + beside}, or name more of the "
                "model (word tables have to be named)"
                if config.size is not None
                else f": give at least bits_per_weight={8 * least / weights:.4g}"
            )
        )
    if budget >= dense and config.max_flops is None:
        raise MPOError(
            f"{asked} leaves {budget} bytes {matrices}, which take {dense} as they are"
            + (f", {dense + beside} with everything else" if config.size is not None else "")
            + ": nothing has to be compressed; give less"
        )


def _priced(tradeoff: Tradeoff, config: MPOConfig) -> list[Priced]:
    unit = tradeoff.unit
    weights = unit.matrix().numel()
    return [
        Priced(option, _size(unit, option, config), _flops(option, weights), tradeoff.cost(option))
        for option in tradeoff.options
    ]


def _flops(option: Option, weights: int) -> float:
    """Of a token; a matrix that is rebuilt for many of them takes what it did."""
    if option.spec is None or not option.spec.bonds:
        return 2.0 * weights
    if not option.is_fitted:
        return 2.0 * min(weights, option.spec.num_parameters)
    cheapest = min(route.forward.flops_per_token for route in chain_routes(option.spec.core_shapes))
    return float(min(2 * weights, cheapest))


def _alternative(plan: Candidate, measured: Sequence[Tradeoff], distance: float | None = None) -> Alternative:
    known = distance is not None and math.isfinite(distance)
    held = sum(_bytes(each.unit, each.options[k]) for each, k in zip(measured, plan.chosen, strict=True))
    return Alternative(plan.name, held, distance if known else None, plan.expected)


def _compare(
    model: nn.Module, found: Survey, measured: Sequence[Tradeoff], plans: Sequence[Candidate], trial: Trial,
    tell: Progress, *, finalists: int,
) -> tuple[Candidate, list[Alternative]]:  # fmt: skip
    """Carry out the plans that may be best, and let held-back text choose."""
    assert trial.samples is not None
    judge = Judge(model, trial.samples.held_back)
    promising = sorted(plans[1:], key=lambda plan: plan.expected)[: _COMPARED - 1]
    # The best uniform plan of each family is a baseline, and so is what there is without chains, whatever is expected.
    for family in (BITS, LOW_RANK, USUAL):
        own = [plan for plan in plans if plan.baseline == family]
        best = min(own, key=lambda plan: (plan.expected, -plan.size), default=None)
        if best is not None and best not in promising and best is not plans[0]:
            promising.append(best)
    tried = [plans[0], *promising]
    for place, (unit, tradeoff) in enumerate(zip(found.units, measured, strict=True)):
        tell(place, len(measured), f"fitting {len(tried)} plans: {unit.name}")
        options = [tradeoff.options[plan.chosen[place]] for plan in tried]
        trial.fit_all(unit, [option.spec for option in options if option.spec is not None])
    results: list[tuple[float, Candidate]] = []
    for done, plan in enumerate(tried):
        tell(done, len(tried), f"trying {plan.name}")
        results.append((_tried(found, measured, plan, trial, judge), plan))
    tell(len(tried), len(tried), "trying")
    results.sort(key=lambda result: result[0])
    least = results[0][0]
    if not math.isfinite(least):
        raise MPOError(f"none of {len(results)} plans gives a model whose output is finite: give a larger budget")
    # Of plans that are close the better one need not be the better one once layers see what was done before them.
    close = [result for result in results if least > _NEGLIGIBLE and result[0] <= _CLOSE * least][:finalists]
    if len(close) > 1:
        finals: list[tuple[float, Candidate, dict[str, Fitted]]] = []
        for done, (_, plan) in enumerate(close):
            told = doing(f"finishing {done + 1} of {len(close)} plans", tell)
            wanted = _wanted(found, measured, plan)
            fits, distance = best_fits(model, wanted, trial, judge, told)
            finals.append((distance, plan, fits))
        finals.sort(key=lambda result: result[0])
        wanted = _wanted(found, measured, finals[0][1])
        trial.finished = {name: spec for name, (_, spec) in wanted.items()}, finals[0][2]
        results = [*((distance, plan) for distance, plan, _ in finals), *results[len(close) :]]
    rest = [plan for plan in plans if plan not in tried]
    told = [_alternative(plan, measured, d) for d, plan in results]
    return results[0][1], [*told, *(_alternative(plan, measured) for plan in rest)]


def _wanted(found: Survey, measured: Sequence[Tradeoff], plan: Candidate) -> dict[str, tuple[DenseUnit, ModuleSpec]]:
    """The units that a plan changes, and what into."""
    chosen = zip(found.units, measured, plan.chosen, strict=True)
    return {unit.name: (unit, spec) for unit, each, k in chosen if (spec := each.options[k].spec) is not None}


def _tried(found: Survey, measured: Sequence[Tradeoff], plan: Candidate, trial: Trial, judge: Judge) -> float:
    wanted = _wanted(found, measured, plan)
    return judged(wanted, {name: trial.fit(unit, spec) for name, (unit, spec) in wanted.items()}, judge)


def _plan(
    model: nn.Module, config: MPOConfig, found: Survey, measured: Sequence[Tradeoff], best: Candidate,
    considered: Sequence[Alternative], trial: Trial,
) -> Plan:  # fmt: skip
    units: list[UnitPlan] = []
    stays: set[str] = set()
    kept: dict[tuple[str, ModuleSpec], Fitted] = {}
    for unit, tradeoff, k in zip(found.units, measured, best.chosen, strict=True):
        option = tradeoff.options[k]
        if option.spec is None:
            stays.update(unit.all_names)
            continue
        beside = found.beside[unit.name]
        # Nothing reached it: it has no metric.
        metric = FROBENIUS if trial.calibration.of(unit.name) is None else ACTIVATION
        units.append(UnitPlan(unit.all_names, option.spec, unit.storage, None, *beside, metric))
        key = unit.name, option.spec
        if key in trial.fits:
            kept[key] = trial.fits[key]
    reasons = {part.name: part for part in found.left}
    left: list[LeftDense] = []
    for part in survey_named(model, {name for unit in units for name in unit.names}).left:
        if part.name in stays:
            left.append(replace(part, reason=LEFT_BY_PLAN, matched=False))
        else:
            said = reasons.get(part.name, part)
            left.append(replace(part, reason=said.reason, matched=said.matched))
    trial.fits = kept
    if trial.finished is not None:
        reached = {unit.name: unit.spec for unit in units if unit.metric == ACTIVATION}
        trial.finished = reached, {name: trial.finished[1][name] for name in reached}
    return Plan(type(model).__name__, config, tuple(units), tuple(left), tuple(considered), trial)
