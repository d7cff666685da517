"""Spectra, ranking and cuts of bonds, against dense SVDs; what optimisers know follows; models still save and load."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.adapter import close, compressed, linear, reference_matrix, roundtrip, small
from helpers.chains import legs, random_chain, slack, unfoldings
from helpers.tiny_models import outputs, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpo_tn.chains.contraction
from mpo_tn import MPOError, Sites
from mpo_tn.planning.ranking import saved_parameters
from mpo_tn.torch import (
    ModuleSpec,
    MPOConfig,
    MPOLayer,
    MPOLinear,
    Ranking,
    bond_spectra,
    compress,
    cut_bond,
    cut_model,
)
from mpo_tn.torch.layers import layer as layers
from mpo_tn.torch.models.cuts import cut_unit
from mpo_tn.torch.models.moments import check_optimizer, unwrapped
from mpo_tn.torch.models.units import cuttable_units, mpo_units
from mpo_tn.truncate import bond_cut
from mpo_tn.truncate.spectra import Spectra

DTYPES = st.sampled_from([torch.float32, torch.float64])


def dense(cores: Any) -> np.ndarray:
    """The matrix of cores in double precision by plain NumPy."""
    tensor = np.ones((1, 1))
    for core in cores:
        tensor = np.tensordot(tensor, np.asarray(core.detach().double()), axes=1)
    n = len(cores)
    tensor = tensor.reshape([size for core in cores for size in core.shape[1:3]])
    rows = math.prod(core.shape[1] for core in cores)
    return tensor.transpose([*range(0, 2 * n, 2), *range(1, 2 * n, 2)]).reshape(rows, -1)


def sites_of(cores: Any) -> Sites:
    return Sites(tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))


def scale_at(cores: Any, k: int) -> float:
    """The norm of everything left of bond k times that of everything right of it: what rounding is relative to."""
    sites = sites_of(cores)
    eye = torch.eye(cores[k].shape[3], dtype=cores[k].dtype)
    left = dense([*cores[: k + 1], eye.reshape(*eye.shape, 1, 1)])
    right = dense([eye.reshape(1, 1, *eye.shape), *cores[k + 1 :]])
    assert left.size == math.prod(sites.sizes[: k + 1]) * eye.shape[0]
    return float(np.linalg.norm(left) * np.linalg.norm(right))


@st.composite
def chains(draw: st.DrawFn, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Gaussian cores in a random gauge, with bonds that may be wider than their neighbours can span."""
    sites = draw(legs(min_sites=2, max_sites=4, max_size=400))
    seed = draw(st.integers(0, 10**6))
    cores = list(random_chain(sites, draw(st.integers(1, 6)), seed, "float64", "torch").cores)
    rng = np.random.default_rng(seed)
    for k in range(len(cores) - 1):
        d = cores[k].shape[3]
        gauge = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, d)))[0] * np.logspace(0, rng.uniform(-2, 2), d))
        cores[k] = cores[k] @ gauge
        cores[k + 1] = torch.tensordot(torch.linalg.inv(gauge), cores[k + 1], dims=1)
    wanted = dtype or draw(DTYPES)
    return [core.to(wanted) for core in cores]


def unit_of(cores: list[torch.Tensor]) -> MPOLinear:
    sites = sites_of(cores)
    bonds = tuple(core.shape[3] for core in cores[:-1])
    spec = ModuleSpec("linear", sites, bonds, *sites.shape)
    return MPOLinear(spec, [nn.Parameter(core.contiguous()) for core in cores])


def name_of(core: torch.Tensor) -> str:
    return str(core.dtype).removeprefix("torch.")


@given(chains())
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


@given(chains(), st.data())
def test_a_cut_is_the_best_approximation(cores: list[torch.Tensor], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(cores) - 2))
    d = cores[k].shape[3]
    new = data.draw(st.integers(1, d))
    cut = cut_bond(cores, k, new)
    before = dense(cores)
    after = dense([*cores[:k], cut.left, cut.right, *cores[k + 2 :]])
    u, s, vh = np.linalg.svd(unfoldings(before, sites_of(cores))[k], full_matrices=False)
    allowed = slack(name_of(cores[0]), before.size, scale_at(cores, k))
    assert abs(np.linalg.norm(before - after) - np.linalg.norm(s[new:])) <= allowed
    gap = s[new - 1] - s[new] if new < len(s) else math.inf
    if gap > 0.1 * s[0]:  # otherwise the best approximation is not unique
        best = (u[:, :new] * s[:new]) @ vh[:new]
        assert np.linalg.norm(unfoldings(after, sites_of(cores))[k] - best) <= 10 * allowed
    assert cut.left.shape[3] == cut.right.shape[0] == new
    assert cut.left.dtype == cores[0].dtype
    assert cut.left.is_contiguous()


