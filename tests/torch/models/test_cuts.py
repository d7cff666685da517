"""Spectra and cuts of the bonds of models: in place, without a matrix, and models still save and load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.adapter import close, compressed, linear, reference_matrix, roundtrip, small, unit_of
from helpers.chains import dense, slack, unfoldings
from helpers.gauges import gauged, scale_at, sites_of
from helpers.tiny_models import outputs, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpo_tn.chains.contraction
from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, Ranking, bond_spectra, compress, cut_model
from mpo_tn.torch.layers import layer as layers
from mpo_tn.torch.models import cuts
from mpo_tn.torch.models.cuts import cut_unit
from mpo_tn.torch.models.units import cuttable_units, mpo_units


@given(gauged(library="torch"))
def test_spectra_are_those_of_the_unfoldings(cores: list[torch.Tensor]) -> None:
    layer = unit_of(cores)
    found = bond_spectra(nn.Sequential(layer))["0"]
    for k, unfolding in enumerate(unfoldings(dense(cores), sites_of(cores))):
        expected = np.linalg.svd(unfolding, compute_uv=False)
        length = min(len(expected), len(found[k]))
        allowed = slack("float64", unfolding.size, scale_at(cores, k))
        assert np.linalg.norm(expected[:length] - found[k][:length]) <= allowed
        assert max([0.0, *expected[length:], *found[k][length:]]) <= allowed  # what one of the two leaves out is zero
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, cores, strict=True))


def test_a_graph_that_is_still_alive_does_no_harm() -> None:
    """Torch keeps the node that collects a gradient in the shape it had when the graph was built."""
    layer, _ = compressed(linear(12, 8), sites=3)
    loss = layer(torch.ones(2, 12)).sum()
    loss.backward()
    cut_unit(mpo_units(layer)[""], 1, 2)
    layer(torch.ones(2, 12)).sum().backward()
    assert [core.grad.shape for core in layer.cores] == [core.shape for core in layer.cores]
    assert loss.grad_fn is not None


def test_nothing_builds_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = compressed(linear(64, 96), sites=4)
    model = nn.Sequential(layer)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {key: torch.ones_like(parameter) for key in ("exp_avg", "exp_avg_sq")}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a matrix was built")

    monkeypatch.setattr(MPOLayer, "dense_weight", never)
    monkeypatch.setattr(layers, "mpo_linear", never)
    monkeypatch.setattr(mpo_tn.chains.contraction, "contract_matrix", never)
    spectra = bond_spectra(model)
    ranking = Ranking(spectra, {"0": layer.spec}, score="error_per_parameter")
    cut_unit(mpo_units(model)["0"], ranking.best().bond, ranking.best().after, optimizer)
    with pytest.raises(AssertionError, match="was built"):
        model(torch.ones(1, 64))


def test_shared_and_tied_modules_are_one_unit() -> None:
    albert = small("albert")
    names = list(mpo_units(albert))
    assert len([name for name in names if "query" in name]) == 1
    assert not any("decoder" in name for name in names)
    tied = mpo_units(albert)[next(name for name in names if "word_embeddings" in name)]
    assert len(tied.modules) == 2
    before = outputs(albert)
    cut_model(albert, {tied.name: [bond - 1 for bond in tied.spec.bonds]})
    assert len({module.spec.bonds for module in tied.modules}) == 1
    assert albert.get_input_embeddings().cores[0] is albert.get_output_embeddings().cores[0]
    assert not torch.equal(outputs(albert), before)


def test_units_that_are_refused() -> None:
    with pytest.raises(MPOError, match="no MPO modules: compress it first"):
        mpo_units(nn.Linear(3, 3))
    first, second = compressed(linear(12, 8), sites=3)[0], compressed(linear(12, 8, seed=1), sites=3)[0]
    second.cores[1] = first.cores[1]
    with pytest.raises(MPOError, match="core 1 of 1 is also a core of 0"):
        cuttable_units(nn.Sequential(first, second))
    with pytest.raises(MPOError, match="meta device"):
        cuttable_units(nn.Sequential(first.to("meta")))
    third = compressed(linear(12, 8), sites=3)[0]
    with torch.no_grad():
        third.cores[1][0, 0, 0, 0] = math.inf
    for call in (bond_spectra, lambda model: cut_model(model, {"0": [1, 1]})):
        with pytest.raises(MPOError, match=r"core 1 of 0 .*infinite"):
            call(nn.Sequential(third))


@pytest.mark.guarantee("cuts-refused", "replace-refused")
def test_bonds_that_are_refused() -> None:
    layer, _ = compressed(linear(12, 8), sites=3)
    cores, spec = [core.clone() for core in layer.cores], layer.spec
    for bonds in ({"x": [1, 1]}, {"": [1]}, {"": [1, 99]}, {"": [0, 1]}, {"": [1, True]}):
        with pytest.raises(MPOError, match=r"bonds"):
            cut_model(layer, bonds)
    with pytest.raises(MPOError, match="cores have shapes"):
        layer.replace_cores(cores, [1, 1])
    assert layer.spec == spec
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, cores, strict=True))


@given(gauged(dtypes=("float64",), library="torch"))
def test_spectra_without_numpy_are_the_same(cores: list[torch.Tensor]) -> None:
    """Cores that are not on the host are swept by torch."""
    model = nn.Sequential(unit_of(cores))
    expected = bond_spectra(model)["0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "workable", lambda cores, name: [core.detach() for core in cores])
        again = bond_spectra(model)["0"]
    for k in range(len(cores) - 1):
        assert np.abs(again[k] - expected[k]).max() <= slack("float64", 1, scale_at(cores, k))


@pytest.mark.guarantee("cuts-add-up")
@given(gauged(dtypes=("float64",), library="torch"), st.data())
def test_a_model_cut_at_once_is_off_by_at_most_the_sum_of_the_tails(
    cores: list[torch.Tensor], data: st.DataObject
) -> None:
    """Every tail of the chain as it is when its bond is cut."""
    layer = unit_of(cores)
    wanted = [data.draw(st.integers(1, int(core.shape[3]))) for core in cores[:-1]]
    tails, allowed, now = 0.0, 0.0, cores
    for k, bond in enumerate(wanted):
        tails += float(np.linalg.norm(np.linalg.svd(unfoldings(dense(now), sites_of(now))[k], compute_uv=False)[bond:]))
        allowed += slack("float64", dense(cores).size, scale_at(now, k))
        cut_model(step := unit_of(now), {"": [*wanted[: k + 1], *(int(core.shape[3]) for core in now[k + 1 : -1])]})
        now = [core.detach().clone() for core in step.cores]
    cut_model(layer, {"": wanted})
    assert layer.spec.bonds == tuple(wanted)
    assert float(np.linalg.norm(dense(cores) - dense(layer.cores))) <= tails + allowed


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cut_layer_computes_with_its_new_cores(frozen: bool) -> None:
    layer, _ = compressed(linear(30, 20), sites=3, bond=7)
    layer.cores[1].requires_grad_(not frozen)
    x = torch.randn(5, 30)
    layer(x)
    assert layer.spec.rel_error is not None
    notes = cut_model(layer, {"": [3, 2]})
    assert (notes, layer.spec.bonds) == ([], (3, 2))
    assert layer.cores[1].requires_grad == (not frozen)
    assert (layer.spec.rel_error, layer.spec.exact) == (None, False)
    assert sum(core.numel() for core in layer.cores) == layer.spec.num_parameters
    close(layer.dense_weight(), reference_matrix(layer).float(), reference_matrix(layer))
    close(layer(x), x @ reference_matrix(layer).float().T + layer.bias, x, reference_matrix(layer))
    layer(x).sum().backward()
    assert (layer.cores[1].grad is None) == frozen


def test_half_precision_is_cut_in_double() -> None:
    layer, _ = compressed(linear(30, 20), sites=3)
    layer = layer.bfloat16()
    before = reference_matrix(layer).detach()
    tail = bond_spectra(nn.Sequential(layer))["0"].tail(0, 2)
    cut_model(layer, {"": [2, layer.spec.bonds[1]]})
    assert {core.dtype for core in layer.cores} == {torch.bfloat16}
    difference = float((before - reference_matrix(layer).detach()).norm())
    assert abs(difference - tail) <= slack("bfloat16", 1, float(before.norm()))


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2"])
def test_a_squeezed_model_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = small(family)
    cut_model(model, {name: [max(1, b - 2) for b in unit.spec.bonds] for name, unit in mpo_units(model).items()})
    loaded = roundtrip(model, tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert {n: u.spec for n, u in mpo_units(loaded).items()} == {n: u.spec for n, u in mpo_units(model).items()}
    cut_model(loaded, {name: [1 for _ in unit.spec.bonds] for name, unit in mpo_units(loaded).items()})
    again = roundtrip(loaded, tmp_path / "again")
    assert torch.equal(outputs(again), outputs(loaded))


def test_a_head_around_a_squeezed_model_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    compress(model.bert, MPOConfig(target_modules=r".*query", sites=3))  # the two share one configuration
    cut_model(model, {name: [2, 2] for name in mpo_units(model)})
    loaded = roundtrip(model, tmp_path)
    assert {unit.spec.bonds for unit in mpo_units(loaded).values()} == {(2, 2)}
    assert torch.equal(outputs(loaded), outputs(model))
