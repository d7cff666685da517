"""Arrays of NumPy, torch and JAX, through the array API: what they are, and how they are factorised.

Only here and, for NumPy alone, in :mod:`mpo_tn.lapack` anything is factorised, in double precision.

Data of 32 bits or fewer is widened to 64 before anything is computed. A Gram matrix of such data, accumulated in
double precision, resolves singular values down to ``1.5e-8 * s_max``, below the rounding of the data itself, so the
cheap symmetric eigenproblem loses nothing there. Double precision data goes through an SVD.

JAX arrays are factorised on the host by NumPy: without x64 JAX has no double precision, and its factorisations give NaN
where others raise. :func:`widen` takes them there and :func:`restored` brings results back, whatever x64 says.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.lapack import small_eigh, small_qr, small_svd, small_triangle, sure_svd, takes

_NUMPY = array_api_compat.array_namespace(np.empty(0))

Array = Any
"""A NumPy array, a torch tensor or a JAX array. The array API standard has no static type that all satisfy."""

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
EPS = _EPS | {"complex64": _EPS["float32"], "complex128": _EPS["float64"]}

DOUBLE = ("float64", "complex128")
"""The names of the dtypes that are computed in."""
_name = cache(lambda dtype: str(dtype).rsplit(".", maxsplit=1)[-1])

_SQUARES_IN_RANGE = (1e-140, 1e140)
"""Norms whose square is in range, and the square of whose entries is where they matter to 16 digits."""

_PIECE = 2**16  # entries of an array that are widened at once in order to be summed


def namespace(array: Array) -> Any:
    """The array API namespace of an array.

    Raises:
        MPOError: not an array of a library we know.
    """
    if type(array) is np.ndarray:
        return _NUMPY  # thousands of sites ask
    try:
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise MPOError(
            f"a {type(array).__name__} is not an array: pass a NumPy array, a torch tensor or a JAX array, for "
            "instance numpy.asarray(w, dtype=float)"
        ) from None


def library(array: Array) -> str:
    """The library an array is of: ``"numpy"``, ``"torch"`` or ``"jax"``."""
    parts = namespace(array).__name__.split(".")
    # jax.numpy has both names.
    return next((name for name in ("jax", "torch", "numpy") if name in parts), parts[-1])


def is_traced(array: Array) -> bool:
    """Whether JAX is tracing the array (jit, grad, vmap), so that it has a shape and no values."""
    jax: Any = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.core.Tracer)


def dtype_name(array: Array) -> str:
    """The dtype without the library's prefix: ``"float32"`` for NumPy and torch alike."""
    return _name(array.dtype)


def eps(array: Array) -> float:
    """The machine precision of the array's dtype."""
    return EPS[dtype_name(array)]


def machine_eps(dtype: Any) -> float:
    """The machine precision of a dtype of some library, of its name, or of itself if it is a number.

    Raises:
        MPOError: a dtype that is not floating-point or complex.
    """
    if isinstance(dtype, float):
        return dtype
    # NumPy's scalar types are classes, which show more than their name.
    name = getattr(dtype, "__name__", None) or str(dtype).rsplit(".", maxsplit=1)[-1]
    if name not in EPS:
        raise MPOError(f"dtype={dtype!r} is not one of {', '.join(EPS)}")
    return EPS[name]


def is_half(array: Array) -> bool:
    """Whether the array is float16 or bfloat16, in which nothing can be factorised."""
    return dtype_name(array) in ("float16", "bfloat16")


def is_single(array: Array) -> bool:
    """Whether its real numbers have 32 bits or fewer, so that a Gram matrix in double precision loses nothing."""
    return dtype_name(array) not in DOUBLE


def describe(array: Array) -> str:
    """Library, dtype and device, as far as they matter: ``"numpy float64"``, ``"torch float32 on cuda:0"``."""
    kind = f"{library(array)} {dtype_name(array)}"
    device = str(array_api_compat.device(array))
    return kind if device == "cpu" or is_traced(array) else f"{kind} on {device}"


def check_dtype(array: Array, what: str) -> None:
    """Refuse dtypes that are not floating-point or complex, or are wider than double precision."""
    if dtype_name(array) not in EPS:
        raise MPOError(
            f"{what} of dtype {dtype_name(array)} cannot be decomposed: convert it first, for instance with "
            f"w.astype('float64'); supported are {', '.join(EPS)}"
        )


