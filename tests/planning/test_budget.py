"""One budget over many matrices, against trying everything; and that it takes no time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.budget import Point, spend

# Few sizes and costs, so that there are ties; some costs that differ by many orders.
COSTS = st.one_of(
    st.integers(0, 9).map(float), st.floats(0, 10), st.floats(1e-9, 1e9), st.integers(-3, 3).map(lambda k: 10.0**k)
)
ROWS = st.lists(st.builds(Point, st.integers(0, 12), COSTS), min_size=1, max_size=5)


def total(options: Sequence[Sequence[Point]], chosen: Sequence[int]) -> tuple[int, float]:
    picked = [row[k] for row, k in zip(options, chosen, strict=True)]
    return sum(point.size for point in picked), sum(point.cost for point in picked)


def largest_step(options: Sequence[Sequence[Point]]) -> float:
    """Of all matrices the largest step down on the lower convex hull, found from its definition: an option is on the
    hull if at some price no other one is better."""
    largest = 0.0
    for row in options:
        points = sorted({(p.size, p.cost) for p in row})
        frontier = [p for p in points if all(q == p or q[0] > p[0] or q[1] > p[1] for q in points)]
        hull = [
            p
            for p in frontier
            if not any(
                a[0] < p[0] < b[0] and a[1] + (b[1] - a[1]) * (p[0] - a[0]) / (b[0] - a[0]) < p[1]
                for a, b in itertools.product(frontier, repeat=2)
            )
        ]
        largest = max([largest, *(a[1] - b[1] for a, b in itertools.pairwise(hull))])
    return largest


def rounding(options: Sequence[Sequence[Point]]) -> float:
    """Sums of a few costs are off by less."""
    return 1e-11 * max(abs(point.cost) for row in options for point in row)


@pytest.mark.guarantee("within-budget", "near-least-cost")
@given(st.lists(ROWS, min_size=1, max_size=4), st.integers(0, 30))
def test_it_fits_and_is_near_the_least(options: list[list[Point]], budget: int) -> None:
    everything = [total(options, chosen) for chosen in itertools.product(*(range(len(row)) for row in options))]
    fitting = [cost for size, cost in everything if size <= budget]
    if not fitting:
        with pytest.raises(MPOError, match=f"takes {min(everything)[0]} and the budget is {budget}"):
            spend(options, budget)
        return
    size, cost = total(options, spend(options, budget))
    assert size <= budget
    assert cost <= min(fitting) + largest_step(options) + rounding(options)


@pytest.mark.guarantee("near-least-cost")
@given(st.lists(ROWS, min_size=2, max_size=5), st.integers(0, 30))
def test_no_change_of_one_or_two_is_better(options: list[list[Point]], budget: int) -> None:
    try:
        chosen = spend(options, budget)
    except MPOError:
        return
    _, cost = total(options, chosen)
    places = [(i, k) for i, row in enumerate(options) for k in range(len(row))]
    for (i, k), (j, m) in itertools.combinations_with_replacement(places, 2):
        if i == j and k != m:
            continue
        other = list(chosen)
        other[i], other[j] = k, m
        room, found = total(options, other)
        assert room > budget or found >= cost - rounding(options)


def test_two_matrices_are_least_exactly() -> None:
    """An exchange of two is then everything."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes, costs = rng.integers(1, 40, (2, 9)), rng.random((2, 9))
        options = [
            [Point(int(s), float(c)) for s, c in zip(*row, strict=True)] for row in zip(sizes, costs, strict=True)
        ]
        budget = int(rng.integers(10, 80))
        fitting = [
            cost
            for chosen in itertools.product(range(9), repeat=2)
            if (found := total(options, chosen))[0] <= budget
            for cost in [found[1]]
        ]
        if fitting:
            assert total(options, spend(options, budget))[1] <= min(fitting) + rounding(options)


def test_matrices_that_are_alike_share_the_budget() -> None:
    """At one price all of them are as good small as large: then as many are large as fit."""
    row = [Point(1, 5.0), Point(3, 1.0)]
    assert sum(spend([row] * 10, 17)) == 3


def test_the_relaxation_alone_is_not_enough() -> None:
    """What brings most for its size leaves no room for what brings more: it is given back."""
    options = [[Point(0, 10.0), Point(6, 0.0)], [Point(0, 11.0), Point(7, 0.0)]]
    assert spend(options, 7) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([[Point(1, 1.0)], []], "matrix 1 has no options"),
        ([[Point(1, float("nan"))]], "option 0 of matrix 0 costs nan"),
        ([[Point(1, 1.0), Point(2, float("inf"))]], "option 1 of matrix 0 costs inf"),
        ([[Point(3, 1.0)], [Point(4, 1.0)]], "takes 7 and the budget is 5"),
    ],
)
def test_bad_input(options: list[list[Point]], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        spend(options, 5)


def test_nothing_to_choose_takes_nothing() -> None:
    assert spend([], 0) == []


@pytest.mark.guarantee("within-budget")
@pytest.mark.slow
@settings(max_examples=3)
@given(st.integers(0, 99))
def test_two_hundred_matrices_take_no_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    options: list[list[Point]] = []
    for _ in range(200):
        sizes = rng.integers(1000, 200_000, 60)
        costs = rng.random() * 10 ** (-rng.random() * sizes / 50_000) * rng.uniform(0.5, 2, 60)
        options.append([Point(int(s), float(c)) for s, c in zip(sizes, costs, strict=True)])
    start = time.process_time()
    size, cost = total(options, spend(options, 200 * 60_000))
    assert time.process_time() - start < 5  # about 0.2 on a quiet core
    assert size <= 200 * 60_000
    assert cost < total(options, [min(range(60), key=lambda k: abs(row[k].size - 60_000)) for row in options])[1]
