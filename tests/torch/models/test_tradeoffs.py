"""What options are expected to cost: against what they do cost, and what is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.adapter import Snapshot
from helpers.planning import TEXT, Chain, log_ratios, measured, vectors
from helpers.tiny_models import tiny
from torch import nn
from transformers import BertModel

from mpo_tn import MPOError
from mpo_tn.planning.options import BITS, DENSE, LOW_RANK


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_costs_are_about_what_options_cost(family: str) -> None:
    model = tiny(family)
    before = Snapshot(model)
    found = measured(model, TEXT)
    before.assert_same(model)
    ratios = log_ratios(model, found[:4], lambda option: option.rank in (8, 16) or option.width in (2, 4))
    assert len(ratios) >= 20
    # Two or three options are tried and all others concluded: within a factor of two and a half, mostly.
    assert np.median(np.abs(ratios)) < 1.3


def test_costs_fall_with_what_is_given() -> None:
    for each in measured(tiny("bert"), TEXT):
        bits = sorted((o.width or 0, each.cost(o)) for o in each.options if o.family == BITS)
        assert [cost for _, cost in bits] == sorted((cost for _, cost in bits), reverse=True)
        ranks = sorted((o.rank or 0, each.cost(o)) for o in each.options if o.family == LOW_RANK and o.width is None)
        assert [cost for _, cost in ranks] == sorted((cost for _, cost in ranks), reverse=True)
        assert [each.cost(o) for o in each.options if o.family == DENSE] == [0.0]
        assert all(math.isfinite(each.cost(o)) and each.cost(o) >= 0 for o in each.options)


def test_without_text_errors_alone_count() -> None:
    for each in measured(tiny("bert"), TEXT, judged=False):
        assert each.sensitivity.rounding == each.sensitivity.cutting > 0


def test_what_d_does_not_see_counts_as_much_as_others() -> None:
    model = BertModel(tiny("bert").config).eval()
    found = {each.unit.name: each.sensitivity for each in measured(model, TEXT)}
    pooler = found.pop("pooler.dense")
    for kind in ("rounding", "cutting"):
        known = sorted(getattr(each, kind) for each in found.values())
        assert known[0] <= getattr(pooler, kind) <= known[-1]
        assert getattr(pooler, kind) > 0


def test_what_text_does_not_reach_counts_as_much_as_others() -> None:
    first, second, unreached = measured(Chain(), vectors())
    for kind in ("rounding", "cutting"):
        known = sorted(getattr(each.sensitivity, kind) for each in (first, second))
        assert known[0] <= getattr(unreached.sensitivity, kind) <= known[1]
        assert known[0] > 0


def test_a_model_that_breaks_by_rounding_names_the_matrix() -> None:
    """Its output is a number for the matrix as it is, and none for any other."""

    class Brittle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(24, 24)
            self.watched = [self.layer.weight]
            self.exact = self.layer.weight.detach().clone()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y if torch.equal(self.exact, self.watched[0]) else y / 0

    model = Brittle()
    before = Snapshot(model)
    with pytest.raises(MPOError, match="layer: the model gives no numbers once it is rounded"):
        measured(model, vectors())
    before.assert_same(model)
