"""Blocks refined: never worse, integers as they were, and nothing left behind where anything raises."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot
from helpers.planning import TEXT, planned, vectors
from helpers.tiny_models import tiny
from torch import nn

import mpo_tn.torch.models.compress as compressing
import mpo_tn.torch.models.fitting as fitting
from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, calibrate, compress
from mpo_tn.torch.layers.quantized import quantized_cores, trained_scales
from mpo_tn.torch.models.refine import EPOCHS
from mpo_tn.torch.models.samples import Samples

IN_BITS: dict[str, Any] = {"sites": 1, "bits": 2, "group": 8, "target_modules": r".*encoder.*(query|key|value|dense)"}


class Stack(nn.Module):
    """Linear layers that are blocks themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def encoder_distance(model: nn.Module, dense: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        parts = [
            tuple(m.bert(**batch).last_hidden_state[batch["attention_mask"].bool()] for m in (model, dense))
            for batch in batches
        ]
    return float(sum((h - t).square().sum() for h, t in parts) / sum(t.square().sum() for _, t in parts))


@pytest.mark.guarantee("refine-never-worse")
@pytest.mark.slow
def test_no_block_is_worse_and_the_model_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    # So few tokens leave nothing to gain once the scales have been swept.
    monkeypatch.setattr(fitting, "quantize", partial(fitting.quantize, sweeps=0))
    dense = tiny("bert")
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    compress(plain, MPOConfig(**IN_BITS), calibration=TEXT, anchored=False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    report = compress(model, MPOConfig(**IN_BITS), calibration=TEXT, anchored=False, refine=True)
    assert [block.name for block in report.refined] == [f"bert.encoder.layer.{k}" for k in range(2)]
    assert all(block.after <= block.before and 0 <= block.epoch <= EPOCHS for block in report.refined)
    assert any(block.epoch for block in report.refined)
    held_back = Samples.of(TEXT).held_back
    assert encoder_distance(model, dense, held_back) < encoder_distance(plain, dense, held_back)
    assert not trained_scales(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags[: len(list(model.parameters()))]
    ours, theirs = quantized_cores(model), quantized_cores(plain)
    assert ours.keys() == theirs.keys()
    for name, core in ours.items():
        assert torch.equal(core.weight_packed, theirs[name].weight_packed), name
        core.check(name)
    # Outside the blocks nothing changes.
    assert torch.equal(model.bert.embeddings.LayerNorm.weight, dense.bert.embeddings.LayerNorm.weight)
    assert report.to_dict()["refined"][0]["name"] == "bert.encoder.layer.0"
    assert "2 blocks refined" in str(report)


@pytest.mark.guarantee("compress-all-or-nothing")
@pytest.mark.parametrize("when", ["in the second block", "at the end"])
def test_whatever_raises_the_model_is_as_it_was(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    before = Snapshot(model)
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    random = torch.get_rng_state()

    def progress(done: int, total: int, what: str) -> None:
        if when == "in the second block" and what.startswith("refining bert.encoder.layer.1, epoch 3"):
            raise KeyboardInterrupt

    class Host:
        def attach(self, *_: Any) -> None:
            raise KeyboardInterrupt

    if when == "at the end":
        monkeypatch.setattr(compressing, "current_host", Host)
    with pytest.raises(KeyboardInterrupt):
        compress(
            model, MPOConfig(**IN_BITS), calibration=TEXT, anchored=False, refine=True, progress=progress
        )  # fmt: skip
    before.assert_same(model)
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == flags
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("config", [{"sites": 1, "bits": 2, "group": 8}, {"sites": 3, "keep": 0.5}])
def test_blocks_that_are_layers_themselves(config: dict[str, Any]) -> None:
    model, dense = Stack(), Stack()
    report = compress(model, MPOConfig(target_modules=r"layers\.[01]", **config), calibration=vectors(), refine=True)
    assert [block.name for block in report.refined] == ["layers.0", "layers.1"]
    assert all(block.after <= block.before for block in report.refined)
    assert any(block.after < block.before for block in report.refined)
    assert model.layers[0].spec.rel_error is None or report.refined[0].epoch == 0
    assert torch.equal(model.layers[2].weight, dense.layers[2].weight)


def test_what_cannot_be_refined_is_refused() -> None:
    model, decided = planned("bert")
    before = Snapshot(model)
    with pytest.raises(MPOError, match="not moments alone"):
        compress(model, decided, calibration=calibrate(model, TEXT, gradients=True), refine=True)
    with pytest.raises(MPOError, match="calibration=batches"):
        compress(model, MPOConfig(sites=3), refine=True)
    before.assert_same(model)
    flat = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(MPOError, match="no blocks"):
        compress(flat, MPOConfig(sites=3), calibration=[{"input": torch.randn(4, 24)}] * 2, refine=True)
