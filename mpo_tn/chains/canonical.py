"""Moving the orthogonality centre."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import TOP, Size, join, lost, lowest, unit, unit_cores
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import (
    EPS,
    Array,
    adjoint,
    binary_exponent,
    check_values,
    dtype_name,
    frobenius_norm,
    is_half,
    namespace,
    qr,
    restored,
    times_power_of_two,
    triangle,
    widen,
)

ChainT = TypeVar("ChainT", bound=Chain)


def canonicalize(chain: ChainT, center: int) -> ChainT:
    """Make every site before ``center`` left-isometric and every site after it right-isometric.

    Only sites that are not known to have the form already are touched. See :meth:`mpo_tn.MPO.canonicalize`.
    """
    site = checked_site(chain, center, "center")
    check_cores(chain)
    cores, exponent = centred(chain, site)
    found, loss = stored(chain.with_cores(cores, (site, site)), chain.cores[0], exponent)
    if loss > 0:
        size = Size(frobenius_norm(cores[site]), exponent)
        raise MPOError(
            f"the norm {size} is below the range of {chain.dtype}, by which {loss:.3g} of it would be lost: use a "
            "wider dtype, or normalized() and log_norm()"
        )
    return found


def centred(chain: Chain, center: int) -> tuple[list[Array], int]:
    """Cores in double precision around a centre of norm 1 to 2, or 0, and the exponent that belongs to it."""
    low, high = chain.canonical_interval
    # The norm may be shared out among the cores in ways that leave the range before they cancel.
    cores, exponent = unit_cores([widen(core) for core in chain.cores], low, high)
    return moved(cores, exponent, (low, high), center)


def moved(cores: list[Array], exponent: int, interval: tuple[int, int], center: int) -> tuple[list[Array], int]:
    """The same of cores in double precision with a canonical interval; they stand for ``2**exponent`` times as much.

    What is carried from site to site is brought to norm 1 to 2, so that a chain of any length stays in range.
    """
    low, high = interval
    for k in range(low, center):
        cores[k], factor = split_right(cores[k])
        carried = unit(factor, exponent)
        exponent = carried.exponent
        cores[k + 1] = join(carried.array, cores[k + 1])
    for k in range(high, center, -1):
        factor, cores[k] = split_left(cores[k])
        carried = unit(factor, exponent)
        exponent = carried.exponent
        cores[k - 1] = join(cores[k - 1], carried.array)
    middle = unit(cores[center], exponent)
    cores[center] = middle.array
    return cores, middle.exponent


def norm_of(chain: Chain) -> Size:
    """The Frobenius norm, in double precision, from triangles alone."""
    check_cores(chain)
    low, high = chain.canonical_interval
    cores, exponent = unit_cores([widen(core) for core in chain.cores[low : high + 1]])
    xp = namespace(cores[0])
    carried = unit(xp.reshape(cores[0], (-1, cores[0].shape[3])), exponent)
    for core in cores[1:]:
        rows = carried.array
        factor = triangle(rows) if rows.shape[0] > rows.shape[1] else rows
        carried = unit(xp.reshape(join(factor, core), (-1, core.shape[3])), carried.exponent)
    return carried.size()


def checked_site(chain: Chain, k: int, name: str) -> int:
    """The site itself.

    Raises:
        MPOError: it is none.
    """
    site = whole_number(k)
    if site is None or not 0 <= site < len(chain):
        raise MPOError(f"{name}={k!r} is not a site: the chain has sites 0 to {len(chain) - 1}")
    return site


def check_cores(chain: Chain) -> None:
    """Refuse chains that cannot be factorised.

    Raises:
        MPOError: a core with entries that are NaN or infinite, without values, or that requires grad.
    """
    for k, core in enumerate(chain.cores):
        check_values(core, f"core {k}")


def stored(chain: ChainT, like: Array, exponent: int = 0) -> tuple[ChainT, float]:
    """``2**exponent`` times a chain with a centre, in the library, dtype and device of an array.

    Half precision rounds isometries too far off to go on claiming the form, and its range is so small that the norm
    is shared out evenly instead.

    Returns:
        The chain, and the fraction of its norm that is lost because it is below the range of the dtype: 0 while that is
        less than the precision of the dtype.

    Raises:
        MPOError: the norm at the centre is beyond the range of the dtype.
    """
    center, _ = chain.canonical_interval
    half, name = is_half(like), dtype_name(like)
    middle = unit(chain.cores[center], exponent)
    size = middle.size()
    wide, exponents = list(chain.cores), [0] * len(chain)
    wide[center] = middle.array
    if half:
        share, rest = divmod(size.top, len(wide))
        exponents = [share + int(k < rest) for k in range(len(wide))]
    elif size.top > TOP[name] or (size.top == TOP[name] and abs(size.mantissa) > 2 - EPS[name]):
        raise MPOError(
            f"the norm {size} is beyond the range of {like.dtype}: use a wider dtype, or normalized() and log_norm()"
        )
    else:
        exponents[center] = middle.exponent
    with np.errstate(over="ignore", invalid="ignore"):
        cores = tuple(_scaled(core, e, like) for core, e in zip(wide, exponents, strict=True))
    if half and not all(bool(namespace(core).all(namespace(core).isfinite(core))) for core in cores):
        raise MPOError(f"the norm {size} is beyond the range of {like.dtype} in {len(cores)} cores: use a wider dtype")
    if half:
        small = [k for k, core in enumerate(wide) if _is_small(core, exponents[k], name)]
    else:
        small = [center] if size.top < lowest(name, math.prod(wide[center].shape)) else []
    loss = sum(lost(widen(wide[k]), exponents[k], cores[k]) for k in small)
    return chain.with_cores(cores, None if half else chain.canonical_interval), loss


def _scaled(core: Array, exponent: int, like: Array) -> Array:
    """``core * 2**exponent`` in the dtype and library of an array; the norm of what gets larger is in range before."""
    if exponent > 0 and not is_half(like):
        return times_power_of_two(restored(core, like), exponent, in_place=dtype_name(core) != dtype_name(like))
    return restored(times_power_of_two(core, exponent) if exponent else core, like)


def _is_small(core: Array, exponent: int, name: str) -> bool:
    """Whether a core times a power of two may lose digits below the range of a dtype."""
    return binary_exponent(frobenius_norm(core)) + exponent < lowest(name, math.prod(core.shape))


def shift_right(core: Array, following: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --Q--(R B)--`` with ``A = Q R``: the left core becomes left-isometric."""
    q, r = split_right(core)
    return q, join(r, following)


def shift_left(preceding: Array, core: Array) -> tuple[Array, Array]:
    """``--A--B--  ->  --(A L)--Q--`` with ``B = L Q``: the right core becomes right-isometric."""
    factor, q = split_left(core)
    return join(preceding, factor), q


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
