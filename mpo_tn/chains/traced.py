"""Norms, inner products and traces of chains that JAX traces: numbers of JAX, which have gradients.

A power of two is taken out at every site here as well, but as an array: nothing is looked at during a trace.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from mpo_tn.chains.algebra import check_pair, check_square, one
from mpo_tn.chains.chain import Chain
from mpo_tn.linalg import Array, conjugate, full_precision, is_half, is_traced, namespace


@dataclass(frozen=True)
class TracedSize:
    """The number ``mantissa * 2**exponent`` of two scalars of JAX; as :class:`mpo_tn.chains.scaled.Size`."""

    mantissa: Array
    exponent: Array

    @property
    def log(self) -> Array:
        """The natural logarithm of its absolute value; ``-inf`` for 0."""
        xp = namespace(self.mantissa)
        return xp.log(xp.abs(self.mantissa)) + self.exponent * math.log(2)

    @property
    def phase(self) -> Array:
        """The number over its absolute value; 0 for 0."""
        size = namespace(self.mantissa).abs(self.mantissa)
        return self.mantissa / namespace(size).where(size > 0, size, 1)

    def number(self, what: str, instead: str) -> Array:
        """The number itself, infinite or 0 where it is out of the range of its dtype: nobody can look at it."""
        return _times_power_of_two(self.mantissa, self.exponent)

    def root(self) -> TracedSize:
        """The square root of one that is real and not negative."""
        xp = namespace(self.mantissa)
        return TracedSize(xp.sqrt(self.mantissa * 2 ** (self.exponent % 2)), self.exponent // 2)


def any_traced(*chains: Any) -> bool:
    """Whether JAX is tracing any core; what is no chain has none."""
    return any(is_traced(core) for chain in chains if isinstance(chain, Chain) for core in chain.cores)


def inner(a: Chain, b: Chain) -> TracedSize:
    """``sum conj(a) * b`` over all entries, in the dtype of the cores, single precision at least."""
    check_pair("take the inner product", a, b, same_legs=True)
    carried, exponent = one(_wide(a.cores[0])), 0
    xp = namespace(carried)
    precision = full_precision(xp)
    for core, other in zip(map(_wide, a.cores), map(_wide, b.cores), strict=True):
        passed = xp.tensordot(carried, other, axes=1, **precision)
        carried = xp.tensordot(conjugate(core), passed, axes=((0, 1, 2), (0, 1, 2)), **precision)
        carried, exponent = _unit(carried, exponent)
    return TracedSize(carried[0, 0], exponent)


def trace(chain: Chain) -> TracedSize:
    """The trace, in the dtype of the cores, single precision at least."""
    check_square(chain)
    carried, exponent = one(_wide(chain.cores[0])), 0
    xp = namespace(carried)
    for core in map(_wide, chain.cores):
        matrix = xp.linalg.trace(xp.permute_dims(core, (0, 3, 1, 2)))
        carried, exponent = _unit(xp.tensordot(carried, matrix, axes=1, **full_precision(xp)), exponent)
    return TracedSize(carried[0, 0], exponent)


def norm(chain: Chain) -> TracedSize:
    """The Frobenius norm, as the root of the inner product with itself."""
    found = inner(chain, chain)
    return TracedSize(namespace(found.mantissa).real(found.mantissa), found.exponent).root()


def _wide(core: Array) -> Array:
    xp = namespace(core)
    return xp.astype(core, xp.float32) if is_half(core) else core


def _unit(carried: Array, exponent: Any) -> tuple[Array, Array]:
    """An array of largest entry from 1/2 to 1, and its exponent, which is a constant to gradients."""
    jax: Any = sys.modules["jax"]
    xp = namespace(carried)
    _, taken = xp.frexp(jax.lax.stop_gradient(xp.max(xp.abs(carried))))
    return _times_power_of_two(carried, -taken), exponent + taken


def _times_power_of_two(array: Array, exponent: Array) -> Array:
    """In three steps, of which each is in range where the result is."""
    xp = namespace(array)
    unit = xp.ones((), dtype=xp.real(array).dtype)
    third = exponent // 3
    for step in (third, third, exponent - 2 * third):
        array = array * xp.ldexp(unit, step)
    return array
