"""The product of two chains, truncated while it is formed, and how far any chain is from it, without its wide bonds.

The part of the product to the right of a bond is known by its Gram matrix (bond of a, bond of b; the same again), found
once from the last site to the first. Whatever is cut from the left then has a known norm: with isometries ``U_j`` to
the left of it, what bond k loses is ``(1 - U_k U_k^H) M_k R_k`` with ``|D R|**2 = tr(D G D^H)``, and what different
bonds lose is orthogonal. So errors add up in squares, whoever chose the isometries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains.algebra import check_pair, one
from mpo_tn.chains.canonical import ChainT, centred, check_cores, moved, stored
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, Size, unit
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    EPS,
    Array,
    adjoint,
    conjugate,
    dtype_name,
    eps,
    left_factor,
    namespace,
    storage_notes,
    tails,
    to_numpy,
)
from mpo_tn.sites import Sites
from mpo_tn.truncate.sweep import Budget, sweep_report
from mpo_tn.truncation import BondReport, Report, Truncation

_NINE_DIGITS = 1e-10
"""How far a reported error may be off, as a fraction of itself, and still be called exact."""

_C = 4
"""The rounding of a Gram matrix, a site, in units of ``eps(float64)`` times its norm."""


@dataclass
class Loss:
    """What a bond loses, ``norm * 2**exponent``, and ``scale * 2**exponent``, as if the right part saw all."""

    norm: float
    scale: float
    exponent: float

    def over(self, exponent: int) -> tuple[float, float]:
        """Both as multiples of a power of two."""
        factor = 2.0 ** max(-1000.0, min(self.exponent - exponent, 1000.0))
        return self.norm * factor, self.scale * factor

    def step(self, kept: int, available: int, top: int, method: str) -> BondReport:
        """What happened at the bond, where the norm of all is ``2**top`` to twice that."""
        return BondReport(kept, available, math.ldexp(self.over(top)[0], top), method=method)


class Product:
    """``a @ b`` of two chains in double precision, site by site.

    Raises:
        MPOError: libraries, dtypes, devices or legs that do not fit; cores that are not finite.
    """

    def __init__(self, a: Chain, b: Chain) -> None:
        check_pair("multiply", a, b, same_legs=False)
        check_cores(a)
        check_cores(b)
        self.sites = Sites(a.sites.out, b.sites.in_)
        # Centred at the first site, the right parts of both are isometries, by which that of the product is tame.
        (self.a, first), (self.b, second) = centred(a, 0), centred(b, 0)
        self.exponent = first + second
        self.xp: Any = namespace(self.a[0])
        self.grams = self._grams()
        square = self.grams[0]
        value = max(float(np.real(to_numpy(square.array)).item()), 0.0)
        top = square.exponent + 2 * self.exponent
        self.size = Size(math.sqrt(value * 2.0 ** (top % 2)), top // 2)

    def __len__(self) -> int:
        return len(self.a)

    def _grams(self) -> list[Scaled]:
        """``R R^H`` of the right part R after every site, (a b, a b); at 0 that of all, 1 x 1."""
        xp, n = self.xp, len(self.a)
        found = [Scaled(one(self.a[0]))] * (n + 1)
        for k in range(n - 1, -1, -1):
            core, other = self.a[k], self.b[k]
            (left, _, _, right), (left_b, _, _, right_b) = core.shape, other.shape
            gram = xp.reshape(found[k + 1].array, (right, right_b, right, right_b))
            half = xp.tensordot(xp.tensordot(core, gram, axes=1), other, axes=((2, 3), (1, 3)))
            half = xp.tensordot(half, conjugate(other), axes=((3, 5), (3, 2)))  # (a, out, a', b, b', mid)
            whole = xp.tensordot(half, conjugate(core), axes=((1, 5, 2), (1, 2, 3)))  # (a, b, b', a')
            whole = xp.reshape(xp.permute_dims(whole, (0, 1, 3, 2)), (left * left_b, left * left_b))
            found[k] = unit((whole + adjoint(whole)) / 2, found[k + 1].exponent)
        return found

    def start(self) -> Scaled:
        """What is carried before the first site."""
        return Scaled(one(self.a[0])[None, :, :], self.exponent)

    def block(self, carried: Scaled, k: int) -> Scaled:
        """``carried`` (bond, bond of a, bond of b) times the cores of site k: (bond, out, in, bonds of a and b)."""
        xp = self.xp
        joined = xp.tensordot(
            xp.tensordot(carried.array, self.a[k], axes=((1,), (0,))), self.b[k], axes=((1, 3), (0, 1))
        )
        joined = xp.permute_dims(joined, (0, 1, 3, 2, 4))
        return unit(xp.reshape(joined, (*joined.shape[:3], -1)), carried.exponent)

    def carry(self, rows: Array, exponent: int, k: int) -> Scaled:
        """Rows (bond, bonds of a and b) after site k as what is carried on."""
        shape = (rows.shape[0], self.a[k].shape[3], self.b[k].shape[3])
        return unit(self.xp.reshape(rows, shape), exponent)

    def weigh(self, rows: Array, exponent: int, k: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The norm of every row times the right part after site k; without it; and the exponent of the former."""
        gram = self.grams[k + 1]
        real = self.xp.real if dtype_name(rows).startswith("complex") else (lambda array: array)
        squares = self.xp.sum(real((rows @ gram.array) * conjugate(rows)), axis=1)
        plain = self.xp.sum(real(rows * conjugate(rows)), axis=1)
        norm = float(np.linalg.norm(to_numpy(gram.array)))
        weights = np.sqrt(np.clip(to_numpy(squares), 0.0, None))
        return weights, np.sqrt(to_numpy(plain) * norm), exponent + gram.exponent / 2

    def follow(self, isometries: list[Array]) -> tuple[Scaled, list[Loss]]:
        """The best last core for left-isometric cores before it, and what each of these loses of the product."""
        losses: list[Loss] = []
        carried = self.start()
        for k, core in enumerate(isometries):
            block = self.block(carried, k)
            rows = self.xp.reshape(block.array, (-1, block.array.shape[3]))
            u = self.xp.reshape(core, (-1, core.shape[3]))
            inside = adjoint(u) @ rows
            losses.append(self.loss(rows - u @ inside, block.exponent, k))
            carried = self.carry(inside, block.exponent, k)
        return self.block(carried, len(self) - 1), losses

    def loss(self, rows: Array, exponent: int, k: int) -> Loss:
        """What is lost with rows (any, bonds of a and b) after site k, orthogonal to what is kept."""
        weights, scales, top = self.weigh(rows, exponent, k)
        return Loss(math.hypot(*weights), math.hypot(*scales), top)

    def report(
        self, steps: list[BondReport], losses: list[Loss], like: Chain, truncation: Truncation, lost: float
    ) -> Report:
        """The report of a chain whose cores lose so much; an upper bound where rounding hides more than its floor."""
        norm = abs(self.size.number("the norm of the product", "normalized() first, and log_norm()"))
        notes = storage_notes(like.cores[0])
        report = sweep_report(steps, norm, len(self), eps(like.cores[0]), truncation, notes, lost)
        report = replace(report, bound=None, lower_bound=None)
        scale = math.ldexp(math.hypot(*(loss.over(self.size.top)[1] for loss in losses)), self.size.top)
        hidden = math.sqrt(_C * len(self) * EPS["float64"]) * scale
        # An error far above it is off by half its square over the error.
        off = hidden if report.error == 0 else min(hidden, hidden * (hidden / (2 * report.error)))
        if off <= max(report.floor, _NINE_DIGITS * report.error):
            return report
        error = math.hypot(report.error, hidden)
        met = error <= truncation.budget(norm, 0.0, "")
        if truncation.strict and not met:
            raise MPOError(
                f"{truncation} cannot be told to be met: the error is {report.error:.6g} or up to {hidden:.3g} more, "
                'which rounding hides: use method="direct"'
            )
        hides = f"rounding hides up to {hidden:.3g} of the error, which is an upper bound with it"
        return replace(
            report,
            error=error,
            bound=error,
            lower_bound=0.0,
            exact=False,
            tolerance_met=met,
            notes=(*report.notes, hides),
        )


