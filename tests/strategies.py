"""What the tests share: random problems, and slow, plain NumPy references that use nothing of the package's algebra."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from mpo_tn import MPO, Sites

C = 4.0
"""The constant of every rounding tolerance ``C * eps(dtype) * sqrt(size) * norm``; `MPO.from_matrix` promises 4."""

EPS = {"float32": 2.0**-23, "complex64": 2.0**-23, "float64": 2.0**-52, "complex128": 2.0**-52}
HALF_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
KINDS = ("gaussian", "decaying", "rank_deficient", "rank_one", "zero", "ones", "one_entry", "orthogonal")
_LEGS = st.sampled_from((1, 1, 2, 2, 3, 4, 5, 7))


@dataclass(frozen=True)
class Problem:
    """A matrix of some library and dtype, its legs, and the same matrix on the host in double precision."""

    matrix: Any
    sites: Sites
    dtype: str
    host: np.ndarray

    @property
    def norm(self) -> float:
        return fro(self.host)

    @property
    def slack(self) -> float:
        """``C * eps * sqrt(size) * norm``."""
        return slack(self.dtype, self.host.size, self.norm)


def slack(dtype: str, size: int, norm: float) -> float:
    return C * (EPS | HALF_EPS)[dtype] * math.sqrt(size) * norm


@st.composite
def legs(draw: Any, *, min_sites: int = 1, max_sites: int = 6, max_size: int = 3000) -> Sites:
    """Legs of 1, primes and composites, for matrices of at most ``max_size`` entries."""
    n = draw(st.integers(min_sites, max_sites))
    out, in_, left = [], [], max_size
    for _ in range(n):
        a = min(draw(_LEGS), left)
        b = min(draw(_LEGS), left // a)
        out.append(a)
        in_.append(b)
        left //= a * b
    return Sites(draw(st.permutations(out)), draw(st.permutations(in_)))


@st.composite
def problems(
    draw: Any, *, min_sites: int = 1, kinds: tuple[str, ...] = KINDS, scaled: bool = True, dtypes: Any = tuple(EPS)
) -> Problem:
    """A random matrix over libraries, dtypes, legs, spectra and scales."""
    sites = draw(legs(min_sites=min_sites))
    dtype = draw(st.sampled_from(dtypes))
    huge = 1e250 if EPS[dtype] < 1e-10 else 1e25
    scale = draw(st.sampled_from((1.0, 1.0, huge, 1 / huge))) if scaled else 1.0
    w = make(draw(st.sampled_from(kinds)), sites, dtype.startswith("complex"), draw(st.integers(0, 2**32 - 1)))
    w = (w * scale).astype(dtype)
    matrix = torch.from_numpy(w.copy()) if draw(st.booleans()) else w
    return Problem(matrix, sites, dtype, np.asarray(w, dtype="complex128" if np.iscomplexobj(w) else "float64"))


def make(kind: str, sites: Sites, is_complex: bool, seed: int) -> np.ndarray:
    """A matrix of order-one entries with the spectrum that ``kind`` names."""
    rng = np.random.default_rng(seed)
    rows, columns = sites.shape

    def normal(*shape: int) -> np.ndarray:
        real = rng.standard_normal(shape)
        return real + 1j * rng.standard_normal(shape) if is_complex else real

    if kind == "gaussian":
        return normal(rows, columns)
    if kind == "decaying":
        return normal(1, 1) / (1.0 + np.add.outer(np.linspace(0, 9, rows), np.linspace(0, 5, columns)) ** 2)
    if kind in ("rank_deficient", "rank_one"):
        bond = 2 if kind == "rank_deficient" else 1
        ends = [1, *[bond] * (len(sites) - 1), 1]
        return dense([normal(ends[k], *leg, ends[k + 1]) for k, leg in enumerate(sites)])
    if kind == "ones":
        return np.ones((rows, columns)) * normal(1, 1)
    if kind == "orthogonal":
        q, _ = np.linalg.qr(normal(max(rows, columns), max(rows, columns)))
        return q[:rows, :columns]
    w = np.zeros((rows, columns), dtype=complex if is_complex else float)
    if kind == "one_entry":
        w[rng.integers(rows), rng.integers(columns)] = normal(1)[0]
    return w


def host(array: Any) -> np.ndarray:
    """A NumPy copy in double precision."""
    if isinstance(array, torch.Tensor):
        wide = torch.complex128 if array.is_complex() else torch.float64
        array = array.detach().cpu().resolve_conj().resolve_neg().to(wide).numpy()
    return np.array(array, dtype="complex128" if np.iscomplexobj(array) else "float64")


def dense(cores: Any) -> np.ndarray:
    """The matrix of cores, left to right in double precision: the definition, term by term."""
    w = np.ones((1, 1, 1))
    for core in map(host, cores):
        w = np.tensordot(w, core, axes=1).transpose(0, 2, 1, 3, 4)
        w = w.reshape(w.shape[0] * w.shape[1], w.shape[2] * w.shape[3], w.shape[4])
    return w[:, :, 0]


def fro(array: np.ndarray) -> float:
    """The Frobenius norm without overflow or underflow."""
    largest = float(np.abs(array).max(initial=0.0))
    return largest * float(np.linalg.norm(array / largest)) if largest > 0 else 0.0


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
        core = (core[0] + 1j * core[1] if dtype.startswith("complex") else core[0]).astype(dtype)
        cores.append(torch.from_numpy(core) if library == "torch" else core)
    return MPO(tuple(cores))


def left_defect(core: Any) -> float:
    """``|Q^H Q - 1|_F`` of a core as a matrix (left out in, right)."""
    q = host(core).reshape(-1, core.shape[3])
    return float(np.linalg.norm(q.conj().T @ q - np.eye(q.shape[1])))


def right_defect(core: Any) -> float:
    """``|Q Q^H - 1|_F`` of a core as a matrix (left, out in right)."""
    q = host(core).reshape(core.shape[0], -1)
    return float(np.linalg.norm(q @ q.conj().T - np.eye(q.shape[0])))
