"""compress: replace the matched modules of a model by MPO modules, in place, and say what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import frobenius_norm, widen
from mpo_tn.mpo import MPO
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.legs import legs_for
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.torch.layers.embedding import MPOEmbedding, table_rows
from mpo_tn.torch.layers.layer import MPOLayer, MPOLinear
from mpo_tn.torch.models.host import after_compress
from mpo_tn.torch.models.report import CompressionReport, LayerReport
from mpo_tn.torch.models.units import DenseUnit, count_parameters, find_units
from mpo_tn.truncate.basis import Method
from mpo_tn.truncation import Report, Truncation

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

Progress = Callable[[int, int, str], None]
"""Called with how many units are done, how many there are, and the name of the next (or last) one."""


def compress(model: nn.Module, config: MPOConfig, *, progress: Progress | None = None) -> CompressionReport:
    """Replace every matched linear layer and embedding of ``model`` by its MPO, in place.

    Args:
        model: any ``torch.nn.Module``. Layers that share a module or a weight are decomposed once and still share.
        config: which modules, which legs, how much to keep.
        progress: called before each unit and once at the end.

    Returns:
        Per unit the legs, bonds and exact Frobenius error, and the kept ratios of the matrices and of the model.
        Bias, dtype, device, ``requires_grad``, training mode and hooks of each module are kept.

    Guarantee (compress-all-or-nothing): if anything is wrong the model is left as it was; modules are only swapped once
    all are decomposed. A transformers model can be saved with ``save_pretrained`` afterwards.

    Raises:
        MPOError: a pattern that matches nothing, a weight with NaN or infinite entries or without data, legs that do
            not fit, a ratio that cannot be reached; the message names the module.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    >>> report = compress(model, MPOConfig(sites=3, keep=0.5))
    >>> report.kept <= 0.5, [type(layer).__name__ for layer in model]
    (True, ['MPOLinear', 'ReLU', 'MPOLinear'])
    """
    units, skipped = _find_units(model, config)
    before = count_parameters(model)
    layers: list[LayerReport] = []
    replacements: list[tuple[str, nn.Module]] = []
    for done, unit in enumerate(units):
        if progress:
            progress(done, len(units), unit.name)
        try:
            layer, cores = _factorise(unit, config.for_module(unit.name))
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
        layers.append(layer)
        replacements += _modules(unit, layer.spec, cores)
    for name, module in replacements:
        model.set_submodule(name, module)
    if progress:
        progress(len(units), len(units), units[-1].name)
    for callback in after_compress:
        callback(model, config)
    return CompressionReport(tuple(layers), skipped, before, count_parameters(model))


def compress_empty(model: nn.Module, config: MPOConfig) -> dict[str, ModuleSpec]:
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
    units, _ = _find_units(model, config)
    specs: dict[str, ModuleSpec] = {}
    replacements: list[tuple[str, nn.Module]] = []
    for unit in units:
        own = config.for_module(unit.name)
        if own.tolerance is not None:
            raise MPOError(
                f"{unit.name}: the bonds that meet tolerance={own.tolerance} depend on the numbers: use keep or bond"
            )
        out, in_ = unit.matrix().shape
        try:
            sites, cap = _legs_and_cap(unit, own)
            bonds = sites.full_bonds if cap is None else sites.capped_bonds(cap)
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
        spec = ModuleSpec(unit.kinds[0], sites, bonds, int(out), int(in_))
        cores = [
            nn.Parameter(
                torch.empty(shape, dtype=unit.weight.dtype, device="meta"), requires_grad=unit.weight.requires_grad
            )
            for shape in spec.core_shapes
        ]
        specs[unit.name] = _specs(unit, spec)[0]
        replacements += _modules(unit, spec, cores)
    for name, module in replacements:
        model.set_submodule(name, module)
    return specs


def _find_units(model: nn.Module, config: MPOConfig) -> tuple[list[DenseUnit], dict[str, str]]:
    if any(isinstance(module, MPOLayer) for module in model.modules()):
        raise MPOError("the model holds MPO modules already: compress the dense model with one configuration")
    return find_units(model, config.target_modules, config.exclude_modules)


def _legs_and_cap(unit: DenseUnit, config: MPOConfig) -> tuple[Sites, int | None]:
    """The legs, and the largest bond allowed."""
    out, in_ = (int(size) for size in unit.matrix().shape)
    sites = legs_for(out, in_, config.sites)
    return sites, config.bond if config.keep is None else sites.largest_cap(config.keep * out * in_)


def _factorise(unit: DenseUnit, config: MPOConfig) -> tuple[LayerReport, list[nn.Parameter]]:
    matrix = unit.matrix()
    if matrix.device.type == "meta":
        raise MPOError("its weight is on the meta device and has no data: load the weights first")
    sites, cap = _legs_and_cap(unit, config)
    (out, in_), (rows, columns) = (int(size) for size in matrix.shape), sites.shape
    padded = functional.pad(matrix, (0, columns - in_, 0, rows - out))
    truncation = Truncation(max_bond=cap, rel_error=config.tolerance)
    mpo, report = MPO.from_matrix(padded, sites, truncation, method=_method(sites, truncation, padded.dtype))
    error, exact = _cropped_error(mpo, report, out, in_)
    rel_error = error / report.norm if report.norm > 0 else 0.0
    cores = [nn.Parameter(core.contiguous(), requires_grad=unit.weight.requires_grad) for core in mpo.cores]
    spec = ModuleSpec(unit.kinds[0], sites, mpo.bonds, out, in_, rel_error=rel_error, exact=exact)
    names = tuple(name for group in unit.names for name in group)
    return LayerReport(names, _specs(unit, spec)[0], error, report.norm, report), cores


def _specs(unit: DenseUnit, spec: ModuleSpec) -> list[ModuleSpec]:
    """The specification of every module of the unit, given what they share."""
    return [
        replace(
            spec,
            kind=kind,
            bias=getattr(module, "bias", None) is not None,
            padding_idx=getattr(module, "padding_idx", None),
            tied_to=None if position == 0 else unit.name,
        )
        for position, (module, kind) in enumerate(zip(unit.modules, unit.kinds, strict=True))
    ]


def _modules(unit: DenseUnit, spec: ModuleSpec, cores: Sequence[nn.Parameter]) -> list[tuple[str, nn.Module]]:
    """The MPO modules that replace those of the unit, under all their names."""
    named: list[tuple[str, nn.Module]] = []
    for own, module, names in zip(_specs(unit, spec), unit.modules, unit.names, strict=True):
        built = build(own, cores, bias=getattr(module, "bias", None))
        for table in _HOOKS:  # the tables themselves, so that handles their owners hold still remove from them
            built.__dict__[table] = module.__dict__[table]
        built.train(module.training)
        named += [(name, built) for name in names]
    return named


def _method(sites: Sites, truncation: Truncation, dtype: torch.dtype) -> Method:
    """Singular vectors in any case: where nothing is cut ``auto`` would make auxiliary tensors identities.

    Those carry nothing of the weights, and slicing them cuts anything.
    """
    beside_center = sites.full_bonds[max(sites.center - 1, 0) : sites.center + 1]
    cap = truncation.max_bond
    if truncation.has_tolerance or (isinstance(cap, int) and cap < min(beside_center, default=1)):
        return "auto"
    return "svd" if dtype == torch.float64 else "gram"


def build(
    spec: ModuleSpec,
    cores: Sequence[nn.Parameter] | None = None,
    *,
    bias: nn.Parameter | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MPOLayer:
    """The module that ``spec`` describes, on the given cores or on empty ones."""
    if spec.kind == "embedding":
        return MPOEmbedding(spec, cores, device=device, dtype=dtype)
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
