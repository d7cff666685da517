"""Every parameter like a matrix is in cores or is named, whatever module holds it, tied ones once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.coverage import Coverage, DenseMatrix, is_matrix
from mpo_tn.torch import MPOConfig, Plan, compress, plan
from mpo_tn.torch.models.summary import inspect_model, model_coverage

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61,
}  # fmt: skip


class Odd(nn.Module):
    """A model with weights of every sort: its own, a convolution, attention, a flat table, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.scale = nn.Parameter(torch.ones(8, 1))  # no matrix: one axis is longer than 1
        self.conv = nn.Conv2d(3, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.table = nn.Embedding(11, 8)
        self.experts = nn.ParameterList([torch.randn(8, 4), torch.randn(3, 4, 8)])
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def vit() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))


MODELS = {"odd": Odd, "mixtral": mixtral, "vit": vit, "gpt2": lambda: tiny("gpt2"), "albert": lambda: tiny("albert")}


def like_matrices(model: nn.Module) -> dict[str, int]:
    """The rule written down again: two axes or more, two of them longer than 1, each parameter once."""
    return {
        name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and len([s for s in p.shape if s > 1]) > 1
    }


@pytest.mark.guarantee("none-in-silence")
@pytest.mark.parametrize("target", ["all-linear", "all-matrices", ".*"])
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_covered_or_named(name: str, target: str) -> None:
    model = MODELS[name]()
    matrices = like_matrices(model)
    decided = plan(model, MPOConfig(target_modules=target, keep=0.9))
    report = compress(model, decided)
    now = {name: size for name, size in like_matrices(model).items() if ".cores." not in name}
    looked = model_coverage(model)
    assert decided.coverage is not None
    for found in (decided.coverage, report.coverage, looked):
        assert found.total == sum(matrices.values())
        assert {each.name: each.numbers for each in found.dense} == now
        assert all(each.reason for each in found.dense)
    assert report.coverage.dense == decided.coverage.dense
    assert report.coverage.covered == sum(layer.spec.out_features * layer.spec.in_features for layer in report.layers)
    assert str(report.coverage) in str(report)
    assert str(report.coverage) in str(decided)
    assert Plan.from_dict(decided.to_dict()) == decided


@pytest.mark.guarantee("none-in-silence")
def test_a_tied_weight_counts_once_and_the_models_own_parameters_are_named() -> None:
    model = Odd()
    found = model_coverage(model, ["body"])
    assert [each.name for each in found.dense] == [
        "position", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "table.weight", "experts.0",
        "experts.1",
    ]  # fmt: skip
    assert found.covered == 64
    assert found.total == sum(like_matrices(model).values())


def test_a_dense_model_is_looked_at_by_the_grammar_of_compress() -> None:
    model = tiny("bert")
    names = {row.name for row in inspect_model(model, target=["query", "re:.*intermediate.*"], sites=2)}
    assert names == {
        unit.name for unit in plan(model, MPOConfig(target_modules=["query", "re:.*intermediate.*"])).units
    }
    with pytest.raises(MPOError, match="qurey"):
        inspect_model(model, target=["qurey"])
    compress(model, MPOConfig(target_modules=["query", "key"], sites=2))
    assert {row.name for row in inspect_model(model, target=["query"])} == {n for n in names if n.endswith("query")}
    assert not {row.name for row in inspect_model(model, exclude=["query"])} & names
    with pytest.raises(MPOError, match=r"value.*matches no compressed matrix"):
        inspect_model(model, target=["value"])


def test_a_plan_of_a_release_that_did_not_say_so_knows_no_coverage() -> None:
    written = plan(tiny("bert"), MPOConfig()).to_dict()
    assert Plan.from_dict(written).coverage is not None
    for part in written["left"]:
        del part["matrices"]
    old = Plan.from_dict(written)
    assert old.coverage is None
    assert "covers" not in str(old)


@pytest.mark.parametrize("matrices", [[], {"w": 3}, {"w": [3, -1]}, {"w": ["3"]}, {3: [2, 2]}])
def test_a_plan_whose_shapes_are_wrong_is_refused(matrices: Any) -> None:
    written = plan(tiny("bert"), MPOConfig()).to_dict()
    written["left"][0]["matrices"] = matrices
    with pytest.raises(MPOError, match="list of sizes"):
        Plan.from_dict(written)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.sampled_from("ab")), max_size=12), st.integers(0, 99)
)
def test_rows_add_up_and_are_sorted(parts: list[tuple[int, int, str]], covered: int) -> None:
    dense = tuple(DenseMatrix(f"layers.{k}.{place}", (size, 2), "why") for k, size, place in parts)
    found = Coverage(covered, dense)
    rows = found.rows()
    assert sum(row.numbers for row in rows) + covered == found.total
    assert [row.numbers for row in rows] == sorted((row.numbers for row in rows), reverse=True)
    assert len({(row.pattern, row.matrices[0].shape) for row in rows}) <= len(rows)


def test_shares_are_never_rounded_to_all_or_nothing() -> None:
    found = Coverage(10**7, (DenseMatrix("w", (2, 2), "why"),))
    assert str(found) == "covers 99.9 % of the matrix parameters"
    assert found.percent(4) == "< 0.1"
    assert str(Coverage(5, ())) == "covers 100.0 % of the matrix parameters"
    assert Coverage(0, ()).share == 1.0


@given(st.lists(st.integers(1, 3), max_size=5))
def test_what_is_like_a_matrix(shape: list[int]) -> None:
    assert is_matrix(shape) == (len([size for size in shape if size > 1]) >= 2)
