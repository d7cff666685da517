"""One matrix fitted in the metric of its layer: what it becomes, and what its bias takes up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.fit.activation import LowRankFits
from mpo_tn.fit.metric import Metric, dense
from mpo_tn.fit.quantized import quantize_chain
from mpo_tn.linalg import frobenius_norm, widen
from mpo_tn.mpo import MPO
from mpo_tn.planning.entries import FROBENIUS
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.truncate.quantize import Integers, quantize
from mpo_tn.truncation import Truncation

RIDGE = 1e-3
"""What is added to the diagonal of S, as a fraction of its mean: what a calibration has not seen still counts a little,
and every rank can be had."""

_CONSTANT = 1e-10
"""Of the mean square of inputs: what varies less is rounding."""

_SWEEPS = 2
"""Of alternating least squares for chains other than low rank: the first two gain most."""


@dataclass(frozen=True)
class Fitted:
    """What a matrix (out, in) became.

    Attributes:
        cores: integers, or tensors in the dtype of the matrix; of the matrix with its padding.
        spec: with the bonds that came out, and the error.
        error: ``|W - W'|``, Frobenius, of what is stored.
        norm: ``|W|``.
        weighted: the same in the metric, relative to the weighted norm of W.
        metric: its name.
        shift: (out,), what is to be added to the bias; None where there is no bias, or nothing is known of means.
    """

    cores: tuple[Integers | torch.Tensor, ...]
    spec: ModuleSpec
    error: float
    norm: float
    weighted: float
    metric: str
    shift: torch.Tensor | None

    def rebuilt(self) -> torch.Tensor:
        """What the cores stand for, (out, in) in double precision."""
        arrays = [_array(core, shape) for core, shape in zip(self.cores, self.spec.core_shapes, strict=True)]
        return dense(arrays)[: self.spec.out_features, : self.spec.in_features]


def metric_of(known: Moments, *, anchor: float = 0.0, centred: bool = True) -> Metric:
    """The metric of a layer.

    Args:
        known: of its inputs.
        anchor: from 0, the goal is W itself on what the layer gets, to 1, it is what the dense layer gave.
        centred: whether a bias takes up the mean of the error, so that only what varies counts.

    Raises:
        MPOError: nothing is known of the inputs but, of a table, how often each id was read.
    """
    if known.second is None:
        raise MPOError("a table has counts of ids and no metric of its inputs")
    second, cross = known.second, known.cross
    # Where no gradient came back, as at queries of single tokens, outputs count alike.
    outer = known.outer if known.outer is not None and bool(known.outer.any()) else None
    mean = known.mean if centred else None
    if mean is not None:
        second = second - torch.outer(mean, mean)
    # Inputs that are the same for every token vary by rounding alone, and tell nothing of directions: no less than
    # that counts, and if they are all zero, every direction counts alike.
    spread, size = float(second.diagonal().mean()), float(known.second.diagonal().mean())
    ridge = max(RIDGE * spread, _CONSTANT * size) or 1.0
    held = second + ridge * torch.eye(len(second), dtype=second.dtype)
    if cross is None or anchor == 0:
        return Metric(held, outer=outer)
    if mean is not None and known.dense_mean is not None:
        cross = cross - torch.outer(known.dense_mean, mean)
    return Metric(held, held + anchor * (cross - second), outer)


class Fitter:
    """Fits of one matrix (out, in) to what its layer is given; what several structures have in common is done once.

    Args:
        matrix: W, floating point.
        known: of the inputs of its layer.
        anchor: see :func:`metric_of`.
        biased: whether there is a bias that takes up the mean of the error.

    Raises:
        MPOError: entries or moments that are not finite, nothing known of the inputs.
    """

    def __init__(self, matrix: torch.Tensor, known: Moments, *, anchor: float = 0.0, biased: bool = False) -> None:
        self.matrix, self.known, self.biased = matrix, known, biased
        self.metric = None if known.second is None else metric_of(known, anchor=anchor, centred=biased)

    @property
    def wide(self) -> torch.Tensor:
        """The matrix in double precision: made when it is asked for, as it is larger than all that is kept."""
        return widen(self.matrix)

    @cached_property
    def low_rank(self) -> LowRankFits:
        """All ranks at once."""
        assert self.metric is not None
        return LowRankFits(self.matrix, self.metric)

    @cached_property
    def _norm(self) -> float:
        return frobenius_norm(self.wide)

    @cached_property
    def _size(self) -> float:
        assert self.metric is not None
        return self.metric.weighed(self.wide)

    def fit(self, spec: ModuleSpec, *, rounds: int = 2) -> Fitted:
        """What a structure comes to. See :func:`fit_matrix`."""
        bits = [None if number == 16 else number for number in spec.core_bits]
        weights: torch.Tensor | None = None
        if self.metric is None:
            name = FROBENIUS if self.known.rows is None else "rows"
            cores, weights = _fit_table(_padded(self.matrix, spec), spec, self.known, bits)
            weights = weights[: len(self.matrix)]
        else:
            cores, name = self._fit_layer(spec, self.metric, bits, rounds), self.metric.name
        cores = tuple(_halved(core) if held == 16 else core for core, held in zip(cores, spec.core_bits, strict=True))
        shapes = _shapes(cores, spec)
        arrays = [_array(core, shape) for core, shape in zip(cores, shapes, strict=True)]
        rebuilt = dense(arrays)[: self.matrix.shape[0], : self.matrix.shape[1]]
        shift = _shift(self.wide, rebuilt, self.known) if self.biased else None
        difference = rebuilt.neg_().add_(self.wide.detach())  # in its place: it is as large as the matrix
        error, norm = frobenius_norm(difference), self._norm
        if self.metric is not None:
            size, missed = self._size, self.metric.weighed(difference)
        else:
            assert weights is not None
            size, missed = frobenius_norm(weights * self.wide), frobenius_norm(weights * difference)
        bonds = tuple(shape[3] for shape in shapes[:-1])
        found = replace(spec, bonds=bonds, rel_error=error / norm if norm > 0 else 0.0, exact=True)
        return Fitted(cores, found, error, norm, missed / size if size > 0 else 0.0, name, shift)

    def _fit_layer(
        self, spec: ModuleSpec, metric: Metric, bits: list[int | None], rounds: int
    ) -> tuple[Integers | torch.Tensor, ...]:
        matrix, pads = _padded(self.matrix, spec), spec.sites.shape != tuple(self.matrix.shape)
        metric = _grown(metric, *spec.sites.shape) if pads else metric
        if len(spec.sites) == 1:
            target = metric.target(matrix if pads else self.wide)
            if bits[0] is None:
                return (target.to(matrix.dtype)[None, :, :, None].contiguous(),)
            return (quantize(target, bits[0], spec.group, metric=metric.second),)
        if spec.sites.is_low_rank and not pads:
            chain = MPO(self.low_rank.cut(spec.bonds[0]).cores)
        else:
            start, _ = MPO.from_matrix(matrix, spec.sites, Truncation(max_bond=spec.bonds))
            chain, _ = start.fit(matrix, sweeps=_SWEEPS, metric=metric)
        if all(number is None for number in bits):
            return tuple(core.contiguous() for core in chain.cores)
        return quantize_chain(chain, matrix, bits, spec.group, metric, rounds=rounds)[0]


def fit_matrix(
    matrix: torch.Tensor,
    spec: ModuleSpec,
    known: Moments,
    *,
    anchor: float = 0.0,
    biased: bool = False,
    rounds: int = 2,
) -> Fitted:
    """Fit what ``spec`` describes to a matrix (out, in), in the metric of its layer.

    Low rank has a closed form; other chains start from singular values and are improved by alternating least squares;
    cores in bits are rounded with error feedback, and the others fitted to what that did. Tables are weighted by how
    often each id was read.

    Args:
        matrix: W, floating point.
        spec: its structure, bits included.
        known: of the inputs of its layer.
        anchor: see :func:`metric_of`.
        biased: whether there is a bias that takes up the mean of the error.
        rounds: how often cores in bits are rounded and the others refitted.

    Raises:
        MPOError: entries or moments that are not finite, nothing known of the inputs.

    Source: GPTQ for integers, Swift-SVD (arXiv 2604.01609) for low rank, AA-SVD (arXiv 2604.02119) for the anchor.
    """
    return Fitter(matrix, known, anchor=anchor, biased=biased).fit(spec, rounds=rounds)


def _padded(matrix: torch.Tensor, spec: ModuleSpec) -> torch.Tensor:
    """With rows and columns of zeros up to what legs multiply to."""
    rows, columns = spec.sites.shape
    return functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def _grown(metric: Metric, rows: int, columns: int) -> Metric:
    """The metric of a matrix with rows and columns of zeros beyond its own: errors there count a little."""

    def grown(moment: torch.Tensor, size: int) -> torch.Tensor:
        ends = torch.full((size - len(moment),), RIDGE * float(metric.second.diagonal().mean()), dtype=moment.dtype)
        return torch.block_diag(moment, torch.diag(ends))

    cross = None if metric.cross is None else grown(metric.cross, columns)
    outer = None if metric.outer is None else functional.pad(metric.outer, (0, rows - len(metric.outer)) * 2)
    return Metric(grown(metric.second, columns), cross, outer)


def _shift(wide: torch.Tensor, rebuilt: torch.Tensor, known: Moments) -> torch.Tensor | None:
    if known.mean is None:
        return None
    there = known.mean if known.dense_mean is None else known.dense_mean
    return wide @ there.to(wide.device) - rebuilt @ known.mean.to(wide.device)


def _fit_table(
    matrix: torch.Tensor, spec: ModuleSpec, known: Moments, bits: list[int | None]
) -> tuple[tuple[Integers | torch.Tensor, ...], torch.Tensor]:
    """A table (ids, width): rows weigh what their ids are read, those that were not read a little."""
    wide = widen(matrix)
    weights = row_weights(known, len(matrix)).to(wide.device)
    if len(spec.sites) == 1:
        core = wide[None, :, :, None]
        cores: tuple[torch.Tensor, ...] = (core,)
    elif spec.sites.is_low_rank:
        weighted = weights * wide
        _, vectors = torch.linalg.eigh(weighted.T @ weighted)
        right = vectors[:, -spec.bonds[0] :].T
        left = wide @ right.T
        cores = (left[None, :, None, :], right[:, None, :, None])
    else:
        start, _ = MPO.from_matrix(matrix, spec.sites, Truncation(max_bond=spec.bonds))
        cores = tuple(widen(core) for core in start.cores)
    held: list[Integers | torch.Tensor] = []
    for core, number in zip(cores, bits, strict=True):
        left, out, in_, right = core.shape
        if number is None:
            held.append(core.to(matrix.dtype).contiguous())
        else:
            held.append(quantize(core.reshape(left * out, in_ * right), number, spec.group))
    return tuple(held), weights


def row_weights(known: Moments, rows: int) -> torch.Tensor:
    """The square roots of how often each id is read, as a column; ids that were not read count as half a time."""
    counts = torch.zeros(rows, dtype=torch.float64) if known.rows is None else known.rows[:rows].double()
    return ((counts + 0.5) / (counts + 0.5).sum()).sqrt()[:, None]


def _halved(core: Integers | torch.Tensor) -> Integers | torch.Tensor:
    """What float16 holds of a core."""
    assert isinstance(core, torch.Tensor)
    half = core.half()
    if not bool(torch.isfinite(half).all()):
        raise MPOError(f"{float(core.abs().max()):.4g} is too large for float16: leave out bits=16")
    return half.to(core.dtype)


def _shapes(cores: tuple[Integers | torch.Tensor, ...], spec: ModuleSpec) -> list[tuple[int, int, int, int]]:
    """The shapes of cores whose bonds may have become narrower than planned."""
    found: list[tuple[int, int, int, int]] = []
    left = 1
    for core, (out, in_) in zip(cores, spec.sites, strict=True):
        right = core.values.shape[1] // in_ if isinstance(core, Integers) else core.shape[3]
        found.append((left, out, in_, int(right)))
        left = int(right)
    return found


def _array(core: Integers | torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    return widen(core) if isinstance(core, torch.Tensor) else core.matrix().reshape(shape)
