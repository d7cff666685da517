"""Legs for a weight of any size: the rows and columns are zero-padded where they do not factor."""

from __future__ import annotations

import math

from mpo_tn.sites import Sites, check_legs

_MOST_PADDING = 1 / 16


def legs_for(out: int, in_: int, sites: int | str | Sites) -> Sites:
    """The legs for a matrix (out, in); they multiply to at least its shape, and to more where padding helps.

    A side is padded when its own factors cannot be spread over the sites. :class:`~mpo_tn.Sites` given by the user must
    multiply exactly.

    Guarantee (little-padding): a side is padded by at most a sixteenth, or by one.

    Raises:
        MPOError: given legs do not multiply to the shape.

    >>> legs_for(30522, 384, 5)
    Sites(out=(2, 4, 477, 4, 2), in_=(2, 4, 6, 4, 2))
    >>> legs_for(257, 384, 3).shape, legs_for(30000, 128, 5).out
    ((272, 384), (5, 10, 10, 10, 6))
    """
    if isinstance(sites, Sites):
        check_legs(sites, (out, in_))
        return sites
    if isinstance(sites, str):
        return Sites.low_rank(out, in_)
    return Sites.balanced(padded_size(out, sites), padded_size(in_, sites), sites)


def padded_size(size: int, n: int) -> int:
    """The size to pad one side to: ``size`` itself if its factors spread well over ``n`` sites.

    >>> [padded_size(size, 5) for size in (384, 257, 30522, 50257, 172, 2)]
    [384, 272, 30528, 50304, 176, 2]
    """
    best = size
    grain = _ideal_grain(size, n)
    while grain > 1:
        padded = math.ceil(size / grain) * grain
        if padded - size <= max(size * _MOST_PADDING, 1):
            best = padded
            break
        grain //= 2
    # A side whose own factors do half as well is left as it is: no padding is the simplest padding.
    return size if 2 * _spread(size, n) >= _spread(best, n) else best


def _spread(size: int, n: int) -> int:
    """How much of a side lies outside its largest leg."""
    return size // max(Sites.balanced(size, 1, n).out)


def _ideal_grain(size: int, n: int) -> int:
    """What the legs outside the middle would multiply to if the size were a power of two."""
    return _spread(2 ** round(math.log2(size)), n)
