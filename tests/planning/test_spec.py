"""ModuleSpec: its JSON, its counts, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from helpers.specs import specs
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.legs import legs_for
from mpo_tn.planning.spec import ModuleSpec, kept_ratio


@pytest.fixture
def spec() -> ModuleSpec:
    sites = legs_for(101, 32, 3)
    return ModuleSpec("embedding", sites, sites.capped_bonds(4), 101, 32, padding_idx=0, rel_error=0.25, exact=False)


def test_a_specification_survives_json(spec: ModuleSpec) -> None:
    assert ModuleSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_specification_counts_its_cores(spec: ModuleSpec) -> None:
    numbers = 0
    for left, out, in_, right in spec.core_shapes:
        numbers += left * out * in_ * right
    assert spec.num_parameters == numbers
    assert spec.kept == numbers / (101 * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "conv2d"}, "conv2d"),
        ({"bonds": (4,)}, "bonds"),
        ({"bonds": (4, 0)}, "bonds"),
        ({"out_features": 10_000}, "10000"),
        ({"in_features": 10_000}, "10000"),
    ],
)
def test_a_specification_that_contradicts_itself(spec: ModuleSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        replace(spec, **changes)


BITS = [None, *range(2, 9), 16]


@given(specs(), st.data(), st.sampled_from([8, 10, 128]), st.sampled_from([2, 4, 8]))
def test_bits_are_counted_and_survive_json(spec: ModuleSpec, data: st.DataObject, group: int, itemsize: int) -> None:
    n = len(spec.sites)
    bits = tuple(data.draw(st.lists(st.sampled_from(BITS), min_size=n, max_size=n)))
    with_bits = replace(spec, bits=bits, group=group)
    assert ModuleSpec.from_dict(json.loads(json.dumps(with_bits.to_dict()))) == with_bits
    total = 0
    for (left, out, in_, right), each in zip(spec.core_shapes, bits, strict=True):
        if each is None or each == 16:
            total += left * out * in_ * right * (itemsize if each is None else 2)
        else:
            columns = in_ * right
            total += left * out * (4 * math.ceil(columns * each / 32) + 2 * math.ceil(columns / group)) + 16
    assert with_bits.bytes(itemsize) == total
    assert with_bits.bits_per_weight(itemsize) == 8 * total / (spec.out_features * spec.in_features)
    assert (with_bits.core_shapes, with_bits.num_parameters) == (spec.core_shapes, spec.num_parameters)
    if not any(bits):
        assert with_bits == spec
        assert not {"bits", "group"} & set(spec.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (4,)}, "not one for each of 3"),
        ({"bits": (4, 9, 4)}, r"bits=9 .*8, or 16 for float16"),
        ({"bits": (None, "4", None)}, "bits='4'"),
        ({"bits": (None, 4, None), "group": 7}, "group=7"),
        ({"bits": (16, 16, 16), "group": 0}, "group=0"),
    ],
)
def test_bits_that_are_refused(spec: ModuleSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MPOError, match=message):
        replace(spec, **changes)


@pytest.mark.parametrize("key", ["kind", "sites", "bonds", "out_features", "in_features"])
def test_a_damaged_specification_names_the_key(spec: ModuleSpec, key: str) -> None:
    values = spec.to_dict()
    del values[key]
    with pytest.raises(MPOError, match=key):
        ModuleSpec.from_dict(values)
    with pytest.raises(MPOError, match="colour"):
        ModuleSpec.from_dict({**spec.to_dict(), "colour": 1})


def test_a_central_tensor_is_the_largest_core() -> None:
    def center(out: tuple[int, ...], in_: tuple[int, ...], bonds: tuple[int, ...]) -> int:
        return ModuleSpec("linear", Sites(out, in_), bonds, math.prod(out), math.prod(in_)).center

    assert center((2, 3, 2), (2, 3, 2), (4, 4)) == 1
    assert center((8, 1, 1), (8, 1, 1), (2, 2)) == 0
    assert center((2, 2, 9), (2, 2, 9), (2, 2)) == 2
    assert center((4, 2, 4), (1, 2, 1), (2, 1)) == 1  # 8, 8, 4: the middle one is among the largest
    assert center((4, 1, 4), (2, 1, 2), (1, 1)) == 0  # 8, 1, 8: it is not
    assert center((6, 1), (1, 6), (3,)) == 0
    assert center((2, 2, 2, 2), (2, 2, 2, 2), (4, 4, 4)) == 1  # 16, 64, 64, 16
    assert center((5,), (7,), ()) == 0
    for shape in ((768, 3072), (768, 768), (30000, 128), (30522, 384), (384, 1536)):
        sites = Sites.balanced(*shape)
        assert center(sites.out, sites.in_, sites.full_bonds) == sites.center == 2


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4))
def test_the_kept_ratio_of_several_weighs_them_by_their_size(sizes: list[tuple[int, int, int]]) -> None:
    specs = [
        ModuleSpec("linear", legs, legs.capped_bonds(bond), out, in_)
        for out, in_, bond in sizes
        for legs in [legs_for(out, in_, 3)]
    ]
    total = sum(out * in_ for out, in_, _ in sizes)
    weighed = sum(spec.kept * (out * in_ / total) for spec, (out, in_, _) in zip(specs, sizes, strict=True))
    assert kept_ratio(iter(specs)) == pytest.approx(weighed)
    assert kept_ratio(specs[:1]) == specs[0].kept


def test_a_shape_is_that_of_a_parameter_and_fits_the_matrix() -> None:
    spec = ModuleSpec("parameter", Sites((4, 6), (2, 4)), (8,), 24, 8, shape=(3, 8, 8))
    assert ModuleSpec.from_dict(spec.to_dict()) == spec
    assert "shape" not in ModuleSpec("parameter", Sites((4, 6), (2, 4)), (8,), 24, 8).to_dict()
    for kind, shape in (("linear", (3, 8, 8)), ("parameter", (3, 8, 9)), ("parameter", (8, 24)), ("parameter", (24,))):
        with pytest.raises(MPOError, match="has no shape"):
            ModuleSpec(kind, Sites((4, 6), (2, 4)), (8,), 24, 8, shape=shape)
