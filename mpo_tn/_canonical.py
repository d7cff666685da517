"""Moving the orthogonality centre."""

from __future__ import annotations

from typing import Any, TypeVar

from mpo_tn.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array, adjoint, is_half, namespace, qr, widen

ChainT = TypeVar("ChainT", bound=Chain)


def canonicalize(chain: ChainT, center: int) -> ChainT:
    """Make every site before ``center`` left-isometric and every site after it right-isometric.

    Only sites that are not known to have the form already are touched. See :meth:`mpo_tn.MPO.canonicalize`.
    """
    if isinstance(center, bool) or not 0 <= center < len(chain):
        raise MPOError(f"center={center!r} is not a site: the chain has sites 0 to {len(chain) - 1}")
    low, high = chain.canonical_interval
    cores = [widen(core) for core in chain.cores]
    for k in range(low, center):
        cores[k], cores[k + 1] = shift_right(cores[k], cores[k + 1])
    for k in range(high, center, -1):
        cores[k - 1], cores[k] = shift_left(cores[k - 1], cores[k])
    return stored(chain.with_cores(cores, (center, center)), chain.dtype)


def stored(chain: ChainT, dtype: Any) -> ChainT:
    """The chain in its storage dtype. Half precision rounds isometries too far off to go on claiming the form."""
    xp = namespace(chain.cores[0])
    cores = tuple(xp.astype(core, dtype, copy=False) for core in chain.cores)
    return chain.with_cores(cores, None if is_half(cores[0]) else chain.canonical_interval)


def shift_right(core: Array, following: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --Q--(R B)--`` with ``A = Q R``: the left core becomes left-isometric."""
    xp = namespace(core)
    left, out, in_, right = core.shape
    q, r = qr(xp.reshape(core, (left * out * in_, right)))
    return xp.reshape(q, (left, out, in_, q.shape[1])), xp.tensordot(r, following, axes=1)


def shift_left(preceding: Array, core: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --(A L)--Q--`` with ``B = L Q``: the right core becomes right-isometric."""
    xp = namespace(core)
    left, out, in_, right = core.shape
    q, r = qr(adjoint(xp.reshape(core, (left, out * in_ * right))))
    return xp.tensordot(preceding, adjoint(r), axes=1), xp.reshape(adjoint(q), (q.shape[1], out, in_, right))
