"""The only module that factorises arrays. NumPy and torch, through the array API; results in double precision.

Data of 32 bits or fewer is widened to 64 before anything is computed. A Gram matrix of such data, accumulated in
double precision, resolves singular values down to ``1.5e-8 * s_max``, below the rounding of the data itself, so the
cheap symmetric eigenproblem loses nothing there. Double precision data goes through an SVD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np
import scipy.linalg

from mpo_tn.exceptions import MPOError

Array = Any
"""A NumPy array or a torch tensor. The array API standard has no static type that both satisfy."""

_EPS = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}


def namespace(array: Array) -> Any:
    """The array API namespace of an array.

    Raises:
        MPOError: not an array of a library we know.
    """
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise MPOError(
            f"a {type(array).__name__} is not an array: pass a NumPy array or a torch tensor, for instance "
            "numpy.asarray(w, dtype=float)"
        ) from None


def dtype_name(array: Array) -> str:
    """The dtype without the library's prefix: ``"float32"`` for NumPy and torch alike."""
    return str(array.dtype).rsplit(".", maxsplit=1)[-1]


def eps(array: Array) -> float:
    """The machine precision of the array's dtype."""
    return _EPS[dtype_name(array)]


def is_half(array: Array) -> bool:
    """Whether the array is float16 or bfloat16, in which nothing can be factorised."""
    return dtype_name(array) in ("float16", "bfloat16")


def check_matrix(matrix: Array) -> None:
    """Refuse anything that is not a finite, non-empty floating-point or complex matrix.

    Raises:
        MPOError: names what is wrong and the way out.
    """
    xp = namespace(matrix)
    if dtype_name(matrix) not in _EPS:
        raise MPOError(
            f"a matrix of dtype {dtype_name(matrix)} cannot be decomposed: convert it first, for instance with "
            f"w.astype('float64'); supported are {', '.join(_EPS)}"
        )
    if matrix.ndim != 2:
        raise MPOError(
            f"expected a matrix of shape (out, in), got an array of shape {tuple(matrix.shape)}: reshape it to two "
            "dimensions"
        )
    if 0 in matrix.shape:
        raise MPOError(f"a matrix of shape {tuple(matrix.shape)} has no entries: there is nothing to decompose")
    if getattr(matrix, "requires_grad", False):
        raise MPOError(
            "the matrix requires grad, and cores are defined only up to a gauge, so they have no gradient: pass "
            "w.detach()"
        )
    if not bool(xp.all(xp.isfinite(matrix))):
        bad = int(xp.sum(xp.astype(~xp.isfinite(matrix), xp.int64)))
        raise MPOError(
            f"the matrix of shape {tuple(matrix.shape)} has {bad} entries that are NaN or infinite: clean the data "
            "first"
        )


def widen(array: Array) -> Array:
    """The array in double precision, real or complex, on the same device."""
    xp = namespace(array)
    wide = xp.complex128 if dtype_name(array).startswith("complex") else xp.float64
    return xp.astype(array, wide, copy=False)


def adjoint(matrix: Array) -> Array:
    """The conjugate transpose."""
    xp = namespace(matrix)
    return xp.conj(xp.permute_dims(matrix, (1, 0)))


def frobenius_norm(array: Array) -> float:
    """The 2-norm of all entries, accumulated in double precision and free of overflow."""
    xp = namespace(array)
    wide = widen(array)
    largest = float(xp.max(xp.abs(wide)))
    if largest == 0.0:
        return 0.0
    scale = 2.0 ** math.frexp(largest)[1]
    return scale * float(xp.linalg.vector_norm(wide / scale))


def tails(values: np.ndarray) -> np.ndarray:
    """``tails(s)[r]`` is the 2-norm of ``s[r:]``, summed from the small end; its length is ``len(s) + 1``.

    >>> tails(np.array([4.0, 3.0]))
    array([5., 3., 0.])
    """
    squares = np.cumsum(values[::-1] ** 2)[::-1]
    return np.sqrt(np.append(squares, 0.0))


@dataclass(frozen=True)
class LeftFactor:
    """All left singular vectors ``u`` (rows, rank) of a matrix, its singular values, and a note if it was hard."""

    u: Array
    values: np.ndarray
    note: str | None = None


def left_factor(matrix: Array, *, gram: bool) -> LeftFactor:
    """The left singular vectors and all singular values of a double precision matrix.

    Args:
        matrix: shape (m, k), double precision.
        gram: the data had 32 bits or fewer, so the Gram matrix loses nothing.

    Cost: ``m**2 k`` flops for the Gram matrix and about ``9 m**3`` for its eigenvectors, else a thin SVD.
    """
    xp = namespace(matrix)
    if gram and matrix.shape[0] <= matrix.shape[1]:
        try:
            eigenvalues, vectors = xp.linalg.eigh(matrix @ adjoint(matrix))
        except (np.linalg.LinAlgError, RuntimeError):
            u, values = _svd_left(matrix)
            return LeftFactor(u, values, "eigenvalues of the Gram matrix did not converge; used an SVD")
        values = np.sqrt(np.clip(to_numpy(eigenvalues)[::-1], 0.0, None))
        return LeftFactor(xp.flip(vectors, axis=1), values)
    try:
        u, values, _ = xp.linalg.svd(matrix, full_matrices=False)
    except (np.linalg.LinAlgError, RuntimeError):
        u, values = _svd_left(matrix)
        return LeftFactor(u, values, "the divide-and-conquer SVD did not converge; used LAPACK gesvd on the host")
    return LeftFactor(u, to_numpy(values))


def _svd_left(matrix: Array) -> tuple[Array, np.ndarray]:
    """LAPACK's slow and sure driver, on the host."""
    u, values, _ = scipy.linalg.svd(to_numpy(matrix), full_matrices=False, lapack_driver="gesvd")
    xp = namespace(matrix)
    return xp.asarray(u, device=array_api_compat.device(matrix)), values


def singular_values(matrix: Array, *, gram: bool) -> np.ndarray:
    """All ``min(m, k)`` singular values, descending, as a host array. See :func:`left_factor` for ``gram``."""
    wide = matrix.shape[0] <= matrix.shape[1]
    return left_factor(matrix if wide else adjoint(matrix), gram=gram).values


def qr(matrix: Array) -> tuple[Array, Array]:
    """``matrix == q @ r`` with orthonormal columns in ``q`` (m, min(m, k))."""
    q, r = namespace(matrix).linalg.qr(matrix)
    return q, r


def to_numpy(array: Array) -> np.ndarray:
    """A host copy."""
    if hasattr(array, "detach"):
        return np.asarray(array.detach().cpu().numpy())
    return np.asarray(array)