@given(chains(torch.float64), st.data())
def test_the_maps_of_a_cut(cores: list[torch.Tensor], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(cores) - 2))
    d = cores[k].shape[3]
    new = data.draw(st.integers(1, d))
    cut = cut_bond(cores, k, new)
    assert (cut.p.shape, cut.q.shape) == ((d, new), (new, d))
    assert np.array_equal(cut.q[:, cut.kept], np.eye(new))
    assert list(cut.kept) == sorted(set(cut.kept))
    assert np.abs(cut.q).max() <= 2.0  # what goes is added to what stays with small weights
    close(cut.left, cores[k] @ torch.from_numpy(cut.p), cores[k], torch.from_numpy(cut.p))
    close(cut.right, torch.tensordot(torch.from_numpy(cut.q), cores[k + 1], dims=1), cores[k + 1])
    if new == d and min(*unfoldings(dense(cores), sites_of(cores))[k].shape) >= d:
        assert np.array_equal(cut.q, np.eye(d))
        np.testing.assert_allclose(cut.p, np.eye(d), atol=slack("float64", d, scale_at(cores, k) / cut.spectrum[d - 1]))


@given(chains(torch.float64), st.integers(1, 3))
def test_a_cut_without_numpy_is_the_same(cores: list[torch.Tensor], new: int) -> None:
    """Cores that are not on the host are swept by torch."""
    layer = unit_of(cores)
    k, new = len(cores) // 2 - 1, min(new, layer.spec.bonds[len(cores) // 2 - 1])
    expected, spectra = cut_bond(cores, k, new), bond_spectra(nn.Sequential(layer))["0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bond_cut, "workable", lambda cores, name: [core.detach() for core in cores])
        cut, again = cut_bond(cores, k, new), bond_spectra(nn.Sequential(layer))["0"]
    allowed = slack("float64", 1, scale_at(cores, k))
    assert np.abs(cut.spectrum - expected.spectrum).max() <= allowed
    assert np.abs(again[k] - spectra[k]).max() <= allowed
    before, after = dense(cores), dense([*cores[:k], cut.left, cut.right, *cores[k + 2 :]])
    tail = np.linalg.norm(cut.spectrum[new:])
    assert abs(np.linalg.norm(before - after) - tail) <= slack("float64", before.size, scale_at(cores, k))
    assert isinstance(cut.left, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bonds_beyond_the_rank_and_zero_matrices(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    for kind in ("left", "right", "both", "zero", "tiny"):
        a, b = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((1, 5, 4, 8), (8, 3, 6, 1)))
        if kind in ("left", "both"):
            a[..., 3:] = a[..., :1]  # columns that are equal
        if kind in ("right", "both"):
            b[2:] = 0.0
        if kind == "zero":
            a *= 0
        if kind == "tiny":
            a, b = a * 1e-30, b * 1e-8
        cores = [a.to(dtype), b.to(dtype)]
        rank = int(np.linalg.matrix_rank(unfoldings(dense(cores), sites_of(cores))[0]))
        assert rank == {"left": 3, "right": 2, "both": 2, "zero": 0, "tiny": 8}[kind]
        for new in range(8, 0, -1):
            cut = cut_bond(cores, 0, new)
            assert all(torch.isfinite(part).all() for part in (cut.left, cut.right))
            assert np.isfinite(cut.p).all()
            assert np.isfinite(cut.q).all()
            assert np.array_equal(cut.q[:, cut.kept], np.eye(new))
            difference = np.linalg.norm(dense(cores) - dense([cut.left, cut.right]))
            tail = np.linalg.norm(cut.spectrum[new:])
            assert abs(difference - tail) <= slack(name_of(cores[0]), 360, scale_at(cores, 0))


@given(chains(torch.float64), st.integers(0, 10**6))
def test_moments_follow_as_the_gradient_does(cores: list[torch.Tensor], seed: int) -> None:
    """For a loss that is linear in W the gradient of W stays what it was, so the gradients of cores map exactly."""
    layer = unit_of(cores)
    unit = mpo_units(nn.Sequential(layer))["0"]
    rng = np.random.default_rng(seed)
    k = int(rng.integers(len(cores) - 1))
    new = int(rng.integers(1, cores[k].shape[3] + 1))
    direction = torch.from_numpy(rng.standard_normal(layer.spec.sites.shape))

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((reference_matrix(layer) * direction).sum(), list(layer.cores))

    optimizer = torch.optim.Adam(layer.parameters())
    squares = [torch.from_numpy(rng.uniform(0, 1, core.shape)) for core in cores]
    for core, gradient, square in zip(layer.cores, gradients(), squares, strict=True):
        optimizer.state[core] = {"step": torch.tensor(7.0), "exp_avg": gradient, "exp_avg_sq": square}
    scale = scale_at(cores, k) * float(direction.norm())
    parameters, before = list(layer.cores), [core.clone() for core in layer.cores]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    cut = cut_bond(list(layer.cores), k, new)
    assert cut_unit(unit, k, new, optimizer) == []
    assert layer.spec.bonds[k] == new
    for j, (core, gradient) in enumerate(zip(layer.cores, gradients(), strict=True)):
        state = optimizer.state[core]
        assert core is parameters[j]
        assert core.grad is None
        assert float(state["step"]) == 7.0
        if j not in (k, k + 1):
            assert torch.equal(core, before[j])
            assert torch.equal(state["exp_avg_sq"], squares[j])
        else:
            weights = torch.from_numpy(cut.q.T if j == k else cut.p) ** 2
            equation = "aoib,bc->aoic" if j == k else "aoib,ac->coib"
            close(state["exp_avg_sq"], torch.einsum(equation, squares[j], weights))
            assert (state["exp_avg_sq"] >= 0).all()
            size = float(np.linalg.norm(cut.p)) * float(np.linalg.norm(cut.q))
            assert float((state["exp_avg"] - gradient).norm()) <= slack("float64", core.numel(), scale * size * 10)


def test_state_that_cannot_follow_is_dropped_and_named() -> None:
    for optimizer_class, kept in [
        (torch.optim.Adamax, False), (torch.optim.Rprop, False), (torch.optim.ASGD, False), (torch.optim.NAdam, True),
        (torch.optim.RMSprop, True), (torch.optim.Adagrad, True), (torch.optim.SGD, True), (torch.optim.RAdam, True),
    ]:  # fmt: skip
        layer, _ = compressed(linear(12, 8), sites=3)
        options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
        optimizer = optimizer_class(layer.parameters(), lr=0.01, **options)

        def step(layer: Any = layer, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            layer(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()

        step()
        notes = cut_unit(mpo_units(layer)[""], 0, 2, optimizer)
        assert len(notes) == (0 if kept else 2), optimizer_class
        assert all("cores" in note and "cannot follow" in note for note in notes)
        step()
        assert all(torch.isfinite(core).all() for core in layer.cores)
    adam = torch.optim.Adam(layer.parameters(), amsgrad=True, capturable=False)
    layer(torch.ones(2, 12)).square().sum().backward()
    adam.step()
    cut_unit(mpo_units(layer)[""], 1, 1, adam)
    assert {tuple(adam.state[layer.cores[2]][key].shape) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {
        tuple(layer.cores[2].shape)
    }


class Wrapped:
    """What accelerate does around an optimiser."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_optimisers_that_are_refused() -> None:
    layer, _ = compressed(linear(12, 8), sites=3)
    adam = torch.optim.Adam(layer.parameters())
    check_optimizer(adam, layer)
    check_optimizer(Wrapped(Wrapped(adam)), layer)
    assert unwrapped(Wrapped(adam)) is adam
    with pytest.raises(MPOError, match="LBFGS"):
        check_optimizer(torch.optim.LBFGS(layer.parameters()), layer)
    with pytest.raises(MPOError, match=r"none of the model's parameters.*after compress"):
        check_optimizer(torch.optim.Adam(linear(3, 3).parameters()), layer)
    with pytest.raises(MPOError, match="str is not a torch optimiser"):
        check_optimizer("adam", layer)
    for mark in ("_is_flat_param", "ds_id", "placements"):
        flat = nn.Parameter(torch.zeros(3))
        setattr(flat, mark, True)
        with pytest.raises(MPOError, match="sharded"):
            check_optimizer(torch.optim.Adam([flat, *layer.parameters()]), layer)
    for name, module in [("ZeroRedundancyOptimizer", "torch"), ("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero")]:
        sharded = type(name, (torch.optim.SGD,), {"__module__": module})
        with pytest.raises(MPOError, match=f"{name}.*sharded"):
            check_optimizer(sharded(layer.parameters()), layer)


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


def naive_ranking(spectra: dict[str, Spectra], specs: dict[str, ModuleSpec], score: str, least: int) -> list[Any]:
    rows = []
    for position, (name, spec) in enumerate(specs.items()):
        for k, bond in enumerate(spec.bonds):
            if bond <= least:
                continue
            smaller = [b - (j == k) for j, b in enumerate(spec.bonds)]
            now, then = spectra[name].what_if(spec.bonds).upper, spectra[name].what_if(smaller).upper
            total = sum(float(value) ** 2 for value in spectra[name][0])
            value = (then**2 - now**2) / total
            if score == "error_per_parameter":
                value /= spec.num_parameters - spec.sites.num_parameters(smaller)
            rows.append((value, position, k, name, bond))
    return sorted(rows)


@given(st.lists(chains(), min_size=1, max_size=3), st.sampled_from(["error", "error_per_parameter"]), st.integers(1, 2))
def test_the_ranking_is_the_raise_of_the_squared_bound(models: list[Any], score: str, least: int) -> None:
    units = mpo_units(nn.ModuleList([unit_of(cores) for cores in models]))
    spectra = bond_spectra(nn.ModuleList([unit.modules[0] for unit in units.values()]))
    specs = {name: unit.spec for name, unit in units.items()}
    ranking = Ranking(spectra, specs, score=score, minimum_bond=least)
    specs = dict(specs)
    while True:
        expected, got = naive_ranking(spectra, specs, score, least), ranking.ranked()
        assert {(cut.unit, cut.bond, cut.before, cut.after) for cut in got} == {
            (name, k, bond, bond - 1) for _, _, k, name, bond in expected
        }
        best = ranking.best()
        if best is None:
            assert not expected
            break
        assert best == got[0]
        assert [cut.score for cut in got] == sorted(cut.score for cut in got)
        by_place = {(name, k): value for value, _, k, name, _ in expected}
        assert all(cut.score == pytest.approx(by_place[cut.unit, cut.bond], rel=1e-6, abs=1e-13) for cut in got)
        ranking.take(best)
        spec = specs[best.unit]
        bonds = tuple(best.after if k == best.bond else bond for k, bond in enumerate(spec.bonds))
        specs[best.unit] = copy.copy(ranking.specs[best.unit])
        assert specs[best.unit].bonds == bonds
        assert saved_parameters(spec, best.bond) == spec.num_parameters - spec.sites.num_parameters(bonds)


def test_scores_by_a_function_and_ties() -> None:
    model = nn.Sequential(compressed(linear(16, 16), sites=3)[0], compressed(linear(16, 16, seed=1), sites=3)[0])
    spectra, specs = bond_spectra(model), {name: unit.spec for name, unit in mpo_units(model).items()}
    seen: list[Any] = []

    def score(name: str, k: int, values: np.ndarray, new: int, spec: ModuleSpec) -> float:
        seen.append((name, k, new))
        assert len(values) >= new
        assert spec.bonds[k] == new + 1
        return -float(new)

    ranking = Ranking(spectra, specs, score=score)
    assert len(seen) == 4
    assert ranking.best().before == max(max(spec.bonds) for spec in specs.values())
    ties = Ranking(spectra, specs, score=lambda *_: 0.0)
    assert [(cut.unit, cut.bond) for cut in ties.ranked()] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    with pytest.raises(MPOError, match="bond 0 of 0 is NaN"):
        Ranking(spectra, specs, score=lambda *_: math.nan)
    for bad in ("loss", None, 3):
        with pytest.raises(MPOError, match="error_per_parameter"):
            Ranking(spectra, specs, score=bad)  # type: ignore[arg-type]


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


def test_bonds_that_are_refused() -> None:
    layer, _ = compressed(linear(12, 8), sites=3)
    cores, spec = [core.clone() for core in layer.cores], layer.spec
    for k, new in [(0, 0), (0, spec.bonds[0] + 1), (0, 1.5), (2, 1), (-1, 1)]:
        with pytest.raises(MPOError, match=r"bond"):
            cut_bond(list(layer.cores), k, new)  # type: ignore[arg-type]
    for bonds in ({"x": [1, 1]}, {"": [1]}, {"": [1, 99]}, {"": [0, 1]}, {"": [1, True]}):
        with pytest.raises(MPOError, match=r"bonds"):
            cut_model(layer, bonds)
    with pytest.raises(MPOError, match="cores have shapes"):
        layer.replace_cores(cores, [1, 1])
    assert layer.spec == spec
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, cores, strict=True))


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
