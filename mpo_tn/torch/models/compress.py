"""compress: replace the matched modules of a model by MPO modules, in place, and say what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded, frobenius_norm, widen
from mpo_tn.mpo import MPO
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.cost import rebuild_route
from mpo_tn.planning.entries import ACTIVATION, UnitPlan
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.progress import Progress, silent
from mpo_tn.sites import Sites
from mpo_tn.torch.layers.cores import Core
from mpo_tn.torch.layers.embedding import MPOEmbedding
from mpo_tn.torch.layers.layer import MPOLayer, MPOLinear
from mpo_tn.torch.layers.merging import dense_matrix
from mpo_tn.torch.layers.parameter import MPOParameter
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.layers.rows import table_rows
from mpo_tn.torch.models.calibration import Calibration
from mpo_tn.torch.models.carry_out import fit_units
from mpo_tn.torch.models.coverage import coverage, matrix_numbers
from mpo_tn.torch.models.decide import plan, samples_of, units_of_plan
from mpo_tn.torch.models.fitting import Fitted
from mpo_tn.torch.models.host import current_host
from mpo_tn.torch.models.places import put, there
from mpo_tn.torch.models.refine import check_refinable, refine_blocks
from mpo_tn.torch.models.report import CompressionReport, LayerReport, RefinedBlock
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import DenseUnit
from mpo_tn.torch.models.trial import Trial
from mpo_tn.torch.models.units import count_parameters
from mpo_tn.truncate.basis import Method
from mpo_tn.truncate.quantize import Integers
from mpo_tn.truncate.spectra import float_floor
from mpo_tn.truncation import Report, Truncation

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

_ROWS = 256
"""Of a matrix that are compared at once with what became of it."""


def compress(
    model: nn.Module,
    config: MPOConfig | Plan,
    *,
    calibration: Iterable[Any] | Calibration | Samples | None = None,
    anchored: bool | None = None,
    refine: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replace linear layers and embeddings of ``model`` by their MPOs, in place, as a configuration or a plan says.

    Args:
        model: any ``torch.nn.Module``. Layers that share a module or a weight are decomposed once and still share.
        config: which modules, which legs, how much to keep; or a :class:`~mpo_tn.torch.Plan`, edited or not. With a
            configuration it is ``compress(model, plan(model, config))``.
        calibration: as for :func:`plan`; of a plan that was made with one and not loaded from a file it is known.
        anchored: whether what is fitted to text is also fitted layer after layer, each to what those before it give by
            then; text that was held back says which is kept. By default wherever there is text, and not moments alone.
        refine: whether afterwards block after block trains what is not in integers (float cores, scales, norms, biases)
            to give what the dense block gave, six times over the text; what was held back says when to stop. Needs
            text, and a model with blocks.
        progress: called before each unit and once when all are decomposed, with how many units are done, how many
            there are, and the name of the next (or last) one.

    Returns:
        Per unit the legs, bonds and exact Frobenius error, the kept ratios of the matrices and of the model, and every
        parameter like a matrix that stays dense, with the reason.
        Bias, dtype, device, ``requires_grad``, training mode and hooks of each module are kept.

    Guarantee (compress-all-or-nothing): if anything is wrong or raises, ``progress`` and whoever saves the model
    included, the model is left as it was; modules are only swapped once all are decomposed. A transformers model can be
    saved with ``save_pretrained`` afterwards.
    Guarantee (tolerance-never-larger): a matrix whose cores would take as many bytes as it does, or more, at the
    ``tolerance`` it was given stays dense, and is listed in ``skipped`` with both numbers.

    Raises:
        MPOError: a pattern that matches nothing, a weight with NaN or infinite entries or without data, legs that do
            not fit, a ratio that cannot be reached; the message names the module. A plan of another model. ``refine``
            without text, or of a model without blocks.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    >>> report = compress(model, MPOConfig(sites=3, keep=0.5))
    >>> report.kept <= 0.5, [type(layer).__name__ for layer in model]
    (True, ['MPOLinear', 'ReLU', 'MPOLinear'])
    """
    given = samples_of(calibration)
    text = _text_of(config.calibration if isinstance(config, Plan) and given is None else given)
    if refine:
        check_refinable(model, text)
    if isinstance(config, Plan):
        decided, source = config, config.calibration if given is None else given
    else:
        decided = plan(model, config, calibration=given, progress=progress)
        source = decided.calibration
    units = units_of_plan(model, decided)
    in_metric = [(planned, unit) for planned, unit in units if planned.metric == ACTIVATION]
    if in_metric and source is None:
        raise MPOError(
            f"the plan fits {in_metric[0][1].name} to what its layer is given, and nothing is known of that: give "
            "calibration=batches, the text that the plan was made with"
        )
    fits = {} if source is None else fit_units(model, in_metric, source, progress or silent, anchored=anchored)

    def make(planned: UnitPlan, unit: DenseUnit) -> Made:
        return fitted(planned, unit, fits[unit.name]) if unit.name in fits else (*factorise(planned, unit), None)

    return put_made(model, decided, units, make, refined_on=text if refine else None, progress=progress)


