"""Second moments of layers for tests: of any rank and spread, and the weighted norm by its definition."""

from __future__ import annotations

import math

import numpy as np

from mpo_tn import Metric


def moment(size: int, seed: int, *, rank: int | None = None, spread: float = 1.0) -> np.ndarray:
    """A second moment (size, size) of ``2 size`` samples, or of ``rank`` ones; features differ by ``10**spread``."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((size, 2 * size if rank is None else rank))
    samples *= np.logspace(0, -spread, size)[rng.permutation(size), None]
    return samples @ samples.T


def correlated(size: int, seed: int, decades: float = 2.0) -> np.ndarray:
    """A second moment (size, size) whose eigenvalues fall by decades, in a random basis, as those of layers do."""
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return (basis * np.logspace(0, -decades, size)) @ basis.T


def random_metric(shape: tuple[int, int], seed: int, kind: str = "plain", **options) -> Metric:
    """A metric for a matrix (out, in): plain, anchored or two-sided."""
    out, in_ = shape
    second = moment(in_, seed, **options)
    cross = outer = None
    if kind == "anchored":
        noise = np.random.default_rng(seed + 1).standard_normal((in_, in_))
        cross = second + 0.1 * noise * np.linalg.norm(second) / in_
    if kind == "two-sided":
        outer = moment(out, seed + 2)
    return Metric(second, cross=cross, outer=outer)


def weighted(metric: Metric, difference: np.ndarray) -> float:
    """``sqrt(tr(G D S D^T))``, by eigenvalues rather than by the roots that the package takes."""
    left, right = roots(metric, len(difference))
    return float(np.linalg.norm(left.T @ difference @ right))


def roots(metric: Metric, out: int) -> list[np.ndarray]:
    """Roots of G and S by eigenvalues; what rounding has made of those that are zero is left out, as no weight."""
    found = []
    for part in (np.eye(out) if metric.outer is None else metric.outer, metric.second):
        values, vectors = np.linalg.eigh(np.asarray(part))
        values[values < 1e-13 * values[-1]] = 0.0
        found.append(vectors * np.sqrt(values))
    return found


def scale(metric: Metric, norm: float) -> float:
    """The largest weighted norm that a matrix of a Frobenius norm can have."""
    outer = 1.0 if metric.outer is None else np.linalg.norm(metric.outer, 2)
    return norm * math.sqrt(np.linalg.norm(metric.second, 2) * outer)
