"""Plans with a metric carried out: the same bits from a file, nothing without text, and the better of two ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot, reference_matrix
from helpers.planning import TEXT, Chain, planned, vectors
from helpers.tiny_models import tiny
from torch import nn

import mpo_tn.torch.models.anchoring as anchoring
from mpo_tn import MPOError
from mpo_tn.torch import Calibration, MPOConfig, Plan, calibrate, compress, plan
from mpo_tn.torch.models.distance import distance
from mpo_tn.torch.models.samples import Samples


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_plan_from_a_file_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    # The same calls of the same routines in one process.
    model, decided = planned(family, bits_per_weight=3.5)
    other = copy.deepcopy(model)
    decided.save(tmp_path / "plan.json")
    compress(model, decided)
    compress(other, Plan.load(tmp_path / "plan.json"), calibration=TEXT)
    assert same_bits(model, other)


def test_a_configuration_is_its_plan() -> None:
    model, decided = planned("bert")
    other = copy.deepcopy(model)
    compress(model, decided)
    compress(other, MPOConfig(bits_per_weight=4.0), calibration=TEXT)
    assert same_bits(model, other)


@pytest.mark.slow
def test_a_plan_from_a_file_needs_text(tmp_path: Path) -> None:
    model, decided = planned("bert")
    decided.save(tmp_path / "plan.json")
    before = Snapshot(model)
    with pytest.raises(MPOError, match=r"query .* nothing is known of that: give calibration=batches"):
        compress(model, Plan.load(tmp_path / "plan.json"))
    other = tiny("bert")
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight += 1
    with pytest.raises(MPOError, match="not of this BertForMaskedLM"):
        compress(model, decided, calibration=calibrate(other, TEXT))
    few = calibrate(model, TEXT, target_modules=["key"])
    with pytest.raises(MPOError, match="query was not calibrated"):
        compress(model, decided, calibration=few)
    before.assert_same(model)


def test_a_calibration_from_a_file_is_enough(tmp_path: Path) -> None:
    model, decided = planned("bert")
    other = copy.deepcopy(model)
    calibrate(model, TEXT).save(tmp_path / "calibration")
    compress(model, decided, calibration=calibrate(model, TEXT))
    compress(other, decided, calibration=Calibration.load(tmp_path / "calibration"))
    assert same_bits(model, other)


@pytest.mark.slow
@pytest.mark.parametrize("better", ["alone", "block by block"])
def test_held_back_text_says_which_way_is_kept(better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decided = planned("bert", bits_per_weight=3.0)
    scores = iter([0.0, 1.0] if better == "alone" else [1.0, 0.0])
    monkeypatch.setattr(anchoring.Judge, "__call__", lambda _: next(scores))
    report = compress(model, decided, anchored=True)
    anchored = [layer for layer in report.layers if "anchored" in layer.metric]
    # The first matrices get what they get in the dense model.
    assert bool(anchored) == (better != "alone")


def test_of_both_ways_the_better_one_is_kept() -> None:
    model, decided = planned("bert", bits_per_weight=2.5)
    held_back, dense, alone = Samples.of(TEXT).held_back, copy.deepcopy(model), copy.deepcopy(model)
    compress(model, decided, anchored=True)
    compress(alone, decided)
    assert float(distance(model, dense, held_back)) <= float(distance(alone, dense, held_back)) * (1 + 1e-6)


def test_block_by_block_needs_text() -> None:
    model, decided = planned("bert")
    with pytest.raises(MPOError, match=r"anchored=True .* give batches, not moments alone"):
        compress(model, decided, calibration=calibrate(model, TEXT), anchored=True)


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fitting", "after what came before", "judging"])
def test_the_model_is_left_as_it_was_whatever_raises(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decided = planned("bert")
    model.train()
    before, flags = Snapshot(model), [m.training for m in model.modules()]
    told = 0

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        told += where in what
        if told == 6:
            raise StopError

    def stop(_: Any) -> float:
        raise StopError

    if where == "judging":
        monkeypatch.setattr(anchoring.Judge, "__call__", stop)
    with pytest.raises(StopError):
        compress(model, decided, progress=tell, anchored=True)
    before.assert_same(model)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def mean_error(a: nn.Module, b: nn.Module) -> float:
    """Of the outputs on the text of the moments, relative to their spread."""
    with torch.no_grad():
        x = torch.cat([batch["x"] for batch in Samples.of(vectors()).batches])
        there, here = a(x).double(), b(x).double()
    return float((there - here).mean(0).norm() / there.std(0).norm())


class Linear(nn.Module):
    """One layer, or two that share a weight and have a bias each or together, side by side."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Linear(24, 24, bias=kind != "no bias"), nn.Linear(24, 24)
        if kind != "one":
            self.b.weight = self.a.weight
        if kind == "shared bias":
            self.b.bias = self.a.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