Made = tuple[LayerReport, Sequence[Core], torch.Tensor | None]
"""What a unit became: its report, its cores, and by what its biases move."""


def put_made(
    model: nn.Module, decided: Plan, units: Sequence[tuple[UnitPlan, DenseUnit]],
    make: Callable[[UnitPlan, DenseUnit], Made], *, refined_on: Samples | None = None, progress: Progress | None = None,
) -> CompressionReport:  # fmt: skip
    """Put what ``make`` makes of the units of a plan into their places: what :func:`compress` does, once it decided."""
    before, matrices = count_parameters(model), matrix_numbers(model)
    layers: list[LayerReport] = []
    modules: dict[str, nn.Module] = {}
    larger: dict[str, str] = {}
    for done, (planned, unit) in enumerate(units):
        if progress:
            progress(done, len(units), unit.name)
        try:
            layer, cores, shift = make(planned, unit)
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
        outgrown = outgrows(planned, layer)
        if outgrown is not None:
            larger[unit.name] = outgrown
            continue
        layers.append(layer)
        modules |= _modules(unit, layer.spec, cores, shift)
    if progress and units:
        progress(len(units), len(units), units[-1][1].name)
    with ExitStack() as undo:
        refined: tuple[RefinedBlock, ...] = ()
        if refined_on is not None:
            refined = refine_blocks(model, modules, refined_on, undo, progress or silent)
        if modules:
            _swap(model, modules, decided.config)
        undo.pop_all()
    return report_of(model, decided, layers, larger, before, matrices, refined)


def report_of(
    model: nn.Module, decided: Plan, layers: Sequence[LayerReport], larger: Mapping[str, str], before: int,
    matrices: int, refined: tuple[RefinedBlock, ...] = (),
) -> CompressionReport:  # fmt: skip
    """The report on a model in which MPO modules are in their places.

    Args:
        model: as it is by now.
        decided: what it was compressed by.
        layers: what became of units.
        larger: units that stayed dense because they did not become smaller, with the reason.
        before: numbers that all its parameters held, and
        matrices: those held that are like matrices.
        refined: what blocks were trained to.
    """
    reasons = {**{part.name: part.reason for part in decided.left}, **larger}
    covers = coverage(model, matrices - matrix_numbers(model), reasons)
    skipped = {**decided.skipped, **larger}
    return CompressionReport(tuple(layers), skipped, before, count_parameters(model), refined, covers)


def _text_of(source: Trial | Samples | Calibration | None) -> Samples | None:
    """Text, if there is any and not moments alone."""
    return source if isinstance(source, Samples) else source.samples if isinstance(source, Trial) else None


def compress_empty(model: nn.Module, config: MPOConfig | Plan) -> dict[str, ModuleSpec]:
    """Do to the structure of ``model`` what :func:`compress` does, with cores that hold no data.

    To count and to look around: a model that was itself built under ``torch.device("meta")`` needs no memory at all.

    Args:
        model: any ``torch.nn.Module``, on any device; its modules are replaced in place, by cores on the meta device.
        config: as for :func:`compress`, but without a tolerance.

    Returns:
        The specifications by name of the unit.

    Guarantee (empty-same-structure): modules, legs, bonds and ties are those that :func:`compress` gives.

    Raises:
        MPOError: as :func:`compress`, and for a tolerance: the bonds that meet it depend on the numbers.

    >>> import torch
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 16384))
    >>> compress_empty(model, MPOConfig(keep=0.5))["0"].kept
    0.49447107315063477
    """
    decided = config if isinstance(config, Plan) else plan(model, config)
    specs: dict[str, ModuleSpec] = {}
    modules: dict[str, nn.Module] = {}
    for planned, unit in units_of_plan(model, decided):
        if planned.tolerance is not None:
            raise MPOError(
                f"{unit.name}: the bonds that meet tolerance={planned.tolerance} depend on the numbers: use keep or "
                "bond"
            )
        specs[unit.name] = specs_of(unit, planned.spec)[0]
        modules |= empty_modules(unit, planned.spec)
    put(model, modules)
    return specs


