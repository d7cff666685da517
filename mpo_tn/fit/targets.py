"""What a fit aims at: a dense matrix or a chain, seen through the cores around a few sites."""

from __future__ import annotations

import math
from typing import Protocol

from mpo_tn.chains.algebra import difference, one
from mpo_tn.chains.canonical import centred, check_cores
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, Size, unit, unit_cores
from mpo_tn.chains.unfolding import interleave
from mpo_tn.exceptions import MPOError, shape_text
from mpo_tn.fit.local_problem import LocalProblem, expand
from mpo_tn.fit.metric import Metric, dense, like
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    check_matrix,
    conjugate,
    describe,
    frobenius_norm,
    is_single,
    namespace,
    times_power_of_two,
    widen,
)
from mpo_tn.sites import Sites

FROBENIUS = "frobenius"
"""What reports call the metric in which all entries count the same."""


class Target(Protocol):
    """A target, as seen through the isometries left and right of a few sites.

    ``advance_left`` and ``advance_right`` take one more core, at site k, into an environment; ``local`` is what the
    target looks like between two environments, one pair of legs per site in between.
    """

    norm: float
    metric: str

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

    def local(self, left: Array, right: Array, k: int, width: int, now: Scaled | None) -> Scaled:
        """The best block (bond, legs of ``width`` sites from k on, bond) between two environments, of norm near 1.

        ``now`` is the core that is there, given for a single site: where the best is found step by step, the block is
        no worse than that.
        """
        ...

    def error(self, cores: list[Array], exponent: int = 0) -> float:
        """How far ``2**exponent`` times cores, of any form, are from the target, measured on the difference itself."""
        ...


class MatrixTarget:
    """A dense target. Left environment: the target projected, (bond, rest); right one: the isometry, (bond, rest)."""

    metric = FROBENIUS

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

    def local(self, left: Array, right: Array, k: int, width: int, now: Scaled | None) -> Scaled:
        """What both projections leave of the target."""
        xp = namespace(left)
        legs = [leg for pair in list(self.sites)[k : k + width] for leg in pair]
        block = xp.reshape(left, (-1, right.shape[1])) @ adjoint(right)
        return unit(xp.reshape(block, (left.shape[0], *legs, right.shape[0])))

    def error(self, cores: list[Array], exponent: int = 0) -> float:
        """The norm of the difference, entry by entry."""
        wide, taken = unit_cores(cores)
        carried = Scaled(self.end(), exponent + taken)
        for k in range(len(cores) - 1, 0, -1):
            carried = Scaled(self.advance_right(carried.array, wide[k], k), carried.exponent)
            # Few cores of norm 1 stay in range.
            carried = carried if (len(cores) - k) % 8 else unit(carried.array, carried.exponent)
        last = times_power_of_two(wide[0], carried.exponent)
        return frobenius_norm(self.edge() - self.advance_right(carried.array, last, 0))


class ChainTarget:
    """A target that is a chain. Environments are overlaps, (bond of the fit, bond of the target), of norm 1 to 2.

    Of a chain that has little in common with the target they fall with every site, out of any range: hence
    :class:`~mpo_tn.chains.scaled.Scaled` arrays.
    """

    metric = FROBENIUS

    def __init__(self, chain: Chain) -> None:
        center = chain.sites.center
        self.cores, self.exponent = centred(chain, center)
        size = Size(frobenius_norm(self.cores[center]), self.exponent)
        self.norm = abs(size.number("the norm of the target", "normalized() of both, and log_norm()"))

    def edge(self) -> Scaled:
        """The overlap of no sites."""
        return Scaled(one(self.cores[0]))

    def end(self) -> Scaled:
        """The overlap of no sites."""
        return Scaled(one(self.cores[0]))

    def advance_left(self, left: Scaled, core: Array, k: int) -> Scaled:
        """The overlap of all sites up to k."""
        passed = from_left(left.array, self.cores[k])
        joined = namespace(core).tensordot(conjugate(core), passed, axes=((0, 1, 2), (0, 1, 2)))
        return unit(joined, left.exponent)

    def advance_right(self, right: Scaled, core: Array, k: int) -> Scaled:
        """The overlap of all sites from k on."""
        xp = namespace(core)
        passed = xp.tensordot(self.cores[k], right.array, axes=((3,), (1,)))
        return unit(xp.tensordot(conjugate(core), passed, axes=((1, 2, 3), (1, 2, 3))), right.exponent)

    def local(self, left: Scaled, right: Scaled, k: int, width: int, now: Scaled | None) -> Scaled:
        """The target's cores between two overlaps."""
        xp = namespace(left.array)
        block = left.array
        for core in self.cores[k : k + width]:
            block = xp.tensordot(block, core, axes=1)
        block = xp.tensordot(block, right.array, axes=((-1,), (1,)))
        return unit(block, self.exponent + left.exponent + right.exponent)

    def error(self, cores: list[Array], exponent: int = 0) -> float:
        """By QR of the difference chain."""
        wide, taken = unit_cores(cores)
        return difference((self.cores, self.exponent), (wide, exponent + taken)).length("the error of the fit")


