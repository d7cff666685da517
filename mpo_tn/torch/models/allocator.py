"""Memory that is free given back to the system, so that what a process holds is what it works on."""

from __future__ import annotations

import ctypes
from functools import cache

_THRESHOLD_NAME, _TRIM_NAME = -3, -1
"""M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of ``malloc.h``."""

_LARGE = 2**20
"""Bytes from which on an array has pages of its own."""


@cache
def give_back_large_blocks() -> bool:
    """Let arrays of a megabyte or more go back to the system as soon as they are freed, in this process from now on.

    The allocator of glibc learns from blocks that are freed to keep later ones: after one matrix of 23 MB it held four
    times as much. Fresh pages are zeroed, about 0.2 ms a megabyte, which is nothing beside a factorisation. Returns
    whether there was such an allocator; others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_THRESHOLD_NAME, _LARGE)) and bool(mallopt(_TRIM_NAME, _LARGE))
