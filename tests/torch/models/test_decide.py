"""plan: what it says is what compress does, for every family; what it leaves and why; plans of other models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter import Snapshot
from helpers.tiny_models import outputs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError, Sites
from mpo_tn.torch import LeftDense, MPOConfig, MPOLayer, Plan, compress, plan
from mpo_tn.torch.models.compress import compress_empty
from mpo_tn.torch.models.host import use_host

FAMILIES = ("bert", "albert", "gpt2", "llama", "distilbert")
WAYS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.6},
    "bond": {"bond": 3},
    "exact": {},
    "low rank": {"sites": "low-rank", "keep": 0.5},
    "tables": {"target_modules": r".*(embed|wte|wpe|shared|query|q_proj).*", "bond": 4},
}


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.guarantee("plan-is-what-comes")
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_planned_is_what_comes(family: str, way: str) -> None:
    model, config = tiny(family), MPOConfig(**WAYS[way])
    before = Snapshot(model)
    decided = plan(model, config)
    before.assert_same(model)
    assert decided.parameters_before == sum(p.numel() for p in model.parameters())
    assert decided.bytes_before == bytes_of(model)
    report = compress(model, decided)
    assert [layer.names for layer in report.layers] == [unit.names for unit in decided.units]
    assert [layer.spec.bonds for layer in report.layers] == [unit.spec.bonds for unit in decided.units]
    assert [layer.spec.num_parameters for layer in report.layers] == [unit.parameters for unit in decided.units]
    assert decided.parameters_after == report.parameters_after == sum(p.numel() for p in model.parameters())
    assert decided.bytes_after == bytes_of(model)
    assert (decided.kept, decided.kept_model) == (report.kept, report.kept_model)
    assert decided.skipped == report.skipped


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_and_its_plan_give_the_same_bits(family: str, tmp_path: Path) -> None:
    # Same process, same threads, the same call of the same routines.
    config = MPOConfig(sites=3, keep=0.7)
    straight, planned = tiny(family), tiny(family)
    compress(straight, config)
    plan(planned, config).save(tmp_path / "plan.json")
    compress(planned, Plan.load(tmp_path / "plan.json"))
    a, b = straight.state_dict(), planned.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    planned.save_pretrained(tmp_path / "model")
    again = type(planned).from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again.eval()), outputs(straight.eval()))


@pytest.mark.guarantee("plan-is-what-comes")
@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.02, 0.95), st.integers(0, 99))
def test_with_a_tolerance_the_plan_is_the_most_that_can_come(out: int, in_: int, tolerance: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(in_, out))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, -3, in_))
    config = MPOConfig(sites=3, tolerance=tolerance)
    widest, bounded = plan(model, config), plan(model, config, spectra=True)
    assert not widest.is_exact
    assert widest.units[0].spec.bonds == widest.units[0].spec.sites.full_bonds
    other = copy.deepcopy(model)
    report = compress(model, bounded)
    assert report.rel_error <= tolerance * (1 + 1e-6)
    # What a plan says of the bonds is what may come out at most, whoever carries it out.
    again = compress(other, widest)
    assert again.skipped == report.skipped
    if not report.layers:  # at this tolerance its cores would not have been smaller
        return
    assert again.layers[0].spec.bonds == report.layers[0].spec.bonds
    assert all(a <= b <= c for a, b, c in zip(
        report.layers[0].spec.bonds, bounded.units[0].spec.bonds, widest.units[0].spec.bonds, strict=True
    ))  # fmt: skip


@pytest.mark.guarantee("empty-same-structure")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_weights(family: str) -> None:
    model = tiny(family)
    with torch.device("meta"):
        empty = type(model)(model.config)
    for way in WAYS.values():
        here, there = plan(model, MPOConfig(**way)), plan(empty, MPOConfig(**way))
        assert here == there
    decided = plan(model, MPOConfig(keep=0.6))
    specs = compress_empty(empty, decided)
    report = compress(model, decided)
    assert {layer.name: replace(layer.spec, rel_error=None, exact=True) for layer in report.layers} == specs
    assert [tuple(p.shape) for p in empty.parameters()] == [tuple(p.shape) for p in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_stays_has_a_reason(family: str) -> None:
    model = tiny(family)
    decided = plan(model, MPOConfig(sites=3, bond=2))
    owners = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    planned = {name for unit in decided.units for name in unit.names}
    left = {part.name for part in decided.left}
    assert owners <= planned | left
    assert not planned & left
    assert all(part.reason for part in decided.left)
    assert sum(len(parts) for parts in decided.reasons().values()) == len(decided.left)


def test_the_reasons() -> None:
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(8, 8),
            "other": nn.Linear(8, 8),
            "table": nn.Embedding(8, 8),
            "norm": nn.LayerNorm(8),
            "classifier": nn.Linear(8, 2),
            "scaled": nn.Embedding(8, 8, max_norm=1.0),
        }
    )
    reasons = {part.name: part.reason for part in plan(model, MPOConfig(exclude_modules=["other"], bond=2)).left}
    assert reasons == {
        "other": "excluded by exclude_modules",
        "table": "an embedding, which has to be named",
        "norm": "a LayerNorm is not a linear layer or an embedding",
        "classifier": "a task head or the output embeddings, which all-linear leaves alone",
        "scaled": "an embedding, which has to be named",
    }
    named = plan(model, MPOConfig(target_modules=["table", "scaled", "norm"], bond=2))
    assert [unit.name for unit in named.units] == ["table"]
    assert named.skipped == {
        "scaled": "max_norm rescales the table in place",
        "norm": "a LayerNorm is not a linear layer or an embedding",
    }
    assert {part.reason for part in named.left if not part.matched} == {"target_modules does not match it"}


def test_an_edited_plan_is_carried_out() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 12))
    decided = plan(model, MPOConfig(sites=3, keep=0.8))
    first, second, third = decided.units
    narrow = replace(first, spec=replace(first.spec, bonds=(1, 2)))
    other_legs = replace(second, spec=replace(second.spec, sites=Sites((4, 3), (4, 4)), bonds=(5,)))
    within = replace(third, spec=replace(third.spec, bonds=third.spec.sites.full_bonds), tolerance=0.5)
    report = compress(model, replace(decided, units=(narrow, other_legs, within)))
    assert [layer.spec.bonds for layer in report.layers[:2]] == [(1, 2), (5,)]
    assert report.layers[1].spec.sites == Sites((4, 3), (4, 4))
    assert 0 < report.layers[2].spec.rel_error <= 0.5


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))


def shared() -> nn.Module:
    model = small()
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "this one has no 2"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 9), nn.LayerNorm(9)), r"2 has the shape \(9, 8\) here"),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Embedding(8, 8), nn.LayerNorm(8)), "2 is of kind embedding here"),
        (
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8)),
            "0 has 0 numbers in 0 bytes beside it here, and 8 in 32 in the plan",
        ),
        (shared(), r"0 is used by \['0', '2'\] here and \['0'\] in the plan"),
        (nn.Sequential(*small(), nn.Linear(8, 8)), "it says nothing of 4 with its 72 parameters"),
        (
            nn.Sequential(*small()[:3], nn.LayerNorm(9)),
            "3 has 18 parameters in 72 bytes here, and 16 in 64 in the plan",
        ),
        (small()[:3], "this one has no 3"),
        (small().double(), "stores 0 as float32, and its weight is float64"),
        (
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.LayerNorm(8)),
            "2, which cannot be one: a LayerNorm",
        ),
    ],
)
def test_a_plan_of_another_model_is_refused(other: nn.Module, message: str) -> None:
    decided = plan(small(), MPOConfig(sites=3, bond=2))
    before = Snapshot(other)
    with pytest.raises(MPOError, match=message):
        compress(other, decided)
    before.assert_same(other)
    assert not any(isinstance(module, MPOLayer) for module in other.modules())


def test_a_model_that_is_compressed_has_no_plan() -> None:
    model = small()
    decided = plan(model, MPOConfig(sites=3))
    compress(model, decided)
    for again in (lambda: plan(model, MPOConfig(sites=3)), lambda: compress(model, decided)):
        with pytest.raises(MPOError, match="holds MPO modules already"):
            again()


class NoRoom(nn.Sequential):
    """Refuses a new module under its second name."""

    closed = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.closed and name == "2" and isinstance(value, MPOLayer):
            raise RuntimeError("no room")
        super().__setattr__(name, value)


@pytest.mark.guarantee("compress-all-or-nothing")
def test_whatever_raises_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = Snapshot(model)
    for fatal in range(3):  # before either unit, and once all are decomposed

        def progress(done: int, total: int, name: str, fatal: int = fatal) -> None:
            if done == fatal:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(model, MPOConfig(sites=3), progress=progress)
        before.assert_same(model)

    class Refuses:
        def attach(self, model: nn.Module, config: MPOConfig) -> None:
            raise RuntimeError("no host")

    previous = use_host(Refuses())
    try:
        with pytest.raises(RuntimeError, match="no host"):
            compress(model, MPOConfig(sites=3))
    finally:
        use_host(previous)
    before.assert_same(model)

    cramped = NoRoom(*small())
    before = Snapshot(cramped)
    cramped.closed = True
    with pytest.raises(RuntimeError, match="no room"):
        compress(cramped, MPOConfig(sites=3))
    before.assert_same(cramped)


def test_names_may_stand_in_any_order() -> None:
    model = shared()
    decided = plan(model, MPOConfig(sites=3, bond=2))
    turned = tuple(replace(unit, names=unit.names[::-1]) for unit in decided.units)
    assert [unit.names for unit in turned] != [unit.names for unit in decided.units]
    report = compress(model, replace(decided, units=turned))
    assert [layer.names for layer in report.layers] == [unit.names for unit in decided.units]


def test_a_plan_that_compresses_nothing_is_refused() -> None:
    model = small()
    decided = plan(model, MPOConfig(sites=3, bond=2))
    left = [
        LeftDense(unit.name, unit.dense_parameters + unit.bias, 4 * (unit.dense_parameters + unit.bias), "by hand")
        for unit in decided.units
    ]
    before = Snapshot(model)
    with pytest.raises(MPOError, match='compresses nothing: move what is to be an MPO from "left" to "units"'):
        compress(model, replace(decided, units=(), left=(*decided.left, *left)))
    before.assert_same(model)


def test_the_bytes_are_those_of_every_dtype_by_itself() -> None:
    model = small()
    model[0].weight.data = model[0].weight.data.half()
    decided = plan(model, MPOConfig(sites=3, bond=2))
    assert [(unit.storage, unit.bias, unit.bias_bytes) for unit in decided.units] == [
        ("float16", 8, 32),
        ("float32", 8, 32),
    ]
    assert decided.bytes_before == bytes_of(model)
    compress(model, decided)
    assert decided.bytes_after == bytes_of(model)


def test_a_lazy_module_has_nothing_to_count() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    decided = plan(model, MPOConfig(sites=2, bond=2))
    assert [(part.name, part.parameters) for part in decided.left] == [("1", 0)]


@pytest.mark.parametrize("target", ["all-linear", ["query"]])
def test_a_model_whose_head_was_taken_off(target: Any, tmp_path: Path) -> None:
    model = tiny("bert")
    del model.cls
    compress(model, MPOConfig(target_modules=target, sites=3, bond=4))
    assert any(isinstance(module, MPOLayer) for module in model.modules())
    assert type(model.config.quantization_config).__name__ == "MPOQuantizationConfig"


def test_bonds_one_by_one_survive_a_file(tmp_path: Path) -> None:
    config = MPOConfig(sites=3, bond=np.int64(4), overrides={"0": {"bond": [3, 2]}, "2": {"bond": np.int64(2)}})
    decided = plan(small(), config)
    decided.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == decided
    assert plan(small(), again.config) == decided
