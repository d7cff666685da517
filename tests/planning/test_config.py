"""MPOConfig: what it refuses, what an override replaces, and its JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.structure import structure

PATTERNS = st.one_of(
    st.just("all-linear"), st.just(r".*query"), st.lists(st.text("abc.", min_size=1), max_size=3).map(tuple)
)
SITES = st.one_of(st.integers(1, 9), st.just("low-rank"), st.just(Sites((2, 3), (4, 5))))
SIZES = st.one_of(
    st.just({}),
    st.floats(0.01, 2).map(lambda keep: {"keep": keep}),
    st.integers(1, 99).map(lambda bond: {"bond": bond}),
    st.floats(0.001, 0.999).map(lambda tolerance: {"tolerance": tolerance}),
)


BITS = st.sampled_from([None, 2, 8, 16, {"central": 4}, {"auxiliary": 8, "central": 3}, {"central": None}, {}])


@st.composite
def configs(draw: Any) -> MPOConfig:
    override = st.builds(lambda size, sites, bits: {**size, "sites": sites, "bits": bits}, SIZES, SITES, BITS)
    return MPOConfig(
        target_modules=draw(PATTERNS),
        exclude_modules=draw(PATTERNS),
        sites=draw(SITES),
        bits=draw(BITS),
        group=draw(st.sampled_from([8, 128])),
        overrides=draw(st.dictionaries(st.text("abc", min_size=1), override, max_size=2)),
        **draw(SIZES),
    )


@given(configs())
def test_a_configuration_survives_json(config: MPOConfig) -> None:
    assert MPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0.5, "bond": 3}, "keep and bond"),
        ({"bond": 3, "tolerance": 0.1}, "bond and tolerance"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": -1}, "keep=-1"),
        ({"keep": 60}, "keep=60"),
        ({"keep": True}, "keep=True"),
        ({"keep": "0.5"}, "keep='0.5'"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"bond": 0}, "0"),
        ({"bond": 2.5}, "2.5"),
        ({"tolerance": 0.0}, "0.0"),
        ({"tolerance": 1.5}, "1.5"),
        ({"tolerance": float("nan")}, "nan"),
        ({"sites": 0}, "sites=0"),
        ({"sites": True}, "sites=True"),
        ({"sites": "lowrank"}, "sites='lowrank'"),
        ({"sites": 2.0}, "sites=2.0"),
        ({"overrides": {"a": {"target_modules": "b"}}}, "target_modules"),
        ({"overrides": {"a": {"keep": 0.5, "bond": 3}}}, "keep and bond"),
        ({"overrides": {"a": {"keep": 7}}}, "keep=7"),
    ],
)
def test_what_is_wrong_is_refused_by_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        MPOConfig(**arguments)


def test_the_first_matching_override_wins_and_replaces_the_size() -> None:
    config = MPOConfig(
        keep=0.5, sites=5, overrides={"a.query": {"bond": 4}, "query": {"tolerance": 0.1}, "key": {"sites": "low-rank"}}
    )
    assert config.for_module("x.a.query") == MPOConfig(bond=4)
    assert config.for_module("x.b.query") == MPOConfig(tolerance=0.1)
    assert config.for_module("x.key") == MPOConfig(keep=0.5, sites="low-rank")
    assert config.for_module("x.value") == MPOConfig(keep=0.5)
    assert MPOConfig(keep=0.5, overrides={"re:.*": {"keep": None}}).for_module("any") == MPOConfig()


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(MPOError, match="rank"):
        MPOConfig.from_dict({"rank": 4})


@given(configs())
def test_for_transformers_it_is_a_dictionary_that_json_can_hold(config: MPOConfig) -> None:
    plain = json.loads(json.dumps(config.to_hf()))
    assert plain.keys() == {"quant_method", "config"}
    assert (plain["quant_method"], MPOConfig.from_dict(plain["config"])) == ("mpo", config)


def test_bits_of_central_and_auxiliary_tensors() -> None:
    def bits(**config: Any) -> tuple[int | None, ...]:
        return structure("linear", 48, 36, MPOConfig(sites=3, **config)).bits

    assert bits() == bits(bits={}) == bits(bits={"central": None}) == ()
    assert bits(bits=4) == (4, 4, 4)
    assert bits(bits={"central": 3}) == (None, 3, None)
    assert bits(bits={"auxiliary": 8, "central": 16}) == (8, 16, 8)
    general = MPOConfig(bits=4, group=64, overrides={"table": {"bits": None}, "query": {"bits": 2, "group": 32}})
    assert [general.for_module(name).bits for name in ("table", "query", "key")] == [None, 2, 4]
    assert [general.for_module(name).group for name in ("table", "query", "key")] == [64, 32, 64]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 1}, r"bits=1 .*16 for float16"),
        ({"bits": 32}, "bits=32"),
        ({"bits": "4"}, "bits='4'"),
        ({"bits": {"centre": 4}}, "names centre: only central and auxiliary"),
        ({"bits": {"central": 1}}, "bits=1"),
        ({"group": 4}, "group=4"),
        ({"overrides": {"x": {"bits": 11}}}, "bits=11"),
    ],
)
def test_bits_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        MPOConfig(**config)


BOUNDS = st.tuples(st.floats(0.1, 8), st.floats(8, 32)).map(
    lambda pair: {"min_bits_per_weight": pair[0], "max_bits_per_weight": pair[1]}
)


@given(
    st.one_of(
        st.floats(0.1, 32).map(lambda bits: {"bits_per_weight": bits}),
        st.integers(1, 10**12).map(lambda size: {"size": size}),
        st.sampled_from(["25MB", "1.5 GiB", "7"]).map(lambda size: {"size": size}),
    ),
    st.one_of(st.just({}), BOUNDS),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.dictionaries(st.sampled_from("abc"), BOUNDS, max_size=2),
)
def test_a_budget_survives_json(
    budget: dict[str, Any], bounds: dict[str, float], max_flops: float | None, overrides: dict[str, Any]
) -> None:
    config = MPOConfig(**budget, **bounds, max_flops=max_flops, overrides=overrides)
    assert MPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.has_budget
    for name, own in overrides.items():
        assert config.for_module(name).min_bits_per_weight == own["min_bits_per_weight"]
        assert config.for_module(name).has_budget


def test_sizes_become_bytes() -> None:
    assert MPOConfig(size="25MB").size == 25_000_000
    assert MPOConfig(size="25MB") == MPOConfig(size=25e6)  # type: ignore[arg-type]


def test_what_was_written_before_there_were_budgets_is_read() -> None:
    values = MPOConfig(keep=0.5).to_dict()
    for name in ("size", "bits_per_weight", "max_flops", "min_bits_per_weight", "max_bits_per_weight"):
        assert values.pop(name) is None
    assert MPOConfig.from_dict(values) == MPOConfig(keep=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "25MB", "bits_per_weight": 3}, "size and bits_per_weight are given together"),
        ({"size": "25MB", "keep": 0.5}, "keep and size are given together"),
        ({"bits_per_weight": 2.3, "tolerance": 0.1}, "tolerance and bits_per_weight are given together"),
        ({"bits_per_weight": 2.3, "bits": 4}, "bits=4 with a budget"),
        ({"bits_per_weight": 0}, "bits_per_weight=0 must be a positive number"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight=nan"),
        ({"bits_per_weight": float("inf")}, "bits_per_weight=inf"),
        ({"bits_per_weight": True}, "bits_per_weight=True"),
        ({"bits_per_weight": "3"}, "bits_per_weight='3'"),
        ({"size": "much"}, "size='much' is not a size: give for instance 25MB"),
        ({"size": 0}, "size=0 is not"),
        ({"max_flops": 0.5, "bond": 4}, "max_flops=0.5 chooses structures"),
        ({"max_flops": 0.5, "tolerance": 0.1}, "max_flops=0.5 chooses structures"),
        ({"max_flops": 0.5, "keep": 0.4, "sites": 3}, "max_flops=0.5 with keep chooses structures"),
        ({"max_flops": 0.5, "bits": 4}, "bits=4 with a budget"),
        ({"min_bits_per_weight": 2, "max_flops": 0.5}, "min_bits_per_weight=2 goes with a budget"),
        ({"families": ("bits", "trees")}, "names 'trees': they are dense, bits, low-rank, k-legs, chains"),
        ({"families": ("dense",)}, "leaves nothing to choose"),
        ({"families": ()}, "leaves nothing to choose"),
        ({"min_bits_per_weight": 3}, "min_bits_per_weight=3 goes with a budget"),
        ({"overrides": {"x": {"max_bits_per_weight": 3}}}, "max_bits_per_weight=3 goes with a budget"),
        (
            {"size": "1MB", "min_bits_per_weight": 4, "max_bits_per_weight": 3},
            "min_bits_per_weight=4 is above max_bits_per_weight=3",
        ),
        (
            {"size": "1MB", "max_bits_per_weight": 3, "overrides": {"x": {"min_bits_per_weight": 4}}},
            "min_bits_per_weight=4 is above max_bits_per_weight=3",
        ),
        ({"size": "1MB", "overrides": {"x": {"keep": 0.5}}}, r"overrides\['x'\] sets keep with a budget"),
        ({"size": "1MB", "overrides": {"x": {"bits": 4}}}, "bits=4 with a budget"),
        ({"overrides": {"x": {"size": "1MB"}}}, r"overrides\['x'\] sets size: only"),
    ],
)
def test_budgets_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        MPOConfig(**config)


def test_flops_are_a_budget_of_their_own() -> None:
    assert MPOConfig(max_flops=0.5).has_budget
    assert MPOConfig(max_flops=0.5, keep=0.4).has_budget
    assert not MPOConfig(keep=0.4).has_budget


@pytest.mark.parametrize(
    "given", [{"sites": 3}, {"bits": 4}, {"overrides": {"x": {"keep": 0.5}}}, {"overrides": {"x": {"bits": 4}}}]
)
def test_keep_is_shared_where_no_structure_is_given(given: dict[str, Any]) -> None:
    assert MPOConfig(keep=0.4).shares_keep
    assert MPOConfig(keep=0.4, overrides={"x": {"group": 8}}).shares_keep
    assert not MPOConfig(keep=0.4, **given).shares_keep
    assert not MPOConfig(bond=4).shares_keep


def test_families_round_trip() -> None:
    config = MPOConfig(size="1MB", families=["bits", "k-legs"])
    assert config.families == ("bits", "k-legs")
    assert MPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MPOConfig.from_dict({"keep": 0.5}).families == ("dense", "bits", "low-rank")
