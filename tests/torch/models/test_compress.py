"""compress: what the report claims against plain recomputation, what it keeps, and that it changes all or nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot, close, compressed, embedding, linear, reference_matrix
from helpers.chains import slack
from helpers.tiny_models import outputs, tiny, token_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError, Sites
from mpo_tn.torch import MPOConfig, MPOEmbedding, MPOLayer, MPOLinear, compress
from mpo_tn.torch.models.compress import compress_empty

SIZES = st.one_of(st.integers(1, 60), st.sampled_from([2, 7, 23, 31, 53, 59, 97, 101]))


def check_error(layer: MPOLayer, dense: torch.Tensor, reported: float, norm: float) -> None:
    """The reported Frobenius error is |W - W'| on what is used, to rounding."""
    difference = float((dense.detach().double() - reference_matrix(layer).detach()).norm())
    rounding = slack("float32", max(math.prod(layer.spec.sites.shape), 1), norm)
    assert abs(difference - reported) <= rounding, f"{difference} is reported as {reported}"


@pytest.mark.guarantee("used-part")
@given(SIZES, SIZES, st.integers(1, 5), st.sampled_from([0.2, 0.5, 0.8]), st.booleans())
def test_the_error_is_that_of_the_used_part(out: int, in_: int, n: int, part: float, table: bool) -> None:
    dense = embedding(out, in_) if table else linear(in_, out)
    weight = dense.weight
    probe, _ = compressed(nn.Linear(in_, out), sites=n)
    bond = max(1, int(part * max(probe.spec.bonds, default=1)))
    layer, report = compressed(dense, sites=n, bond=bond)
    unit = report.layers[0]
    assert isinstance(layer, MPOEmbedding if table else MPOLinear)
    assert max(layer.spec.bonds, default=1) <= bond
    check_error(layer, weight, unit.error, unit.norm)
    assert unit.norm == pytest.approx(float(weight.detach().double().norm()), rel=1e-6)
    assert report.rel_error == pytest.approx(unit.error / unit.norm)
    assert report.matrix_after == sum(core.numel() for core in layer.cores)


@pytest.mark.guarantee("used-part")
@pytest.mark.parametrize(("out", "in_"), [(101, 97), (101, 32), (32, 101)])
def test_the_error_with_padded_rows_and_columns(out: int, in_: int) -> None:
    for bond in range(1, 8):  # full bonds are 8 or more
        dense = linear(in_, out)
        layer, report = compressed(dense, sites=3, bond=bond)
        rows, columns = layer.spec.sites.shape
        assert (rows > out, columns > in_) == (out == 101, in_ in (97, 101))
        check_error(layer, dense.weight, report.layers[0].error, report.layers[0].norm)
        assert report.layers[0].error < report.layers[0].report.error


def test_the_error_of_all_matrices_together() -> None:
    model = nn.Sequential(linear(20, 30), nn.ReLU(), linear(30, 18, seed=1), nn.Linear(18, 18))
    weights = [model[k].weight.detach().double() for k in (0, 2)]
    report = compress(model, MPOConfig(target_modules=["0", "2"], sites=3, keep=0.4))
    lost = sum(
        float((w - reference_matrix(model[k]).detach()).norm()) ** 2 for w, k in zip(weights, (0, 2), strict=True)
    )
    assert report.rel_error == pytest.approx(math.sqrt(lost / sum(float(w.norm()) ** 2 for w in weights)), rel=1e-6)
    assert report.matrix_before == 20 * 30 + 30 * 18
    assert report.parameters_before == 20 * 30 + 30 + 30 * 18 + 18 + 18 * 18 + 18
    assert report.parameters_after == report.parameters_before - report.matrix_before + report.matrix_after
    assert report.kept_model == report.parameters_after / report.parameters_before
    assert "2 matrices" in str(report)


