"""Plans without a model: the numbers, the round trip through JSON, and what an edited plan may not say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.plans import unit_of
from hypothesis import given, reject
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.entries import ACTIVATION, Alternative, LeftDense, UnitPlan
from mpo_tn.planning.plan import PLAN_VERSION, Plan
from mpo_tn.planning.structure import structure

SIZES = st.integers(1, 3000)
CONFIGS = st.one_of(
    st.builds(MPOConfig, sites=st.integers(1, 6), keep=st.floats(0.9, 1.5)),
    st.builds(MPOConfig, sites=st.sampled_from([1, 2, 5, "low-rank"]), bond=st.integers(1, 200)),
    st.builds(MPOConfig, sites=st.integers(1, 6), tolerance=st.floats(1e-3, 0.9)),
    st.builds(MPOConfig, sites=st.integers(1, 6)),
    st.builds(
        MPOConfig, sites=st.integers(1, 6), group=st.sampled_from([8, 100, 128]),
        bits=st.sampled_from([2, 5, 16, {"central": 3}, {"auxiliary": 8}, {"central": 16, "auxiliary": 7}]),
    ),
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    config = draw(CONFIGS)
    units: list[UnitPlan] = []
    for number in range(draw(st.integers(0, 4))):
        names = tuple(f"layer.{number}.{k}" for k in range(draw(st.integers(1, 3))))
        try:
            spec = structure(draw(st.sampled_from(["linear", "embedding"])), draw(SIZES), draw(SIZES), config)
        except MPOError:  # too little to keep
            reject()
        storage = draw(st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
        metric = draw(st.sampled_from(["frobenius", *([] if config.tolerance else [ACTIVATION])]))
        units.append(UnitPlan(names, spec, storage, config.tolerance, draw(st.integers(0, 99)), metric=metric))
    left = [
        LeftDense(
            f"norm.{k}", draw(st.integers(0, 999)), draw(st.integers(0, 999)), draw(st.text()), draw(st.booleans())
        )
        for k in range(draw(st.integers(0, 3)))
    ]
    numbers = st.one_of(st.none(), st.floats(0, 1e9))
    considered = st.lists(st.builds(Alternative, st.text(), st.integers(0, 10**9), numbers, numbers), max_size=3)
    return Plan(draw(st.text()), config, tuple(units), tuple(left), tuple(draw(considered)))


@pytest.mark.guarantee("plan-round-trip")
@given(plans())
def test_a_plan_comes_back_from_json_to_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    folder = tmp_path_factory.mktemp("plan")
    plan.save(folder / "plan.json")
    again = Plan.load(folder / "plan.json")
    assert again == plan
    again.save(folder / "again.json")
    assert (folder / "again.json").read_bytes() == (folder / "plan.json").read_bytes()
    # What is written is plain JSON of the same content, however it is laid out.
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8")) == plan.to_dict()


@given(SIZES, SIZES, st.integers(1, 6), st.floats(0.05, 1.5))
def test_a_structure_holds_what_is_kept_and_no_wider_cap_would_fit(out: int, in_: int, n: int, keep: float) -> None:
    try:
        spec = structure("linear", out, in_, MPOConfig(sites=n, keep=keep))
    except MPOError:
        least = structure("linear", out, in_, MPOConfig(sites=n, bond=1))
        assert least.num_parameters > keep * out * in_
        return
    assert spec.num_parameters <= keep * out * in_
    widest = max(spec.bonds, default=1)
    wider = spec.sites.capped_bonds(widest + 1)
    assert wider == spec.bonds or spec.sites.num_parameters(wider) > keep * out * in_
    sizes = [math.prod(shape) for shape in spec.core_shapes]
    assert spec.auxiliary_parameters == sum(sizes) - max(sizes)


@given(plans())
def test_the_totals_are_the_sums_of_the_parts(plan: Plan) -> None:
    left = sum(part.parameters for part in plan.left)
    beside = sum(unit.bias for unit in plan.units)
    assert plan.parameters_before == left + beside + sum(u.spec.out_features * u.spec.in_features for u in plan.units)
    assert plan.parameters_after == left + beside + sum(math.prod(s) for u in plan.units for s in u.spec.core_shapes)
    width = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    assert all(unit.bytes == unit.spec.bytes(width[unit.storage]) for unit in plan.units)
    in_full = [unit for unit in plan.units if not unit.spec.bits]
    assert all(unit.bytes == unit.parameters * width[unit.storage] for unit in in_full)
    assert plan.bytes_after - plan.bytes_before == sum(
        unit.bytes - unit.dense_parameters * width[unit.storage] for unit in plan.units
    )
    assert plan.is_exact == (not plan.units or plan.config.tolerance is None)
    assert str(plan.parameters_after) in str(plan)
    assert plan.has_bits == any(unit.spec.bits for unit in plan.units) == ("bits per weight" in str(plan))
    if plan.units:
        assert plan.bits_per_weight == 8 * sum(unit.bytes for unit in plan.units) / plan.matrix_before


def test_rows_take_together_what_differs_by_number_alone() -> None:
    units = [unit_of(f"encoder.{layer}.{name}", bond=4) for layer in range(12) for name in ("query", "output.0")]
    units.append(unit_of("encoder.12.query", bond=3))
    rows = Plan("Model", MPOConfig(), tuple(units), ()).rows()
    assert [(row.pattern, len(row.units)) for row in rows] == [
        ("encoder.*.query", 12),
        ("encoder.*.output.0", 12),
        ("encoder.12.query", 1),
    ]


def edited(change: Any) -> dict[str, Any]:
    plan = Plan("Model", MPOConfig(bond=4), (unit_of("a", bond=4), unit_of("b", bond=4)), (LeftDense("n", 5, 20, "x"),))
    values = json.loads(json.dumps(plan.to_dict()))
    change(values)
    return values


def test_an_edited_plan_may_leave_its_counts_out() -> None:
    def narrower(values: dict[str, Any]) -> None:
        values["units"][1]["bonds"] = [2, 3]
        del values["units"][1]["parameters"], values["units"][1]["bytes"]

    unit = Plan.from_dict(edited(narrower)).units[1]
    assert unit.spec.bonds == (2, 3)
    assert unit.parameters == unit.spec.sites.num_parameters((2, 3))


def unit_change(**changes: Any) -> Any:
    return lambda values: values["units"][1].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=PLAN_VERSION + 1), f"version {PLAN_VERSION + 1}, and this release .* upgrade"),
        (lambda v: v.update(version="1"), "version '1'"),
        (lambda v: v.pop("version"), "version None"),
        (lambda v: v.update(format="mpo_tn.cores"), "format is 'mpo_tn.cores', not mpo_tn.plan"),
        (lambda v: v.pop("left"), "the plan lacks left"),
        (lambda v: v.update(storages=[]), "has storages, which this version does not know"),
        (lambda v: v["config"].update(quality=1), "unknown configuration keys quality"),
        (lambda v: v["units"].append(v["units"][0]), "names a twice"),
        (lambda v: v["left"].append(v["left"][0]), "names n twice"),
        (lambda v: v["left"][0].update(name="b"), "names b twice"),
        (lambda v: v["left"][0].update(parameters=-1), "parameters=-1 must be a whole number"),
        (lambda v: v.update(units={"a": 1}), "damaged|names"),
        (lambda v: v.update(units=[3]), "a unit is 3 and no object"),
        (lambda v: v.update(units=None), "damaged"),
        (lambda v: v.update(left=["n"]), "an entry of left is 'n' and no object"),
        (lambda v: v.update(model=3), "model=3 is not the name of a class"),
        (lambda v: v["left"][0].update(name=[1]), r"left, \[1\]: name=\[1\] must be a string"),
        (lambda v: v["left"][0].update(matched="no"), "left, 'n': matched='no' must be a boolean"),
        (lambda v: v["left"][0].update(bytes=1.5), "left, n: bytes=1.5 must be a whole number"),
        (lambda v: v["config"].update(target_modules=[3]), "target_modules=.3,. are not all strings"),
        (unit_change(bonds=[4, 999]), r"b: bond 1 is 999, and with legs .* from 1 to 4"),
        (unit_change(bonds=[4, 0]), r"b: bonds=\(4, 0\) must be whole numbers"),
        (unit_change(bonds=[4, 2.5]), r"b: bonds=\(4, 2\.5\) must be whole numbers"),
        (unit_change(bonds=[4]), r"b: bonds=\(4,\) do not fit 3 sites"),
        (unit_change(parameters=7), r'b: "parameters" is 7, and .* hold 96 numbers: correct it, or leave it out'),
        (unit_change(bytes=7), 'b: "bytes" is 7, and .* hold 384 bytes'),
        (unit_change(sites={"out": [2, 2, 1], "in": [2, 2, 2]}), "b: legs multiply to 4 x 8, less than 8 x 8"),
        (unit_change(sites={"out": [2, 2, 0], "in": [2, 2, 2]}), "b: leg 2 of out=0"),
        (unit_change(out_features=9), "b: legs multiply to 8 x 8, less than 9 x 8"),
        (unit_change(kind="conv3d"), "b: kind='conv3d'"),
        (unit_change(storage="int3"), "b: storage='int3' is not one of float16"),
        (unit_change(tolerance=-0.5), "b: tolerance=-0.5 must be a number above 0"),
        (unit_change(tolerance=float("nan")), "b: tolerance=nan must be a number above 0"),
        (unit_change(tolerance=True), "b: tolerance=True must be a number above 0"),
        (unit_change(names="a"), "names='a': give a list"),
        (unit_change(names=[0]), r"0: names=\(0,\) are not the names"),
        (unit_change(out_features="8"), "b: out_features='8' must be a whole number"),
        (unit_change(bonds=None), "b: something in its entry is of the wrong kind"),
        (unit_change(bonds=[True, 4]), r"b: bonds=\(True, 4\) must be whole numbers"),
        (unit_change(sites={"out": [2, 2, 2]}), "b: something in its entry is of the wrong kind|b: .*in"),
        (
            unit_change(sites={"out": [2, 2, 5], "in": [2, 2, 2]}),
            "b: legs multiply to 20 x 8 for a matrix of 8 x 8: more than half",
        ),
        (unit_change(bias_bytes=-4), "b: bias_bytes=-4 must be a whole number"),
        (lambda v: v["units"][1].pop("bias"), "unit b lacks bias"),
        (unit_change(bias=-1), "b: bias=-1"),
        (unit_change(rank=3), "unit b has rank, which this version does not know"),
        (lambda v: v["units"][1].pop("bonds"), "unit b lacks bonds"),
    ],
)
def test_what_does_not_add_up_is_refused_by_name(change: Any, message: str) -> None:
    with pytest.raises(MPOError, match=message):
        Plan.from_dict(edited(change))


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(MPOError, match=r"none\.json could not be read .* mpo-tn plan"):
        Plan.load(tmp_path / "none.json")
    for text in ("", "{", "[1]", "3", '{"format": "x"}', "\udcff"):
        (tmp_path / "bad.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(MPOError, match=r"bad\.json: "):
            Plan.load(tmp_path / "bad.json")
    (tmp_path / "wide.json").write_text(json.dumps(edited(unit_change(bonds=[4, 999]))), encoding="utf-8")
    with pytest.raises(MPOError, match=r"wide\.json: b: bond 1"):
        Plan.load(tmp_path / "wide.json")


def test_bonds_one_by_one_and_legs_by_hand() -> None:
    sites = Sites((2, 3, 2), (3, 2, 2))
    assert structure(
        "linear", 12, 12, MPOConfig(sites=sites, overrides={"x": {"bond": (2, 9)}}).for_module("x")
    ).bonds == (
        2,
        4,
    )
    with pytest.raises(MPOError, match="multiply to"):
        structure("linear", 12, 13, MPOConfig(sites=sites))
    with pytest.raises(MPOError, match="lists 3 bonds and the chain has 2"):
        structure("linear", 12, 12, MPOConfig(sites=sites, overrides={"x": {"bond": (1, 2, 3)}}).for_module("x"))


def test_a_tolerance_of_numpy_is_written_as_a_number() -> None:
    unit = replace(unit_of("a", bond=4), tolerance=np.float32(0.25))
    assert json.loads(json.dumps(unit.to_dict()))["tolerance"] == 0.25
    assert UnitPlan.from_dict(unit.to_dict()) == unit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bytes": -1}, "bytes=-1"),
        ({"bytes": 1.5}, "bytes=1.5"),
        ({"distance": "near"}, "distance='near' of the alternative 'joint' is no finite number"),
        ({"distance": math.inf}, "distance=inf of the alternative 'joint'"),
        ({"expected": math.nan}, "expected=nan of the alternative 'joint'"),
        ({"rank": 3}, "an alternative has rank, which this version does not know"),
    ],
)
def test_alternatives_that_are_refused(change: dict[str, Any], message: str) -> None:
    plan = Plan("M", MPOConfig(), (unit_of("a", 2),), (), (Alternative("joint", 8, 0.5, 0.25),))
    values = plan.to_dict()
    assert Plan.from_dict(values) == plan
    values["considered"][0] |= change
    with pytest.raises(MPOError, match=message):
        Plan.from_dict(values)
    del values["considered"][0]["bytes"]
    with pytest.raises(MPOError, match="an alternative lacks bytes"):
        Plan.from_dict(values)


def test_a_plan_without_a_calibration_says_nothing_of_metrics() -> None:
    """What was written before there were any is the same, byte for byte."""
    plain = Plan("M", MPOConfig(bond=2), (unit_of("a", 2),), ())
    values = plain.to_dict()
    assert "considered" not in values
    assert "metric" not in values["units"][0]
    assert not plain.needs_calibration
    fitted = replace(plain, units=(replace(plain.units[0], metric=ACTIVATION),))
    assert fitted.to_dict()["units"][0]["metric"] == "activation"
    assert fitted.needs_calibration
    assert Plan.from_dict(fitted.to_dict()) == fitted
    with pytest.raises(MPOError, match="a tolerance is a Frobenius error"):
        replace(plain.units[0], metric=ACTIVATION, tolerance=0.1)
    with pytest.raises(MPOError, match="metric='exact' is neither frobenius nor activation"):
        replace(plain.units[0], metric="exact")
