"""The choice against all routes; tests/torch/layers/test_product.py counts the flops that are predicted."""

from __future__ import annotations

import pytest
from helpers.specs import spec_of, specs
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning import cost
from mpo_tn.planning.spec import ModuleSpec

TOKENS = st.sampled_from([1, 2, 5, 64, 1000])


def routes(spec: ModuleSpec) -> list[cost.Route]:
    return [
        cost.rebuild_route(spec.core_shapes, spec.out_features, spec.in_features), *cost.chain_routes(spec.core_shapes)
    ]  # fmt: skip


@settings(max_examples=60)
@given(specs(largest=8), TOKENS, st.booleans(), st.sampled_from(["cpu", "cuda"]), st.sampled_from([2, 4, 8]))
def test_the_choice_is_the_cheapest_route(
    spec: ModuleSpec, tokens: int, training: bool, device: str, itemsize: int
) -> None:
    shapes, size = spec.core_shapes, (spec.out_features, spec.in_features)

    def seconds(route: cost.Route) -> float:
        return (route.training if training else route.forward).seconds(tokens, device, itemsize)

    for mode in ("auto", "chain", "rebuild"):
        table = cost.choices(shapes, *size, mode, training=training, device_type=device, itemsize=itemsize)
        allowed = [
            route for route in routes(spec)
            if mode in ("auto", route.mode)
            and (mode != "auto" or tokens * route.state_per_token <= max(size[0] * size[1], tokens * sum(size)))
        ]  # fmt: skip
        assert table.starts[0] == 0
        assert list(table.starts) == sorted(set(table.starts))
        assert seconds(table.at(tokens)) == pytest.approx(min(map(seconds, allowed)), rel=1e-9)


@given(specs(), TOKENS)
def test_costs_are_straight_lines(spec: ModuleSpec, tokens: int) -> None:
    for route in routes(spec):
        fixed, slope = route.forward.seconds(0), route.forward.seconds(1) - route.forward.seconds(0)
        assert route.forward.seconds(tokens) == pytest.approx(fixed + slope * tokens)
        assert route.training.total_flops(tokens) >= 3 * route.forward.total_flops(tokens)


def test_a_chain_holds_what_it_says() -> None:
    """Low rank: between the two products a token has as many numbers as the rank."""
    route = cost.choices(spec_of((64, 1), (1, 32), 5).core_shapes, 64, 32, "chain").at(10)
    assert route.state_per_token == 64
    assert route.forward.total_flops(10) == 10 * 2 * 5 * (64 + 32)


def test_the_paper_legs_at_bond_64() -> None:
    """768 x 3072: the chain costs a vector 16 times the dense flops, the matrix 1.6 times those of 128 vectors."""
    sites = Sites.balanced(768, 3072)
    spec = ModuleSpec("linear", sites, sites.capped_bonds(64), 768, 3072)
    dense = cost.dense_route(768, 3072).forward
    one, many = (cost.choices(spec.core_shapes, 768, 3072).at(tokens) for tokens in (1, 128))
    assert (one.mode, many.mode) == ("chain", "rebuild")
    assert one.forward.total_flops(1) / dense.total_flops(1) == pytest.approx(16.2, abs=0.1)
    assert many.forward.total_flops(128) / dense.total_flops(128) == pytest.approx(1.58, abs=0.01)
    assert cost.dense_route(768, 3072).training.total_flops(1) == 3 * dense.total_flops(1)


def test_what_chains_may_hold_is_bounded() -> None:
    """A chain that is faster, but would hold many times x and y for many tokens, is left for few."""
    spec = spec_of((1, 16, 1), (16, 1, 16), 4096)
    table = cost.choices(spec.core_shapes, spec.out_features, spec.in_features)
    for tokens in (1, 10, 1000, 100_000):
        route = table.at(tokens)
        assert tokens * route.state_per_token <= max(16 * 256, tokens * (16 + 256))


def test_unknown_mode() -> None:
    with pytest.raises(MPOError, match="'fast'"):
        cost.choices(((1, 2, 2, 1),), 2, 2, "fast")
    assert cost.choices(((1, 2, 2, 1),), 2, 2, "cached").at(5).mode == "cached"
