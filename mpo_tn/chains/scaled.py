"""An array with a power of two beside it: what is carried along a chain, whose size soon leaves the range of any dtype.

Whatever goes from site to site (triangles, overlaps, projections) is made :func:`unit` at every site: a power of two is
taken out and its exponent kept, which changes no digit. A chain of any length then has a norm, if only as a logarithm.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo_tn.chains.balance import balanced
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    EPS,
    Array,
    binary_exponent,
    dtype_name,
    frobenius_norm,
    is_traced,
    times_power_of_two,
    widen,
)

TOP = {"float16": 15, "bfloat16": 127, "float32": 127, "complex64": 127, "float64": 1023, "complex128": 1023}
"""The exponent of the largest power of two of a dtype; that of its smallest normal number is ``1 - TOP``."""

_FAR = 200
"""Beyond this exponent of the norm of a core it may hold values so different that their squares are out of range."""

_STEP = 64
"""The power of two that is taken out of an array whose norm is beyond double precision, before it is measured again."""


@dataclass(frozen=True)
class Scaled:
    """``array * 2**exponent``."""

    array: Array
    exponent: int = 0

    def plus(self, other: Scaled) -> Scaled:
        """The sum. What is smaller by more than double precision can tell vanishes."""
        top = max(part.exponent for part in (self, other) if part.exponent == self.exponent or _any(part.array))
        first, second = (times_power_of_two(part.array, part.exponent - top) for part in (self, other))
        return unit(first + second, top)

    def times(self, other: Scaled) -> Scaled:
        """The last index contracted with the first of another; not made :func:`unit`."""
        return Scaled(join(self.array, other.array), self.exponent + other.exponent)

    def size(self) -> Size:
        """The 2-norm of all entries."""
        return Size(frobenius_norm(self.array), self.exponent)


@dataclass(frozen=True)
class Size:
    """The number ``mantissa * 2**exponent``, which may be beyond the range of double precision."""

    mantissa: float | complex
    exponent: int

    @property
    def log(self) -> float:
        """The natural logarithm of its absolute value; ``-inf`` for 0."""
        size = abs(self.mantissa)
        return math.log(size) + self.exponent * math.log(2) if size > 0 else -math.inf

    @property
    def phase(self) -> float | complex:
        """The number over its absolute value; 0 for 0."""
        size = abs(self.mantissa)
        return self.mantissa / size if size > 0 else self.mantissa

    @property
    def top(self) -> int:
        """The ``e`` with ``2**e <= size < 2**(e + 1)``; 0 for 0."""
        return binary_exponent(abs(self.mantissa)) + (self.exponent if self.mantissa else 0)

    @property
    def in_range(self) -> bool:
        """Whether double precision holds it with all its digits."""
        return not self.mantissa or 1 - TOP["float64"] <= self.top <= TOP["float64"]

    def number(self, what: str, instead: str) -> float | complex:
        """The number itself.

        Args:
            what: what it is, for messages.
            instead: the verbs that tell it all the same.

        Raises:
            MPOError: it is beyond the range of double precision, or below it and not 0.
        """
        if not self.in_range:
            beyond = "overflows" if self.top > 0 else "is below the range of"
            raise MPOError(f"{what}, {self}, {beyond} double precision: use {instead}")
        return self.rounded()

    def length(self, what: str) -> float:
        """The absolute value, of which less than double precision can tell apart from 0 is 0.

        Raises:
            MPOError: it is beyond the range of double precision.
        """
        size = Size(abs(self.mantissa), self.exponent)
        return abs(size.rounded() if size.top < 0 else size.number(what, "normalized() first"))

    def rounded(self) -> float | complex:
        """The number in double precision; 0 or of fewer digits below its range."""
        if isinstance(self.mantissa, complex):
            return complex(*(math.ldexp(part, self.exponent) for part in (self.mantissa.real, self.mantissa.imag)))
        return math.ldexp(self.mantissa, self.exponent)

    def __str__(self) -> str:
        if self.in_range:
            return f"{self.rounded():.6g}"
        whole, rest = divmod(self.log / math.log(10), 1)
        return f"about {10**rest:.3f}e{int(whole)}"


def join(left: Array, right: Array) -> Array:
    """The last index of one array contracted with the first of another, by one product of matrices."""
    bond = right.shape[0]
    return (left.reshape((-1, bond)) @ right.reshape((bond, -1))).reshape((*left.shape[:-1], *right.shape[1:]))


def has_values(array: Array) -> bool:
    """Whether the size of an array can be looked at: not while JAX or torch trace it, compile or map over it."""
    if is_traced(array) or "meta" in str(getattr(array, "device", "")):
        return False
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(array, torch.Tensor):
        return True
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(array))


def size_of(array: Array) -> float:
    """The 2-norm of all entries, also of a tensor whose gradient is wanted."""
    return frobenius_norm(array.detach() if hasattr(array, "detach") else array)


def unit(array: Array, exponent: int = 0) -> Scaled:
    """``array * 2**exponent`` as an array of norm from 1 to 2, or 0, and its exponent."""
    norm = size_of(array)
    if math.isinf(norm):
        array, exponent = times_power_of_two(array, -_STEP), exponent + _STEP
        norm = size_of(array)
    taken = binary_exponent(norm)
    return Scaled(times_power_of_two(array, -taken) if taken else array, exponent + taken)


def placed(part: Scaled, what: str) -> Array:
    """The array itself, in its dtype.

    Raises:
        MPOError: an entry is beyond the range of the dtype, or so much is below it that digits are lost.
    """
    if part.exponent == 0:
        return part.array
    part = unit(part.array, part.exponent)
    name, size = dtype_name(part.array), Size(size_of(part.array), part.exponent)
    with np.errstate(over="ignore", invalid="ignore"):
        array = times_power_of_two(part.array, part.exponent)
    entries = math.prod(array.shape)
    beyond = size.top >= TOP[name] and not math.isfinite(size_of(array))
    if beyond or (size.mantissa and size.top < lowest(name, entries) and lost(*_wide(part), array) > 0):
        raise MPOError(
            f"{what}, of norm {size}, is {'beyond' if beyond else 'below'} the range of {name}: use normalized() and "
            "log_norm(), or a wider dtype"
        )
    return array


def _wide(part: Scaled) -> tuple[Array, int]:
    return widen(part.array.detach() if hasattr(part.array, "detach") else part.array), part.exponent


def unit_cores(cores: Sequence[Array], low: int = 0, high: int | None = None) -> tuple[list[Array], int]:
    """Cores, those from ``low`` to ``high`` of norm from 1 to 2, or 0, and the sum of the exponents taken out."""
    found, inside = list(cores), slice(low, len(cores) if high is None else high + 1)
    parts, total = [unit(core) for core in found[inside]], 0
    if any(abs(part.exponent) > _FAR for part in parts):
        tame, total = balanced(found[inside])
        parts = [unit(core) for core in tame]
    found[inside] = [part.array for part in parts]
    return found, total + sum(part.exponent for part in parts)


def shared_out(cores: Sequence[Array], exponents: Sequence[int], where: Sequence[int], what: str) -> list[Array]:
    """``cores[k] * 2**exponents[k]``, each in the range of its dtype.

    Where one would leave it, and lose digits, all exponents are shared out evenly among the cores ``where``.

    Raises:
        MPOError: even so one leaves the range.
    """
    placed = list(exponents)
    sizes = [size_of(core) for core in cores]
    if not all(map(_fits, cores, sizes, placed)):
        total = sum(placed) + sum(binary_exponent(sizes[k]) for k in where)
        share, rest = divmod(total, len(where))
        placed = [0] * len(placed)
        for position, k in enumerate(where):
            placed[k] = share + (position < rest) - binary_exponent(sizes[k])
        if not all(map(_fits, cores, sizes, placed)):
            raise MPOError(
                f"{what} of {len(cores)} cores of norm about 2**{share} each is beyond the range of "
                f"{dtype_name(cores[0])}: use a wider dtype, or normalized()"
            )
    return [times_power_of_two(core, e) if e else core for core, e in zip(cores, placed, strict=True)]


def evened(cores: Sequence[Array]) -> list[Array]:
    """The same product, all powers of two shared out evenly, as far as they can be moved without losing digits."""
    found, total = unit_cores(cores)
    share, rest = divmod(total, len(found))
    exponents = [share + (k < rest) for k in range(len(found))]
    return shared_out(found, exponents, range(len(found)), "the sum")


def _fits(core: Array, size: float, exponent: int) -> bool:
    """Whether a core times a power of two has a norm in range, and keeps its digits."""
    if exponent == 0 or not 0 < size < math.inf:
        return True
    top, name = binary_exponent(size) + exponent, dtype_name(core)
    return lowest(name, math.prod(core.shape)) <= top <= TOP[name]


def lowest(name: str, entries: int) -> int:
    """The least exponent of the norm of so many entries at which a dtype keeps its digits: ``eps`` of the norm."""
    return 1 - TOP[name] + math.ceil(math.log2(entries) / 2)


def lost(core: Array, exponent: int, cast: Array) -> float:
    """The fraction of ``core * 2**exponent`` that a cast of it has lost; 0 unless it is more than its precision.

    Args:
        core: in double precision, of norm near 1.
        exponent: of any size.
        cast: what was stored.
    """
    size = frobenius_norm(core)
    gap = frobenius_norm(core - times_power_of_two(_wide(Scaled(cast))[0], -exponent)) if size > 0 else 0.0
    return gap / size if gap > EPS[dtype_name(cast)] * size else 0.0


def _any(array: Array) -> bool:
    return frobenius_norm(array) > 0
