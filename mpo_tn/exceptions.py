"""The one error that users of this package have to catch, and what its messages are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

_SHOWN = 16
"""The most entries of a list that are printed; of a longer one the first and the last few."""


_LONGEST = 2000
"""Bytes of a message: more says less."""


class MPOError(ValueError):
    """A wrong argument, matrix, model or file.

    The message names the offending value and says what to do instead. Nothing has been changed when it is raised,
    unless the docstring of what raises it says what has.

    >>> from mpo_tn import Sites
    >>> Sites(out=(2, 0), in_=(4, 1))
    Traceback (most recent call last):
        ...
    mpo_tn.exceptions.MPOError: leg 1 of out=0 must be a positive integer

    Guarantee (bounded-messages): a message has at most 2,000 bytes, whatever names and values it is made of: of a
    longer one the middle is left out, so that what is wrong and what to do about it stay.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(bounded_text(arg) if isinstance(arg, str) else arg for arg in args))


def bounded_text(text: str, most: int = _LONGEST) -> str:
    """A text, or the begin and the end of one that has more bytes than that.

    >>> bounded_text("no " + "x" * 5000 + ": name another", 110)
    'no xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx [... 4,947 bytes ...] : name another'
    """
    raw = text.encode(errors="surrogatepass")
    if len(raw) <= most:
        return text
    kept = most - 40
    begin, end = raw[: kept * 4 // 5], raw[len(raw) - kept // 5 :]
    left = f" [... {len(raw) - len(begin) - len(end):,} bytes ...] "
    return left.join(part.decode(errors="ignore") for part in (begin, end))


def whole_number(value: Any) -> int | None:
    """The value as an int, or None if it is no whole number: a bool, a float, an array of several."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_real(value: Any) -> bool:
    """Whether it is a real number of any library, and no bool."""
    return not isinstance(value, bool) and isinstance(value, Real)


def count_text(number: int) -> str:
    """A whole number of any size in a few characters.

    >>> count_text(4096), count_text(2**14300)
    ('4096', 'about 10**4304.7')
    """
    return str(number) if abs(number) < 10**18 else f"about 10**{math.log10(number):.1f}"


def shape_text(shape: Iterable[int]) -> str:
    """A shape as Python prints it, if its numbers are not too large for that.

    >>> shape_text((4, 2**4000))
    '(4, about 10**1204.1)'
    """
    sizes = tuple(shape)
    return str(sizes) if max(sizes, default=0) < 10**18 else f"({', '.join(map(count_text, sizes))})"


def list_text(values: Sequence[Any]) -> str:
    """A tuple as Python prints it, or the ends of a long one and its length.

    >>> list_text((2, 3)), list_text(range(500))
    ('(2, 3)', '(0, 1, 2, 3, 4, 5, ..., 498, 499: 500 in all)')
    """
    if len(values) <= _SHOWN:
        return str(tuple(values))
    first, last = ", ".join(map(str, values[:6])), ", ".join(map(str, values[-2:]))
    return f"({first}, ..., {last}: {len(values)} in all)"


def clipped(text: str, most: int = 200) -> str:
    """A text of a file as a part of an error message: not all of it, if it is long.

    >>> clipped("a" * 300, 60)
    'aaaaaaaaaaaaaaaa [... 280 bytes ...] aaaa'
    """
    return bounded_text(text, most)
