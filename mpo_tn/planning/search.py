"""Which plans to compare under one budget: chosen together, of one family, and the uniform ones that people use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.budget import Point, spend
from mpo_tn.planning.options import BITS, CHAINS, DENSE, FACTOR_WIDTHS, K_LEGS, LOW_RANK, WIDTHS, Option

USUAL = "joint of integers and low rank"
"""The baseline of plans with chains: what would be chosen without them."""

_BY_MATRIX = {
    BITS: "integers, bits chosen by matrix",
    LOW_RANK: "low rank, rank and bits by matrix",
    K_LEGS: "k-legs, bond and bits by matrix",
    CHAINS: "chains, bonds and bits by matrix",
}

_PRICES = 40
"""So many prices of a flop are tried."""


@dataclass(frozen=True)
class Priced:
    """One option of one matrix: what it takes of the budget, flops of a token, and the expected cost."""

    option: Option
    size: int
    flops: float
    cost: float


@dataclass(frozen=True)
class Candidate:
    """A plan to compare: of each matrix one option, by its place in the list.

    ``baseline`` is the family of a uniform plan, also where another plan comes to the same, or :data:`USUAL`; ``""``
    for others.
    """

    name: str
    chosen: tuple[int, ...]
    size: int
    expected: float
    baseline: str = ""


def candidates(priced: Sequence[Sequence[Priced]], budget: int, *, max_flops: float | None = None) -> list[Candidate]:
    """The plans that fit a budget: the joint one first, then those of some families, then uniform ones.

    Args:
        priced: the options of each matrix.
        budget: bytes for all matrices together, or numbers, whatever the sizes are.
        max_flops: flops of a token for all of them together, if they are limited.

    Returns:
        At least the joint plan. Uniform plans give every matrix as many bits, or as much of its size.

    Raises:
        MPOError: nothing fits.
    """
    every = [list(range(len(row))) for row in priced]
    there = {p.option.family for row in priced for p in row}
    found = [_joint("joint", priced, every, budget, max_flops)]

    def only(name: str, families: Collection[str], baseline: str = "") -> None:
        allowed = [
            [k for k in own if row[k].option.family in families]
            or [k for k in own if not row[k].option.is_fitted]
            or own
            for row, own in zip(priced, every, strict=True)
        ]
        found.append(_joint(name, priced, allowed, budget, max_flops, baseline))

    if there & {K_LEGS, CHAINS}:
        only(USUAL, (DENSE, BITS, LOW_RANK), USUAL)
    for family, name in _BY_MATRIX.items():
        if family in there:
            only(name, (family,))
    for bits in sorted(WIDTHS, reverse=True) if BITS in there else ():
        uniform = _pick(priced, lambda option, bits=bits: option.family == BITS and option.width == bits)
        found.append(_candidate(f"integers, {bits} bits", priced, uniform, BITS))
    for bits in FACTOR_WIDTHS if LOW_RANK in there else ():
        name = "low rank" if bits is None else f"low rank in {bits} bits"
        found.append(_candidate(name, priced, _uniform_rank(priced, bits, budget), LOW_RANK))
    kept = [plan for plan in found if plan is not None and _fits(plan, priced, budget, max_flops)]
    if not kept:
        raise _nothing_fits(priced, budget, max_flops)
    distinct: dict[tuple[int, ...], Candidate] = {}
    for plan in kept:
        first = distinct.setdefault(plan.chosen, plan)
        distinct[plan.chosen] = replace(first, baseline=first.baseline or plan.baseline)
    return list(distinct.values())


def _nothing_fits(priced: Sequence[Sequence[Priced]], budget: int, max_flops: float | None) -> MPOError:
    least = sum(min(option.size for option in row) for row in priced)
    if least > budget:
        return MPOError(
            f"the smallest plan takes {least} and the budget is {budget}: give more, or plan less of the model"
        )
    fewest = sum(min(option.flops for option in row) for row in priced)
    return MPOError(
        f"no plan was found that takes {budget} and {max_flops or 0:.4g} flops a token at the most (without a "
        f"limit on size the fewest flops are {fewest:.4g}): give more of either"
    )


def _fits(plan: Candidate, priced: Sequence[Sequence[Priced]], budget: int, max_flops: float | None) -> bool:
    flops = sum(row[k].flops for row, k in zip(priced, plan.chosen, strict=True))
    return plan.size <= budget and (max_flops is None or flops <= max_flops * (1 + 1e-9))


def _candidate(
    name: str, priced: Sequence[Sequence[Priced]], chosen: Sequence[int] | None, baseline: str = ""
) -> Candidate | None:
    if chosen is None:
        return None
    picked = [row[k] for row, k in zip(priced, chosen, strict=True)]
    return Candidate(name, tuple(chosen), sum(p.size for p in picked), sum(p.cost for p in picked), baseline)


def _joint(
    name: str, priced: Sequence[Sequence[Priced]], allowed: Sequence[Sequence[int]], budget: int,
    max_flops: float | None, baseline: str = "",
) -> Candidate | None:  # fmt: skip
    """The cheapest choice; where flops are limited, at the least price of a flop for which they fit."""

    def at(price: float) -> list[int] | None:
        tables = [
            [Point(row[k].size, row[k].cost + price * row[k].flops) for k in own]
            for row, own in zip(priced, allowed, strict=True)
        ]
        if sum(min(point.size for point in table) for table in tables) > budget:
            return None
        return [own[k] for own, k in zip(allowed, spend(tables, budget), strict=True)]

    def flops(chosen: Sequence[int]) -> float:
        return sum(row[k].flops for row, k in zip(priced, chosen, strict=True))

    chosen = at(0.0)
    if chosen is None or max_flops is None or flops(chosen) <= max_flops:
        return _candidate(name, priced, chosen, baseline)
    # At some price flops are all that counts.
    low, high = 0.0, max(p.cost for row in priced for p in row) / max_flops or 1.0
    best: list[int] | None = None
    for _ in range(_PRICES):
        middle = (low + high) / 2 if best is not None else high
        chosen = at(middle)
        assert chosen is not None
        if flops(chosen) <= max_flops:
            best, high = chosen, middle
        elif best is None:
            low, high = high, 8 * high
        else:
            low = middle
    return _candidate(name, priced, best, baseline)


def _pick(priced: Sequence[Sequence[Priced]], wanted: Callable[[Option], bool]) -> list[int] | None:
    """The option wanted of every matrix; one that does not have it is left dense if it may be."""
    chosen: list[int] = []
    for row in priced:
        places = [k for k, p in enumerate(row) if wanted(p.option)]
        places = places or [k for k, p in enumerate(row) if p.option.family == DENSE]
        if not places:
            return None
        chosen.append(places[0])
    return chosen


def _uniform_rank(priced: Sequence[Sequence[Priced]], bits: int | None, budget: int) -> list[int] | None:
    """Of every matrix the largest rank within one share of its largest size, the share as large as fits."""
    own: list[list[int]] = []
    for row in priced:
        ranks = [k for k, p in enumerate(row) if p.option.family == LOW_RANK and p.option.width == bits]
        ranks = ranks or [k for k, p in enumerate(row) if p.option.family == DENSE]
        if not ranks:
            return None
        own.append(sorted(ranks, key=lambda k: row[k].size))
    whole = [max(p.size for p in row) for row in priced]

    def at(share: float) -> list[int]:
        chosen: list[int] = []
        for row, ranks, size in zip(priced, own, whole, strict=True):
            within = [k for k in ranks if row[k].size <= share * size]
            chosen.append(within[-1] if within else ranks[0])
        return chosen

    low, high, best = 0.0, 1.0, None
    for _ in range(40):
        middle = (low + high) / 2
        chosen = at(middle)
        if sum(row[k].size for row, k in zip(priced, chosen, strict=True)) <= budget:
            low, best = middle, chosen
        else:
            high = middle
    return best