def empty_modules(unit: DenseUnit, spec: ModuleSpec) -> dict[str, nn.Module]:
    """The MPO modules that replace those of a unit, with cores on the meta device."""
    cores = list(build(specs_of(unit, spec)[0], device="meta", dtype=unit.weight.dtype).cores)
    for core in cores:
        if isinstance(core, nn.Parameter):
            core.requires_grad_(unit.weight.requires_grad)
    return _modules(unit, spec, cores)


def _swap(model: nn.Module, modules: Mapping[str, nn.Module], config: MPOConfig) -> None:
    """Put modules in the places of others and tell the host library; all of it or nothing."""
    dense = there(model, modules)
    try:
        put(model, modules)
        current_host().attach(model, config)
    except BaseException:  # an interrupt, too
        put(model, dense)
        raise


def factorise(planned: UnitPlan, unit: DenseUnit) -> tuple[LayerReport, list[Core]]:
    """What a unit becomes in the Frobenius norm, as modules hold it."""
    check_loaded(unit.weight, "its weight")
    sites, bonds = planned.spec.sites, planned.spec.bonds
    matrix = unit.padded(sites)
    truncation = Truncation(max_bond=bonds, rel_error=planned.tolerance)
    mpo, report = MPO.from_matrix(matrix, sites, truncation, method=_method(sites, truncation, matrix.dtype))
    size = planned.spec.out_features, planned.spec.in_features
    cores: list[Core] = [
        nn.Parameter(core.contiguous(), requires_grad=unit.weight.requires_grad)
        if bits is None
        else QuantizedCore.rounded(core, bits, planned.spec.group)
        for core, bits in zip(mpo.cores, planned.spec.core_bits, strict=True)
    ]
    error, exact = missed_norm(matrix, cores, size) if planned.spec.bits else _cropped_error(mpo, report, *size)
    rel_error = error / report.norm if report.norm > 0 else 0.0
    spec = replace(planned.spec, bonds=mpo.bonds, rel_error=rel_error, exact=exact)
    return LayerReport(unit.all_names, specs_of(unit, spec)[0], error, report.norm, report, unit.storage), cores


def outgrows(planned: UnitPlan, layer: LayerReport) -> str | None:
    """Why a unit stays dense: at the tolerance that it was given its cores would not be smaller. None if they are."""
    dense = planned.dense_parameters * planned.itemsize
    if planned.tolerance is None or layer.bytes < dense:
        return None
    return f"at tolerance={planned.tolerance:g} its cores would take {layer.bytes:,} bytes, and it takes {dense:,}"


def fitted(planned: UnitPlan, unit: DenseUnit, found: Fitted) -> tuple[LayerReport, list[Core], torch.Tensor | None]:
    """What a fit in the metric of the layer gave, as modules hold it."""
    cores: list[Core] = []
    for core, shape, bits in zip(found.cores, found.spec.core_shapes, found.spec.core_bits, strict=True):
        if isinstance(core, Integers):
            cores.append(QuantizedCore.from_integers(core, shape, dtype=unit.weight.dtype))
        elif bits is not None:
            cores.append(QuantizedCore.rounded(core, bits, found.spec.group))
        else:
            cores.append(nn.Parameter(core, requires_grad=unit.weight.requires_grad))
    floor = float_floor(unit.storage, len(found.spec.sites), found.norm)
    report = Report(found.error, found.norm, (), None, None, floor)
    layer = LayerReport(
        unit.all_names, specs_of(unit, found.spec)[0], found.error, found.norm, report, unit.storage, found.metric,
        found.weighted,
    )  # fmt: skip
    return layer, cores, found.shift


def missed_norm(matrix: torch.Tensor, cores: Sequence[Core], size: tuple[int, int]) -> tuple[float, bool]:
    """The norm of what the cores, as they are held, miss of the matrix; in double precision, padding cropped."""
    wide = [core.dequantize(torch.float64) if isinstance(core, QuantizedCore) else widen(core) for core in cores]
    shapes = tuple(tuple(core.shape) for core in wide)
    with torch.no_grad():
        difference = dense_matrix(wide, rebuild_route(shapes, *size).segments[0], size)
        if len(wide) == 1 and isinstance(cores[0], torch.Tensor):
            difference = difference.clone()  # or it is the core itself
        del wide
        for start in range(0, size[0], _ROWS):  # what is subtracted is widened
            part = slice(start, start + _ROWS)
            difference[part] = difference[part] - matrix[: size[0], : size[1]][part]
    return frobenius_norm(difference), True


