"""The differentiable truncation: a matrix to the matrix of its truncated MPO, with a gradient that has no gauge."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any

import numpy as np

from mpo_tn.chains.unfolding import deinterleave, interleave
from mpo_tn.exceptions import MPOError
from mpo_tn.lapack import svd
from mpo_tn.linalg import (
    EPS,
    Array,
    adjoint,
    check_matrix,
    frobenius_norm,
    is_traced,
    library,
    restored,
    to_numpy,
    widen,
)
from mpo_tn.sites import Sites, check_legs, checked_sites
from mpo_tn.truncate.sweep import peels_left
from mpo_tn.truncation import Truncation, checked_truncation

Step = tuple[np.ndarray, np.ndarray, np.ndarray]
"""``u`` (m, p), singular values (p,) and ``v`` (k, p) of one unfolding, ``p = min(m, k)``, on the host."""


def truncated(matrix: Array, sites: Sites, truncation: Truncation) -> Array:
    """The matrix of the MPO that :meth:`MPO.from_matrix` makes of a matrix (out, in); differentiable in torch and JAX.

    Cores have no gradient, because they are defined only up to a gauge; the matrix they stand for has one.

    Args:
        matrix: shape (out, in); NumPy, a torch tensor that may require grad, or a JAX array, which ``jax.jit``,
            ``grad`` and ``vmap`` may trace.
        sites: legs that multiply to the shape.
        truncation: ``max_bond`` alone: bonds have to be fixed for there to be a derivative.

    Computed in double precision, on the host; while JAX traces, by a callback, once more for the gradient.

    Guarantee (truncated-matrix): equal to ``MPO.from_matrix(matrix, sites, truncation)[0].to_matrix()``, to
    ``8 eps(dtype) sqrt(size) norm (1 + norm / gap)**2`` for the least gap between the last kept and the first discarded
    singular value of a bond.
    Guarantee (truncated-gradient): the gradient is the exact adjoint of the derivative, also where singular values
    within the kept or within the discarded ones coincide, for which torch's own gradient of an SVD is wrong or NaN.

    Cost: an SVD of each unfolding that is cut, of the size of the matrix; their factors are kept for the gradient.

    Raises:
        MPOError: a tolerance; legs that do not fit; not a matrix that can be decomposed; in the gradient, a bond whose
            last kept and first discarded singular values are equal: there is none then. What is wrong with the values
            of an array that JAX traces is raised by JAX, with the same words.

    Source: rank truncation F is smooth where ``s_r > s_{r+1}``; with ``X = U^H G V`` its adjoint is ``P_U G + G P_V -
    P_U G P_V + U M V^H``, M zero but between kept i and discarded j: ``M_ij = (s_j**2 X_ij + s_i s_j conj(X_ji)) /
    (s_i**2 - s_j**2)``, and the mirrored block. A sweep is a product of such truncations.

    >>> import numpy as np
    >>> w = 1 / (1 + np.add.outer(np.arange(16.0), np.arange(16.0)))
    >>> close = truncated(w, Sites.balanced(16, 16, n=4), Truncation(max_bond=2))
    >>> close.shape, bool(np.linalg.norm(close - w) < 0.05 * np.linalg.norm(w))
    ((16, 16), True)
    """
    sites, truncation = checked_sites(sites), checked_truncation(truncation)
    if truncation.has_tolerance or truncation.max_parameters is not None:
        raise MPOError(
            f"{truncation} chooses bonds by the values of the matrix, which has no derivative: give max_bond, for "
            "instance the bonds of MPO.from_matrix(matrix.detach(), sites, truncation)[0]"
        )
    caps = truncation.caps(len(sites) - 1)
    if library(matrix) == "jax":
        return _for_jax()(matrix, sites, caps)
    if library(matrix) == "torch":
        return _for_torch().apply(matrix, sites, caps)
    return _forward(matrix, sites, caps)[0]


def _forward(matrix: Array, sites: Sites, caps: tuple[int | None, ...]) -> tuple[Array, list[Step]]:
    matrix = check_matrix(matrix)
    check_legs(sites, matrix.shape)
    tensor = interleave(to_numpy(widen(matrix)), sites.out, sites.in_)
    steps: list[Step] = []
    for bond, rank in _order(sites, caps):
        u, values, vh = svd(tensor.reshape(math.prod(sites.sizes[: bond + 1]), -1))
        steps.append((u, values, adjoint(vh)))
        tensor = ((u[:, :rank] * values[:rank]) @ vh[:rank]).ravel()
    return restored(deinterleave(tensor, sites.out, sites.in_), matrix), steps


def _backward(gradient: Array, steps: list[Step], sites: Sites, caps: tuple[int | None, ...]) -> Array:
    vector = interleave(to_numpy(widen(gradient)), sites.out, sites.in_)
    for (bond, rank), step in zip(reversed(_order(sites, caps)), reversed(steps), strict=True):
        g = vector.reshape(math.prod(sites.sizes[: bond + 1]), -1)
        vector = _adjoint_of_step(g, step, rank, bond).ravel()
    return restored(deinterleave(vector, sites.out, sites.in_), gradient)


def _adjoint_of_step(g: np.ndarray, step: Step, rank: int, bond: int) -> np.ndarray:
    """See the source in :func:`truncated`."""
    u, values, v = step
    kept, cut = values[:rank], values[rank:]
    if float(kept[-1] - cut[0]) <= EPS["float64"] * frobenius_norm(values):
        raise MPOError(
            f"singular values {rank} and {rank + 1} of bond {bond} are equal ({float(kept[-1]):.6g}), so the "
            "truncation has no derivative there: choose another bond"
        )
    inside = adjoint(u) @ g @ v
    above, below = inside[:rank, rank:], inside[rank:, :rank]
    rows, columns = kept[:, None], cut[None, :]
    gaps = (rows - columns) * (rows + columns)
    squares, products = columns**2 / gaps, rows * columns / gaps
    right = squares * above + products * adjoint(below)
    left = adjoint(squares * adjoint(below) + products * above)
    uk, ud, vk, vd = u[:, :rank], u[:, rank:], v[:, :rank], v[:, rank:]
    tangent = uk @ (adjoint(uk) @ g) + (g @ vk) @ adjoint(vk) - uk @ inside[:rank, :rank] @ adjoint(vk)
    return tangent + uk @ right @ adjoint(vd) + ud @ left @ adjoint(vk)


def _order(sites: Sites, caps: tuple[int | None, ...]) -> list[tuple[int, int]]:
    """Bonds and their ranks in the order in which a decomposition peels them; without those that cannot be cut."""
    sizes = sites.sizes
    low, high, left, right = 0, len(sites) - 1, 1, 1
    found: list[tuple[int, int]] = []
    while low < high:
        inner, rows, columns = math.prod(sizes[low + 1 : high]), left * sizes[low], sizes[high] * right
        from_left = peels_left(sites, low, high, left, right)
        bond = low if from_left else high - 1
        full = min(rows, inner * columns) if from_left else min(columns, rows * inner)
        cap = caps[bond]
        rank = full if cap is None else min(full, cap)
        if rank < full:
            found.append((bond, rank))
        if from_left:
            low, left = low + 1, rank
        else:
            high, right = high - 1, rank
    return found


@cache
def _for_torch() -> Any:
    torch: Any = sys.modules["torch"]  # loaded already: there is a tensor

    class Truncated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, matrix: Array, sites: Sites, caps: tuple[int | None, ...]) -> Array:
            value, ctx.steps = _forward(matrix.detach(), sites, caps)
            ctx.sites, ctx.caps = sites, caps
            return value

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Array) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return _backward(gradient, ctx.steps, ctx.sites, ctx.caps), None, None

    return Truncated


@cache
def _for_jax() -> Any:
    import jax

    def on_host(function: Any, *arrays: Array) -> Array:
        """What NumPy makes of the arrays, of the kind of the first; while JAX traces them, once it has their values."""
        shape = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
        return jax.pure_callback(
            lambda *values: function(*map(np.asarray, values)), shape, *arrays, vmap_method="sequential"
        )

    def forward(matrix: Array, sites: Sites, caps: tuple[int | None, ...]) -> tuple[Array, Any]:
        if not is_traced(matrix):
            return _forward(matrix, sites, caps)
        # All that can be seen without values is looked at here, where an error can still be raised as it is.
        check_legs(sites, check_matrix(np.broadcast_to(np.zeros((), matrix.dtype), matrix.shape)).shape)
        # Their factors would be cut to single precision on the way without x64, so they are found once more.
        return on_host(lambda values: _forward(values, sites, caps)[0], matrix), matrix

    def plain(matrix: Array, sites: Sites, caps: tuple[int | None, ...]) -> Array:
        return forward(matrix, sites, caps)[0]

    def backward(sites: Sites, caps: tuple[int | None, ...], kept: Any, gradient: Array) -> tuple[Array]:
        # JAX's cotangents are the conjugates of torch's.
        gradient = jax.numpy.conj(gradient)
        if isinstance(kept, list):
            return (jax.numpy.conj(_backward(gradient, kept, sites, caps)),)

        def of_both(g: np.ndarray, w: np.ndarray) -> Array:
            return _backward(g, _forward(w, sites, caps)[1], sites, caps)

        return (jax.numpy.conj(on_host(of_both, gradient, kept)),)

    function = jax.custom_vjp(plain, nondiff_argnums=(1, 2))
    function.defvjp(forward, backward)
    return function
