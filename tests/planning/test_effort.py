from __future__ import annotations

from itertools import pairwise

import pytest

from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.effort import effort_of
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.structure import structure

CONFIGS = [
    MPOConfig(sites="low-rank", keep=0.5),
    MPOConfig(sites=5, keep=0.5),
    MPOConfig(sites=1, bits=4),
    MPOConfig(sites=3, tolerance=0.1),
]


def unit(config: MPOConfig, out: int, in_: int) -> UnitPlan:
    return UnitPlan(("layer",), structure("linear", out, in_, config), "bfloat16")


@pytest.mark.parametrize("config", CONFIGS)
def test_larger_matrices_cost_more_of_everything(config: MPOConfig) -> None:
    efforts = [effort_of(unit(config, size, 2 * size), 2) for size in (256, 512, 1024, 4096)]
    for small, large in pairwise(efforts):
        assert small.seconds < large.seconds
        assert small.memory < large.memory
        assert small.bytes_read < large.bytes_read
        assert small.bytes_written < large.bytes_written
    assert efforts[0].bytes_read == 256 * 512 * 2


def test_low_rank_takes_longer_than_chains_and_rounding_least_memory() -> None:
    low_rank, chain, rounded, _ = (effort_of(unit(config, 4096, 4096), 2) for config in CONFIGS)
    assert low_rank.seconds > 3 * chain.seconds
    assert rounded.memory < low_rank.memory
