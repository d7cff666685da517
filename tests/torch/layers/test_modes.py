"""Forward modes: that they agree, what they are chosen by, and when a kept matrix is dropped."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.modes import MODES, agrees, layer_of
from helpers.specs import LARGER, SMALL, spec_of, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch import set_mode

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.slow
@settings(max_examples=100)
@given(specs(), st.sampled_from([0, 1, 2, 37]), st.sampled_from(DTYPES))
def test_all_modes_agree(spec: ModuleSpec, tokens: int, dtype: torch.dtype) -> None:
    layer = layer_of(spec, dtype=dtype)
    x = torch.randn(tokens, spec.in_features, dtype=dtype)
    for mode in MODES:
        layer.mode = mode
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = layer(x)
            assert y.dtype == dtype
            assert y.is_contiguous()
            agrees(layer, x, y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 0, 3), (2, 3), (1, 2, 2, 1)])
def test_any_shape_and_stride(mode: str, shape: tuple[int, ...]) -> None:
    layer = layer_of(LARGER, mode)
    x = torch.randn(LARGER.in_features, *shape, dtype=torch.float64).movedim(0, -1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert layer(x).shape == (*shape, LARGER.out_features)
            agrees(layer, x, layer(x))


@pytest.mark.parametrize("mode", MODES)
def test_wrong_input(mode: str) -> None:
    layer = layer_of(LARGER, mode)
    with pytest.raises(MPOError, match=r"34 columns.* 35"):
        layer(torch.randn(3, LARGER.in_features - 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        layer(torch.randn(3, LARGER.in_features, dtype=torch.float32))


def model() -> Any:
    return nn.ModuleDict({
        "query": layer_of(LARGER), "inner": nn.ModuleDict({"query": layer_of(SMALL), "dense": layer_of(SMALL)}),
        "other": nn.Linear(2, 2),
    })  # fmt: skip


def test_set_mode_by_pattern() -> None:
    network = model()
    assert all(module.mode == "auto" for module in network.modules() if hasattr(module, "mode"))
    assert set_mode(network, "chain") == ["query", "inner.query", "inner.dense"]
    assert set_mode(network, "cached", ["query"]) == ["query", "inner.query"]
    assert set_mode(network, "rebuild", r"inner\..*") == ["inner.query", "inner.dense"]
    modes = [network["query"].mode, network["inner"]["query"].mode, network["inner"]["dense"].mode]
    assert modes == ["cached", "rebuild", "rebuild"]
    assert set_mode(network["query"], "auto") == [""]


def test_set_mode_refuses() -> None:
    network = model()
    with pytest.raises(MPOError, match=r"'fast'.*auto, chain, rebuild, cached"):
        set_mode(network, "fast")
    with pytest.raises(MPOError, match="'fast'"):
        network["query"].mode = "fast"
    with pytest.raises(MPOError, match=r"'key'.*query"):
        set_mode(network, "chain", ["key"])
    with pytest.raises(MPOError, match="no MPO modules"):
        set_mode(nn.Linear(2, 2), "chain")
    assert network["query"].mode == "auto"


X = torch.randn(40, LARGER.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def kept(layer: Any) -> torch.Tensor | None:
    """The dense matrix in the memory of a layer; that of the layer's cores is smaller."""
    entries = LARGER.out_features * LARGER.in_features
    held = [value for value in vars(layer).values() if hasattr(value, "weight")]
    return next((value.weight for value in held if value.weight.numel() == entries), None)


def cached() -> Any:
    layer = layer_of(LARGER, "cached").eval()
    with torch.no_grad():
        agrees(layer, X, layer(X))
    assert kept(layer) is not None
    return layer


def test_a_kept_matrix_is_used_and_not_saved() -> None:
    layer = cached()
    first = kept(layer)
    with torch.no_grad():
        layer(X)
        assert kept(layer) is first
        first.zero_()
        assert torch.equal(layer(X), layer.bias.expand(40, -1))
    assert sorted(layer.state_dict()) == ["bias", "cores.0", "cores.1", "cores.2"]
    assert sorted(name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]) == sorted(layer.state_dict())


def _step(layer: Any) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(X).square().mean().backward()
    optimizer.step()


def _load(layer: Any, **options: Any) -> None:
    layer.load_state_dict(layer_of(LARGER, seed=5).state_dict(), **options)


def _swap_data(layer: Any) -> None:
    for _ in range(3):  # the second and third may get memory that was just given back
        layer.cores[1].data = torch.randn_like(layer.cores[1])