def zip_up(
    product: Product, like: Chain, truncation: Truncation
) -> tuple[list[Array], Scaled, list[BondReport], list[Loss]]:
    """One sweep that multiplies and truncates, site by site, from the first to the last.

    ::

        --C--A--        --U--C--A--
          |  |     ->     |  |  |        the singular vectors U are those of the part on the left; which of them are
          +--B--             +--B--      kept is told by what they weigh in the whole product

    Returns:
        Left-isometric cores, the last core, what happened at every bond, and what was lost there.
    """
    n = len(product)
    caps = truncation.caps(n - 1)
    xp, top = product.xp, product.size.top
    norm = abs(product.size.number("the norm of the product", "normalized() first, and log_norm()"))
    budget = Budget(truncation.budget(norm, eps(like.cores[0]), dtype_name(like.cores[0])), n - 1)
    budget.scale(math.ldexp(1.0, top))
    cores: list[Array] = []
    steps: list[BondReport] = []
    losses: list[Loss] = []
    carried = product.start()
    for k in range(n - 1):
        block = product.block(carried, k)
        shape = block.array.shape
        found = _best_basis(product, xp.reshape(block.array, (-1, shape[3])), block.exponent, k, budget, caps[k])
        kept = found.image.shape[0]
        losses.append(found.loss)
        steps.append(losses[-1].step(kept, found.available, top, "zipup"))
        budget.spend(found.loss.over(top)[0])
        cores.append(xp.reshape(found.u, (*shape[:3], kept)))
        carried = product.carry(found.image, block.exponent, k)
    return cores, product.block(carried, n - 1), steps, losses


