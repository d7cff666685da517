"""Distances measured rather than bounded: after a cast, and in the operator norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains.algebra import apply, conj, side_by_side, transpose
from mpo_tn.chains.canonical import check_cores, wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, unit
from mpo_tn.exceptions import MPOError, shape_text, whole_number
from mpo_tn.linalg import (
    DOUBLE,
    Array,
    adjoint,
    check_matrix,
    describe,
    dtype_name,
    frobenius_norm,
    machine_eps,
    namespace,
    widen,
)

_MOST_COLUMNS = 2**28
"""Vectors of the operator norm of more entries are not made."""

_UNIFORM_ROUNDING = math.sqrt(3 / (96 * math.log(2)))
"""The rms relative rounding error over eps, mantissas being log-uniform: ``sqrt(E[m**-2] / 12)``, about 0.21."""


def cast_error(chain: Chain, dtype: Any) -> float:
    """What storing the cores in another dtype costs. See :meth:`mpo_tn.MPO.cast_error`."""
    check_cores(chain)
    xp = namespace(chain.cores[0])
    name = _dtype_name(dtype)
    is_complex = dtype_name(chain.cores[0]).startswith("complex")
    if is_complex and not name.startswith("complex"):
        raise MPOError(f"complex cores cannot be cast to {name} without losing their imaginary part: use complex64")
    if name in DOUBLE:
        return 0.0  # they hold every other dtype, and JAX has neither unless told
    wanted = getattr(xp, name, None)
    if wanted is None:
        raise MPOError(f"{xp.__name__} has no {name}: use float16, or torch tensors")
    # D_k = A_k - B_k is known exactly, and A_1 .. A_n - B_1 .. B_n = sum_k B_1 .. B_{k-1} D_k A_{k+1} .. A_n, a chain
    # whose columns keep their relative accuracy in QR: errors far below eps * norm come out right.
    kept = gone = None
    for k, core in enumerate(chain.cores):
        a, b = Scaled(widen(core)), Scaled(widen(_cast(core, wanted, k)))
        a, b, d = unit(a.array), unit(b.array), unit(a.array - b.array)
        if kept is not None and gone is not None:
            b, d = _times(kept, b), _times(kept, d).plus(_times(gone, a))
        if k == len(chain) - 1:
            return d.size().length("the error of the cast")
        kept, gone = side_by_side(b, d)
    raise AssertionError("a chain has at least one core")


def _times(carried: Scaled, core: Scaled) -> Scaled:
    """What is carried from the left, times the next core."""
    product = carried.times(core)
    return unit(product.array, product.exponent)


def cast_error_estimate(dtype: Any, n: int, norm: float) -> float:
    """What storing ``n`` cores of a chain with a centre in another dtype may be expected to cost, without looking.

    ``sqrt(3 / (96 ln 2)) * eps * sqrt(n) * norm``, about ``0.21 eps sqrt(n) norm``: every entry is
    off by an independent relative error, uniform within half a unit in the last place, and mantissas are log-uniform.
    At the centre of a canonical chain the error of one core, whatever its bonds, is then ``0.21 * eps * norm``, and
    those of different cores are uncorrelated. An estimate: entries that share one mantissa, that the dtype represents
    exactly or that are below its normal range (float16: 6e-5) behave otherwise.

    >>> round(cast_error_estimate("bfloat16", 4, 1.0), 5)
    0.00332
    """
    return _UNIFORM_ROUNDING * machine_eps(dtype) * math.sqrt(n) * norm


def _cast(core: Array, dtype: Any, k: int) -> Array:
    xp = namespace(core)
    # A dtype with too small a range gives infinity; that is found below, and NumPy's warning says less.
    with np.errstate(over="ignore"):
        cast = xp.astype(core, dtype)
    if not bool(xp.all(xp.isfinite(cast))):
        raise MPOError(
            f"core {k} has entries of size {float(xp.max(xp.abs(core))):.6g}, beyond the range of {dtype}: scale the "
            "matrix, or use a dtype of wider range"
        )
    return cast


def _dtype_name(dtype: Any) -> str:
    machine_eps(dtype)
    if isinstance(dtype, float):
        raise MPOError(f"dtype={dtype!r} is not a dtype: pass a name such as 'float32'")
    return getattr(dtype, "__name__", None) or str(dtype).rsplit(".", maxsplit=1)[-1]


@dataclass(frozen=True)
class OperatorNorm:
    """An estimate of a largest singular value.

    Attributes:
        lower: never above it, up to rounding: the largest Ritz value.
        upper: at least it, except with probability ``failure``.
        failure: see ``upper``; 0 if the Krylov space was exhausted, when both are equal.
        steps: products with the matrix, and as many with its adjoint.
    """

    lower: float
    upper: float
    failure: float
    steps: int


def operator_norm(
    chain: Chain, minus: Array | Chain | None, *, steps: int = 30, failure: float = 1e-6, seed: int = 0
) -> OperatorNorm:
    """The operator norm of a chain, or of its difference to something. See :meth:`mpo_tn.MPO.operator_norm`."""
    for name, value in (("steps", steps), ("seed", seed)):
        number = whole_number(value)
        if number is None or number < (name == "steps"):
            raise MPOError(f"{name}={value!r} must be a whole number of at least {int(name == 'steps')}")
    if not isinstance(failure, float) or not 0 < failure < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MPOError(f"failure={failure!r} is a probability, above 0 and below 1")
    check_cores(chain)
    # A dense matrix is a chain of one site.
    terms = [chain] if minus is None else [chain, minus if isinstance(minus, Chain) else _one_site(check_matrix(minus))]
    for other in terms[1:]:
        check_cores(other)
        like, expected = describe(other.cores[0]), describe(chain.cores[0])
        if other.shape != chain.shape or like != expected:
            raise MPOError(
                f"the MPO is {expected} of shape {shape_text(chain.shape)}, what to subtract is {like} of shape "
                f"{shape_text(other.shape)}: use one shape, library, dtype and device"
            )
    if chain.shape[1] > _MOST_COLUMNS:
        raise MPOError(
            f"vectors for a matrix of shape {shape_text(chain.shape)} are too large to be made: norm() bounds the "
            "operator norm from above"
        )
    forward = [wide_chain(term) for term in terms]
    backward = [conj(transpose(term)) for term in forward]
    first = forward[0].cores[0]
    xp = namespace(first)
    columns = chain.shape[1]
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((2, columns))
    vector = start[0] + 1j * start[1] if dtype_name(first).startswith("complex") else start[0]
    vector = xp.asarray(vector, device=array_api_compat.device(first))

    def times(x: Array, conjugate: bool) -> Array:
        parts = [apply(term, x) for term in (backward if conjugate else forward)]
        return parts[0] - parts[1] if len(parts) > 1 else parts[0]

    alphas, betas, exhausted = _bidiagonal(times, vector, min(steps, columns))
    k = len(alphas)
    lower = float(np.linalg.norm(np.diag(alphas) + np.diag(betas[: k - 1], 1), ord=2))
    if not math.isfinite(lower):
        raise MPOError("products with the matrix overflow double precision: scale a core down, or canonicalize first")
    if exhausted or k == columns:
        return OperatorNorm(lower, lower, 0.0, k)
    # A complex matrix is a real one of twice the size, with every singular value twice and the same Krylov space.
    size = columns * (2 if dtype_name(first).startswith("complex") else 1)
    root = math.log(1.648 * math.sqrt(size) / failure) / (2 * k - 1)
    upper = lower / math.sqrt(1 - root**2) if root < 1 else math.inf
    return OperatorNorm(lower, upper, failure, k)


def _one_site(matrix: Array) -> Chain:
    return Chain((namespace(matrix).reshape(matrix, (1, *matrix.shape, 1)),))


def _bidiagonal(times: Any, vector: Array, steps: int) -> tuple[list[float], list[float], bool]:
    """Golub-Kahan bidiagonalisation, every vector orthogonalised twice against all before it.

    The diagonal, the entries above it, and whether the Krylov space was exhausted.
    """
    right = [vector / frobenius_norm(vector)]
    left: list[Array] = []
    alphas: list[float] = []
    betas: list[float] = []
    largest = 0.0
    for _ in range(steps):
        u, alpha = _orthogonalised(times(right[-1], False), left)
        alphas.append(alpha)
        largest = max(largest, alpha)
        if not alpha > 1e-14 * largest:
            return alphas, betas, True
        left.append(u / alpha)
        v, beta = _orthogonalised(times(left[-1], True), right)
        largest = max(largest, beta)
        if not beta > 1e-14 * largest:
            return alphas, betas, True
        betas.append(beta)
        right.append(v / beta)
    return alphas, betas, False


def _orthogonalised(vector: Array, basis: list[Array]) -> tuple[Array, float]:
    xp = namespace(vector)
    if basis:
        columns = xp.stack(basis, axis=1)
        for _ in range(2):
            vector = vector - columns @ (adjoint(columns) @ vector)
    return vector, frobenius_norm(vector)
