"""Sites: how the rows and columns of a matrix are split into the legs of a chain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from mpo_tn.exceptions import MPOError, list_text, shape_text, whole_number

# Liu, Gao et al., ACL 2021, supplement, Tables 1 and 2, keyed by (out, in). These four reproduce the paper's counts.
_PAPER_LEGS = {
    (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2)),
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
}


@dataclass(frozen=True)
class Sites:
    """The legs of every site: ``prod(out)`` rows and ``prod(in_)`` columns, the same number of legs on both sides.

    Legs of size 1 are legal. The row index is read as a mixed-radix number with digits ``(o_1, ..., o_n)``, the first
    digit the most significant (C order), and the column index likewise.

    Raises:
        MPOError: the two sides have different numbers of legs, none at all, or a leg that is not a positive integer.

    >>> sites = Sites(out=(3, 4, 4, 4, 4), in_=(4, 4, 8, 6, 4))
    >>> sites.shape, sites.full_bonds
    ((768, 3072), (12, 192, 384, 16))
    """

    out: tuple[int, ...]
    in_: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", _checked_legs("out", self.out))
        object.__setattr__(self, "in_", _checked_legs("in_", self.in_))
        if len(self.out) != len(self.in_):
            raise MPOError(
                f"out={list_text(self.out)} has {len(self.out)} legs and in_={list_text(self.in_)} has "
                f"{len(self.in_)}: give one leg per site on each side, using 1 where a site has none"
            )

    @classmethod
    def balanced(cls, out: int, in_: int, n: int = 5) -> Sites:
        """Spread the prime factors of both sides over ``n`` sites so that the legs rise towards the middle site.

        For ``n >= 5`` the outer legs aim at 2, 4, 8, ... from the ends inward, so that the central tensor holds most
        of the parameters and the auxiliary tensors few; for fewer sites all legs aim at the same size. A prime side
        puts its factor in the middle and 1 elsewhere. The four matrix shapes of Liu, Gao et al. (ACL 2021) get the
        legs printed in their supplement when ``n`` is 5.

        Raises:
            MPOError: a size or ``n`` is not a positive integer.

        >>> Sites.balanced(384, 1536)
        Sites(out=(2, 4, 6, 4, 2), in_=(2, 4, 24, 4, 2))
        >>> Sites.balanced(768, 3072)
        Sites(out=(3, 4, 4, 4, 4), in_=(4, 4, 8, 6, 4))
        >>> Sites.balanced(257, 12, n=3)
        Sites(out=(1, 257, 1), in_=(2, 3, 2))
        """
        out, in_, n = _positive("out", out), _positive("in_", in_), _positive("n", n)
        if n == 5 and (out, in_) in _PAPER_LEGS:
            legs = _PAPER_LEGS[out, in_]
            return cls(*legs)
        return cls(_arrange(_spread(out, n), mirrored=False), _arrange(_spread(in_, n), mirrored=True))

    @classmethod
    def low_rank(cls, out: int, in_: int) -> Sites:
        """The two-site member whose chain is a plain low-rank factorisation: legs ``(out, 1), (1, in_)``.

        Truncating it is the truncated SVD of the matrix itself, or near it (see :meth:`mpo_tn.MPO.from_matrix`).

        >>> Sites.low_rank(6, 8).full_bonds
        (6,)
        """
        return cls((_positive("out", out), 1), (1, _positive("in_", in_)))

    @property
    def is_low_rank(self) -> bool:
        """Whether these are the legs of :meth:`low_rank`.

        >>> Sites.low_rank(6, 8).is_low_rank, Sites((1, 6), (8, 1)).is_low_rank
        (True, False)
        """
        return len(self) == 2 and self.out[1] == 1 and self.in_[0] == 1

    def __repr__(self) -> str:
        return f"Sites(out={list_text(self.out)}, in_={list_text(self.in_)})"

    def __len__(self) -> int:
        return len(self.out)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the pairs ``(out_k, in_k)``."""
        return iter(zip(self.out, self.in_, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix shape ``(prod(out), prod(in_))``."""
        return math.prod(self.out), math.prod(self.in_)

    @property
    def sizes(self) -> tuple[int, ...]:
        """``out_k * in_k`` of every site."""
        return tuple(out * in_ for out, in_ in self)

    @property
    def full_bonds(self) -> tuple[int, ...]:
        """The ``n - 1`` bonds that hold any matrix exactly: ``min(prod_{m<=k} out_m in_m, prod_{m>k} out_m in_m)``."""
        left, right = (list(accumulate(sizes, mul)) for sizes in (self.sizes, self.sizes[::-1]))
        return tuple(map(min, left[:-1], right[-2::-1]))

    @property
    def center(self) -> int:
        """The site of the central tensor: the middle one, or the larger of the two middle ones."""
        middle = len(self) // 2
        if len(self) % 2 == 0 and self.sizes[middle - 1] > self.sizes[middle]:
            return middle - 1
        return middle

    def num_parameters(self, bonds: Sequence[int]) -> int:
        """How many numbers the cores hold at these ``n - 1`` inner bonds.

        >>> Sites(out=(3, 4, 4, 4, 4), in_=(4, 4, 8, 6, 4)).num_parameters((12, 64, 64, 16))
        168336
        """
        if len(bonds) != len(self) - 1:
            raise MPOError(f"bonds={list_text(bonds)} has {len(bonds)} entries: {len(self)} sites have {len(self) - 1}")
        around = (1, *(_positive(f"bond {k}", bond) for k, bond in enumerate(bonds)), 1)
        return sum(left * size * right for left, size, right in zip(around, self.sizes, around[1:], strict=False))

    def capped_bonds(self, cap: int) -> tuple[int, ...]:
        """The full bonds, none above ``cap``.

        >>> Sites(out=(3, 4, 4, 4, 4), in_=(4, 4, 8, 6, 4)).capped_bonds(64)
        (12, 64, 64, 16)
        """
        cap = _positive("cap", cap)
        return tuple(min(cap, full) for full in self.full_bonds)

    def largest_cap(self, max_parameters: float) -> int:
        """The largest single cap on the bonds whose chain holds at most ``max_parameters`` numbers.

        Raises:
            MPOError: even bonds of 1 hold more.

        >>> Sites.low_rank(10, 10).largest_cap(45)
        2
        """
        widest = max(self.full_bonds, default=1)
        least = self.num_parameters(self.capped_bonds(1))
        if not least <= max_parameters:  # not a number, too
            raise MPOError(
                f"legs out={self.out}, in_={self.in_} need {least} parameters at bond 1, more than the "
                f"{max_parameters:g} asked for: keep more, or use other legs"
            )
        low, high = 1, widest
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_parameters(self.capped_bonds(middle)) <= max_parameters:
                low = middle
            else:
                high = middle - 1
        return low


def checked_sites(sites: object) -> Sites:
    """The sites themselves.

    Raises:
        MPOError: they are none.
    """
    if not isinstance(sites, Sites):
        raise MPOError(f"sites={sites!r} is not a Sites: pass Sites(out=..., in_=...) or Sites.balanced(out, in_)")
    return sites


def check_legs(sites: Sites, shape: Sequence[int]) -> None:
    """Refuse legs that do not multiply to the shape of a matrix (out, in).

    Raises:
        MPOError: they do not.
    """
    if sites.shape != tuple(shape):
        raise MPOError(
            f"legs out={list_text(sites.out)}, in_={list_text(sites.in_)} multiply to {shape_text(sites.shape)} and "
            f"the matrix is {tuple(shape)}: legs must multiply exactly, see Sites.balanced"
        )


def _positive(name: str, value: int) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise MPOError(f"{name}={value!r} must be a positive integer")
    return number


def _checked_legs(name: str, legs: Sequence[int]) -> tuple[int, ...]:
    try:
        checked = tuple(_positive(f"leg {k} of {name}", leg) for k, leg in enumerate(legs))
    except TypeError:
        raise MPOError(f"{name}={legs!r} must be a sequence of positive integers, one per site") from None
    if not checked:
        raise MPOError(f"{name}=() has no legs: a chain has at least one site")
    return checked


def _spread(size: int, n: int) -> list[int]:
    """``n`` divisors with product ``size``, ascending; the largest is what the others leave."""
    legs: list[int] = []
    rest = size
    for position in range(n - 1):  # outermost pair first
        left = n - position
        ideal = 2.0 ** (position // 2 + 1) if n >= 5 else rest ** (1 / left)
        # A leg above the left-th root of what remains would leave too little for the sites further in.
        fitting = (d for d in _divisors(rest) if d**left <= rest)
        leg = min(fitting, key=lambda d: (abs(math.log(d / ideal)), -d))
        legs.append(leg)
        rest //= leg
    return sorted([*legs, rest])


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _arrange(ascending: list[int], *, mirrored: bool) -> tuple[int, ...]:
    """Small legs at the ends, the largest in the middle; ``mirrored`` starts at the other end."""
    left = ascending[1::2] if mirrored else ascending[0::2]
    right = ascending[0::2] if mirrored else ascending[1::2]
    return (*left, *reversed(right))
