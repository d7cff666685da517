"""What a matrix could become: all of it smaller, with the bytes that files will have."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.options import (
    BITS,
    CHAINS,
    DENSE,
    FACTOR_WIDTHS,
    FAMILIES,
    K_LEGS,
    LOW_RANK,
    WIDTHS,
    options,
    ranks,
)

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


@given(SIDES, SIDES, st.sampled_from([2, 4]), st.booleans())
def test_chains_are_small_and_multiply_to_the_matrix(out: int, in_: int, itemsize: int, rounded: bool) -> None:
    found = options("linear", out, in_, itemsize=itemsize, families=FAMILIES, rounded=rounded)
    assert len({str(option) for option in found}) == len(found)
    for option in found:
        if not option.is_fitted:
            continue
        spec = option.spec
        assert spec is not None
        assert option.rank is None
        assert spec.kept <= 0.35
        assert UnitPlan(("m",), spec, "float32").parameters == spec.num_parameters == option.numbers(out * in_)
        assert option.bytes(out * in_ * itemsize, itemsize) < out * in_ * itemsize
        assert option.width in (FACTOR_WIDTHS if rounded else (None,))
        if option.family == K_LEGS:
            k = spec.sites.in_[0]
            assert (spec.sites.out, spec.sites.in_) == ((out // k, k), (k, in_ // k))
            assert spec.sites.shape == (out, in_)
            assert len(set(spec.core_bits)) == 1
        else:
            assert option.family == CHAINS
            assert 3 <= len(spec.sites) <= 5
            held = [bits for k, bits in enumerate(spec.core_bits) if k != spec.center]
            assert set(held) == ({None} if option.width is None else {8})


def test_k_legs_hold_as_many_numbers_as_low_rank() -> None:
    found = options("linear", 384, 1536, itemsize=4, families=FAMILIES)
    legs = [option for option in found if option.family == K_LEGS]
    assert {option.spec.sites.in_[0] for option in legs if option.spec} == {2, 4, 8}
    assert all(option.spec.num_parameters == option.spec.bonds[0] * (384 + 1536) for option in legs if option.spec)
    assert not [o for o in options("linear", 27, 64, itemsize=4, families=(K_LEGS,)) if o.family == K_LEGS]


def test_a_family_can_be_left_out() -> None:
    def families(*chosen: str, **more: bool) -> set[str]:
        return {o.family for o in options("linear", 64, 64, itemsize=4, families=chosen, **more)}

    assert families(DENSE, BITS) == {DENSE, BITS}
    assert families(BITS) == {BITS}
    # Nothing smaller than the matrix: it stays.
    assert families() == families(BITS, rounded=False) == {DENSE}
    assert families(*FAMILIES, rounded=False) == {DENSE, LOW_RANK, CHAINS}  # no multiple of 16 is a bond that small
    larger = options("linear", 128, 128, itemsize=4, families=FAMILIES, rounded=False)
    assert {o.family for o in larger} == {DENSE, LOW_RANK, K_LEGS, CHAINS}


def test_what_is_called_how() -> None:
    names = {str(option) for option in options("linear", 128, 128, itemsize=4)}
    assert {"dense", "dense in 4 bits", "rank 16", "rank 16 in 3 bits"} <= names
    names = {str(option) for option in options("linear", 512, 512, itemsize=4, families=FAMILIES)}
    assert {"4-legs, bond 16", "4-legs, bond 16 in 3 bits"} <= names
    assert any(name.startswith("5 sites, bonds ") and name.endswith(" in 4 bits") for name in names)
