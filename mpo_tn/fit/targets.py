"""What a fit aims at: a dense matrix or a chain, seen through the cores around a few sites."""

from __future__ import annotations

import math
from typing import Protocol

import array_api_compat

from mpo_tn.chains.algebra import distance
from mpo_tn.chains.canonical import canonicalize, check_cores, wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.unfolding import interleave
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    check_matrix,
    conjugate,
    describe,
    frobenius_norm,
    namespace,
    widen,
)
from mpo_tn.sites import Sites


class Target(Protocol):
    """A target, as seen through the isometries left and right of a few sites.

    ``advance_left`` and ``advance_right`` take one more core, at site k, into an environment; ``local`` is what the
    target looks like between two environments, one pair of legs per site in between.
    """

    norm: float

    def edge(self) -> Array:
        """The environment left of the first site."""
        ...

    def end(self) -> Array:
        """The environment right of the last site."""
        ...

    def advance_left(self, left: Array, core: Array, k: int) -> Array:
        """The environment left of site k + 1, from the one left of site k and the left-isometric core there."""
        ...

    def advance_right(self, right: Array, core: Array, k: int) -> Array:
        """The environment right of site k - 1, from the one right of site k and the right-isometric core there."""
        ...

    def local(self, left: Array, right: Array, k: int, width: int) -> Array:
        """The best block (bond, legs of ``width`` sites from k on, bond) between two environments."""
        ...

    def error(self, cores: list[Array]) -> float:
        """How far cores, of any form, are from the target, measured on the difference itself."""
        ...


class MatrixTarget:
    """A dense target. Left environment: the target projected, (bond, rest); right one: the isometry, (bond, rest)."""

    def __init__(self, matrix: Array, sites: Sites) -> None:
        self.tensor = interleave(widen(matrix), sites.out, sites.in_)
        self.sites = sites
        self.norm = frobenius_norm(self.tensor)

    def edge(self) -> Array:
        """The target as one row: nothing is projected yet."""
        return namespace(self.tensor).reshape(self.tensor, (1, -1))

    def end(self) -> Array:
        """The isometry of no sites."""
        return one(self.tensor)

    def advance_left(self, left: Array, core: Array, k: int) -> Array:
        """Project the rows of one more site."""
        xp = namespace(core)
        rows = math.prod(core.shape[:3])
        return adjoint(xp.reshape(core, (rows, -1))) @ xp.reshape(left, (rows, -1))

    def advance_right(self, right: Array, core: Array, k: int) -> Array:
        """Take one more site into the isometry."""
        return namespace(core).reshape(to_right(core, right), (core.shape[0], -1))

    def local(self, left: Array, right: Array, k: int, width: int) -> Array:
        """What both projections leave of the target."""
        xp = namespace(left)
        legs = [leg for pair in list(self.sites)[k : k + width] for leg in pair]
        block = xp.reshape(left, (-1, right.shape[1])) @ adjoint(right)
        return xp.reshape(block, (left.shape[0], *legs, right.shape[0]))

    def error(self, cores: list[Array]) -> float:
        """The norm of the difference, entry by entry."""
        right = self.end()
        for k in range(len(cores) - 1, -1, -1):
            right = self.advance_right(right, cores[k], k)
        return frobenius_norm(self.edge() - right)


class ChainTarget:
    """A target that is a chain. Environments are overlaps, (bond of the fit, bond of the target)."""

    def __init__(self, chain: Chain) -> None:
        self.chain = canonicalize(wide_chain(chain), chain.sites.center)
        self.norm = frobenius_norm(self.chain.cores[chain.sites.center])

    def edge(self) -> Array:
        """The overlap of no sites."""
        return one(self.chain.cores[0])

    def end(self) -> Array:
        """The overlap of no sites."""
        return one(self.chain.cores[0])

    def advance_left(self, left: Array, core: Array, k: int) -> Array:
        """The overlap of all sites up to k."""
        xp = namespace(core)
        return xp.tensordot(conjugate(core), from_left(left, self.chain.cores[k]), axes=((0, 1, 2), (0, 1, 2)))

    def advance_right(self, right: Array, core: Array, k: int) -> Array:
        """The overlap of all sites from k on."""
        xp = namespace(core)
        passed = xp.tensordot(self.chain.cores[k], right, axes=((3,), (1,)))
        return xp.tensordot(conjugate(core), passed, axes=((1, 2, 3), (1, 2, 3)))

    def local(self, left: Array, right: Array, k: int, width: int) -> Array:
        """The target's cores between two overlaps."""
        xp = namespace(left)
        block = left
        for core in self.chain.cores[k : k + width]:
            block = xp.tensordot(block, core, axes=1)
        return xp.tensordot(block, right, axes=((-1,), (1,)))

    def error(self, cores: list[Array]) -> float:
        """By QR of the difference chain."""
        return distance(self.chain, Chain(tuple(cores)))


def target_of(target: Array | Chain, chain: Chain) -> Target:
    """A matrix or a chain as what ``chain`` is fitted to.

    Raises:
        MPOError: another shape, legs, library, dtype or device, entries that are not finite.
    """
    if isinstance(target, Chain):
        check_cores(target)
        like, legs = describe(target.cores[0]), target.sites
        if legs != chain.sites:
            raise MPOError(f"the target has legs {legs} and the MPO {chain.sites}: a fit keeps the legs")
    else:
        target = check_matrix(target)
        like = describe(target)
        if tuple(target.shape) != chain.shape:
            raise MPOError(f"the target is {tuple(target.shape)} and the MPO {chain.shape}: a fit keeps the legs")
    if like != describe(chain.cores[0]):
        raise MPOError(
            f"the target is {like} and the MPO {describe(chain.cores[0])}: use one library, dtype and device"
        )
    goal = ChainTarget(target) if isinstance(target, Chain) else MatrixTarget(target, chain.sites)
    if not math.isfinite(goal.norm):
        raise MPOError(f"the norm of the target of shape {chain.shape} overflows double precision: scale it down")
    return goal


def from_left(matrix: Array, core: Array) -> Array:
    """A matrix times a core, over its left bond."""
    return namespace(core).tensordot(matrix, core, axes=1)


def to_right(core: Array, matrix: Array) -> Array:
    """A core times a matrix, over its right bond."""
    return namespace(core).tensordot(core, matrix, axes=1)


def one(like: Array) -> Array:
    """The 1 x 1 matrix 1, in the library, dtype and device of an array."""
    return namespace(like).ones((1, 1), dtype=like.dtype, device=array_api_compat.device(like))