def check_loaded(array: Array, what: str) -> None:
    """Refuse tensors on torch's meta device, which have no values, and its DTensors, of which a process has a part."""
    if hasattr(array, "placements"):
        raise MPOError(f"{what} is sharded over processes (FSDP), and needed whole: do this before it is sharded")
    if "meta" in str(array_api_compat.device(array)):
        raise MPOError(f"{what} is on the meta device (offloaded or not loaded) and has no values: load it first")


def check_values(array: Array, what: str) -> None:
    """Refuse arrays without finite values, or whose values a gradient depends on."""
    if type(array) is np.ndarray and np.isfinite(array).all():
        return
    xp = namespace(array)
    if getattr(array, "requires_grad", False):
        raise MPOError(
            f"{what} requires grad, and cores are defined only up to a gauge, so they have no gradient: pass "
            "w.detach(), or use mpo_tn.truncated, whose result is a matrix"
        )
    if is_traced(array):
        raise MPOError(
            f"{what} is being traced by JAX (jit, grad or vmap) and has no values, which factorisations on the host "
            "need: call this outside the traced function, or use mpo_tn.truncated, whose result is a matrix"
        )
    check_loaded(array, what)
    if library(array) == "jax":
        array, xp = to_numpy(array), np  # JAX would compile for every shape
    if not bool(xp.all(xp.isfinite(array))):
        bad = int(to_numpy(~xp.isfinite(array)).sum())
        raise MPOError(f"{what} of shape {tuple(array.shape)} has {bad} entries that are NaN or infinite: clean them")


def check_matrix(matrix: Array) -> Array:
    """The matrix, without what a NumPy subclass adds; refuse all but finite, non-empty, floating-point or complex ones.

    Raises:
        MPOError: names what is wrong and the way out.
    """
    namespace(matrix)
    if isinstance(matrix, np.ma.MaskedArray):
        raise MPOError("a MaskedArray has entries without a value: fill them first, for instance with w.filled(0.0)")
    if isinstance(matrix, np.ndarray):
        matrix = np.asarray(matrix)
    check_dtype(matrix, "a matrix")
    if library(matrix) == "torch" and str(matrix.layout) != "torch.strided":
        raise MPOError(f"a tensor of layout {matrix.layout} (sparse) cannot be decomposed: pass w.to_dense()")
    if matrix.ndim != 2:
        raise MPOError(
            f"expected a matrix of shape (out, in), got an array of shape {tuple(matrix.shape)}: reshape it to two "
            "dimensions"
        )
    if 0 in matrix.shape:
        raise MPOError(f"a matrix of shape {tuple(matrix.shape)} has no entries: there is nothing to decompose")
    check_values(matrix, "the matrix")
    return matrix


def widen(array: Array) -> Array:
    """The array in double precision, real or complex, on the same device; a JAX array as a NumPy array on the host."""
    if type(array) is np.ndarray:
        return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)
    if library(array) == "jax":
        array = to_numpy(array)
    xp = namespace(array)
    wide = xp.complex128 if dtype_name(array).startswith("complex") else xp.float64
    return xp.astype(array, wide, copy=False)


def restored(array: Array, like: Array) -> Array:
    """What was computed from ``widen(like)``, in the library, dtype and device of ``like``.

    Raises:
        MPOError: see :func:`to_jax`.
    """
    if all(type(part) is np.ndarray for part in (like, array)):
        return array.astype(like.dtype, copy=False)
    if library(like) == "jax" and library(array) != "jax":
        # A sharded array has several; what is made of it goes to the first.
        device = min(like.devices(), key=lambda d: d.id)
        return to_jax(np.asarray(array).astype(like.dtype, copy=False), device)
    if library(like) == "torch":  # from the host, too
        return namespace(like).asarray(array, dtype=like.dtype, device=like.device)
    return namespace(array).astype(array, like.dtype, copy=False)


def to_jax(array: np.ndarray, device: Any = None) -> Array:
    """A NumPy array as a JAX array of the same dtype.

    Raises:
        MPOError: double precision while JAX has x64 switched off, when JAX would cut it to single precision.
    """
    import jax

    if dtype_name(array) in DOUBLE and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise MPOError(
            f"JAX cannot hold {dtype_name(array)} with x64 switched off: call "
            'jax.config.update("jax_enable_x64", True) first, or use another dtype or library'
        )
    # jax.numpy.asarray would compile a program for every new shape.
    return jax.device_put(array, device)


