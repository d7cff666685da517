"""Chains of any length in plain NumPy: transfer matrices that are rescaled at every site, by their norm.

Nothing here is shared with the package: scales are real numbers and their logarithms are added up, not powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Cores = Sequence[np.ndarray]


def scaled(core: np.ndarray) -> tuple[np.ndarray, float]:
    """A core over its largest entry, and the logarithm of that."""
    core = np.asarray(core, dtype="complex128" if np.iscomplexobj(core) else "float64")
    largest = float(np.abs(core).max())
    return (core / largest, math.log(largest)) if largest > 0 else (core, 0.0)


def log_overlap(a: Cores, b: Cores) -> tuple[complex, float]:
    """The phase and the logarithm of the size of ``sum conj(A) B``."""
    carried, logs = np.ones((1, 1)), [0.0]
    for left, right in zip(a, b, strict=True):
        (left, first), (right, second) = scaled(left), scaled(right)
        carried = np.einsum("ab,aoic,boid->cd", carried, left.conj(), right, optimize=True)
        size = float(np.linalg.norm(carried))
        if size == 0:
            return 0.0, -math.inf
        carried = carried / size
        logs += [first, second, math.log(size)]
    return carried[0, 0] / abs(carried[0, 0]), math.fsum(logs)


def log_norm(cores: Cores) -> float:
    """The logarithm of the Frobenius norm."""
    return log_overlap(cores, cores)[1] / 2


def log_trace(cores: Cores) -> tuple[complex, float]:
    """The phase and the logarithm of the size of the trace."""
    carried, logs = np.ones(1), [0.0]
    for core in cores:
        core, first = scaled(core)
        carried = carried @ np.einsum("aoob->ab", core)
        size = float(np.linalg.norm(carried))
        if size == 0:
            return 0.0, -math.inf
        carried = carried / size
        logs += [first, math.log(size)]
    return carried[0] / abs(carried[0]), math.fsum(logs)


def relative_distance(a: Cores, b: Cores) -> float:
    """``|A - B| / |A|``, right to ``2e-6``: from inner products alone, whose logarithms are known to 1e-12."""
    log = log_norm(a)
    phase, cross = log_overlap(a, b)
    other = 2 * (log_norm(b) - log)
    return math.sqrt(max(1 + math.exp(min(other, 700)) - 2 * (phase * math.exp(min(cross - 2 * log, 700))).real, 0.0))


def log_spectra(cores: Cores) -> list[np.ndarray]:
    """The singular values of every bond over the norm, from the transfer matrices of both sides."""
    lefts, rights = [np.ones((1, 1))], [np.ones((1, 1))]
    wide = [scaled(core)[0] for core in cores]
    for core in wide[:-1]:
        here = np.einsum("ab,aoic,boid->cd", lefts[-1], core.conj(), core, optimize=True)
        lefts.append(here / np.linalg.norm(here))
    for core in wide[:0:-1]:
        here = np.einsum("aoic,boid,cd->ab", core.conj(), core, rights[-1], optimize=True)
        rights.append(here / np.linalg.norm(here))
    found = []
    for left, right in zip(lefts[1:], rights[:0:-1], strict=True):
        values = np.sqrt(np.clip(np.linalg.eigvals(left.T @ right).real, 0.0, None))
        values = np.sort(values)[::-1]
        found.append(values / np.linalg.norm(values))
    return found
