"""Moments block by block: with nothing changed those of the whole model, then of what layers really get."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.adapter import Snapshot
from helpers.calibrating import inputs_of, near, padded_batches
from helpers.tiny_models import VOCAB, tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import BlockStep, MPOConfig, calibrate, calibrate_blocks, compress

STACKED = ("bert", "distilbert", "gpt2", "llama")


def close_to(actual: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    """Replaying a block may round otherwise than the whole model: to float32."""
    assert actual is not None
    assert expected is not None
    near(actual, expected.numpy(), 10 * float(expected.trace()), eps=1.2e-7)


@pytest.mark.guarantee("blocks-are-the-model")
@pytest.mark.parametrize("target", ["all-linear", r".*"])
@pytest.mark.parametrize("family", STACKED)
def test_with_nothing_changed_they_are_those_of_the_whole_model(family: str, target: str) -> None:
    model, batches = tiny(family), padded_batches()
    whole = calibrate(model, batches, target_modules=target)
    before = Snapshot(model)
    steps = list(calibrate_blocks(model, iter(batches), target_modules=target))
    before.assert_same(model)
    assert [step.name for step in steps if step.block is not None] == [
        step.name for step in steps if step.name not in ("before the blocks", "after the blocks")
    ]
    assert sorted(unit for step in steps for unit in step.calibration.units) == sorted(whole.units)
    for step in steps:
        found = step.calibration
        assert found.tokens == whole.tokens
        assert found.fingerprint == whole.fingerprint
        for unit in found.units:
            mine, all_at_once = found.of(unit), whole.of(unit)
            if all_at_once is None:
                assert mine is None
                continue
            assert mine is not None
            assert mine.tokens == all_at_once.tokens
            assert mine.cross is None
            if mine.rows is not None:
                assert all_at_once.rows is not None
                assert torch.equal(mine.rows, all_at_once.rows)
            if all_at_once.second is not None:
                close_to(mine.second, all_at_once.second)
        assert all(sample.given is sample.dense_input for sample in step.samples)


def changed(model: Any, step: BlockStep) -> None:
    """Its units as MPOs of small bonds, or, outside of blocks, with other weights."""
    if step.block is not None:
        compress(step.block, MPOConfig(target_modules=r".*", sites=2, bond=3))
        return
    with torch.no_grad():
        for unit in step.calibration.units:
            model.get_submodule(unit).weight.mul_(0.8)


@pytest.mark.parametrize("family", STACKED)
def test_with_blocks_changed_they_are_of_what_layers_then_get(family: str) -> None:
    """Against running both models whole, with the block in question not changed yet."""
    model, batches = tiny(family), padded_batches()
    dense: Any = copy.deepcopy(model)
    for number, step in enumerate(calibrate_blocks(model, batches)):
        now: Any = copy.deepcopy(model)
        for unit in step.calibration.units:
            known = step.calibration.of(unit)
            assert known is not None
            assert known.second is not None
            x, y = inputs_of(dense, unit, batches), inputs_of(now, unit, batches)
            scale = 10 * float(np.sqrt((x**2).sum() * (y**2).sum()) / len(x))
            near(known.second, y.T @ y / len(y), scale, eps=1.2e-7)
            assert (known.cross is None) == (number == 0)
            near(known.second if known.cross is None else known.cross, x.T @ y / len(x), scale, eps=1.2e-7)
            assert number == 0 or np.linalg.norm(x - y) > 0.01 * np.linalg.norm(x)
        if step.block is not None:
            changed(model, step)


def hidden_states(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("family", STACKED)
def test_samples_are_what_blocks_get_and_give(family: str) -> None:
    """Against the hidden states that the models themselves tell (the last of GPT-2 and Llama is after a norm)."""
    model, batches = tiny(family), padded_batches()
    dense: Any = copy.deepcopy(model)
    for place, step in enumerate(s for s in calibrate_blocks(model, batches) if s.block is not None):
        assert step.block is not None
        assert len(step.samples) == len(batches)
        for sample, batch in zip(step.samples, batches, strict=True):
            states, now = hidden_states(dense, batch), hidden_states(model, batch)
            assert sample.mask is not None
            assert torch.equal(sample.mask, batch["attention_mask"].bool())
            kept = sample.mask

            def same(a: torch.Tensor, b: torch.Tensor, kept: torch.Tensor = kept) -> None:
                assert torch.allclose(a[kept], b[kept], rtol=1e-5, atol=1e-5)

            same(sample.dense_input, states[place])
            same(sample.given, now[place])
            if place == 0:
                same(sample.dense_output, states[1])
                same(sample.run(step.block).detach(), sample.dense_output)
            loss = (sample.run(step.block) - sample.dense_output)[kept].square().mean()
            assert (float(loss.detach()) > 1e-6) == (place > 0)
            if place > 0:
                loss.backward()
                assert all(p.grad is not None for p in step.block.parameters() if p.ndim > 1)
        changed(model, step)


def test_the_decoder_goes_block_by_block_and_its_encoder_comes_before() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5Model(config).eval()
    dense = copy.deepcopy(model)
    batches = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in padded_batches()]
    whole = calibrate(model, batches)
    assert whole.inputs["decoder.block.1.layer.1.EncDecAttention.v"] == "decoder.block.0.layer.1.EncDecAttention.k"
    steps = []
    for step in calibrate_blocks(model, batches):
        steps.append(step.name)
        for unit in step.calibration.units:
            close_to(step.calibration.of(unit).second, whole.of(unit).second)  # type: ignore[union-attr]
    assert steps == ["before the blocks", "decoder.block.0", "decoder.block.1"]
    for step in calibrate_blocks(model, batches):
        if step.name == "decoder.block.1":  # the keys of its cross attention come from the changed encoder
            known = step.calibration.of("decoder.block.1.layer.1.EncDecAttention.k")
            x, y = [], []
            for batch in batches:
                mask = batch["attention_mask"].bool()
                inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                with torch.no_grad():
                    x.append(dense.encoder(**inputs).last_hidden_state[mask].double().numpy())
                    y.append(model.encoder(**inputs).last_hidden_state[mask].double().numpy())
            a, b = np.concatenate(x), np.concatenate(y)
            assert known is not None
            assert known.cross is not None
            near(known.cross, a.T @ b / known.tokens, 10 * float(np.sqrt((a**2).sum() * (b**2).sum()) / len(a)), 1.2e-7)
            break
        if step.block is None:
            changed(model, step)


@pytest.mark.parametrize("family", ["albert", "plain"])
def test_a_model_without_blocks_is_one_step(family: str) -> None:
    model: Any = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 4)) if family == "plain" else tiny(family)
    batches = [batch["input_ids"] for batch in padded_batches()]
    (step,) = calibrate_blocks(model, batches)
    assert (step.name, step.block, step.samples) == ("the whole model", None, ())
    whole = calibrate(model, batches)
    assert step.calibration.inputs == whole.inputs
    assert step.calibration.notes == whole.notes
    for key, known in whole.moments.items():
        assert torch.equal(known.second, step.calibration.moments[key].second)  # type: ignore[arg-type]


def test_a_block_may_be_put_in_the_place_of_another_and_training_mode_is_the_callers() -> None:
    model: Any = tiny("llama")
    model.train()
    names = []
    for step in calibrate_blocks(model, padded_batches()):
        assert model.training
        assert step.block is not None
        names.append(step.name)
        known = step.calibration.of(step.calibration.units[0])
        assert known is not None
        assert (known.cross is None) == (len(names) == 1)
        if len(names) == 1:
            other = copy.deepcopy(step.block)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.5)
            model.model.layers[0] = other
    assert names == ["model.layers.0", "model.layers.1"]


def test_what_is_refused() -> None:
    with pytest.raises(MPOError, match="no token"):
        next(calibrate_blocks(tiny("bert"), []))

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[: 3 if float(x.detach().sum()) > 0 else 2]:
                x = layer(x)
            return x

    with pytest.raises(MPOError, match=r"layers\.2 is called 0 times in one batch and once in the first"):
        next(calibrate_blocks(Skips(), [torch.ones(2, 4), -torch.ones(2, 4)]))


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model: Any = tiny("llama")
    steps = calibrate_blocks(model, padded_batches())
    block: Any = next(steps).block
    with torch.no_grad():
        block.mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(MPOError, match=r"the input of model\.layers\.1\.self_attn\.q_proj has"):
        next(steps)
