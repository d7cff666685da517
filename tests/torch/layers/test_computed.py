"""Weights that look like tensors and are computed from cores where they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.layers.computed import ComputedWeight
from mpo_tn.torch.layers.layer import MPOLayer

EPS = torch.finfo(torch.float64).eps


class Experts(nn.Module):
    """Six matrices (4, 10) that are read one by one and all at once."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(6, 4, 10))


def held(sites: int | str = 3, **policy: Any) -> tuple[MPOLayer, torch.Tensor]:
    """A stack of matrices as cores, and as it was."""
    torch.manual_seed(0)
    model = nn.Sequential(Experts()).double()
    weight = model[0].proj.detach().clone()
    compress(model, MPOConfig(sites=sites, **policy))
    layer = model[0].mpo.proj
    assert isinstance(layer, MPOLayer)
    return layer, weight


def close(result: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
    """Equal to 100 eps of norms that the operations below multiply up to."""
    assert result.shape == wanted.shape
    assert float((result - wanted).detach().norm()) <= 100 * EPS * scale * (1 + float(wanted.detach().norm()))


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one": lambda w: functional.linear(torch.ones(3, 10).double(), w[2]),
    "last": lambda w: w[-1] * 2,
    "index": lambda w: w[torch.tensor(3)].T @ torch.ones(4, 2).double(),
    "select": lambda w: w.select(0, 1).exp(),
    "slice": lambda w: w[1:3].sum(0),
    "gather": lambda w: w[torch.tensor([0, 5, 5])] + 1,
    "batch": lambda w: torch.bmm(torch.ones(6, 2, 4).double(), w),
    "turned": lambda w: w.transpose(1, 2).reshape(60, 4) @ torch.ones(4).double(),
    "cast": lambda w: w.float().double() @ torch.ones(10).double(),
    "itself": lambda w: w * w,
    "einsum": lambda w: torch.einsum("eoi,ti->teo", w, torch.ones(2, 10).double()),
    "parts": lambda w: torch.cat(w.chunk(2, dim=1), dim=2),
}


@pytest.mark.guarantee("computed-when-read")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sites", [1, 3, "low-rank"])
def test_results_and_gradients_are_those_of_the_dense_weight(name: str, sites: int | str) -> None:
    layer, _ = held(sites)
    found, wanted = OPERATIONS[name](layer.weight), OPERATIONS[name](layer.stored_weight())
    scale = 1e8 if name == "cast" else 1.0  # a cast to float32 may round either way
    close(found, wanted, scale)
    cores = [*layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y.square().sum(), cores) for y in (found, wanted)), strict=True):
        close(ours, theirs, scale)


@given(out=st.integers(2, 9), in_=st.integers(2, 9), tokens=st.integers(1, 5), sites=st.integers(1, 3))
def test_products_and_lookups(out: int, in_: int, tokens: int, sites: int) -> None:
    model = nn.Sequential(nn.Linear(in_, out)).double()
    compress(model, MPOConfig(sites=sites))
    layer, x = model[0], torch.randn(2, tokens, in_).double()
    dense = layer.dense_weight()
    for y in (functional.linear(x, layer.weight), x @ layer.weight.T, torch.matmul(x, layer.weight.t())):
        close(y, functional.linear(x, dense), float(x.norm()))
    ids = torch.randint(0, out, (2, tokens))
    close(functional.embedding(ids, layer.weight, padding_idx=-1), dense[ids])


