"""Plans under one budget: what is compared, that all of it fits, and limits of flops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.options import (
    BITS,
    CHAINS,
    DENSE,
    FAMILIES,
    K_LEGS,
    LOW_RANK,
    USUAL_FAMILIES,
    Option,
    options,
)
from mpo_tn.planning.search import USUAL, Candidate, Priced, candidates


def priced(
    seed: int, matrices: int, *, few: int | None = None, families: Sequence[str] = USUAL_FAMILIES
) -> list[list[Priced]]:
    """Options of matrices of some sizes with costs that fall with what they take; some of them only."""
    rng = np.random.default_rng(seed)
    found: list[list[Priced]] = []
    for _ in range(matrices):
        out, in_ = (int(side) for side in rng.choice([16, 48, 64, 96, 200], 2))
        every = options("linear", out, in_, itemsize=4, families=families)
        chosen: list[Option] = every
        if few is not None:
            chosen = [every[k] for k in sorted(rng.choice(len(every), min(few, len(every)), replace=False))]
        hurts = {BITS: rng.random(), LOW_RANK: rng.random(), DENSE: 0.0, K_LEGS: rng.random(), CHAINS: rng.random()}
        row: list[Priced] = []
        for option in chosen:
            size = option.bytes(4 * out * in_, 4)
            numbers = out * in_ if option.spec is None else min(out * in_, option.spec.num_parameters)
            cost = float(hurts[option.family] * np.exp(-6 * size / (4 * out * in_)) * rng.uniform(0.8, 1.2))
            row.append(Priced(option, size, 2.0 * numbers, cost))
        found.append(row)
    return found


def least(options: list[list[Priced]]) -> int:
    return sum(min(p.size for p in row) for row in options)


def picked(plan: Candidate, options: list[list[Priced]]) -> list[Priced]:
    return [row[k] for row, k in zip(options, plan.chosen, strict=True)]


@pytest.mark.guarantee("within-budget")
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(1.0, 6.0), st.sampled_from([None, 7]))
def test_every_plan_fits_and_is_what_it_says(seed: int, matrices: int, share: float, few: int | None) -> None:
    options_ = priced(seed, matrices, few=few)
    budget = int(share * least(options_))
    plans = candidates(options_, budget)
    assert plans[0].name == "joint"
    assert len({plan.chosen for plan in plans}) == len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        rows = picked(plan, options_)
        assert sum(p.size for p in rows) == plan.size <= budget
        assert plan.expected == sum(p.cost for p in rows)


@given(st.integers(0, 2**31), st.floats(1.1, 6.0))
def test_the_best_uniform_plans_are_among_them(seed: int, share: float) -> None:
    """Also where another plan comes to the same: it then bears the mark."""
    options_ = priced(seed, 3)
    budget = int(share * least(options_))
    plans = candidates(options_, budget)
    for bits in (2, 3, 4, 5, 6, 8):
        own = [next((p for p in row if p.option.family == BITS and p.option.width == bits), row[0]) for row in options_]
        assert own[0].option.family == BITS
        if sum(p.size for p in own) <= budget:
            (same,) = [plan for plan in plans if picked(plan, options_) == own]
            assert same.baseline
    for plan in plans:
        families = {p.option.family for p in picked(plan, options_)}
        widths = {p.option.width for p in picked(plan, options_) if p.option.family != DENSE}
        if plan.baseline:
            assert families <= {plan.baseline, DENSE}
            assert len(widths) == 1


def test_a_uniform_rank_fills_the_budget() -> None:
    """A little more for every matrix would not fit."""
    options_ = priced(1, 4)
    budget = 3 * least(options_)
    (plan,) = [plan for plan in candidates(options_, budget) if plan.name == "low rank in 4 bits"]
    larger = 0
    for row, p in zip(options_, picked(plan, options_), strict=True):
        sizes = sorted(q.size for q in row if q.option.family == LOW_RANK and q.option.width == 4)
        larger += sizes[min(sizes.index(p.size) + 1, len(sizes) - 1)]
    assert plan.size <= budget < larger


@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(0.05, 1.0), st.floats(1.0, 6.0))
def test_flops_are_limited(seed: int, matrices: int, share: float, room: float) -> None:
    options_ = priced(seed, matrices, few=6)
    assume(any(p.cost > 0 for row in options_ for p in row))
    budget, most = int(room * least(options_)), sum(max(p.flops for p in row) for row in options_)
    limit = share * most
    within = [
        cost
        for chosen in itertools.product(*options_)
        if sum(p.size for p in chosen) <= budget and sum(p.flops for p in chosen) <= limit
        for cost in [sum(p.cost for p in chosen)]
    ]
    try:
        plans = candidates(options_, budget, max_flops=limit)
    except MPOError:
        # Both limits together are looked for along prices only, which may miss what leaves little room.
        assert not within or least(options_) > 0.3 * budget
        return
    for plan in plans:
        rows = picked(plan, options_)
        assert sum(p.size for p in rows) <= budget
        assert sum(p.flops for p in rows) <= limit * (1 + 1e-9)
        assert plan.expected >= min(within) - 1e-12


def test_flops_at_any_price() -> None:
    """The one matrix that saves flops costs much by it: no price is too high if nothing else fits."""
    named = {str(option): option for option in options("linear", 64, 64, itemsize=4)}
    dense, bits, rank = (named[name] for name in ("dense", "dense in 4 bits", "rank 16"))
    row = [Priced(dense, 16384, 8192.0, 0.0), Priced(bits, 2000, 8192.0, 1e-9), Priced(rank, 4096, 2048.0, 1e6)]
    plans = candidates([row], 5000, max_flops=3000.0)
    assert [str(p.option) for p in picked(plans[0], [row])] == ["rank 16"]


def test_what_does_not_fit_names_the_least() -> None:
    options_ = priced(0, 2)
    with pytest.raises(MPOError, match=f"takes {least(options_)} and the budget is {least(options_) - 1}"):
        candidates(options_, least(options_) - 1)
    with pytest.raises(MPOError, match=r"flops a token at the most .* fewest flops are"):
        candidates(options_, 10 * least(options_), max_flops=1.0)


@given(st.integers(0, 2**31), st.floats(1.0, 6.0))
def test_with_chains_what_would_be_chosen_without_is_compared(seed: int, share: float) -> None:
    options_ = priced(seed, 3, families=FAMILIES)
    usual = [[p for p in row if p.option.family in USUAL_FAMILIES] for row in options_]
    budget = int(share * least(usual))
    plans = candidates(options_, budget)
    (without,) = [plan for plan in plans if plan.baseline == USUAL]
    alone = candidates(usual, budget)[0]
    assert without.expected == pytest.approx(alone.expected)
    assert {p.option.family for p in picked(without, options_)} <= set(USUAL_FAMILIES)
    assert all(sum(p.size for p in picked(plan, options_)) == plan.size <= budget for plan in plans)
    for plan in plans:
        if plan.name.startswith(("k-legs", "chains")):
            # A matrix that cannot be one becomes what it would without chains.
            for p, row in zip(picked(plan, options_), options_, strict=True):
                own = plan.name.split(",")[0]
                there = own in {q.option.family for q in row}
                assert p.option.family == own if there else p.option.family in USUAL_FAMILIES
