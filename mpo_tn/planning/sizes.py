"""Sizes as people write them."""

from __future__ import annotations

import math

from mpo_tn.exceptions import MPOError, is_real


def size_of(text: str | int) -> int:
    """Bytes of a size such as ``"25MB"``, ``"1.5 GB"`` or a number; MB are 10**6 and MiB 2**20.

    Raises:
        MPOError: no such text, or below a byte.

    >>> size_of("25MB"), size_of("1.5 KiB"), size_of(1000)
    (25000000, 1536, 1000)
    """
    if not isinstance(text, str):
        if is_real(text) and 1 <= text < math.inf:
            return int(text)
        raise MPOError(f"size={text!r} is not a number of bytes, nor text such as 25MB")
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    compact = text.replace(" ", "").upper()
    digits = compact.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        number = float(digits) * units[compact[len(digits) :]]
    except (ValueError, KeyError):
        raise MPOError(f"size={text!r} is not a size: give for instance 25MB or 1.5GB") from None
    if not (math.isfinite(number) and number >= 1):
        raise MPOError(f"size={text!r} must be at least a byte")
    return int(number)
