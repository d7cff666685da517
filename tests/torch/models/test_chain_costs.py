"""What chains are expected to cost, from few fits: against what they do cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.adapter import Snapshot
from helpers.planning import TEXT, Chain, log_ratios, measured, vectors
from helpers.tiny_models import tiny
from hypothesis import given
from hypothesis import strategies as st

import mpo_tn.torch.models.chain_costs as chain_costs
from mpo_tn.planning.options import CHAINS, FAMILIES, K_LEGS, options
from mpo_tn.progress import silent
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.chain_costs import ChainCost
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.tradeoffs import tradeoffs


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(2, 10**6), st.integers(2, 10**6))
def test_between_two_fits_errors_go_with_a_power(first: float, second: float, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high) + 1
    missed = (max(first, second), min(first, second))
    cost = ChainCost((low, high), missed, 1.0, None)
    for numbers, expected in zip((low, high), missed, strict=True):
        assert cost.cut(numbers) == pytest.approx(expected)
    middle = math.sqrt(low * high)
    assert cost.cut(middle) == pytest.approx(math.sqrt(missed[0] * missed[1]))
    assert 0 <= cost.cut(10 * high) <= cost.cut(high) <= cost.cut(low) <= cost.cut(low / 10) <= 1 + 1e-12


def test_one_fit_says_the_same_of_all() -> None:
    assert ChainCost((10,), (0.3,), 1.0, None).cut(1000) == 0.3


@pytest.mark.slow
def test_costs_are_about_what_chains_cost() -> None:
    model = tiny("bert")
    before = Snapshot(model)
    found = measured(model, TEXT, first=3, families=FAMILIES)
    before.assert_same(model)
    ratios = log_ratios(model, found[:2], lambda option: option.is_fitted and option.width in (4, None))
    assert len(ratios) >= 10
    assert np.median(np.abs(ratios)) < 1


def test_matrices_that_are_alike_take_one_fit_for_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: dict[str, list[int]] = {}
    tried = chain_costs._Tries.tried

    def counting(self: chain_costs._Tries, spec: chain_costs.ModuleSpec) -> tuple[float, float | None]:
        fits.setdefault(self.unit.name, []).append(len(spec.sites))
        return tried(self, spec)

    monkeypatch.setattr(chain_costs._Tries, "tried", counting)
    found = measured(Chain(), vectors(), first=3, families=FAMILIES)
    first, second, _ = (fits[each.unit.name] for each in found)
    assert len(first) > 4
    assert sorted(sites > 2 for sites in second) == [False, True]
    assert set(found[0].chains) == set(found[1].chains)


def test_every_chain_has_a_cost_that_falls_with_what_it_keeps() -> None:
    for judged, rounded in ((True, True), (False, False)):
        for each in measured(Chain(), vectors(), judged=judged, first=3, families=FAMILIES, rounded=rounded):
            for family in (K_LEGS, CHAINS):
                assert any(option.family == family for option in each.options)
            for legs in each.chains:
                own = [o for o in each.options if o.spec is not None and o.spec.sites == legs and o.width is None]
                costs = [each.cost(o) for o in sorted(own, key=lambda o: o.numbers(0))]
                assert costs == sorted(costs, reverse=True)
                assert all(math.isfinite(cost) and cost >= 0 for cost in costs)


def test_nothing_is_fitted_where_no_chain_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_costs, "Fitter", None)
    samples, model = Samples.of(vectors()), Chain()
    units = find_units(model, "all-linear")[0]
    choices = [options("linear", *unit.matrix().shape, itemsize=4) for unit in units]
    found = tradeoffs(units, choices, calibrate(model, samples.batches), None, 128, silent)
    assert [dict(each.chains) for each in found] == [{}] * 3
