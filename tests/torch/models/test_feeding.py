"""Which rows of an input are no padding, and which mask belongs to whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn.torch.models.feeding import Call, calls_of, counted_rows, is_encoder_decoder, only_looked_at

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
X = torch.arange(12.0).reshape(2, 3, 2)


@pytest.mark.parametrize(
    ("x", "expected", "known"),
    [
        (X, X[MASK], True),
        (X.reshape(6, 2), X[MASK], True),
        (X.transpose(0, 1), X.transpose(0, 1)[MASK.T], True),
        (X[:, 0], X[:, 0], True),  # one row a sequence
        (X[MASK], X[MASK], True),  # the model itself took the padding out
        (torch.ones(5, 2), torch.ones(5, 2), False),
        (torch.ones(2, 7, 2), torch.ones(14, 2), False),
    ],
)
def test_rows_that_are_no_padding(x: torch.Tensor, expected: torch.Tensor, known: bool) -> None:
    rows, told = counted_rows(x, MASK)
    assert torch.equal(rows, expected)
    assert told is known
    assert torch.equal(counted_rows(x, None)[0], x.reshape(-1, 2))


def test_one_row_of_a_sequence_that_is_all_padding_does_not_count() -> None:
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    assert torch.equal(counted_rows(X[:, 0], mask)[0], X[:1, 0])


def test_a_decoder_has_its_own_mask_and_reads_the_encoders_tokens() -> None:
    own = torch.ones(2, 2).bool()
    call = Call((), {}, {"attention_mask": MASK, "decoder_attention_mask": own}, None)
    assert call.mask_of("encoder.block.0.q", True, MASK.shape) is MASK
    assert call.mask_of("decoder.block.0.q", True, own.shape) is own
    assert call.mask_of("decoder.block.0.cross.k", True, MASK.shape) is MASK
    assert call.mask_of("model.decoder.layers.0.q", False, MASK.shape) is MASK  # a decoder alone
    ids = Call((), {"decoder_input_ids": torch.ones(2, 2)}, {"attention_mask": MASK}, None)
    assert ids.mask_of("decoder.q", True, torch.Size((2, 2))) is None
    assert ids.mask_of("decoder.cross.k", True, MASK.shape) is MASK
    halves = nn.ModuleDict({"encoder": nn.Linear(1, 1), "decoder": nn.Linear(1, 1)})
    assert is_encoder_decoder(halves)
    assert not is_encoder_decoder(nn.ModuleDict({"decoder": nn.Linear(1, 1)}))


def test_batches_without_a_token_are_left_out_and_floats_have_no_tokens() -> None:
    empty = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.zeros(1, 2)}
    calls = list(calls_of(nn.Linear(1, 1), [empty, torch.zeros(0, 3, dtype=torch.long), torch.ones(1, 2)]))
    assert len(calls) == 1
    assert calls[0].tokens is None


def test_caches_of_keys_and_values_are_off_meanwhile() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.config = SimpleNamespace(use_cache=True)
    model[0].config = SimpleNamespace(use_cache=False)
    model.train()

    def looked_at() -> None:
        with only_looked_at(model):
            assert not (model.config.use_cache)
            assert not (model.training)
            assert not (torch.is_grad_enabled())
            assert not model[0].weight.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        looked_at()
    assert model.config.use_cache
    assert not model[0].config.use_cache
    assert model.training
    assert torch.is_grad_enabled()
    assert model[0].weight.requires_grad


def test_what_has_a_decoder_says_so() -> None:
    """BERT calls the matrix that gives logits a decoder; it has none, and its logits have the padding of its tokens."""
    model = tiny("bert")
    assert {"encoder", "decoder"} <= {part for name, _ in model.named_modules() for part in name.split(".")}
    assert not is_encoder_decoder(model)
    model.config.is_encoder_decoder = True
    assert is_encoder_decoder(model)
    assert is_encoder_decoder(torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "decoder": torch.nn.Linear(2, 2)}))
    assert not is_encoder_decoder(torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)}))