@pytest.mark.parametrize("kind", ["one", "tied", "shared bias", "no bias"])
def test_biases_take_up_the_mean_of_an_error(kind: str) -> None:
    model = Linear(kind)
    dense = copy.deepcopy(model)
    decided = plan(model, MPOConfig(bits_per_weight=3.0), calibration=vectors())
    report = compress(model, decided)
    assert report.rel_error > 0.1
    assert (
        report.parameters_after
        == decided.parameters_after
        == sum(unit.parameters for unit in decided.units)
        + sum(p.numel() for n, p in dense.named_parameters() if n.endswith("bias"))
    )
    if kind == "no bias":  # the module without one is not shifted, so neither is the other: they are one matrix
        assert mean_error(dense, model) > 1e-3
        assert torch.equal(model.b.bias, dense.b.bias)
    else:
        # In float32: eps times a few dozen.
        assert mean_error(dense, model) < 1e-5
        assert not torch.equal(model.b.bias, dense.b.bias)
        assert (model.a.bias is model.b.bias) == (kind == "shared bias")


def test_a_bias_that_others_use_stays() -> None:
    """A shift for one of them would be an error of the other."""
    model = Chain(2)
    model.layers[1].bias = model.layers[0].bias  # type: ignore[union-attr]
    bias = model.layers[0].bias.clone()  # type: ignore[operator, union-attr]
    decided = plan(model, MPOConfig(bits_per_weight=3.0), calibration=vectors())
    compress(model, decided)
    assert model.layers[0].bias is model.layers[1].bias
    assert torch.equal(model.layers[0].bias, bias)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"sites": 1, "bits": 4},
        {"sites": 3, "keep": 0.5},
        {"sites": 3, "keep": 0.6, "bits": {"central": 4}},
        {"sites": "low-rank", "keep": 0.5, "bits": 16},
    ],
)
def test_structures_by_hand_are_fitted_to_text(config: dict[str, Any]) -> None:
    """And are then nearer to the dense model than without."""
    fitted, plain, dense = (tiny("bert") for _ in range(3))
    decided = plan(fitted, MPOConfig(**config), calibration=TEXT)
    assert {unit.metric for unit in decided.units} == {"activation"}
    report = compress(fitted, decided)
    assert decided.bytes_after == pytest.approx(sum(layer.bytes for layer in report.layers) + 25_108, rel=0.01)
    compress(plain, MPOConfig(**config))
    held_back = Samples.of(TEXT).held_back
    assert float(distance(fitted, dense, held_back)) < float(distance(plain, dense, held_back))


def test_a_table_with_padding_legs_is_fitted_by_rows() -> None:
    """101 ids are a prime: legs of three sites multiply to more."""
    model = tiny("llama")
    model.lm_head = nn.Linear(32, 101, bias=False)  # a table of its own
    config = MPOConfig(target_modules=["embed_tokens"], sites=3, keep=0.6)
    report = compress(model, config, calibration=TEXT)
    (layer,) = report.layers
    assert layer.metric == "rows"
    assert layer.spec.sites.shape[0] > 101
    assert 0 < layer.error < layer.norm


def test_a_layer_with_padding_legs_is_fitted() -> None:
    """And the error is that of what is used."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 101), nn.Tanh(), nn.Linear(101, 24))
    dense = copy.deepcopy(model)
    text = [{"input": batch["x"]} for batch in vectors()]
    report = compress(model, MPOConfig(sites=3, keep=0.6), calibration=text)
    assert [layer.spec.sites.shape for layer in report.layers] == [(104, 24), (24, 104)]
    for layer, name in zip(report.layers, ("0", "2"), strict=True):
        before, there = dense.get_submodule(name).weight, reference_matrix(model.get_submodule(name))  # type: ignore[arg-type]
        assert layer.error == pytest.approx(float((before.double() - there).detach().norm()), rel=1e-6)  # type: ignore[operator]
        assert layer.weighted is not None
        assert layer.weighted < 0.9


@pytest.mark.slow
def test_layers_see_what_was_done_before_them_in_their_own_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, decided = planned("bert", bits_per_weight=3.0)
    seen: list[bool] = []
    fit = anchoring.fit_matrix

    def watched(matrix: torch.Tensor, spec: Any, known: Any, **options: Any) -> Any:
        seen.append(known.cross is not None)
        return fit(matrix, spec, known, **options)

    monkeypatch.setattr(anchoring, "fit_matrix", watched)
    compress(model, decided, anchored=True)
    # Query, key and value of the first block get what they got, and stay as they are; all after them something else.
    assert seen == [True] * (len(decided.units) - 3)


class Routed(nn.Module):
    """Blocks that send every token to one of two layers, by what it is."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.experts = nn.Linear(12, 12), nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.mix(x)
            out, first = torch.zeros_like(x), x[..., 0] > x[..., 1]
            for chosen, expert in zip((first, ~first), self.experts, strict=True):
                out[chosen] = expert(x[chosen])
            return x + out

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            input = block(input)
        return input


def test_experts_that_are_sent_other_tokens_than_in_the_dense_model_are_fitted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    model, text = Routed(), [{"input": torch.randn(2, 40, 12)} for _ in range(5)]
    scores = iter([1.0, 0.0])  # the fits after what came before are kept
    monkeypatch.setattr(anchoring.Judge, "__call__", lambda _: next(scores))
    report = compress(model, MPOConfig(sites=1, bits=2, group=8), calibration=text)
    metrics = {layer.names[0]: layer.metric for layer in report.layers}
    assert len(metrics) == 9
    # The layers before them get what they got in the dense model, token by token.
    assert [("anchored" in metrics[f"blocks.{k}.mix"]) for k in range(3)] == [False, True, True]
    assert all(metric.startswith("activation") for metric in metrics.values())
