"""MPOConfig: what it refuses, what an override replaces, and its JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.config import MPOConfig

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


@st.composite
def configs(draw: Any) -> MPOConfig:
    override = st.builds(lambda size, sites: {**size, "sites": sites}, SIZES, SITES)
    return MPOConfig(
        target_modules=draw(PATTERNS),
        exclude_modules=draw(PATTERNS),
        sites=draw(SITES),
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
