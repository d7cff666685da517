"""What a matrix could become: structures and bits to choose from, by family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.truncate.quantize import GROUP

BITS = "bits"
LOW_RANK = "low rank"
DENSE = "dense"

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of one-site options."""

FACTOR_WIDTHS: tuple[int | None, ...] = (2, 3, 4, 8, None)
"""Bits of the cores of low-rank options; None is the dtype of the weight."""

_RANKS = 24
_STEP = 16
"""Ranks are multiples of this: groups and words are full then."""


@dataclass(frozen=True)
class Option:
    """One thing that a matrix could become. ``spec`` is None where it stays dense.

    ``family`` says how it errs: by rounding (``"bits"``), by what is cut (``"low rank"``, with or without bits) or not
    at all (``"dense"``).
    """

    family: str
    spec: ModuleSpec | None

    def bytes(self, dense_bytes: int, itemsize: int) -> int:
        """Bytes of the matrix."""
        return dense_bytes if self.spec is None else self.spec.bytes(itemsize)

    @property
    def width(self) -> int | None:
        """Bits of its first core; None for the dtype of the weight."""
        return None if self.spec is None else self.spec.core_bits[0]

    @property
    def rank(self) -> int | None:
        """The bond of a low-rank option."""
        return self.spec.bonds[0] if self.spec is not None and self.spec.bonds else None

    def __str__(self) -> str:
        if self.spec is None:
            return "dense"
        bits = "" if self.width is None else f" in {self.width} bits"
        return f"rank {self.rank}{bits}" if self.rank else f"dense{bits}"


def options(
    kind: str, out: int, in_: int, *, itemsize: int, group: int = GROUP, families: Sequence[str] = (BITS, LOW_RANK)
) -> list[Option]:
    """What a matrix (out, in) could become, itself among it; only what is smaller than the matrix.

    >>> found = options("linear", 384, 1536, itemsize=4)
    >>> [str(option) for option in found[:3]], len({option.family for option in found})
    (['dense', 'dense in 2 bits', 'dense in 3 bits'], 3)
    """
    found = [Option(DENSE, None)]
    whole = out * in_ * itemsize
    if BITS in families:
        one = Sites((out,), (in_,))
        found += [Option(BITS, ModuleSpec(kind, one, (), out, in_, bits=(b,), group=group)) for b in WIDTHS]
    if LOW_RANK in families:
        pair = Sites.low_rank(out, in_)
        for bits in FACTOR_WIDTHS:
            for rank in ranks(out, in_):
                held = () if bits is None else (bits, bits)
                found.append(Option(LOW_RANK, ModuleSpec(kind, pair, (rank,), out, in_, bits=held, group=group)))
    return [option for option in found if option.spec is None or option.spec.bytes(itemsize) < whole]


def ranks(out: int, in_: int) -> list[int]:
    """Ranks to choose from, few at the top and close below."""
    most = min(out, in_)
    step = _STEP if most >= 4 * _STEP else max(1, most // 8)
    count = max(most // step, 1)
    numbers = {round(count ** (k / (_RANKS - 1))) for k in range(_RANKS)} | {round(count * k / 8) for k in range(1, 9)}
    return sorted({min(step * max(number, 1), most) for number in numbers})