def _cut(layer: Any) -> None:
    """What squeezing does: other shapes in the same parameters."""
    bonds = (layer.spec.bonds[0] - 1, layer.spec.bonds[1])
    layer.cores[0].data = layer.cores[0].data[..., :-1].clone()
    layer.cores[1].data = layer.cores[1].data[:-1].clone()
    layer.spec = replace(layer.spec, bonds=bonds)


def _in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.cores[2][0] += 1


def _new_parameter(layer: Any) -> None:
    layer.cores[0] = nn.Parameter(torch.randn_like(layer.cores[0]))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": _step,
    "load_state_dict": _load,
    "load_state_dict(assign=True)": lambda layer: _load(layer, assign=True),
    "data": _swap_data,
    "cut": _cut,
    "in place": _in_place,
    "new parameter": _new_parameter,
    "cast": lambda layer: layer.float().double(),
    "cast and back with a change": lambda layer: (layer.half(), _in_place(layer), layer.double()),
}


@pytest.mark.guarantee("never-stale")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_kept_matrix_is_not_used_after_a_change(change: Callable[[Any], Any]) -> None:
    layer = cached()
    with torch.no_grad():
        before = layer(X)
    change(layer)
    with torch.no_grad():
        after = layer(X)
        agrees(layer, X, after)
        assert not torch.equal(after, before)


DROPS: dict[str, Callable[[Any], Any]] = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "train of a parent": lambda layer: nn.Sequential(layer).train(),
    "to": lambda layer: layer.to(torch.float64),
    "load_state_dict": _load,
    "another mode": lambda layer: set_mode(layer, "auto"),
    "spec": _cut,
    "a training step": lambda layer: layer(X),
}


@pytest.mark.guarantee("never-stale")
@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
def test_a_kept_matrix_is_freed(drop: Callable[[Any], Any]) -> None:
    layer = cached()
    memory = weakref.ref(kept(layer))
    drop(layer)
    gc.collect()
    assert memory() is None
    assert kept(layer) is None


def test_cached_with_gradients_for_x_alone() -> None:
    layer = layer_of(LARGER, "cached", frozen=(0, 1, 2))
    x = X.clone().requires_grad_()
    y = layer(x)
    weight = kept(layer)
    assert weight is not None
    assert not weight.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), [x])
    assert torch.allclose(gradient, layer.dense_weight().sum(0).expand_as(x))


def test_cached_made_in_inference_mode_serves_training() -> None:
    layer = layer_of(LARGER, "cached", frozen=(0, 1, 2))
    with torch.inference_mode():
        layer(X)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_cores_made_in_inference_mode_are_not_watched() -> None:
    with torch.inference_mode():
        layer = layer_of(LARGER, "cached")
        layer(X)
        layer.cores[0].add_(1)
        agrees(layer, X, layer(X))
    assert kept(layer) is None


@pytest.mark.guarantee("never-stale")
def test_cached_under_autocast_and_functional_call() -> None:
    layer = layer_of(LARGER, "cached", dtype=torch.float32)
    x = X.float()
    other = layer_of(LARGER, dtype=torch.float32, seed=9)
    with torch.no_grad():
        for _ in range(2):
            agrees(layer, x, layer(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            assert layer(x).dtype == torch.float32
            agrees(other, x, torch.func.functional_call(layer, dict(other.named_parameters()), (x,)))


def test_copies_and_pickles_carry_the_mode_but_not_the_matrix() -> None:
    layer = cached()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert twin.mode == "cached"
        assert kept(twin) is None
        with torch.no_grad():
            assert torch.equal(twin(X), layer(X))
            twin.cores[0].zero_()
            agrees(twin, X, twin(X))
    assert kept(layer) is not None


def test_the_chain_never_builds_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpo_tn.torch.layers import product

    def refuse(*args: Any) -> Any:
        raise AssertionError("the matrix is built")

    monkeypatch.setattr(product, "merged_matrix", refuse)
    for tokens in (1, 10_000):
        layer = layer_of(LARGER, "chain")
        layer(torch.randn(tokens, LARGER.in_features, dtype=torch.float64)).sum().backward()
        with pytest.raises(AssertionError, match="built"):
            layer_of(LARGER, "rebuild")(X)


def test_auto_takes_the_chain_for_low_rank_and_the_matrix_for_full_bonds(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpo_tn.torch.layers import product

    used: list[str] = []
    plain = product.product
    monkeypatch.setattr(product, "product", lambda *args: (used.append(args[2].mode), plain(*args))[1])
    low_rank = layer_of(spec_of((256, 1), (1, 256), 4))
    full = layer_of(spec_of((8, 4, 8), (8, 4, 8), 4096))
    for layer, tokens in ((low_rank, 1), (low_rank, 2048), (full, 2048)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                layer(torch.randn(tokens, 256, dtype=torch.float64))
    assert used == ["chain"] * 4 + ["rebuild"] * 2