def storage_notes(array: Array) -> list[str]:
    """What a report says about an array that is not computed with as it is."""
    if library(array) != "jax" and not is_half(array):
        return []
    wide = "complex128" if dtype_name(array).startswith("complex") else "float64"
    note = f"computed in {wide}, stored as {dtype_name(array)}"
    return [f"{note}; JAX arrays are factorised by NumPy on the host" if library(array) == "jax" else note]


def full_precision(xp: Any) -> dict[str, str]:
    """What ``xp.tensordot`` has to be told to work in the precision of the dtype: JAX on accelerators uses less."""
    return {"precision": "highest"} if getattr(xp, "__name__", "") == "jax.numpy" else {}


def narrow(array: Array) -> Array:
    """The array in single precision, real or complex, on the same device."""
    xp = namespace(array)
    single = xp.complex64 if dtype_name(array).startswith("complex") else xp.float32
    return xp.astype(array, single, copy=False)


def conjugate(array: Array) -> Array:
    """The complex conjugate; a real array itself, where NumPy would copy it."""
    if not dtype_name(array).startswith("complex"):
        return array
    # Not torch's own, which only marks a tensor as conjugate: neither NumPy nor files understand the mark.
    return namespace(array).conj(array)


def adjoint(matrix: Array) -> Array:
    """The conjugate transpose."""
    if type(matrix) is np.ndarray:
        return matrix.T.conj() if matrix.dtype.kind == "c" else matrix.T
    return conjugate(namespace(matrix).permute_dims(matrix, (1, 0)))


def frobenius_norm(array: Array) -> float:
    """The 2-norm of all entries, accumulated in double precision; infinite only if it is beyond that range itself."""
    if type(array) is not np.ndarray and library(array) == "jax":
        array = to_numpy(array)
    if isinstance(array, np.ndarray):
        # The norm of NumPy warns where squares overflow; a wide copy in pieces stays in the cache.
        flat, wide_type = array.ravel("K"), np.complex128 if array.dtype.kind == "c" else np.float64
        square = 0.0
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE].astype(wide_type, copy=False)
            square += np.vdot(piece, piece).real
        norm = math.sqrt(square)
    else:
        norm = float(namespace(array).linalg.vector_norm(widen(array)))
    if _SQUARES_IN_RANGE[0] < norm < _SQUARES_IN_RANGE[1]:
        return norm
    wide = widen(array)
    xp = namespace(wide)
    parts = (xp.real(wide), xp.imag(wide)) if dtype_name(wide) == "complex128" else (wide,)
    largest = max(float(xp.max(xp.abs(part))) for part in parts)
    if not 0 < largest < math.inf:
        return largest
    # The same sum again, so that the digits are those of the array in range.
    exponent = binary_exponent(largest)
    return frobenius_norm(times_power_of_two(wide, -exponent)) * 2.0**exponent


def binary_exponent(value: float) -> int:
    """The ``e`` with ``1 <= value / 2**e < 2``; 0 for 0. ``2.0**e`` is in range for every finite value."""
    return math.frexp(value)[1] - 1 if value > 0 else 0


def times_power_of_two(array: Array, exponent: int, *, in_place: bool = False) -> Array:
    """``array * 2**exponent``, exact where the result is in range, even if ``2**exponent`` is not.

    ``in_place``: an array of NumPy or torch that may be written into, which spares the memory of the result.
    """
    name = dtype_name(array)
    most = 1000 if name in DOUBLE else 14 if name == "float16" else 120
    if abs(exponent) > most:
        exponent = max(-2200, min(exponent, 2200))  # beyond that nothing is left, or all is infinite
    while abs(exponent) > most:
        step = math.copysign(most, exponent)
        array, exponent = array * 2.0**step, exponent - int(step)
    if in_place:
        array *= 2.0**exponent
    return array if in_place else array * 2.0**exponent


