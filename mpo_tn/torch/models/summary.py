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
from mpo_tn.planning.cost import Prediction, predictions
from mpo_tn.planning.legs import legs_for
from mpo_tn.progress import Progress
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.models.units import find_units
from mpo_tn.truncate.spectra import entropy, unfolding_spectra


@dataclass(frozen=True)
class MatrixSummary:
    """One matrix of a model: what it is, or what it would be at full bonds, and how flat its spectrum is.

    ``flatness`` is the entropy of the widest bond over its greatest possible value: 1 is flat and does not compress.
    ``needed`` of ``available`` singular values of that bond leave a relative error of at most a tenth there.
    ``auto`` says how a compressed linear layer in mode ``"auto"`` computes at 1, 128 and 2048 tokens, and its flops
    over those of the dense layer.
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

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def inspect_model(
    model: nn.Module,
    *,
    target: str = r".*",
    sites: int | str = 5,
    progress: Progress | None = None,
) -> list[MatrixSummary]:
    """Summarise every compressed module of a model, or, in a dense model, every matrix that could be compressed.

    Args:
        model: a model with MPO modules, or without.
        target: pattern of the modules to list.
        sites: the legs to look at in a dense model.
        progress: called before each matrix and once at the end.
    """
    compressed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MPOLayer) and module.spec.tied_to is None
    }
    work: list[tuple[str, Callable[[], MatrixSummary]]]
    if compressed:
        work = [(name, lambda n=name, m=module: _summarise_mpo(n, m)) for name, module in compressed.items()]
    else:
        units, _ = find_units(model, target)
        work = [(unit.name, lambda u=unit: _summarise_dense(u.name, u.kinds[0], u.matrix(), sites)) for unit in units]
    rows: list[MatrixSummary] = []
    for done, (name, summarise) in enumerate(work):
        if progress:
            progress(done, len(work), name)
        rows.append(summarise())
    if progress:
        progress(len(work), len(work), "")
    return rows


def _summarise_mpo(name: str, module: MPOLayer) -> MatrixSummary:
    spec = module.spec
    return MatrixSummary(
        name, spec.kind, (spec.out_features, spec.in_features), spec.sites.out, spec.sites.in_, spec.bonds, True,
        spec.kept, spec.rel_error, *_spectrum_summary(module.mpo().spectra()),
        () if spec.kind == "embedding" else predictions(spec.core_shapes, spec.out_features, spec.in_features),
    )  # fmt: skip


def _summarise_dense(name: str, kind: str, matrix: Any, sites: int | str) -> MatrixSummary:
    out, in_ = (int(size) for size in matrix.shape)
    legs = legs_for(out, in_, sites)
    padded = nn.functional.pad(matrix, (0, legs.shape[1] - in_, 0, legs.shape[0] - out))
    try:
        spectra = unfolding_spectra(padded, legs)
    except MPOError as error:
        raise MPOError(f"{name}: {error}") from error
    kept = legs.num_parameters(legs.full_bonds) / (out * in_)
    return MatrixSummary(
        name, kind, (out, in_), legs.out, legs.in_, legs.full_bonds, False, kept, None, *_spectrum_summary(spectra)
    )


def _spectrum_summary(spectra: Sequence[np.ndarray]) -> tuple[float, int, int]:
    if not spectra:
        return 0.0, 1, 1
    widest = max(spectra, key=len)
    tail = tails(widest)
    needed = max(1, int((tail > 0.1 * tail[0]).sum()))
    greatest = math.log(len(widest))
    return (entropy(widest) / greatest if greatest > 0 else 0.0), needed, len(widest)
