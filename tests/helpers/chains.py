"""What the tests share beyond `mpo_tn.testing`: short names, references for spectra, and chains of a given bond."""

import math

import numpy as np
from hypothesis import settings

from mpo_tn import MPO, Sites, linalg
from mpo_tn.testing import (
    DTYPES,
    HALF_DTYPES,
    KINDS,
    C,
    Problem,
    holds,
    installed_backends,
    left_defect,
    legs,
    mpos,
    problems,
    right_defect,
    spectral_problems,
    to_backend,
)
from mpo_tn.testing import dense_matrix as dense
from mpo_tn.testing import frobenius as fro
from mpo_tn.testing import matrix_of_kind as make
from mpo_tn.testing import to_host as host
from mpo_tn.testing import tolerance as slack

__all__ = [
    "EPS",
    "HALF_EPS",
    "KINDS",
    "C",
    "Problem",
    "dense",
    "fro",
    "holds",
    "host",
    "installed_backends",
    "left_defect",
    "legs",
    "make",
    "mpos",
    "problems",
    "random_chain",
    "right_defect",
    "slack",
    "spectral_problems",
    "tail_norms",
    "to_backend",
    "unfoldings",
]

fewer = settings(max_examples=max(10, settings.default.max_examples // 8))
"""For properties of many calls, each of which JAX compiles for every new shape: an eighth of the examples."""
EPS = {dtype: linalg.EPS[dtype] for dtype in DTYPES}
HALF_EPS = {dtype: linalg.EPS[dtype] for dtype in HALF_DTYPES}


def unfoldings(w: np.ndarray, sites: Sites) -> list[np.ndarray]:
    """The unfolding at every bond, by plain index arithmetic."""
    n = len(sites)
    tensor = w.reshape(*sites.out, *sites.in_).transpose([axis for k in range(n) for axis in (k, n + k)])
    return [tensor.reshape(math.prod(sites.sizes[: k + 1]), -1) for k in range(n - 1)]


def tail_norms(w: np.ndarray, sites: Sites, bonds: tuple[int, ...]) -> list[float]:
    """``eps_k``: what the best rank-``bonds[k]`` approximation of unfolding k misses."""
    spectra = [np.linalg.svd(m, compute_uv=False) for m in unfoldings(w, sites)]
    return [math.hypot(*values[bond:]) for values, bond in zip(spectra, bonds, strict=True)]


def random_chain(sites: Sites, bond: int, seed: int, dtype: str = "float64", library: str = "numpy") -> MPO:
    """An MPO of Gaussian cores that claims no canonical form."""
    rng = np.random.default_rng(seed)
    ends = [1, *[bond] * (len(sites) - 1), 1]
    cores = []
    for k, (out, in_) in enumerate(sites):
        core = rng.standard_normal((2, ends[k], out, in_, ends[k + 1]))
        cores.append(to_backend(core[0] + 1j * core[1] if dtype.startswith("complex") else core[0], library, dtype))
    return MPO(tuple(cores))