def tails(values: np.ndarray) -> np.ndarray:
    """``tails(s)[r]`` is the 2-norm of ``s[r:]``, summed from the small end; its length is ``len(s) + 1``.

    >>> tails(np.array([4.0, 3.0]))
    array([5., 3., 0.])
    """
    # hypot, because squares of values beyond 1e154 or below 1e-162 are out of range.
    found = np.zeros(len(values) + 1)
    np.hypot.accumulate(values[::-1], out=found[-2::-1])
    return found


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
        found = eigenvectors(matrix @ adjoint(matrix))
        return replace(found, values=np.sqrt(found.values))
    try:
        u, values, _ = small_svd(matrix) if takes(matrix) else xp.linalg.svd(matrix, full_matrices=False)
    except (np.linalg.LinAlgError, RuntimeError):
        u, values = _svd_left(matrix)
        return LeftFactor(u, values, "the divide-and-conquer SVD did not converge; used LAPACK gesvd on the host")
    return LeftFactor(u, to_numpy(values))


def eigenvectors(gram: Array) -> LeftFactor:
    """The eigenvectors of a Hermitian matrix without negative eigenvalues (m, m), and these, largest first.

    All are computed: SciPy finds a few in half the time, but with its own pool of threads. Cost: ``9 m**3`` flops.
    """
    try:
        values, vectors = small_eigh(gram) if takes(gram) else namespace(gram).linalg.eigh(gram)
    except (np.linalg.LinAlgError, RuntimeError):
        u, singular = _svd_left(gram)
        return LeftFactor(u, singular, "eigenvalues of the Gram matrix did not converge; used an SVD")
    return LeftFactor(namespace(gram).flip(vectors, axis=1), np.clip(to_numpy(values)[::-1], 0.0, None))


def gram_factor(matrix: Array) -> Array:
    """``L`` with ``L L^H = matrix matrix^H`` (m, m), to half the digits; by Cholesky, or eigenvectors if that fails."""
    gram = matrix @ adjoint(matrix)
    try:
        return namespace(gram).linalg.cholesky(gram)
    except (np.linalg.LinAlgError, RuntimeError):
        found = left_factor(matrix, gram=True)
        return found.u * namespace(gram).asarray(found.values, device=array_api_compat.device(gram))


def _svd_left(matrix: Array) -> tuple[Array, np.ndarray]:
    """LAPACK's slow and sure driver, on the host."""
    u, values, _ = sure_svd(to_numpy(matrix))
    return namespace(matrix).asarray(u, device=array_api_compat.device(matrix)), values


def singular_values(matrix: Array, *, gram: bool) -> np.ndarray:
    """All ``min(m, k)`` singular values, descending, as a host array. See :func:`left_factor` for ``gram``."""
    xp = namespace(matrix)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else adjoint(matrix)
    try:
        if gram:
            return np.sqrt(np.clip(to_numpy(xp.linalg.eigvalsh(wide @ adjoint(wide)))[::-1], 0.0, None))
        longer = 2 * wide.shape[1] > 3 * wide.shape[0]
        return to_numpy(xp.linalg.svdvals(triangle(adjoint(wide)) if longer else wide))
    except (np.linalg.LinAlgError, RuntimeError):
        return left_factor(wide, gram=gram).values


def qr(matrix: Array) -> tuple[Array, Array]:
    """``matrix == q @ r`` with orthonormal columns in ``q`` (m, min(m, k))."""
    if takes(matrix):
        return small_qr(matrix)
    xp = namespace(matrix)
    q, r = xp.linalg.qr(matrix)
    if not bool(xp.all(xp.isfinite(q))):
        # The complex QR of torch divides by zero at columns near the smallest positive number.
        q, r = (xp.asarray(part, device=matrix.device) for part in np.linalg.qr(to_numpy(matrix)))
    return q, r


def triangle(matrix: Array) -> Array:
    """The ``r`` of :func:`qr` alone, which is half the work. Not by SciPy's ``geqrt``, for its pool of threads."""
    if takes(matrix):
        return small_triangle(matrix)
    if isinstance(matrix, np.ndarray):
        return np.linalg.qr(matrix, mode="r")
    r = namespace(matrix).linalg.qr(matrix, mode="r")[1]
    return r if bool(namespace(matrix).all(namespace(matrix).isfinite(r))) else qr(matrix)[1]


def to_numpy(array: Array) -> np.ndarray:
    """A host copy."""
    return np.asarray(array.detach().cpu().numpy() if hasattr(array, "detach") else array)