@dataclass
class _Basis:
    """Orthonormal columns that are kept, ``u^H rows``, what is lost, and how many there were."""

    u: Array
    image: Array
    loss: Loss
    available: int


def _best_basis(product: Product, rows: Array, exponent: int, k: int, budget: Budget, cap: int | None) -> _Basis:
    """The better one of two bases of rows (any, bonds of a and b) after site k.

    Singular vectors of the rows themselves resolve what weighs little. Eigenvectors of ``rows G rows^H`` are the best
    there are, as far as half the digits tell.
    """
    xp = product.xp
    first = left_factor(rows, gram=False).u
    image = adjoint(first) @ rows
    turn = left_factor(image @ product.grams[k + 1].array @ adjoint(image), gram=False).u
    found: list[_Basis] = []
    for u, part in ((first, image), (first @ turn, adjoint(turn) @ image)):
        weights, scales, top = product.weigh(part, exponent, k)
        order = np.argsort(-weights, kind="stable")
        tail = tails(np.asarray([Loss(float(weight), 0.0, top).over(product.size.top)[0] for weight in weights[order]]))
        kept = budget.rank(tail, cap)
        cut, index = order[kept:], xp.asarray(np.sort(order[:kept]), device=array_api_compat.device(u))
        loss = Loss(math.hypot(*weights[cut]), math.hypot(*scales[cut]), top)
        found.append(_Basis(xp.take(u, index, axis=1), xp.take(part, index, axis=0), loss, len(order)))
    return min(found, key=lambda basis: (basis.image.shape[0], basis.loss.norm))


def finished(product: Product, cores: list[Array], last: Scaled, like: ChainT) -> tuple[ChainT, float]:
    """A chain of left-isometric cores and a last one, stored like another; and the fraction lost by that."""
    center = product.sites.center
    moved_cores, exponent = moved([*cores, last.array], last.exponent, (len(cores), len(cores)), center)
    return stored(like.with_cores(moved_cores, (center, center)), like.cores[0], exponent)
