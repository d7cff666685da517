"""The one error that users of this package have to catch, and what tells numbers from what is none."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


class MPOError(ValueError):
    """A wrong argument, matrix, model or file.

    The message names the offending value and says what to do instead. Nothing has been changed when it is raised,
    unless the docstring of what raises it says what has.

    >>> from mpo_tn import Sites
    >>> Sites(out=(2, 0), in_=(4, 1))
    Traceback (most recent call last):
        ...
    mpo_tn.exceptions.MPOError: leg 1 of out=0 must be a positive integer
    """


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
