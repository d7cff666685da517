"""Which modules a pattern means, what is skipped and why, and which modules are one unit, before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter import compressed, linear, small
from helpers.grammar import GRAMMAR
from helpers.tiny_models import FAMILIES, VOCAB, tiny, token_ids
from torch import nn
from torch.nn.utils import parametrizations, prune

from mpo_tn import MPOError
from mpo_tn.torch import (
    MPOConfig,
    MPOEmbedding,
    MPOLinear,
    bond_spectra,
    compress,
    cut_model,
    freeze,
    save_cores,
    save_state,
    squeeze,
)
from mpo_tn.torch.models.summary import inspect_model
from mpo_tn.torch.models.survey import find_units, survey
from mpo_tn.torch.models.units import cuttable_units, mpo_specs, mpo_units


def names(model: nn.Module, target: str | list[str], exclude: str | list[str] = ()) -> list[str]:
    return [unit.name for unit in find_units(model, target, exclude)[0]]


@pytest.fixture
def block() -> nn.Module:
    attention = nn.ModuleDict({"query": nn.Linear(4, 4), "myquery": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
    return nn.ModuleDict(
        {"attention": attention, "query": nn.Linear(4, 4), "table": nn.Embedding(6, 4), "norm": nn.LayerNorm(4)}
    )


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        *GRAMMAR,
        (r".*", ["attention.query", "attention.myquery", "attention.key", "query", "table"]),
        ("all-linear", ["attention.query", "attention.myquery", "attention.key", "query"]),
    ],
)
def test_grammar(block: nn.Module, target: str | list[str], expected: list[str]) -> None:
    assert names(block, target) == expected


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["query"], ["attention.myquery", "attention.key"]),
        (r"attention\..*", ["query"]),
        (["re:.*y"], []),
        (["attention"], ["query"]),
    ],
)
def test_exclude(block: nn.Module, exclude: str | list[str], left: list[str]) -> None:
    if left:
        assert names(block, "all-linear", exclude) == left
    else:
        with pytest.raises(MPOError, match="no module"):
            find_units(block, "all-linear", exclude)


@pytest.mark.parametrize("pattern", ["(", "re:*", "["])
def test_a_broken_expression_is_named(block: nn.Module, pattern: str) -> None:
    with pytest.raises(MPOError) as caught:
        find_units(block, [f"re:{pattern.removeprefix('re:')}"])
    assert pattern.removeprefix("re:") in str(caught.value)


def test_no_match_hints_at_what_there_is(block: nn.Module) -> None:
    with pytest.raises(MPOError, match=r"nowhere.*attention\.query"):
        find_units(block, ["nowhere"])
    with pytest.raises(MPOError, match="no linear layer"):
        find_units(nn.Sequential(nn.ReLU()), "all-linear")
    with pytest.raises(MPOError, match=r"norm.*LayerNorm"):
        find_units(block, ["norm"])


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _parametrized() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(4, 4))


def _weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def _integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def _complex() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.complex64)


def _empty() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(0, 4))
    return layer


def _with(name: str, held: object) -> nn.Module:
    layer = nn.Linear(4, 4)
    if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter):
        layer.register_buffer(name, held)
    else:
        setattr(layer, name, held)
    return layer


def _float8() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def _pruned_bias() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "bias", 1)


def _computed_bias() -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    object.__setattr__(layer, "__dict__", {**layer.__dict__, "bias": torch.ones(4)})
    del layer._parameters["bias"]
    return layer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.LayerNorm(4), "LayerNorm"),
        (lambda: _with("adapter", nn.LayerNorm(4)), "holds adapter beside weight and bias"),
        (lambda: _with("scale", nn.Parameter(torch.ones(4))), "holds scale beside weight and bias"),
        (lambda: _with("mask", torch.ones(4)), "holds mask beside weight and bias"),
        (_pruned_bias, "holds bias_mask, bias_orig, a bias that is computed beside"),
        (_computed_bias, "a bias that is computed"),
        (_float8, "its weight is torch.float8_e4m3fn, in which nothing can be computed"),
        (lambda: nn.LazyLinear(4), "LazyLinear"),
        (lambda: nn.Sequential(), "Sequential"),
        (_parametrized, "parametriz|Parametrized"),
        (_weight_normed, "parametriz|Parametrized"),
        (lambda: nn.Embedding(6, 4, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(6, 4, sparse=True), "sparse"),
        (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), "frequency"),
        (_integers, "int8"),
        (_complex, "complex64"),
        (_empty, "no entries"),
    ],
)
def test_what_cannot_be_an_mpo_is_listed_with_the_reason(build: object, reason: str) -> None:
    model = nn.ModuleDict({"odd": build(), "good": nn.Linear(4, 4)})
    kept = model["odd"]
    report = compress(model, MPOConfig(target_modules=["odd", "good"], sites=2))
    assert [layer.name for layer in report.layers] == ["good"]
    assert list(report.skipped) == ["odd"]
    assert any(part in report.skipped["odd"] for part in reason.split("|"))
    assert model["odd"] is kept


def test_heads_are_left_by_all_linear_but_can_be_named() -> None:
    model = tiny("bert", tied=False)
    assert not any(name.endswith("decoder") for name in names(model, "all-linear"))
    assert names(model, ["decoder"]) == ["cls.predictions.decoder"]
    model = nn.ModuleDict({"classifier": nn.ModuleDict({"dense": nn.Linear(4, 4)}), "body": nn.Linear(4, 4)})
    assert names(model, "all-linear") == ["body"]


@pytest.mark.parametrize("tied", [True, False])
def test_all_matrices_takes_embeddings_and_leaves_heads(tied: bool) -> None:
    """A head that is tied to the table goes with it."""
    model = tiny("llama", tied=tied)
    found = survey(model, "all-matrices")
    linear_ones = [unit.name for unit in survey(model, "all-linear").units]
    assert [unit.name for unit in found.units] == ["model.embed_tokens", *linear_ones]
    assert found.units[0].all_names == (("model.embed_tokens", "lm_head") if tied else ("model.embed_tokens",))
    assert [part.name for part in found.left if "which all-matrices leaves alone" in part.reason] == (
        [] if tied else ["lm_head"]
    )
    assert found.skipped == {}


def test_a_shared_module_is_one_unit_named_by_first_occurrence() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "other": nn.Linear(4, 4), "second": shared})
    units, _ = find_units(model, ["second"])
    assert [(unit.name, unit.names) for unit in units] == [("first", (("first", "second"),))]
    report = compress(model, MPOConfig(target_modules=["second"], sites=2))
    assert model["first"] is model["second"]
    assert isinstance(model["first"], MPOLinear)
    assert report.layers[0].names == ("first", "second")


def test_modules_that_share_a_parameter_share_their_cores() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(6, 4, padding_idx=2), "head": nn.Linear(4, 6), "b": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    report = compress(model, MPOConfig(target_modules=["head"], sites=2))
    assert report.layers[0].names == ("table", "head")
    assert isinstance(model["table"], MPOEmbedding)
    assert isinstance(model["head"], MPOLinear)
    assert all(a is b for a, b in zip(model["table"].cores, model["head"].cores, strict=True))
    assert (model["table"].spec.tied_to, model["head"].spec.tied_to) == (None, "table")
    assert (model["table"].padding_idx, model["head"].spec.bias) == (2, True)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_a_unit_with_a_partner_that_cannot_follow_is_skipped_whole() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "odd": _with("mask", torch.ones(4)), "free": nn.Linear(4, 4)})
    model["odd"].weight = model["a"].weight
    report = compress(model, MPOConfig(sites=2))
    assert [layer.name for layer in report.layers] == ["free"]
    assert "odd" in report.skipped["a"]
    assert model["odd"].weight is model["a"].weight


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_a_partner_that_needs_its_table_keeps_the_unit_dense(options: dict[str, object]) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 6), "table": nn.Embedding(6, 4, **options), "b": nn.Linear(4, 4)})
    model["head"].weight = model["table"].weight
    report = compress(model, MPOConfig(target_modules=["head", "b"], sites=2))
    assert list(report.skipped) == ["head"]
    assert "table" in report.skipped["head"]
    assert type(model["table"]) is nn.Embedding
    assert model["head"].weight is model["table"].weight


@pytest.mark.parametrize("excluded", [["decoder"], ["word_embeddings"], ["decoder", "word_embeddings"]])
def test_excluding_either_side_of_a_tie_leaves_both_dense(excluded: list[str]) -> None:
    model = tiny("bert")
    target = ["word_embeddings", "decoder", "query"]
    report = compress(model, MPOConfig(target_modules=target, exclude_modules=excluded, sites=3, bond=4))
    assert len(report.layers) == 2
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if len(excluded) == 1:
        assert excluded[0] in report.skipped["bert.embeddings.word_embeddings"]


def test_naming_one_side_of_a_tie_takes_both() -> None:
    model = tiny("bert")
    compress(model, MPOConfig(target_modules=["word_embeddings"], sites=3, bond=4))
    assert isinstance(model.get_output_embeddings(), MPOLinear)


def test_parts_with_one_weight_in_two_layouts_are_skipped() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"a": Conv1D(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    report = compress(model, MPOConfig(sites=2))
    assert [layer.name for layer in report.layers] == ["c"]
    assert "shared" in report.skipped["a"]


def test_the_model_itself_is_not_a_target() -> None:
    for target in (r".*", "all-linear"):
        with pytest.raises(MPOError, match="the model"):
            compress(nn.Linear(4, 4), MPOConfig(target_modules=target, sites=2))


def test_every_family_still_runs() -> None:
    for family in ("bert", "gpt2", "llama"):
        model = tiny(family)
        compress(model, MPOConfig(target_modules=r".*", sites=2, bond=8))
        with torch.no_grad():
            assert model(token_ids()).logits.shape == (2, 9, VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_units_of_a_compressed_model_are_those_it_was_compressed_by(family: str) -> None:
    target = r".*(?<!position_embeddings)"
    before, _ = find_units(tiny(family), target)
    model = small(family)
    units = mpo_units(model)
    assert [(unit.name, unit.names) for unit in before] == [(unit.name, unit.names) for unit in units.values()]
    assert list(units) == [unit.name for unit in units.values()]
    assert cuttable_units(model) == units
    modules = dict(model.named_modules(remove_duplicate=False))
    for unit in units.values():
        assert [m.spec.tied_to for m in unit.modules] == [None] + [unit.name] * (len(unit.modules) - 1)
        for module, names in zip(unit.modules, unit.names, strict=True):
            assert all(modules[name] is module for name in names)
            assert all(a is b for a, b in zip(module.cores, unit.cores, strict=True))
    first_names = {
        names[0]: m.spec for unit in units.values() for m, names in zip(unit.modules, unit.names, strict=True)
    }
    assert mpo_specs(model) == first_names
    assert list(mpo_specs(model)) == [name for name, m in model.named_modules() if name in first_names]  # as they come
    assert list(units) == [row.name for row in inspect_model(model)]


def sharing_one_core() -> nn.Sequential:
    first, second = compressed(linear(12, 8), sites=3)[0], compressed(linear(12, 8, seed=1), sites=3)[0]
    second.cores[1] = first.cores[1]
    return nn.Sequential(first, second)


def without_data() -> nn.Sequential:
    return nn.Sequential(compressed(linear(12, 8), sites=3)[0].to("meta"))


def flattened() -> nn.Sequential:
    """As FSDP leaves them."""
    layer = compressed(linear(12, 8), sites=3)[0]
    layer.cores[2] = nn.Parameter(layer.cores[2].detach().reshape(-1))
    return nn.Sequential(layer)


UNCUTTABLE = {
    "core 1 of 1 is also a core of 0": sharing_one_core,
    r"0\.cores\.0 is on the meta device": without_data,
    r"0\.cores\.2 is sharded": flattened,
}
CHANGING: dict[str, Callable[[Any, Any], Any]] = {
    "cuttable_units": lambda model, place: cuttable_units(model),
    "bond_spectra": lambda model, place: bond_spectra(model),
    "cut_model": lambda model, place: cut_model(model, {"0": [1, 1]}),
    "squeeze": lambda model, place: squeeze(model, evaluate=lambda _: 1.0, delta=0.1),
    "save_state": lambda model, place: save_state(f"{place}/state", model=model),
}


@pytest.mark.parametrize("verb", CHANGING)
@pytest.mark.parametrize("message", UNCUTTABLE)
def test_who_gives_cores_new_shapes_refuses_those_that_cannot_have_them(message: str, verb: str) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.raises(MPOError, match=message):
        CHANGING[verb](UNCUTTABLE[message](), place)


@pytest.mark.parametrize("model", [make() for make in UNCUTTABLE.values()], ids=["shared", "meta", "flat"])
def test_who_looks_at_structure_does_not_mind(model: nn.Sequential) -> None:
    assert list(mpo_units(model)) == [name for name, _ in model.named_children()] == list(mpo_specs(model))
    assert freeze(model, "cores", also=()).trainable == sum(
        p.numel() for n, p in model.named_parameters() if "cores" in n
    )


def test_cores_that_are_shared_one_by_one_are_still_listed_and_saved(tmp_path: Path) -> None:
    model = sharing_one_core()
    assert [row.name for row in inspect_model(model)] == ["0", "1"]
    assert len(save_cores(model, tmp_path / "cores", "cores")) == 5
    with pytest.raises(MPOError, match="core 1 of 1 trains there and not"):
        freeze(model, overrides={"1": "none", "0": "cores"})


def test_a_part_with_the_tied_modules_alone_has_a_unit() -> None:
    head = small("bert").cls
    (unit,) = [unit for unit in mpo_units(head).values() if unit.spec.tied_to is not None]
    assert unit.name in [row.name for row in inspect_model(head)]


def test_without_mpo_modules() -> None:
    with pytest.raises(MPOError, match="no MPO modules: compress it first"):
        mpo_units(nn.Linear(3, 3))
    assert mpo_units(nn.Linear(3, 3), required=False) == mpo_specs(nn.Linear(3, 3)) == {}
