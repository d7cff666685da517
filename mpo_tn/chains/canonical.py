"""Moving the orthogonality centre."""

from __future__ import annotations

from typing import TypeVar

from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    check_values,
    frobenius_norm,
    is_half,
    namespace,
    qr,
    restored,
    times_power_of_two,
    widen,
)

_LARGEST_EXPONENT = 1023
"""``2.0**1023`` is the largest power of two in double precision."""

ChainT = TypeVar("ChainT", bound=Chain)


def canonicalize(chain: ChainT, center: int) -> ChainT:
    """Make every site before ``center`` left-isometric and every site after it right-isometric.

    Only sites that are not known to have the form already are touched. See :meth:`mpo_tn.MPO.canonicalize`.
    """
    site = whole_number(center)
    if site is None or not 0 <= site < len(chain):
        raise MPOError(f"center={center!r} is not a site: the chain has sites 0 to {len(chain) - 1}")
    check_cores(chain)
    center = site
    low, high = chain.canonical_interval
    cores = [widen(core) for core in chain.cores]
    # The norm may be shared out among the cores in ways that leave the range before they cancel.
    exponents = [binary_exponent(frobenius_norm(core)) for core in cores[low : high + 1]]
    for k, exponent in enumerate(exponents, start=low):
        cores[k] = times_power_of_two(cores[k], -exponent)
    for k in range(low, center):
        cores[k], cores[k + 1] = shift_right(cores[k], cores[k + 1])
    for k in range(high, center, -1):
        cores[k - 1], cores[k] = shift_left(cores[k - 1], cores[k])
    total = sum(exponents)
    if binary_exponent(frobenius_norm(cores[center])) + total > _LARGEST_EXPONENT:
        raise MPOError(f"the norm of the matrix of shape {chain.shape} overflows double precision: scale a core down")
    cores[center] = times_power_of_two(cores[center], total)
    return stored(chain.with_cores(cores, (center, center)), chain.cores[0])


def check_cores(chain: Chain) -> None:
    """Refuse chains that cannot be factorised.

    Raises:
        MPOError: a core with entries that are NaN or infinite, without values, or that requires grad.
    """
    for k, core in enumerate(chain.cores):
        check_values(core, f"core {k}")


def stored(chain: ChainT, like: Array) -> ChainT:
    """A chain with a centre, in the library, dtype and device of an array.

    Half precision rounds isometries too far off to go on claiming the form, and its range is so small that the norm
    is shared out evenly instead.

    Raises:
        MPOError: the norm at the centre is beyond the range of the dtype.
    """
    xp = namespace(chain.cores[0])
    center, _ = chain.canonical_interval
    wide = list(chain.cores)
    half = is_half(like)
    if half:
        share, rest = divmod(binary_exponent(frobenius_norm(wide[center])), len(wide))
        wide[center] = times_power_of_two(wide[center], -(share * len(wide) + rest))
        wide = [times_power_of_two(core, share + int(k < rest)) for k, core in enumerate(wide)]
    elif frobenius_norm(wide[center]) > float(xp.finfo(like.dtype).max):
        raise MPOError(
            f"the norm {frobenius_norm(wide[center]):.6g} is beyond the range of {like.dtype}: scale the matrix"
        )
    cores = tuple(restored(core, like) for core in wide)
    return chain.with_cores(cores, None if half else chain.canonical_interval)


def shift_right(core: Array, following: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --Q--(R B)--`` with ``A = Q R``: the left core becomes left-isometric."""
    q, r = split_right(core)
    return q, namespace(core).tensordot(r, following, axes=1)


def shift_left(preceding: Array, core: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --(A L)--Q--`` with ``B = L Q``: the right core becomes right-isometric."""
    factor, q = split_left(core)
    return namespace(core).tensordot(preceding, factor, axes=1), q


def split_right(core: Array) -> tuple[Array, Array]:
    """``Q`` and ``R`` of ``core = Q R``, Q left-isometric and R a matrix."""
    xp = namespace(core)
    q, r = qr(xp.reshape(core, (-1, core.shape[3])))
    return xp.reshape(q, (*core.shape[:3], q.shape[1])), r


def split_left(core: Array) -> tuple[Array, Array]:
    """``L`` and ``Q`` of ``core = L Q``, L a matrix and Q right-isometric."""
    xp = namespace(core)
    q, r = qr(adjoint(xp.reshape(core, (core.shape[0], -1))))
    return adjoint(r), xp.reshape(adjoint(q), (q.shape[1], *core.shape[1:]))


def wide_chain(chain: ChainT) -> ChainT:
    """The chain in double precision."""
    return chain.with_cores((widen(core) for core in chain.cores), chain.canonical_interval)
