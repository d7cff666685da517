"""Text split in two, matrices put in the place of others and taken back, and who has a bias of its own."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot
from helpers.planning import TEXT, Chain, vectors
from helpers.tiny_models import EMBEDDINGS, tiny
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch.models.distance import distance
from mpo_tn.torch.models.samples import Judge, Samples, is_biased, replaced
from mpo_tn.torch.models.survey import find_units


@given(st.integers(1, 40))
def test_about_every_fifth_batch_is_held_back(count: int) -> None:
    batches = [{"x": torch.tensor([k])} for k in range(count)]
    found = Samples.of(iter(batches))
    both = [*found.batches, *found.held_back]
    if count == 1:
        assert found.batches == found.held_back == tuple(batches)
        return
    assert sorted(int(batch["x"]) for batch in both) == list(range(count))
    assert len(found.held_back) == max(count // 5, 1)
    assert len(found.batches) >= len(found.held_back)


@pytest.mark.parametrize("given_", [[], TEXT[0], [torch.ones(2, 3)], ["text"], "text", [{"x": 3}], torch.ones(2)])
def test_what_is_no_text_is_refused(given_: Any) -> None:
    with pytest.raises(MPOError, match="batch"):
        Samples.of(given_)


def test_a_judge_is_the_distance_to_the_model_as_it_was() -> None:
    model, dense = tiny("bert"), tiny("bert")
    judge = Judge(model, TEXT)
    assert judge() == 0
    (unit,) = find_units(model, ["bert.encoder.layer.0.output.dense"])[0]
    with replaced(unit, 0.5 * unit.matrix()):
        found = judge()
        assert found == float(distance(model, dense, TEXT)) > 0
    assert judge() == 0


def test_a_judge_takes_as_many_tokens_as_it_is_told() -> None:
    tokens = [int(batch["attention_mask"].sum()) for batch in TEXT]
    model = tiny("bert")
    assert len(Judge(model, TEXT, 1).batches) == 1
    assert len(Judge(model, TEXT, tokens[0] + 1).batches) == 2
    assert len(Judge(model, TEXT, 10**9).batches) == len(TEXT)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_matrix_is_put_in_place_and_taken_back(family: str) -> None:
    model = tiny(family)
    targets = rf".*(dense|c_fc|up_proj|{EMBEDDINGS[family]})"
    for unit in find_units(model, targets)[0]:
        before, places = Snapshot(model), [p.data_ptr() for p in model.parameters()]
        matrix = torch.randn(unit.matrix().shape, dtype=torch.float64)
        shift = torch.randn(len(matrix), dtype=torch.float64) if is_biased(unit) else None
        biases = [getattr(module, "bias", None) for module in unit.modules]
        old = [None if bias is None else bias.detach().clone() for bias in biases]
        with contextlib.suppress(KeyError), replaced(unit, matrix, shift):
            assert torch.equal(unit.matrix(), matrix.float())
            assert unit.weight.is_contiguous()
            for bias, there in zip(biases, old, strict=True):
                if shift is not None:
                    assert torch.equal(bias, (there + shift).float())  # type: ignore[operator, arg-type]
            raise KeyError
        before.assert_same(model)
        assert [p.data_ptr() for p in model.parameters()] == places


def test_nothing_is_put_in_place_if_a_shift_does_not_fit() -> None:
    model = Chain()
    before = Snapshot(model)
    unit = find_units(model, "all-linear")[0][0]
    with pytest.raises(RuntimeError), replaced(unit, torch.zeros(24, 24), torch.zeros(7)):
        pass
    before.assert_same(model)


def test_who_has_a_bias_of_its_own() -> None:
    def biased(change: Any) -> list[bool]:
        model = Chain()
        change(model)
        return [is_biased(unit) for unit in find_units(model, "all-linear")[0]]

    def lend(model: Any) -> None:
        model.layers[1].bias = model.layers[0].bias

    def lend_to_norm(model: Any) -> None:
        model.norm = torch.nn.LayerNorm(24)
        model.norm.bias = model.layers[0].bias

    def tie(model: Any) -> None:
        model.layers[1].weight = model.layers[0].weight
        model.layers[1].bias = model.layers[0].bias

    def half_tie(model: Any) -> None:
        model.layers[1].weight = model.layers[0].weight
        model.layers[1].bias = None

    assert biased(lambda model: None) == [True, True, True]
    assert biased(lend) == [False, False, True]
    assert biased(lend_to_norm) == [False, True, True]
    assert biased(tie) == [True, True]
    assert biased(half_tie) == [False, True]


def test_a_plain_output_is_judged() -> None:
    model = Chain()
    judge = Judge(model, vectors())
    unit = find_units(model, "all-linear")[0][0]
    with replaced(unit, 0.9 * unit.matrix()):
        assert judge() > 0
