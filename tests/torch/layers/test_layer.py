"""MPOLinear and MPOEmbedding against the dense layers they stand for: values, gradients, memory, torch's own tools."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers.adapter import close, compressed, cores_norm, embedding, linear, reference_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from mpo_tn import MPOError
from mpo_tn.torch import MPOEmbedding, MPOLinear

SIZES = st.integers(1, 40)
SHAPES = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 2, 1)]


@given(SIZES, SIZES, st.integers(1, 5), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_full_bonds_compute_what_the_linear_layer_did(
    in_: int, out: int, n: int, bias: bool, dtype: torch.dtype
) -> None:
    dense = linear(in_, out, bias=bias, dtype=dtype)
    layer, _ = compressed(dense, sites=n)
    x = torch.randn(7, in_, dtype=dtype)
    close(layer.dense_weight(), dense.weight)
    bias_norm = 0.0 if dense.bias is None else dense.bias.detach().norm()
    close(layer(x), dense(x), x.norm() * dense.weight.detach().norm() + bias_norm)


@given(SIZES, SIZES, st.integers(1, 5), st.integers(1, 4))
def test_the_forward_pass_is_that_of_the_dense_weight(in_: int, out: int, n: int, bond: int) -> None:
    layer, _ = compressed(linear(in_, out), sites=n, bond=bond)
    assert layer.dense_weight().shape == (out, in_)
    close(layer.dense_weight(), reference_matrix(layer).float(), reference_matrix(layer))
    scale = 1 + layer.bias.detach().norm()
    for shape in SHAPES:
        x = torch.randn(*shape, in_)
        wanted = functional.linear(x, layer.dense_weight(), layer.bias)
        assert layer(x).is_contiguous()
        close(layer(x), wanted, scale + x.norm() * cores_norm(layer))


def test_strided_input_and_conv1d() -> None:
    layer, _ = compressed(linear(12, 8), bond=3)
    x = torch.randn(12, 6, 5)
    assert torch.equal(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))
    conv = Conv1D(20, 12)
    small, report = compressed(conv)
    x = torch.randn(2, 3, 12)
    close(small.dense_weight(), conv.weight.T)
    close(small(x), conv(x), x, conv.weight)
    assert (small.spec.kind, small.in_features, small.out_features) == ("conv1d", 12, 20)
    assert small.bias is conv.bias
    assert report.layers[0].error == 0


@pytest.mark.parametrize("build", [lambda: linear(10, 14), lambda: embedding(11, 6)], ids=["linear", "embedding"])
def test_gradients_are_those_of_an_independent_contraction(build: Any) -> None:
    layer, _ = compressed(build().double(), bond=3)
    ids, x = torch.tensor([[3, 3, 10], [0, 7, 3]]), torch.randn(5, 10, dtype=torch.float64)
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    if isinstance(layer, MPOEmbedding):
        loss, expected = (
            (layer(ids) * weight).sum(),
            (functional.embedding(ids, reference_matrix(layer)) * weight).sum(),
        )
    else:
        loss = layer(x).square().sum()
        expected = functional.linear(x, reference_matrix(layer), layer.bias).square().sum()
    got = torch.autograd.grad(loss, list(layer.cores))
    wanted = torch.autograd.grad(expected, list(layer.cores))
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        close(a, b)


def _functional(layer: Any, *inputs: torch.Tensor) -> tuple[Any, tuple[torch.Tensor, ...]]:
    names = [name for name, _ in layer.named_parameters()]

    def call(*values: torch.Tensor) -> torch.Tensor:
        given_inputs, parameters = values[: len(inputs)], dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(layer, parameters, given_inputs or (torch.tensor([0, 3, 3, 6]),))

    return call, (*inputs, *(p.detach().requires_grad_() for p in layer.parameters()))


@pytest.mark.parametrize("sites", [1, 2, 4, "low-rank"])
def test_gradcheck(sites: int | str) -> None:
    layer, _ = compressed(linear(6, 5).double(), sites=sites, bond=2)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(*_functional(layer, x))
    table, _ = compressed(embedding(7, 4).double(), sites=sites, bond=2)
    assert torch.autograd.gradcheck(*_functional(table))


def test_the_weight_is_computed_when_it_is_read() -> None:
    for layer in (compressed(linear(4, 6))[0], compressed(embedding(6, 4))[0]):
        close(layer.weight + 0, layer.dense_weight())
        assert "weight" not in dict(layer.named_parameters())
        with pytest.raises(AttributeError, match="colour"):
            _ = layer.colour


def test_the_mpo_of_a_layer_claims_no_canonical_form() -> None:
    layer, _ = compressed(linear(10, 14), bond=3)
    mpo = layer.mpo()
    assert mpo.center is None
    assert mpo.bonds == layer.spec.bonds
    assert mpo.cores[0].data_ptr() == layer.cores[0].data_ptr()
    assert not any(core.requires_grad for core in mpo.cores)
    close(mpo.to_matrix(), reference_matrix(layer).float())


def test_state_copies_and_pickles() -> None:
    model = nn.Sequential(compressed(linear(10, 14), bond=3)[0], compressed(embedding(10, 14), bond=3)[0])
    keys = ["0.bias", *(f"0.cores.{k}" for k in range(3)), *(f"1.cores.{k}" for k in range(3))]
    assert sorted(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 10)
    assert torch.equal(twin[0](x), model[0](x))
    assert "10 -> 14, out=(1, 7, 2), in_=(2, 5, 1), bonds=(2, 2), kept=1.057" in repr(model)


def test_wrong_cores_are_refused() -> None:
    layer, _ = compressed(linear(10, 14), bond=3)
    with pytest.raises(MPOError, match="cores have shapes"):
        MPOLinear(layer.spec, list(reversed(list(layer.cores))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    dense = linear(24, 36, dtype=dtype)
    layer, _ = compressed(dense)
    x = torch.randn(5, 24, dtype=dtype)
    assert layer(x).dtype == dtype
    close(layer.dense_weight(), dense.weight)
    close(layer(x), dense(x), x, dense.weight)
    table, _ = compressed(embedding(24, 36, dtype=dtype))
    assert table(torch.tensor([1])).dtype == dtype


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    """Several layers in one process: numbers that differ between them must not become symbols."""
    ids = torch.tensor([[3, 3], [0, 10]])
    for module, sites, x in [
        (linear(12, 30), 3, torch.randn(4, 12)),
        (linear(64, 64), 5, torch.randn(4, 64)),
        (linear(30, 7), 2, torch.randn(4, 30)),
        (embedding(11, 6, padding_idx=3), 3, ids),
        (embedding(64, 8), 5, ids),
    ]:
        layer, _ = compressed(module, sites=sites, bond=4)
        fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
        close(fast(x), layer(x))
        fast(x).sum().backward()
        compiled = [core.grad.clone() for core in layer.cores]
        layer.zero_grad()
        layer(x).sum().backward()
        for core, gradient in zip(layer.cores, compiled, strict=True):
            close(gradient, core.grad, 1 + core.grad.norm())


def test_export_with_a_dynamic_batch() -> None:
    for layer, x, more in [
        (compressed(linear(12, 30), bond=4)[0], torch.randn(4, 12), torch.randn(9, 12)),
        (compressed(embedding(11, 6), bond=4)[0], torch.tensor([1, 2, 1]), torch.arange(11)),
    ]:
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
        close(exported(more), layer(more))


def test_activation_checkpointing_and_autocast() -> None:
    layer, _ = compressed(linear(12, 30), bond=4)
    x = torch.randn(4, 12, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, layer(x).bfloat16(), x.norm() * layer.dense_weight().norm() + layer.bias.norm())
    y.sum().backward()
    assert {core.grad.dtype for core in layer.cores} == {torch.float32}
