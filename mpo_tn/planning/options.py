"""What a matrix could become: structures and bits to choose from, by family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.legs import legs_for
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.truncate.quantize import GROUP

DENSE = "dense"
BITS = "bits"
LOW_RANK = "low-rank"
K_LEGS = "k-legs"
CHAINS = "chains"

FAMILIES = (DENSE, BITS, LOW_RANK, K_LEGS, CHAINS)
"""All there are."""

USUAL_FAMILIES = (DENSE, BITS, LOW_RANK)
"""Those whose errors are known in closed form; what the others lose is known after a fit only."""

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of one-site options."""

FACTOR_WIDTHS: tuple[int | None, ...] = (2, 3, 4, 8, None)
"""Bits of the cores of low-rank options; None is the dtype of the weight."""

AUXILIARY_WIDTH = 8
"""Bits of the auxiliary tensors of a chain whose central tensor is in bits. In float16 chains of a MiniLM matrix are
8 % larger and have up to 5 % less error with 2 bits in the centre, none with 3 or 4: wider bonds bring as much."""

_SPLITS = (2, 4, 8)
_NUMBERS_OF_SITES = (3, 4, 5)

_MOST_KEPT = 0.35
"""Of the numbers of a matrix: above, low rank has less error and costs less to find."""

_RANKS = 24
_CAPS = 12
_LEAST_KEPT = 0.02
_STEP = 16
"""Ranks are multiples of this: groups and words are full then."""


@dataclass(frozen=True)
class Option:
    """One thing that a matrix could become. ``spec`` is None where it stays dense.

    ``family`` says how it errs: by rounding (``"bits"``), by what is cut, with or without bits (``"low-rank"``; two
    sites with legs (out / k, k), (k, in / k), ``"k-legs"``; three to five balanced sites, ``"chains"``) or not at all
    (``"dense"``).
    """

    family: str
    spec: ModuleSpec | None

    def bytes(self, dense_bytes: int, itemsize: int) -> int:
        """Bytes of the matrix."""
        return dense_bytes if self.spec is None else self.spec.bytes(itemsize)

    def numbers(self, weights: int) -> int:
        """How many numbers it holds in the place of so many weights."""
        return weights if self.spec is None else self.spec.num_parameters

    @cached_property
    def width(self) -> int | None:
        """Bits of its central tensor; None for the dtype of the weight."""
        return None if self.spec is None else self.spec.core_bits[self.spec.center]

    @property
    def rank(self) -> int | None:
        """The bond of a low-rank option."""
        return self.spec.bonds[0] if self.spec is not None and self.family == LOW_RANK else None

    @property
    def is_fitted(self) -> bool:
        """Whether its error is known after a fit only."""
        return self.family in (K_LEGS, CHAINS)

    def __str__(self) -> str:
        if self.spec is None:
            return "dense"
        bits = "" if self.width is None else f" in {self.width} bits"
        if self.family == K_LEGS:
            return f"{self.spec.sites.in_[0]}-legs, bond {self.spec.bonds[0]}{bits}"
        if self.family == CHAINS:
            return f"{len(self.spec.sites)} sites, bonds {','.join(map(str, self.spec.bonds))}{bits}"
        return f"rank {self.rank}{bits}" if self.rank else f"dense{bits}"


def options(
    kind: str,
    out: int,
    in_: int,
    *,
    itemsize: int,
    group: int = GROUP,
    families: Sequence[str] = USUAL_FAMILIES,
    rounded: bool = True,
) -> list[Option]:
    """What a matrix (out, in) could become, itself among it; only what is smaller than the matrix.

    Args:
        kind: see :class:`ModuleSpec`.
        out: rows.
        in_: columns.
        itemsize: bytes of a number of the matrix.
        group: columns that share a scale.
        families: to choose from; where nothing of them is smaller than the matrix, it stays.
        rounded: whether numbers may be held in bits.

    >>> found = options("linear", 384, 1536, itemsize=4)
    >>> [str(option) for option in found[:3]], len({option.family for option in found})
    (['dense', 'dense in 2 bits', 'dense in 3 bits'], 3)
    """
    whole = out * in_ * itemsize
    widths = FACTOR_WIDTHS if rounded else (None,)
    found: list[Option] = []
    if BITS in families and rounded:
        one = Sites((out,), (in_,))
        found += [Option(BITS, ModuleSpec(kind, one, (), out, in_, bits=(b,), group=group)) for b in WIDTHS]
    for family, legs, bonds in _chains(out, in_, families):
        plain = ModuleSpec(kind, legs, bonds, out, in_)
        found += [Option(family, plain if bits is None else in_bits(plain, bits, group)) for bits in widths]
    found = [option for option in found if option.spec is not None and option.spec.bytes(itemsize) < whole]
    return [Option(DENSE, None), *found] if DENSE in families or not found else found


def _chains(out: int, in_: int, families: Sequence[str]) -> Iterator[tuple[str, Sites, tuple[int, ...]]]:
    """Legs and bonds, by family."""
    every = ranks(out, in_)
    if LOW_RANK in families:
        for rank in every:
            yield LOW_RANK, Sites.low_rank(out, in_), (rank,)
    for k in _SPLITS if K_LEGS in families else ():
        if out % k == in_ % k == 0 and k < min(out, in_):
            # As many numbers as low rank of that rank.
            for bond in every:
                if bond * (out + in_) <= _MOST_KEPT * out * in_:
                    yield K_LEGS, Sites((out // k, k), (k, in_ // k)), (bond,)
    for n in _NUMBERS_OF_SITES if CHAINS in families else ():
        legs = legs_for(out, in_, n)
        if min(legs.sizes) > 1:
            for bonds in _caps(legs, out * in_):
                yield CHAINS, legs, bonds


def _caps(legs: Sites, weights: int) -> list[tuple[int, ...]]:
    """Bonds of a chain that keep shares of the weights in even steps of their logarithm."""
    found: list[tuple[int, ...]] = []
    for step in range(_CAPS):
        kept = _LEAST_KEPT * (_MOST_KEPT / _LEAST_KEPT) ** (step / (_CAPS - 1))
        try:
            found.append(legs.capped_bonds(legs.largest_cap(kept * weights)))
        except MPOError:  # bonds of 1 hold more
            continue
    return list(dict.fromkeys(found))


def in_bits(spec: ModuleSpec, bits: int, group: int) -> ModuleSpec:
    """With its central tensor in so many bits; of two sites both, which are about of one size."""
    auxiliary = bits if len(spec.sites) == 2 else max(bits, AUXILIARY_WIDTH)
    held = tuple(bits if k == spec.center else auxiliary for k in range(len(spec.sites)))
    return replace(spec, bits=held, group=group)


def ranks(out: int, in_: int) -> list[int]:
    """Ranks to choose from, few at the top and close below."""
    most = min(out, in_)
    step = _STEP if most >= 4 * _STEP else max(1, most // 8)
    count = max(most // step, 1)
    numbers = {round(count ** (k / (_RANKS - 1))) for k in range(_RANKS)} | {round(count * k / 8) for k in range(1, 9)}
    return sorted({min(step * max(number, 1), most) for number in numbers})
