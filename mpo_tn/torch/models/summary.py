"""What the matrices of a model are, or would be, and how flat their spectra are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import tails
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.cost import Prediction, predictions
from mpo_tn.planning.coverage import Coverage, DenseMatrix
from mpo_tn.planning.spec import PARAMETER
from mpo_tn.planning.structure import structure
from mpo_tn.progress import Progress
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.models.coverage import coverage
from mpo_tn.torch.models.eligible import cannot_be_mpo
from mpo_tn.torch.models.listening import find_readers
from mpo_tn.torch.models.survey import NOT_NAMED, DenseUnit, find_units, survey, survey_named
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.truncate.spectra import entropy, unfolding_spectra


@dataclass(frozen=True)
class MatrixSummary:
    """One matrix of a model: what it is, or what it would be at full bonds, and how flat its spectrum is.

    ``flatness`` is the entropy of the widest bond over its greatest possible value: 1 is flat and does not compress.
    ``needed`` of ``available`` singular values of that bond leave a relative error of at most a tenth there.
    ``auto`` says how a compressed linear layer in mode ``"auto"`` computes at 1, 128 and 2048 tokens, and its flops
    over those of the dense layer. ``bits`` says how each core is held where any is in bits, see
    :class:`~mpo_tn.torch.ModuleSpec`; ``bytes`` are those of the cores, None for a dense model.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    bonds: tuple[int, ...]
    compressed: bool
    kept: float
    rel_error: float | None
    flatness: float
    needed: int
    available: int
    auto: tuple[Prediction, ...] = ()
    bits: tuple[int | None, ...] = ()
    bytes: int | None = None
    bits_per_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def inspect_model(
    model: nn.Module,
    *,
    target: str | Sequence[str] = r".*",
    exclude: str | Sequence[str] = (),
    sites: int | str = 5,
    progress: Progress | None = None,
) -> list[MatrixSummary]:
    """Summarise every compressed matrix of a model, or, in a dense model, every matrix that could be compressed.

    Args:
        model: a model with MPO modules, or without.
        target: patterns of the modules to list, in the grammar of :class:`~mpo_tn.torch.MPOConfig`.
        exclude: and of those to leave out.
        sites: the legs to look at in a dense model.
        progress: called before each matrix and once at the end.

    Raises:
        MPOError: a pattern that matches nothing, or no matrix.
    """
    compressed = mpo_units(model, required=False)
    work: list[tuple[str, Callable[[], MatrixSummary]]]
    if compressed:
        asked = find_readers(model, target, exclude)
        units = [unit for name, unit in compressed.items() if name in asked]
        if not units:
            raise MPOError(
                f"target={target!r} matches no compressed matrix: there is for instance {next(iter(compressed))}"
            )
        work = [(unit.name, lambda u=unit: _summarise_mpo(u.name, u.modules[0])) for unit in units]
    else:
        units, _ = find_units(model, target, exclude)
        work = [(unit.name, lambda u=unit: _summarise_dense(u, sites)) for unit in units]
    rows: list[MatrixSummary] = []
    for done, (name, summarise) in enumerate(work):
        if progress:
            progress(done, len(work), name)
        rows.append(summarise())
    if progress:
        progress(len(work), len(work), "")
    return rows


def model_coverage(
    model: nn.Module, target: str | Sequence[str] = r".*", exclude: str | Sequence[str] = ()
) -> Coverage:
    """What of a model's matrices is in cores or, in a dense model, would be with these targets; every other with why.

    Raises:
        MPOError: as :func:`inspect_model`.
    """
    compressed = mpo_units(model, required=False)
    if compressed:
        covered = sum(unit.spec.out_features * unit.spec.in_features for unit in compressed.values())
        why = {part.name: part.reason for part in survey_named(model, ()).left}
        return coverage(model, covered, {name: _why_dense(model.get_submodule(name), why[name]) for name in why})
    found = survey(model, target, exclude)
    dense = [
        DenseMatrix(f"{part.name}.{own}".lstrip("."), shape, part.reason)
        for part in found.left
        for own, shape in part.matrices or ()
    ]
    return Coverage(sum(unit.matrix().numel() for unit in found.units), tuple(dense))


def _why_dense(module: nn.Module, reason: str) -> str:
    """Of a module of a compressed model that is dense."""
    return cannot_be_mpo(module) or (_KEPT if reason == NOT_NAMED else reason)


_KEPT = "not compressed"


def _summarise_mpo(name: str, module: MPOLayer) -> MatrixSummary:
    spec = module.spec
    itemsize = module.cores.forward(packed=True)[0].dtype.itemsize
    return MatrixSummary(
        name, spec.kind, (spec.out_features, spec.in_features), spec.sites.out, spec.sites.in_, spec.bonds, True,
        spec.kept, spec.rel_error, *_spectrum_summary(module.mpo().spectra()),
        () if spec.kind in ("embedding", PARAMETER)
        else predictions(spec.core_shapes, spec.out_features, spec.in_features),
        spec.bits, spec.bytes(itemsize), spec.bits_per_weight(itemsize),
    )  # fmt: skip


def _summarise_dense(unit: DenseUnit, sites: int | str) -> MatrixSummary:
    out, in_ = (int(size) for size in unit.matrix().shape)
    spec = structure(unit.kinds[0], out, in_, MPOConfig(sites=sites), unit.blocks)
    try:
        spectra = unfolding_spectra(unit.padded(spec.sites), spec.sites)
    except MPOError as error:
        raise MPOError(f"{unit.name}: {error}") from error
    return MatrixSummary(
        unit.name, spec.kind, (out, in_), spec.sites.out, spec.sites.in_, spec.bonds, False, spec.kept, None,
        *_spectrum_summary(spectra),
    )  # fmt: skip


def _spectrum_summary(spectra: Sequence[np.ndarray]) -> tuple[float, int, int]:
    if not spectra:
        return 0.0, 1, 1
    widest = max(spectra, key=len)
    tail = tails(widest)
    needed = max(1, int((tail > 0.1 * tail[0]).sum()))
    greatest = math.log(len(widest))
    return (entropy(widest) / greatest if greatest > 0 else 0.0), needed, len(widest)