class MetricTarget:
    """A dense target in a metric. Both environments are the isometries themselves, (out, in, bond), (bond, out, in)."""

    def __init__(self, matrix: Array, metric: Metric) -> None:
        self.matrix = metric.target(matrix)
        self.weight, self.metric = metric, metric.name
        self.second = _scaled(like(metric.second, self.matrix))
        self.outer = None if metric.outer is None else _scaled(like(metric.outer, self.matrix))
        self.norm = metric.weighed(self.matrix)
        self.single = is_single(matrix)

    def edge(self) -> Array:
        """The isometry of no sites."""
        return one(self.matrix)[None, :, :]

    def end(self) -> Array:
        """The isometry of no sites."""
        return self.edge()

    def advance_left(self, left: Array, core: Array, k: int) -> Array:
        """Take one more site into the isometry."""
        xp = namespace(core)
        joined = xp.permute_dims(to_right(left, core), (0, 2, 1, 3, 4))
        return xp.reshape(joined, (left.shape[0] * core.shape[1], left.shape[1] * core.shape[2], core.shape[3]))

    def advance_right(self, right: Array, core: Array, k: int) -> Array:
        """Take one more site into the isometry."""
        xp = namespace(core)
        joined = xp.permute_dims(to_right(core, right), (0, 1, 3, 2, 4))
        return xp.reshape(joined, (core.shape[0], core.shape[1] * right.shape[1], core.shape[2] * right.shape[2]))

    def local(self, left: Array, right: Array, k: int, width: int, now: Scaled | None) -> Scaled:
        """The core, improved: by the exact solution where that is cheap, else by conjugate gradients from the core."""
        if now is None:
            raise MPOError("a metric weighs one site at a time: use sites=1")
        problem = LocalProblem(left, right, self.second, self.outer, self.single)
        core = times_power_of_two(now.array, now.exponent)
        return unit(core + problem.step(core, self.matrix - expand(core, left, right)))

    def error(self, cores: list[Array], exponent: int = 0) -> float:
        """The weighted norm of the difference."""
        return self.weight.weighed(self.matrix - times_power_of_two(dense(cores), exponent))


def _scaled(moment: Array) -> Array:
    """A moment divided by a power of two, so that single precision holds it: no step depends on its scale."""
    return times_power_of_two(moment, -binary_exponent(frobenius_norm(moment)))


def target_of(target: Array | Chain, chain: Chain, metric: Metric | None = None) -> Target:
    """A matrix or a chain as what ``chain`` is fitted to.

    Raises:
        MPOError: another shape, legs, library, dtype or device, entries that are not finite; a chain in a metric.
    """
    if metric is not None and isinstance(target, Chain):
        raise MPOError("a fit to an MPO in a metric needs its matrix: pass target.to_matrix()")
    if isinstance(target, Chain):
        check_cores(target)
        kind, legs = describe(target.cores[0]), target.sites
        if legs != chain.sites:
            raise MPOError(f"the target has legs {legs} and the MPO {chain.sites}: a fit keeps the legs")
    else:
        target = check_matrix(target)
        kind = describe(target)
        if tuple(target.shape) != chain.shape:
            shapes = f"{tuple(target.shape)} and the MPO {shape_text(chain.shape)}"
            raise MPOError(f"the target is {shapes}: a fit keeps the legs")
    if kind != describe(chain.cores[0]):
        raise MPOError(
            f"the target is {kind} and the MPO {describe(chain.cores[0])}: use one library, dtype and device"
        )
    if isinstance(target, Chain):
        goal = ChainTarget(target)
    else:
        goal = MatrixTarget(target, chain.sites) if metric is None else MetricTarget(target, metric)
    if not math.isfinite(goal.norm):
        shape = shape_text(chain.shape)
        raise MPOError(f"the norm of the target of shape {shape} overflows double precision: scale it down")
    return goal


def from_left(matrix: Array, core: Array) -> Array:
    """A matrix times a core, over its left bond."""
    return namespace(core).tensordot(matrix, core, axes=1)


def to_right(core: Array, matrix: Array) -> Array:
    """A core times a matrix, over its right bond."""
    return namespace(core).tensordot(core, matrix, axes=1)
