"""What a matrix could become: all of it smaller, with the bytes that files will have."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.options import BITS, DENSE, FACTOR_WIDTHS, LOW_RANK, WIDTHS, options, ranks

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.sampled_from(["float16", "bfloat16", "float32", "float64"]), st.sampled_from([8, 32, 128]))
def test_every_option_is_a_smaller_plan_of_the_matrix(out: int, in_: int, storage: str, group: int) -> None:
    itemsize = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[storage]
    found = options("linear", out, in_, itemsize=itemsize, group=group)
    whole = out * in_ * itemsize
    assert [option.family for option in found].count(DENSE) == 1
    assert found[0].bytes(whole, itemsize) == whole
    assert len({str(option) for option in found}) == len(found)
    for option in found[1:]:
        assert option.spec is not None
        unit = UnitPlan(("m",), option.spec, storage)
        assert unit.bytes == option.bytes(whole, itemsize) < whole
        assert (option.spec.out_features, option.spec.in_features) == (out, in_) == option.spec.sites.shape
        assert (option.family == LOW_RANK) == (option.rank is not None)
        assert option.width in (WIDTHS if option.family == BITS else FACTOR_WIDTHS)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_ranks_rise_from_few_to_all(out: int, in_: int) -> None:
    found, most = ranks(out, in_), min(out, in_)
    assert found == sorted(set(found))
    assert 1 <= found[0] <= 16
    assert found[-1] <= most
    assert found[-1] > most - 16
    assert len(found) <= 33
    # None is far from the next, in what it takes: no budget is far from what can be had.
    step = max(1, min(16, most // 8))
    assert all(high - low <= max(low, step) for low, high in itertools.pairwise(found))


def test_a_family_can_be_left_out() -> None:
    assert {o.family for o in options("linear", 64, 64, itemsize=4, families=(BITS,))} == {DENSE, BITS}
    assert {o.family for o in options("linear", 64, 64, itemsize=4, families=())} == {DENSE}


def test_what_is_called_how() -> None:
    names = {str(option) for option in options("linear", 128, 128, itemsize=4)}
    assert {"dense", "dense in 4 bits", "rank 16", "rank 16 in 3 bits"} <= names