def test_shared_parameters_count_once() -> None:
    model = tiny("bert")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    report = compress(model, MPOConfig(target_modules=["word_embeddings"], sites=3, bond=4))
    assert report.parameters_before == sum(p.numel() for p in tiny("bert").parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_before - report.parameters_after == report.matrix_before - report.matrix_after


@given(SIZES, SIZES, st.one_of(st.integers(1, 5), st.just("low-rank")), st.floats(0.05, 1.0))
def test_keep_is_the_largest_cap_that_fits(out: int, in_: int, sites: int | str, keep: float) -> None:
    at_one, _ = compressed(linear(in_, out), sites=sites, bond=1)
    if at_one.spec.num_parameters > keep * out * in_:
        with pytest.raises(MPOError, match=f"need {at_one.spec.num_parameters} parameters at bond 1"):
            compressed(linear(in_, out), sites=sites, keep=keep)
        return
    layer, report = compressed(linear(in_, out), sites=sites, keep=keep)
    assert report.kept == layer.spec.kept <= keep
    assert layer.spec.num_parameters <= keep * out * in_
    cap = max(layer.spec.bonds, default=1)
    assert layer.spec.bonds == layer.spec.sites.capped_bonds(cap)
    wider = layer.spec.sites.capped_bonds(cap + 1)
    assert wider == layer.spec.bonds or layer.spec.sites.num_parameters(wider) > keep * out * in_


@pytest.mark.guarantee("tolerance-never-larger")
@given(SIZES, SIZES, st.floats(0.01, 0.9))
def test_a_tolerance_holds_for_the_used_part(out: int, in_: int, tolerance: float) -> None:
    dense = linear(in_, out)
    layer, report = compressed(dense, sites=3, tolerance=tolerance)
    assert report.rel_error <= tolerance
    if layer is dense:
        assert report.layers == ()
        assert f"at tolerance={tolerance:g} its cores would take" in report.skipped["0"]
        assert report.parameters_after == report.parameters_before
    else:
        assert layer.spec.num_parameters < out * in_
        check_error(layer, dense.weight, report.layers[0].error, report.layers[0].norm)


@pytest.mark.guarantee("tolerance-never-larger")
def test_at_a_tolerance_some_matrices_may_stay_dense_and_the_model_is_saved(tmp_path: Path) -> None:
    model = tiny("bert")
    flat, steep = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"
    with torch.no_grad():
        weight = model.get_submodule(steep).weight
        weight.copy_(torch.outer(torch.arange(1.0, 1 + weight.shape[0]), torch.ones(weight.shape[1])))
    report = compress(model, MPOConfig(target_modules=[flat, steep], sites=3, tolerance=0.01))
    assert [layer.name for layer in report.layers] == [steep]
    assert list(report.skipped) == [flat]
    assert report.parameters_after < report.parameters_before
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval()), outputs(model.eval()))


def test_to_keep_more_than_there_is_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="keep=1.5 lets cores take more room"):
        compress(nn.Sequential(linear(8, 12)), MPOConfig(sites=3, keep=1.5))


Spoil = Callable[[nn.Sequential], dict[str, Any]]


def three_layers() -> nn.Sequential:
    return nn.Sequential(linear(8, 12), nn.ReLU(), embedding(12, 8), linear(12, 8, seed=2))


def _poison(model: nn.Sequential, value: float) -> dict[str, Any]:
    with torch.no_grad():
        model[3].weight[2, 3] = value
    return {"bond": 2}


def _to_meta(model: nn.Sequential) -> dict[str, Any]:
    model[3] = nn.Linear(12, 8, device="meta")
    return {"bond": 2}


@pytest.mark.guarantee("compress-all-or-nothing")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: _poison(model, math.nan), "NaN|nan|finite"),
        (lambda model: _poison(model, math.inf), "inf|finite"),
        (_to_meta, "meta"),
        (lambda model: {"overrides": {"3": {"sites": Sites((3, 3), (4, 3))}}}, r"\(9, 12\)"),
        (lambda model: {"overrides": {"3": {"keep": 0.01}}}, "parameters at bond 1"),
    ],
    ids=["nan", "inf", "meta", "legs", "keep"],
)
def test_nothing_changes_when_the_last_layer_fails(
    spoil: Callable[[nn.Sequential], dict[str, Any]], message: str
) -> None:
    model = three_layers()
    config = MPOConfig(**{"target_modules": r".*", "sites": 2, **spoil(model)})
    before = Snapshot(model)
    with pytest.raises(MPOError, match=f"^3: .*({message})"):
        compress(model, config)
    before.assert_same(model)


@pytest.mark.guarantee("compress-all-or-nothing")
def test_nothing_changes_in_a_pretrained_model_that_fails() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    before, config = Snapshot(model), model.config.to_dict()
    with pytest.raises(MPOError, match=r"encoder\.layer\.1\.output\.dense"):
        compress(model, MPOConfig(sites=3, bond=2))
    before.assert_same(model)
    assert model.config.to_dict() == config
    assert getattr(model, "hf_quantizer", None) is None


