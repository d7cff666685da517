"""Legs of any size: the padding is bounded, what factors is not padded, and what the user gives is not touched."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.legs import legs_for, padded_size

SIZES = st.integers(1, 5000)
MOST_PADDING = 1 / 16


@pytest.mark.guarantee("little-padding")
@given(SIZES, SIZES, st.integers(1, 7))
def test_legs_hold_the_matrix_with_little_padding(out: int, in_: int, n: int) -> None:
    sites = legs_for(out, in_, n)
    assert len(sites) == n
    for size, padded in zip((out, in_), sites.shape, strict=True):
        assert size <= padded <= max(size * (1 + MOST_PADDING), size + 1)


@given(SIZES, st.integers(1, 7))
def test_padding_pays(size: int, n: int) -> None:
    padded = padded_size(size, n)

    def outside_the_largest_leg(number: int) -> int:
        return number // max(Sites.balanced(number, 1, n).out)

    assert padded == size or outside_the_largest_leg(padded) > 2 * outside_the_largest_leg(size)


@pytest.mark.parametrize("size", [64, 384, 768, 1536, 3072, 4096])
def test_sizes_of_real_models_are_not_padded(size: int) -> None:
    assert legs_for(size, size, 5).shape == (size, size)


def test_the_legs_of_the_paper_are_kept() -> None:
    assert legs_for(768, 3072, 5) == Sites((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
    assert legs_for(30000, 128, 5).out == (5, 10, 10, 10, 6)


@given(SIZES, SIZES)
def test_low_rank_never_pads(out: int, in_: int) -> None:
    assert legs_for(out, in_, "low-rank") == Sites((out, 1), (1, in_))


@given(SIZES, SIZES)
def test_one_site_is_the_matrix_itself(out: int, in_: int) -> None:
    assert legs_for(out, in_, 1) == Sites((out,), (in_,))


def test_given_legs_must_multiply_exactly() -> None:
    sites = Sites((2, 3), (4, 5))
    assert legs_for(6, 20, sites) is sites
    with pytest.raises(MPOError, match=r"\(6, 20\).*\(7, 20\)"):
        legs_for(7, 20, sites)


@given(st.sampled_from([101, 257, 997, 4999, 30522, 50257]), st.integers(3, 6))
def test_an_odd_vocabulary_spreads_over_the_sites(size: int, n: int) -> None:
    out = legs_for(size, 64, n).out
    assert max(out) < size
    assert math.prod(out) >= size