@pytest.mark.guarantee("computed-forgotten")
def test_no_dense_weight_is_kept_for_backward() -> None:
    layer, weight = held("low-rank", bond=2)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(7, 4).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = torch.bmm(x.expand(6, 7, 4), layer.weight).square().sum()
    assert weight.numel() not in kept, "the hooks that were there get what is kept"
    (gradient,) = torch.autograd.grad(y, x)
    dense = layer.stored_weight()
    (wanted,) = torch.autograd.grad(torch.bmm(x.expand(6, 7, 4), dense).square().sum(), x)
    close(gradient, wanted, 10)
    # What was kept once more is computed of the cores as they were.
    z = torch.bmm(x.expand(6, 7, 4), layer.weight).square().sum()
    with torch.no_grad():
        next(layer.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_others_that_are_kept_are_watched_as_without_hooks() -> None:
    layer, _ = held()
    x = torch.randn(6, 7, 4).double().requires_grad_()
    inner = x * 1
    y = torch.bmm(inner, layer.weight)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.guarantee("computed-forgotten")
def test_a_part_is_computed_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for sites in (3, "low-rank", 1):
        layer, weight = held(sites)
        monkeypatch.setattr(type(layer), "stored_weight", lambda *_: pytest.fail("the whole was computed"))
        close(layer.weight[4] + 0, weight[4])
        monkeypatch.undo()
    with pytest.raises(IndexError, match="out of bounds"):
        _ = layer.weight[6] + 0


WRITES: list[Callable[[torch.Tensor], object]] = [
    lambda w: w.zero_(),
    lambda w: w.data.copy_(torch.ones(6, 4, 10)),
    lambda w: nn.init.normal_(w),
    lambda w: w.__setitem__(0, 1.0),
    lambda w: w[0].add_(1),
    lambda w: setattr(w, "data", torch.ones(1)),
    lambda w: w.requires_grad_(False),
]


@pytest.mark.guarantee("computed-read-only")
@pytest.mark.parametrize("write", WRITES)
def test_writing_raises(write: Callable[[torch.Tensor], object]) -> None:
    layer, weight = held()
    with torch.no_grad(), pytest.raises(MPOError, match="nothing would come of it"):
        write(layer.weight)
    close(layer.stored_weight(), weight)


@pytest.mark.guarantee("computed-read-only")
def test_a_number_scales_a_core() -> None:
    layer, weight = held()
    with torch.no_grad():
        layer.weight.div_(4)
        layer.weight.mul_(2)
    close(layer.stored_weight(), weight / 2)
    packed, _ = held(1, bits=8)
    with torch.no_grad(), pytest.raises(MPOError, match="in bits"):
        packed.weight.mul_(2)


def test_what_is_known_is_known_without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight = held()
    monkeypatch.setattr(type(layer), "dense_weight", lambda *_: pytest.fail("it was computed"))
    monkeypatch.setattr(type(layer), "part", lambda *_: pytest.fail("it was computed"))
    found = layer.weight
    assert isinstance(found, torch.Tensor)
    assert isinstance(found, ComputedWeight)
    assert (found.shape, found.dtype, found.device, found.requires_grad) == (
        weight.shape,
        weight.dtype,
        weight.device,
        True,
    )
    assert found.mT.shape == (6, 10, 4)
    assert found.float()[1].dtype == torch.float32
    assert (found.size(1), found.stride(), len(found), found.grad, found.is_contiguous()) == (
        4,
        (40, 10, 1),
        6,
        None,
        True,
    )


def test_copies_and_files_hold_an_ordinary_tensor(tmp_path: Any) -> None:
    layer, weight = held()
    assert type(copy.deepcopy(layer.weight)) is torch.Tensor
    torch.save(layer.weight, tmp_path / "weight")
    close(torch.load(tmp_path / "weight"), weight)
    assert "tensor(" in repr(layer.weight)


def test_second_derivatives() -> None:
    layer, _ = held("low-rank", bond=1)
    x = torch.randn(2, 10).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: (x @ layer.weight[1].T).square(), x)


@pytest.mark.parametrize("sites", [1, 3, "low-rank"])
def test_cores_in_bits(sites: int | str) -> None:
    layer, _ = held(sites, bits=8)
    assert layer.weight.dtype == torch.float64
    close(layer.weight[2] + 0, layer.stored_weight()[2])
    close(layer.weight + 0, layer.stored_weight())


def test_under_the_transformations_of_torch_func() -> None:
    """Where hooks are turned off."""
    layer, _ = held()
    model = nn.Sequential(layer)
    cores, x = dict(model.named_parameters()), torch.randn(6, 2, 4).double()

    def loss(cores: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(Reading(model), {f"0.{k}": v for k, v in cores.items()}, (x,))

    found = torch.func.grad(loss)(cores)
    wanted = torch.autograd.grad(torch.bmm(x, layer.stored_weight()).square().sum(), [*cores.values()])
    for ours, theirs in zip(found.values(), wanted, strict=True):
        close(ours, theirs, 10)


class Reading(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self[0][0].weight).square().sum()