@pytest.mark.guarantee("empty-same-structure")
@given(SIZES, SIZES, st.one_of(st.integers(1, 5), st.just("low-rank")), st.booleans(), st.data())
def test_an_empty_compression_has_the_same_structure(
    out: int, in_: int, sites: int | str, table: bool, data: st.DataObject
) -> None:
    size = data.draw(
        st.sampled_from([{}, {"bond": data.draw(st.integers(1, 12))}, {"keep": data.draw(st.floats(0.4, 1.0))}])
    )
    config = MPOConfig(target_modules=r".*", sites=sites, **size)
    real, empty = (nn.Sequential(embedding(out, in_) if table else linear(in_, out)) for _ in range(2))
    try:
        report = compress(real, config)
    except MPOError as error:
        with pytest.raises(MPOError, match=re.escape(str(error))):
            compress_empty(empty, config)
        return
    specs = compress_empty(empty, config)
    assert {name: replace(spec, exact=True, rel_error=None) for name, spec in specs.items()} == {
        layer.name: replace(layer.spec, exact=True, rel_error=None) for layer in report.layers
    }
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (real, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.guarantee("compress-all-or-nothing")
def test_compressing_twice_is_refused() -> None:
    model = three_layers()
    compress(model, MPOConfig(target_modules=["0"], sites=2))
    before = Snapshot(model)
    with pytest.raises(MPOError, match="already"):
        compress(model, MPOConfig(target_modules=["3"], sites=2))
    before.assert_same(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_a_module_keeps(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"frozen": linear(8, 12, dtype=dtype), "free": linear(12, 8, bias=False, dtype=dtype)})
    model["frozen"].requires_grad_(requires_grad=False).eval()
    bias = model["frozen"].bias
    compress(model, MPOConfig(sites=2, bond=3))
    frozen, free = model["frozen"], model["free"]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in free.parameters())
    assert frozen.bias is bias
    assert free.bias is None
    assert (frozen.training, free.training) == (False, True)
    assert all(core.is_contiguous() for core in free.cores)


def test_hooks_stay_and_can_still_be_removed() -> None:
    model = nn.Sequential(linear(8, 12))
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: seen.append("pre")),
        model[0].register_forward_hook(lambda module, args, kwargs, out: seen.append("post"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("back")),
    ]
    compress(model, MPOConfig(sites=2, bond=3))
    x = torch.ones(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["pre", "post", "back"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 3


def test_overrides_and_progress() -> None:
    model = three_layers()
    calls: list[tuple[int, int, str]] = []
    report = compress(
        model,
        MPOConfig(target_modules=r".*", sites=2, keep=0.8, overrides={"3": {"bond": 1}, "0": {"sites": "low-rank"}}),
        progress=lambda *call: calls.append(call),
    )
    assert calls == [(0, 3, "0"), (1, 3, "2"), (2, 3, "3"), (3, 3, "3")]
    assert model[3].spec.bonds == (1,)
    assert model[0].spec.sites == Sites.low_rank(12, 8)
    assert [unit["name"] for unit in report.to_dict()["layers"]] == ["0", "2", "3"]


def test_albert_decomposes_its_shared_layer_once() -> None:
    model = tiny("albert")
    report = compress(model, MPOConfig(sites=3, keep=0.7))
    assert len({layer.name for layer in report.layers}) == len(report.layers) == 7
    assert outputs(model).isfinite().all()


def test_bert_keeps_the_pair_of_decoder_bias() -> None:
    model = tiny("bert")
    predictions = model.cls.predictions
    assert predictions.decoder.bias is predictions.bias
    compress(model, MPOConfig(target_modules=["word_embeddings"], sites=3, bond=4))
    assert predictions.decoder.bias is predictions.bias
    model.tie_weights()
    embedding_cores = model.get_input_embeddings().cores
    assert all(a is b for a, b in zip(predictions.decoder.cores, embedding_cores, strict=True))
    assert (model.get_input_embeddings().padding_idx, predictions.decoder.spec.padding_idx) == (0, None)


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama"])
def test_a_compressed_model_trains(family: str) -> None:
    model = tiny(family)
    compress(model, MPOConfig(target_modules=r".*", sites=3, bond=6))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        cores = [core for module in model.modules() if isinstance(module, MPOLayer) for core in module.cores]
        assert all(core.grad is not None and core.grad.any() for core in cores)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_the_output_moves_as_little_as_the_error_says() -> None:
    exact, dense = tiny("bert"), tiny("bert")
    report = compress(exact, MPOConfig(sites=3))
    assert report.rel_error == 0
    close(outputs(exact), outputs(dense))
