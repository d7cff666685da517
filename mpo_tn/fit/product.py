"""The product of two chains as what a chain is fitted to, without its wide bonds."""

from __future__ import annotations

import math

from mpo_tn.chains.canonical import centred
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, unit
from mpo_tn.fit.targets import FROBENIUS
from mpo_tn.linalg import Array, conjugate
from mpo_tn.truncate.product import Loss, Product


class ProductTarget(Product):
    """A target that is ``a @ b``. Environments are overlaps, (bond of the fit, bond of a, bond of b), of norm near 1.

    ::

        --C--        conjugated
          |
        --A--
          |
        --B--        and the legs of C with the out leg of A and the in leg of B
    """

    metric = FROBENIUS

    def __init__(self, a: Chain, b: Chain) -> None:
        super().__init__(a, b)
        self.norm = abs(self.size.number("the norm of the product", "normalized() of both, and log_norm()"))

    def edge(self) -> Scaled:
        """The overlap of no sites."""
        return Scaled(self.start().array)

    def end(self) -> Scaled:
        """The overlap of no sites."""
        return Scaled(self.start().array)

    def advance_left(self, left: Scaled, core: Array, k: int) -> Scaled:
        """The overlap of all sites up to k."""
        block = self.block(left, k)
        rows = self.xp.tensordot(conjugate(core), block.array, axes=((0, 1, 2), (0, 1, 2)))
        return self.carry(rows, block.exponent, k)

    def advance_right(self, right: Scaled, core: Array, k: int) -> Scaled:
        """The overlap of all sites from k on."""
        xp = self.xp
        passed = xp.tensordot(self.a[k], right.array, axes=((3,), (1,)))  # (a, out, mid, fit, b)
        passed = xp.tensordot(passed, self.b[k], axes=((2, 4), (1, 3)))  # (a, out, fit, b, in)
        joined = xp.tensordot(conjugate(core), passed, axes=((1, 2, 3), (1, 4, 2)))
        return unit(joined, right.exponent)

    def local(self, left: Scaled, right: Scaled, k: int, width: int, now: Scaled | None) -> Scaled:
        """The cores of both between two overlaps."""
        xp = self.xp
        block, legs = left, list[int]()
        for site in range(k, k + width):
            found = self.block(Scaled(xp.reshape(block.array, (-1, *block.array.shape[-2:])), block.exponent), site)
            legs += found.array.shape[1:3]
            block = self.carry(xp.reshape(found.array, (-1, found.array.shape[3])), found.exponent, site)
        rows = xp.reshape(block.array, (block.array.shape[0], -1))
        whole = rows @ xp.permute_dims(xp.reshape(right.array, (right.array.shape[0], -1)), (1, 0))
        whole = xp.reshape(whole, (left.array.shape[0], *legs, right.array.shape[0]))
        return unit(whole, block.exponent + right.exponent + self.exponent)

    def error(self, cores: list[Array], exponent: int = 0) -> float:
        """From what each core loses, with the last one's own gap; see :mod:`mpo_tn.truncate.product`."""
        wide, taken = centred(Chain(tuple(cores)), len(cores) - 1)
        last, losses = self.follow(wide[:-1])
        gap = last.plus(Scaled(-wide[-1], exponent + taken)).size()
        parts = [*losses, Loss(abs(gap.mantissa), 0.0, gap.exponent)]
        return math.ldexp(math.hypot(*(part.over(self.size.top)[0] for part in parts)), self.size.top)

    def improved(self, fitted: Chain, before: list[Loss]) -> tuple[list[Array], Scaled, list[Loss]] | None:
        """The left-isometric cores of a fit, the best last one and what they lose, if that is less than before."""
        cores, _ = centred(fitted, len(fitted) - 1)
        last, losses = self.follow(cores[:-1])
        now, earlier = (math.hypot(*(loss.over(self.size.top)[0] for loss in part)) for part in (losses, before))
        return (cores[:-1], last, losses) if now < earlier else None
