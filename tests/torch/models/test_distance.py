"""D, the distance to the dense model: its formula, its errors, and what does not count."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.tiny_models import VOCAB, tiny
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.models.distance import Inputs, distance, outputs
from mpo_tn.torch.models.evaluating import evaluating

LENGTHS = (9, 3, 5, 1, 7, 2)


def texts() -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=source) for length in LENGTHS]


def batches(size: int, rows: list[torch.Tensor] | None = None) -> list[Inputs]:
    """Padded on the right to the longest of each batch."""
    rows = texts() if rows is None else rows
    found: list[Inputs] = []
    for k in range(0, len(rows), size):
        part = rows[k : k + size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def encoder() -> torch.nn.Module:
    return tiny("bert").base_model


def smaller(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    compress(other, MPOConfig(sites=3, keep=0.5))
    return other


# Two float32 forward passes of two layers in other batches: a few hundred roundings of values near one.
ROUNDING = 1e-4


@pytest.mark.guarantee("distance-definition")
def test_of_an_encoder_it_is_the_relative_squared_distance_of_hidden_states() -> None:
    dense = encoder()
    model = smaller(dense)
    above = below = 0.0
    with torch.no_grad():
        for row in texts():  # one by one, so that there is no padding
            wanted = dense(row[None]).last_hidden_state.double()
            above += float((model(row[None]).last_hidden_state.double() - wanted).square().sum())
            below += float(wanted.square().sum())
    found = distance(model, dense, batches(4))
    assert found.measure == "hidden"
    assert (found.positions, found.sequences) == (sum(LENGTHS), len(LENGTHS))
    assert float(found) == pytest.approx(above / below, rel=ROUNDING)
    assert 0 < found.standard_error < found.value


@pytest.mark.guarantee("distance-definition")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_language_model_it_is_the_mean_divergence_of_next_tokens(family: str) -> None:
    dense = tiny(family)
    model = smaller(dense)
    total = 0.0
    with torch.no_grad():
        for row in texts():
            p, q = (m(row[None]).logits[0].double().softmax(-1) for m in (dense, model))
            total += float((p * (p / q).log()).sum())
    found = distance(model, dense, batches(4))
    assert found.measure == "logits"
    assert float(found) == pytest.approx(total / sum(LENGTHS), rel=ROUNDING)


@pytest.mark.guarantee("distance-padding")
@given(st.integers(1, 6), st.permutations(range(len(LENGTHS))))
def test_other_batches_give_the_same(size: int, order: list[int]) -> None:
    dense, model = _PAIR
    expected = distance(model, dense, batches(1))
    rows = texts()
    found = distance(model, dense, batches(size, [rows[k] for k in order]))
    assert found.value == pytest.approx(expected.value, rel=ROUNDING)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=100 * ROUNDING)


_PAIR = (encoder(), smaller(encoder()))


def test_what_the_dense_model_gave_serves_in_its_place() -> None:
    dense, model = _PAIR
    kept = list(outputs(dense, batches(4)))
    assert [len(rows) for rows in kept] == [18, 9]
    assert distance(model, kept, batches(4)) == distance(model, dense, batches(4))
    assert float(distance(dense, kept, batches(4))) == 0


@pytest.mark.parametrize("labels", [1, 3])
def test_of_a_classifier_its_classes_count_and_of_a_regression_its_score(labels: int) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=VOCAB,
        num_labels=labels,
    )  # fmt: skip
    dense = transformers.BertForSequenceClassification(config).eval()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.classifier.bias.add_(torch.arange(1.0, labels + 1))
    found = distance(model, dense, batches(6))
    rows = batches(6)[0]
    with torch.no_grad():
        wanted, other = dense(**rows).logits.double(), model(**rows).logits.double()
    assert found.measure == ("score" if labels == 1 else "logits")
    if labels == 1:
        expected = float((other - wanted).square().sum() / wanted.square().sum())
    else:
        expected = float((wanted.softmax(-1) * (wanted.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean())
    assert float(found) == pytest.approx(expected, rel=ROUNDING)
    assert found.sequences == len(LENGTHS)


def test_the_error_is_that_of_a_ratio_of_sums() -> None:
    """Halved tables give D = 1/4 for every text: no draw of texts changes that."""
    dense, half = _Table(1.0), _Table(0.5)
    found = distance(half, dense, batches(2))
    assert found.value == pytest.approx(0.25, rel=1e-6)
    assert found.standard_error < 1e-8
    assert math.isnan(distance(half, dense, batches(1, texts()[:1])).standard_error)


def test_a_model_that_gives_no_numbers_is_infinitely_far() -> None:
    assert distance(_Table(math.nan), _Table(1.0), batches(2)).value == math.inf


def test_modes_are_restored() -> None:
    dense, model = encoder(), encoder()
    model.train()
    model.encoder.eval()
    flags = [module.training for module in model.modules()]
    distance(model, dense, batches(3))
    assert [module.training for module in model.modules()] == flags
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags


class _Table(torch.nn.Module):
    """Hidden states looked up, times a number."""

    def __init__(self, factor: float, width: int = 3) -> None:
        super().__init__()
        self.factor = factor
        self.table = torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.factor * self.table[input_ids])


class _Silent(torch.nn.Module):
    def forward(self, **_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.zeros(()))


BAD = {
    "no batch": (lambda: distance(_Table(1), _Table(1), []), "there is no batch"),
    "wider": (lambda: distance(_Table(1), _Table(1, 4), batches(3)), r"\(17, 3\) numbers and the reference has \(17,"),
    "fewer": (lambda: distance(_Table(1), list(outputs(_Table(1), batches(3)))[:1], batches(3)), "ends after 1 of 2"),
    "zeros": (lambda: distance(_Table(1), _Table(0), batches(3)), "zeros everywhere"),
    "not finite": (lambda: distance(_Table(1), _Table(math.inf), batches(3)), "gives what is not finite"),
    "nothing": (lambda: distance(_Silent(), _Silent(), batches(3)), "neither last_hidden_state nor logits"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input(mistake: str) -> None:
    act, message = BAD[mistake]
    with pytest.raises(MPOError, match=message):
        act()
