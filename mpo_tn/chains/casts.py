"""Chains in another dtype, on another device."""

from __future__ import annotations

import sys
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains.algebra import dtype_of
from mpo_tn.chains.canonical import ChainT
from mpo_tn.chains.scaled import has_values, shared_out, unit
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import DOUBLE, EPS, dtype_name, is_half, library, namespace, to_jax


def astype(chain: ChainT, dtype: Any) -> ChainT:
    """The chain in another dtype. See :meth:`mpo_tn.MPO.astype`."""
    first = chain.cores[0]
    xp = namespace(first)
    if dtype is None:
        raise MPOError("dtype=None is no dtype: name one, such as 'float32'")
    wanted = dtype_of(xp, dtype)
    before, after = dtype_name(first), (getattr(wanted, "__name__", None) or str(wanted)).rsplit(".", maxsplit=1)[-1]
    if before == after:
        return chain
    if after in DOUBLE and library(first) == "jax":
        to_jax(np.empty(0, after))  # refused where JAX would cut it to single precision
    if before.startswith("complex") and not after.startswith("complex"):
        raise MPOError(f"complex cores cannot become {after} without losing their imaginary part: use complex64")
    # Isometries are what they are to the digits of their dtype: with more digits, or very few, they no longer are.
    keeps = EPS[after] >= EPS[before] and not is_half(first) and after not in ("float16", "bfloat16")
    interval = chain.canonical_interval if keeps else None
    if not all(map(has_values, chain.cores)):
        return chain.with_cores((xp.astype(core, wanted) for core in chain.cores), interval)
    # By digits first, so that what one core cannot hold finds room in the others.
    parts = [unit(core) for core in chain.cores]
    cast = [xp.astype(part.array, wanted) for part in parts]
    low, high = (0, len(chain) - 1) if interval is None else interval
    inside = range(low, high + 1)
    placed = shared_out(cast, [part.exponent for part in parts], inside, "the MPO")
    return chain.with_cores(placed, interval)


def to_device(chain: ChainT, device: Any) -> ChainT:
    """The chain on another device. See :meth:`mpo_tn.MPO.to`."""
    kind = library(chain.cores[0])
    target = device
    try:
        if kind == "jax" and isinstance(device, str):
            name, _, number = device.partition(":")
            target = sys.modules["jax"].devices(name)[int(number or 0)]  # loaded already: there is an array of it
        elif kind == "torch":
            target = sys.modules["torch"].device(device)  # a dtype would do for torch's own to()
        cores = [array_api_compat.to_device(core, target) for core in chain.cores]
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise MPOError(f"device={device!r} is none that {kind} arrays can be moved to here: {error}") from error
    return chain.with_cores(cores, chain.canonical_interval)
