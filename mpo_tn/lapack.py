"""Factorisations of NumPy matrices by SciPy's LAPACK: those that NumPy lacks, and small ones without its wrappers.

Of a matrix of some dozen entries NumPy's functions take three to ten times as long as LAPACK does, and a long chain of
small bonds is made of nothing else. Only small matrices are handed over: SciPy has a pool of threads of its own, which
starts for larger ones and then spins on the cores that NumPy's needs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.linalg
from scipy.linalg import lapack

SMALL = 2048
"""Matrices of at most so many entries are small: no BLAS threads are started for them."""

_QR: dict[str, Any] = {
    "d": (lapack.dgeqrf, lapack.dorgqr),  # type: ignore[attr-defined]
    "D": (lapack.zgeqrf, lapack.zungqr),  # type: ignore[attr-defined]
}
_SVD: dict[str, Any] = {"d": lapack.dgesdd, "D": lapack.zgesdd}  # type: ignore[attr-defined]
_EIGH: dict[str, Any] = {"d": lapack.dsyevd, "D": lapack.zheevd}  # type: ignore[attr-defined]


def is_small(matrix: Any) -> bool:
    """Whether a matrix of any library is small."""
    return math.prod(matrix.shape) <= SMALL


def takes(matrix: Any) -> bool:
    """Whether the functions below that are for small matrices take it: NumPy's, in double precision, not empty."""
    return type(matrix) is np.ndarray and 0 < matrix.size <= SMALL and matrix.dtype.char in _QR


def small_qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``numpy.linalg.qr``."""
    reflect, build = _QR[matrix.dtype.char]
    packed, tau, _, info = reflect(matrix)
    _checked(info)
    q, _, info = build(packed[:, : len(tau)], tau)
    _checked(info)
    return q, _upper(packed, len(tau))


def small_triangle(matrix: np.ndarray) -> np.ndarray:
    """The ``r`` of :func:`small_qr`."""
    packed, tau, _, info = _QR[matrix.dtype.char][0](matrix)
    _checked(info)
    return _upper(packed, len(tau))


def small_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``numpy.linalg.svd`` without full matrices."""
    u, values, vh, info = _SVD[matrix.dtype.char](matrix, full_matrices=0)
    _checked(info)
    return u, values, vh


def small_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``numpy.linalg.eigh``."""
    values, vectors, info = _EIGH[matrix.dtype.char](matrix, lower=1)
    _checked(info)
    return values, vectors


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``matrix == (u * values) @ vh``, values descending."""
    try:
        return scipy.linalg.svd(matrix, full_matrices=False)  # type: ignore[return-value]
    except np.linalg.LinAlgError:
        return sure_svd(matrix)


def sure_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same by LAPACK's slow and sure driver."""
    return scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")  # type: ignore[return-value]


def pivoted_qr(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``r`` of ``matrix[:, order] == q @ r``, its diagonal falling in size, and ``order``."""
    result: tuple[Any, Any] = scipy.linalg.qr(matrix, mode="r", pivoting=True)  # type: ignore[assignment]
    r, order = result
    return r[: min(matrix.shape)], order


def pivoted_cholesky(matrix: np.ndarray) -> np.ndarray:
    """``L`` (n, rank) with ``matrix == L L^T``, but for pivots below ``n eps`` of the largest."""
    factor, order, rank, _ = lapack.dpstrf(matrix, lower=1)  # type: ignore[attr-defined]
    return np.tril(factor)[np.argsort(order), :rank]


def _upper(packed: np.ndarray, rows: int) -> np.ndarray:
    return np.where(_is_above(rows, packed.shape[1]), packed[:rows], 0.0)


@lru_cache(maxsize=256)
def _is_above(rows: int, columns: int) -> np.ndarray:
    """Which entries of a matrix are not below its diagonal."""
    return ~np.tri(rows, columns, -1, dtype=bool)


def _checked(info: int) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK says {info}")