def specs_of(unit: DenseUnit, spec: ModuleSpec) -> list[ModuleSpec]:
    """The specification of every module of the unit, given what they share."""
    return [
        replace(
            spec,
            kind=kind,
            bias=kind != PARAMETER and getattr(module, "bias", None) is not None,
            padding_idx=None if kind == PARAMETER else getattr(module, "padding_idx", None),
            shape=tuple(unit.weight.shape) if kind == PARAMETER else (),
            tied_to=None if position == 0 else unit.name,
        )
        for position, (module, kind) in enumerate(zip(unit.modules, unit.kinds, strict=True))
    ]


def _modules(
    unit: DenseUnit, spec: ModuleSpec, cores: Sequence[Core], shift: torch.Tensor | None = None
) -> dict[str, nn.Module]:
    """The MPO modules that replace those of the unit, under all their names; their biases moved by ``shift``."""
    named: dict[str, nn.Module] = {}
    moved: dict[nn.Parameter, nn.Parameter] = {}  # modules may share a bias, too
    for own, module, names in zip(specs_of(unit, spec), unit.modules, unit.names, strict=True):
        if own.kind == PARAMETER:
            named |= dict.fromkeys(names, build(own, cores))
            continue
        bias = getattr(module, "bias", None)
        if bias is not None and shift is not None:
            there = nn.Parameter((bias.detach() + shift).to(bias.dtype), requires_grad=bias.requires_grad)
            bias = moved.setdefault(bias, there)
        built = build(own, cores, bias=bias)
        for table in HOOKS:  # the tables themselves, so that handles their owners hold still remove from them
            built.__dict__[table] = module.__dict__[table]
        built.train(module.training)
        named |= dict.fromkeys(names, built)
    return named


def _method(sites: Sites, truncation: Truncation, dtype: torch.dtype) -> Method:
    """Singular vectors in any case: where nothing is cut ``auto`` would make auxiliary tensors identities.

    Those carry nothing of the weights, and slicing them cuts anything.
    """
    beside_center = slice(max(sites.center - 1, 0), sites.center + 1)
    caps, full = truncation.caps(len(sites) - 1)[beside_center], sites.full_bonds[beside_center]
    if truncation.has_tolerance or all(cap is not None and cap < most for cap, most in zip(caps, full, strict=True)):
        return "auto"
    return "svd" if dtype == torch.float64 else "gram"


def build(
    spec: ModuleSpec,
    cores: Sequence[Core] | None = None,
    *,
    bias: nn.Parameter | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MPOLayer:
    """The module that ``spec`` describes, on the given cores or on empty ones; where it has bits, on quantised ones."""
    if spec.kind == "embedding":
        return MPOEmbedding(spec, cores, device=device, dtype=dtype)
    if spec.kind == PARAMETER:
        return MPOParameter(spec, cores, device=device, dtype=dtype)
    return MPOLinear(spec, cores, bias, device=device, dtype=dtype)


def _cropped_error(mpo: MPO, report: Report, out: int, in_: int) -> tuple[float, bool]:
    """The error on the rows and columns that are used: what falls on the padding, where W is zero, does not count.

    ::

        | W - W'   - W'_right |      |W - W'|**2 = error**2 - |W'_right|**2 - |W'_below|**2
        | - W'_below          |
    """
    rows, columns = mpo.shape
    if (rows, columns) == (out, in_) or report.error == 0:
        return report.error, report.exact
    wide = [widen(core) for core in mpo.cores]
    slabs = [0.0]
    if rows > out:
        slabs.append(frobenius_norm(table_rows(wide, torch.arange(out, rows, device=wide[0].device))))
    if columns > in_:
        # The columns of the matrix are the rows of its transpose, whose cores have their legs swapped.
        swapped = [core.transpose(1, 2) for core in wide]
        below = table_rows(swapped, torch.arange(in_, columns, device=wide[0].device))[:, :out]
        slabs.append(frobenius_norm(below))
    outside = math.hypot(*slabs)
    # Below the floor the difference of squares is rounding, not error.
    if outside > report.error:
        return report.floor, False
    return math.sqrt((report.error - outside) * (report.error + outside)), report.exact
