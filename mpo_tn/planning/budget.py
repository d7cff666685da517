"""One budget over all matrices: of each one option is chosen so that the sum of their costs is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mpo_tn.exceptions import MPOError

_NO_GAIN = 1e-12
"""Exchanges that lower the cost by less than this, of the largest difference of costs in one matrix, are rounding."""


@dataclass(frozen=True)
class Point:
    """What an option takes of the budget, and what it costs in quality."""

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
    Guarantee (near-least-cost): the cost is above the least possible by less than the largest cost step of a single
    matrix, a step being one from an option to the next on the lower convex hull of cost over size; and no option in
    place of another, nor any two in place of two others, fits the budget and lowers the cost, but by rounding:
    ``1e-12`` of the largest difference of costs in one matrix.

    All matrices begin with their smallest option, and steps along their hulls are taken in the order of what they
    bring for their size, until the budget ends: that is the Lagrangian relaxation, at every price of size at once.
    What is left is spent by changes of one matrix or two, the best first.

    Cost: ``O(N log N)`` for N options in all, and about as much for every change that follows.

    Raises:
        MPOError: the smallest options do not fit (the message says how much they take), a matrix without options, or a
            cost that is no finite number.

    >>> few, many = [Point(1, 9.0), Point(4, 1.0)], [Point(1, 3.0), Point(4, 2.0)]
    >>> spend([few, many], 5), spend([few, many], 8)
    ([1, 0], [1, 1])
    """
    tables = [_worthwhile(row, number) for number, row in enumerate(options)]
    least = sum(table.sizes[0] for table in tables)
    if least > budget:
        raise MPOError(f"the smallest plan takes {least} and the budget is {budget}")
    if not tables:
        return []
    chosen = _along_hulls(tables, budget)
    _exchange(tables, chosen, budget)
    return [table.places[k] for table, k in zip(tables, chosen, strict=True)]


@dataclass(frozen=True)
class _Table:
    """The options of a matrix that no other one beats in size and cost both, from small and dear to large and cheap."""

    places: list[int]
    sizes: list[int]
    costs: list[float]


def _worthwhile(row: Sequence[Point], number: int) -> _Table:
    if not row:
        raise MPOError(f"matrix {number} has no options to choose from")
    found = _Table([], [], [])
    for k in sorted(range(len(row)), key=lambda k: (row[k].size, row[k].cost)):
        if not math.isfinite(row[k].cost):
            raise MPOError(f"option {k} of matrix {number} costs {row[k].cost}: costs are finite numbers")
        if not found.costs or row[k].cost < found.costs[-1]:
            found.places.append(k)
            found.sizes.append(int(row[k].size))
            found.costs.append(float(row[k].cost))
    return found


def _hull(table: _Table) -> list[int]:
    """The options on the lower convex hull of cost over size."""
    sizes, costs = table.sizes, table.costs
    hull: list[int] = []
    for k in range(len(sizes)):
        while len(hull) > 1:
            i, j = hull[-2:]
            if (costs[i] - costs[j]) * (sizes[k] - sizes[j]) > (costs[j] - costs[k]) * (sizes[j] - sizes[i]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _along_hulls(tables: Sequence[_Table], budget: int) -> list[int]:
    steps: list[tuple[float, int, int, int]] = []
    for i, table in enumerate(tables):
        hull, worth = _hull(table), math.inf
        for place, (a, b) in enumerate(pairwise(hull)):
            # Rounding must not turn the order of a matrix's own steps around.
            worth = min(worth, (table.costs[a] - table.costs[b]) / (table.sizes[b] - table.sizes[a]))
            steps.append((-worth, i, place, b))
    chosen, room = [0] * len(tables), budget - sum(table.sizes[0] for table in tables)
    ended: set[int] = set()
    for _, i, _, k in sorted(steps):
        needed = tables[i].sizes[k] - tables[i].sizes[chosen[i]]
        if needed > room:
            ended.add(i)  # smaller steps of others may still fit
        elif i not in ended:
            chosen[i], room = k, room - needed
    return chosen


def _exchange(tables: Sequence[_Table], chosen: list[int], budget: int) -> None:
    """Change one matrix or two, in place, as long as the cost goes down: the best change there is, each time."""
    owner = np.repeat(np.arange(len(tables)), [len(table.sizes) for table in tables])
    place = np.concatenate([np.arange(len(table.sizes)) for table in tables])
    sizes = np.concatenate([np.array(table.sizes, dtype=np.int64) for table in tables])
    costs = np.concatenate([np.array(table.costs) for table in tables])
    nothing = _NO_GAIN * max(table.costs[0] - table.costs[-1] for table in tables)
    while True:
        here_sizes = np.array([table.sizes[k] for table, k in zip(tables, chosen, strict=True)], dtype=np.int64)
        here_costs = np.array([table.costs[k] for table, k in zip(tables, chosen, strict=True)])
        room = budget - int(here_sizes.sum())
        change = _best_change(owner, sizes - here_sizes[owner], costs - here_costs[owner], room, -nothing)
        if change is None:
            return
        for move in change:
            chosen[owner[move]] = int(place[move])


def _best_change(
    owner: np.ndarray, sizes: np.ndarray, costs: np.ndarray, room: int, enough: float
) -> tuple[int, int] | None:
    """Two moves of different matrices that fit and lower the cost most, if that is below ``enough``.

    Every matrix has the move to where it is, so one of the two may be none. Of all moves in the order of their sizes,
    ``best[p]`` is the cheapest up to p; where that is of the same matrix as the first move, the cheapest of the others.
    """
    lowering = np.flatnonzero(costs < enough / 2)
    order = np.argsort(sizes, kind="stable")
    ranked = costs[order]
    last = np.searchsorted(sizes[order], room - sizes[lowering], side="right") - 1
    alone = lowering[sizes[lowering] <= room]
    change, gain = None, enough
    if len(alone):
        first = int(alone[costs[alone].argmin()])
        if costs[first] < gain:
            change, gain = (first, first), float(costs[first])
    lowering, last = lowering[last >= 0], last[last >= 0]
    best = _records(ranked)
    second = best[last]
    own = owner[order[second]] == owner[lowering]
    for number in np.unique(owner[lowering[own]]):
        others = _records(np.where(owner[order] == number, np.inf, ranked))
        mine = own & (owner[lowering] == number)
        second[mine] = others[last[mine]]
    different = owner[order[second]] != owner[lowering]
    total = np.where(different, costs[lowering] + ranked[second], np.inf)
    if len(total) and total.min() < gain:
        k = int(total.argmin())
        change = int(lowering[k]), int(order[second[k]])
    return change


def _records(values: np.ndarray) -> np.ndarray:
    """For every place the place of the least value so far."""
    least = np.minimum.accumulate(values)
    new = np.concatenate([[True], values[1:] < least[:-1]])
    return np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
