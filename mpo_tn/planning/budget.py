"""One budget over all matrices: of each one option is chosen so that the sum of their costs is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpo_tn.exceptions import MPOError


@dataclass(frozen=True)
class Point:
    """What an option takes of the budget, and what it costs in quality; both of at least 0."""

    size: int
    cost: float


def spend(options: Sequence[Sequence[Point]], budget: int) -> list[int]:
    """Choose one option of each list so that the sizes fit the budget and the sum of the costs is small.

    Args:
        options: for each matrix what it could become.
        budget: the sum of sizes that is allowed, in whatever unit the sizes have.

    Returns:
        The index of the chosen option, for each list.

    Guarantee (within-budget): the sizes of what is chosen add up to at most the budget.
    Guarantee (near-least-cost): the cost is above the least possible by at most what the Lagrangian relaxation leaves
    open, which is less than the largest cost step of a single matrix; without a better single move or exchange of two.

    The relaxation puts a price on size: at a price each matrix by itself takes the option of least
    ``cost + price * size``. The price is bisected until the sizes just fit (only options on the lower convex hull are
    ever taken), then what is left of the budget is spent by moves of one matrix and exchanges of two.

    Cost: ``O(n m log)`` for n lists of m options, and ``O(n^2 m^2)`` NumPy operations a round of exchanges.

    Raises:
        MPOError: the smallest options do not fit; the message says how much they take.

    >>> few, many = [Point(1, 9.0), Point(4, 1.0)], [Point(1, 3.0), Point(4, 2.0)]
    >>> spend([few, many], 5), spend([few, many], 8), spend([few, many], 2)
    ([1, 0], [1, 1], [0, 0])
    """
    tables = [(np.array([p.size for p in row], dtype=np.int64), np.array([p.cost for p in row])) for row in options]
    least = sum(int(sizes.min()) for sizes, _ in tables)
    if least > budget:
        raise MPOError(f"the smallest plan takes {least} and the budget is {budget}")
    chosen = _at_price(tables, *_price_bounds(tables, budget), budget)
    _exchange(tables, chosen, budget)
    return chosen


_Table = tuple[np.ndarray, np.ndarray]


def _best(tables: Sequence[_Table], price: float) -> list[int]:
    """The option of each list of least cost plus price; of equal ones the smallest."""
    found: list[int] = []
    for sizes, costs in tables:
        total = costs + price * sizes if math.isfinite(price) else sizes.astype(float)
        ties = np.flatnonzero(total <= total.min())
        found.append(int(ties[np.lexsort((costs[ties], sizes[ties]))[0]]))
    return found


def _total(tables: Sequence[_Table], chosen: Sequence[int]) -> int:
    return sum(int(sizes[k]) for (sizes, _), k in zip(tables, chosen, strict=True))


def _price_bounds(tables: Sequence[_Table], budget: int) -> tuple[float, float]:
    """A price at which the choice may be too large, and one at which it fits."""
    if _total(tables, _best(tables, 0.0)) <= budget:
        return 0.0, 0.0
    high = max(float(np.ptp(costs)) for _, costs in tables) + 1e-300
    while _total(tables, _best(tables, high)) > budget:
        high *= 4
        if not math.isfinite(high):
            break
    return 0.0, high


def _at_price(tables: Sequence[_Table], low: float, high: float, budget: int) -> list[int]:
    best = _best(tables, high)
    for _ in range(100):
        middle = math.sqrt(low * high) if low > 0 else high / 16
        if not low < middle < high:
            break
        tried = _best(tables, middle)
        if _total(tables, tried) <= budget:
            high, best = middle, tried
            if low == 0 and high < 1e-280:
                break
        else:
            low = middle
            if high / low < 1 + 1e-12:
                break
    return best


def _exchange(tables: Sequence[_Table], chosen: list[int], budget: int) -> None:
    """Moves of one matrix and exchanges of two, in place, as long as the cost goes down."""
    for _ in range(4 * len(tables) + 8):
        room = budget - _total(tables, chosen)
        sizes = [row[0] - row[0][k] for row, k in zip(tables, chosen, strict=True)]
        costs = [row[1] - row[1][k] for row, k in zip(tables, chosen, strict=True)]
        gain, move = 0.0, None
        for i, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            fits = np.where(size <= room, cost, np.inf)
            k = int(fits.argmin())
            if fits[k] < gain:
                gain, move = float(fits[k]), ((i, k),)
        if move is None and len(tables) <= 400:
            move = _best_pair(sizes, costs, room)
        if move is None:
            return
        for i, k in move:
            chosen[i] = k


def _best_pair(sizes: list[np.ndarray], costs: list[np.ndarray], room: int) -> tuple[tuple[int, int], ...] | None:
    """The exchange of two options, one grown and one shrunk, that lowers the cost most."""
    gain, move = -1e-15 * max(float(np.abs(cost).max()) for cost in costs), None
    # For every size that a shrinking matrix frees, the cheapest way to free as much by another one.
    for i, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
        better = np.flatnonzero((cost < 0) & (size > room))
        for k in better:
            need = room - size[k]
            for j, (other_size, other_cost) in enumerate(zip(sizes, costs, strict=True)):
                if j == i:
                    continue
                fits = np.where(other_size <= need, other_cost, np.inf)
                m = int(fits.argmin())
                if cost[k] + fits[m] < gain:
                    gain, move = float(cost[k] + fits[m]), ((i, int(k)), (j, m))
    return move
