"""What tests compare with: plain NumPy references with none of the package's algebra, and sample matrices."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterable, Sequence

import numpy as np

from mpo_tn import linalg
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array
from mpo_tn.sites import Sites

C = 4.0
"""The constant of every rounding tolerance that :class:`mpo_tn.MPO` promises, see :func:`tolerance`."""

BACKENDS = ("numpy", "torch", "jax")
KINDS = ("gaussian", "decaying", "rank_deficient", "rank_one", "zero", "ones", "one_entry", "orthogonal")
"""What the matrices of :func:`matrix_of_kind` are like."""


def tolerance(dtype: str, size: int, norm: float, c: float = C) -> float:
    """What rounding may add to a Frobenius norm: ``c * eps(dtype) * sqrt(size) * norm``.

    >>> tolerance("float32", 100, 2.0) == 4 * 2.0**-23 * 10 * 2
    True
    """
    return c * linalg.EPS[dtype] * math.sqrt(size) * norm


def to_host(array: Array) -> np.ndarray:
    """A NumPy copy of an array of any backend, in double precision, real or complex."""
    if linalg.library(array) == "torch":
        array = array.detach().cpu().resolve_conj().resolve_neg()
        array = array.to(linalg.widen(array[:0] if array.ndim else array).dtype).numpy()
    array = np.asarray(array)
    return np.array(array, dtype="complex128" if np.iscomplexobj(array) else "float64")


def dense_matrix(cores: Iterable[Array]) -> np.ndarray:
    """The matrix (out, in) of cores, from left to right in double precision: the definition, term by term."""
    matrix = np.ones((1, 1, 1))
    for core in map(to_host, cores):
        matrix = np.tensordot(matrix, core, axes=1).transpose(0, 2, 1, 3, 4)
        matrix = matrix.reshape(matrix.shape[0] * matrix.shape[1], matrix.shape[2] * matrix.shape[3], matrix.shape[4])
    return matrix[:, :, 0]


def frobenius(array: np.ndarray) -> float:
    """The Frobenius norm without overflow or underflow."""
    largest = float(np.abs(array).max(initial=0.0))
    return largest * float(np.linalg.norm(array / largest)) if largest > 0 else largest


def left_defect(core: Array) -> float:
    """``|Q^H Q - 1|_F`` of a core as a matrix (left out in, right): 0 if it is left-isometric."""
    q = to_host(core).reshape(-1, core.shape[3])
    return float(np.linalg.norm(q.conj().T @ q - np.eye(q.shape[1])))


def right_defect(core: Array) -> float:
    """``|Q Q^H - 1|_F`` of a core as a matrix (left, out in right): 0 if it is right-isometric."""
    q = to_host(core).reshape(core.shape[0], -1)
    return float(np.linalg.norm(q @ q.conj().T - np.eye(q.shape[0])))


def installed_backends() -> tuple[str, ...]:
    """``"numpy"``, and ``"torch"`` and ``"jax"`` where installed; the environment variable MPO_TN_BACKENDS picks some.

    >>> "numpy" in installed_backends()
    True
    """
    chosen = os.environ.get("MPO_TN_BACKENDS", " ".join(BACKENDS)).split()
    return tuple(name for name in BACKENDS if name in chosen and importlib.util.find_spec(name) is not None)


def holds(backend: str, dtype: str) -> bool:
    """Whether a backend has a dtype: JAX no double precision without x64, NumPy no bfloat16 without ml_dtypes."""
    if backend == "jax" and dtype in linalg.DOUBLE:
        import jax

        return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
    return backend != "numpy" or dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None


def to_backend(array: np.ndarray, backend: str, dtype: str) -> Array:
    """A NumPy array as an array of a backend and dtype, sharing no memory."""
    array = np.array(array)
    if backend == "torch":
        torch = importlib.import_module("torch")
        return torch.from_numpy(array).to(getattr(torch, dtype))
    if dtype == "bfloat16":
        import ml_dtypes

        array = array.astype(ml_dtypes.bfloat16)
    return linalg.to_jax(array.astype(dtype)) if backend == "jax" else array.astype(dtype)


def matrix_of_kind(kind: str, sites: Sites, is_complex: bool, seed: int) -> np.ndarray:
    """A matrix in double precision, of order-one entries, with the structure that ``kind`` of :data:`KINDS` names."""
    rng = np.random.default_rng(seed)
    rows, columns = sites.shape
    if kind == "gaussian":
        return normal(rng, is_complex, rows, columns)
    if kind == "decaying":
        grid = np.add.outer(np.linspace(0, 9, rows), np.linspace(0, 5, columns))
        return normal(rng, is_complex, 1, 1) / (1.0 + grid**2)
    if kind in ("rank_deficient", "rank_one"):
        ends = [1, *[2 if kind == "rank_deficient" else 1] * (len(sites) - 1), 1]
        return dense_matrix(normal(rng, is_complex, ends[k], *leg, ends[k + 1]) for k, leg in enumerate(sites))
    if kind == "ones":
        return np.ones((rows, columns)) * normal(rng, is_complex, 1, 1)
    if kind == "orthogonal":
        return np.linalg.qr(normal(rng, is_complex, max(rows, columns), max(rows, columns)))[0][:rows, :columns]
    if kind not in KINDS:
        raise MPOError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    matrix = np.zeros((rows, columns), dtype=complex if is_complex else float)
    if kind == "one_entry":
        matrix[rng.integers(rows), rng.integers(columns)] = normal(rng, is_complex, 1)[0]
    return matrix


def matrix_with_spectrum(
    sites: Sites,
    spectrum: Sequence[float] | np.ndarray,
    bond: int | None = None,
    *,
    is_complex: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """A random matrix whose unfolding at one bond, or at every bond, has prescribed singular values.

    It is ``sum_r s_r a_1r x ... x a_gr`` with random orthonormal ``a_g0, a_g1, ...`` on every group of sites. The
    groups are what lies left and right of ``bond``, or single sites if ``bond`` is None; then every unfolding has the
    spectrum.

    Raises:
        MPOError: more values than a group of sites has dimensions, or no such bond.

    >>> matrix = matrix_with_spectrum(Sites(out=(2, 3), in_=(2, 3)), [3.0, 2.0, 1.0], bond=0)
    >>> unfolding = matrix.reshape(2, 3, 2, 3).transpose(0, 2, 1, 3).reshape(4, 9)
    >>> np.linalg.svd(unfolding, compute_uv=False).round(12)
    array([3., 2., 1., 0.])
    """
    n, values = len(sites), np.asarray(spectrum, dtype=float)
    if bond is not None and not 0 <= bond < n - 1:
        raise MPOError(f"bond={bond} is not a bond: {n} sites have {n - 1}")
    sizes = sites.sizes
    groups = sizes if bond is None else (math.prod(sizes[: bond + 1]), math.prod(sizes[bond + 1 :]))
    if len(values) > min(groups):
        raise MPOError(f"{len(values)} singular values do not fit on groups of sites of sizes {groups}")
    rng = np.random.default_rng(seed)
    terms = values[np.newaxis]
    for size in groups:
        basis, _ = np.linalg.qr(normal(rng, is_complex, size, len(values)))
        terms = (terms[:, np.newaxis] * basis).reshape(-1, len(values))
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
    return terms.sum(axis=1).reshape(list(itertools.chain(*sites))).transpose(order).reshape(sites.shape)


def normal(rng: np.random.Generator, is_complex: bool, *shape: int) -> np.ndarray:
    """Independent standard normal numbers, real or complex."""
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if is_complex else real
