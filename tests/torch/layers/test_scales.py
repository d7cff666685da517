"""Scales that train: their gradients in every mode, what is kept for backward, and what they are rounded to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.adapter import close, compressed, embedding, kept_for_backward, linear, reference_matrix
from helpers.in_bits import bits_held, bytes_of
from helpers.modes import MODES
from torch import nn

from mpo_tn.torch import QuantizedCore
from mpo_tn.torch.layers.packing import unpack
from mpo_tn.torch.layers.scales import logarithms, rounded

KINDS: dict[str, dict[str, Any]] = {
    "dense in 3 bits": {"sites": 1, "bits": 3, "group": 16},
    "centre in 4 bits": {"sites": 3, "bits": {"central": 4}, "group": 16},
    "all in bits": {"sites": 5, "bits": {"central": 5, "auxiliary": 8}, "keep": 0.6},
    "one in float16": {"sites": 3, "bits": {"central": 16, "auxiliary": 4}},
}


@pytest.fixture(params=KINDS, ids=lambda name: name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def training(module: nn.Module, **config: Any) -> Any:
    """The module in bits, its scales training."""
    layer, _ = compressed(module, **config)
    for core in layer.cores:
        if isinstance(core, QuantizedCore):
            core.train_scales()
    return layer


def matrix_of(layer: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The matrix in float64 from integers and leaves for the scales, and those leaves."""
    cores: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []
    for core in layer.cores:
        if not isinstance(core, QuantizedCore) or core.bits == 16:
            cores.append(core.dequantize() if isinstance(core, QuantizedCore) else core.detach())
            continue
        left, out, in_, right = core.shape
        integers = unpack(core.weight_packed, core.bits, in_ * right).double()
        leaves.append(core.weight_scale.double().requires_grad_())
        wide = leaves[-1].repeat_interleave(core.group, dim=1)[:, : in_ * right]
        cores.append((integers * wide).reshape(left, out, in_, right))
    probe = copy.copy(layer)
    probe._modules = {**layer._modules, "cores": cores}
    return reference_matrix(probe), leaves


def logs_of(layer: Any) -> list[nn.Parameter]:
    return [core.scale_logs for core in layer.cores if isinstance(core, QuantizedCore) and core.scale_logs is not None]


def test_all_numbers_of_float16_come_back() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[torch.isfinite(every) & (every != 0)]
    assert torch.equal(rounded(logarithms(every), every), every.float())


def test_no_scale_becomes_zero_or_infinite() -> None:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float16)
    for logs in (-1e4, -50.0, 50.0, 1e4):
        scales = rounded(torch.full((2,), logs), signs)
        assert torch.isfinite(scales.half()).all()
        assert (scales.half() != 0).all()
        assert torch.equal(scales.sign(), signs.float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_gradients_reach_the_scales(mode: str, tokens: int, config: dict[str, Any]) -> None:
    layer = training(linear(23, 34, dtype=torch.float64), **config)
    layer.mode = mode
    x, upstream = torch.randn(tokens, 23, dtype=torch.float64), torch.randn(tokens, 34, dtype=torch.float64)
    layer(x).backward(upstream)
    matrix, scales = matrix_of(layer)
    wanted = torch.autograd.grad((upstream * (x @ matrix.T)).sum(), scales)
    assert wanted
    for logs, scale, of_scale in zip(logs_of(layer), scales, wanted, strict=True):
        assert logs.grad is not None
        assert logs.grad.dtype == torch.float32
        close(logs.grad, (of_scale * scale).detach())


@pytest.mark.parametrize("config", [KINDS["all in bits"], KINDS["dense in 3 bits"]])
def test_gradients_reach_the_scales_of_tables_and_of_dense_weights(config: dict[str, Any]) -> None:
    layer = training(embedding(60, 24, dtype=torch.float64), **config)
    ids = torch.tensor([[3, 59, 3], [7, 0, 1]])
    upstream = torch.randn(2, 3, 24, dtype=torch.float64)
    (layer(ids) * upstream).sum().backward()
    matrix, scales = matrix_of(layer)
    wanted = torch.autograd.grad((upstream * matrix[ids]).sum(), scales, retain_graph=True)
    for logs, scale, of_scale in zip(logs_of(layer), scales, wanted, strict=True):
        assert logs.grad is not None
        close(logs.grad, (of_scale * scale).detach())
        logs.grad = None
    layer.dense_weight().square().sum().backward()
    wanted = torch.autograd.grad(matrix.square().sum(), scales)
    for logs, scale, of_scale in zip(logs_of(layer), scales, wanted, strict=True):
        assert logs.grad is not None
        close(logs.grad, (of_scale * scale).detach())


@pytest.mark.parametrize("mode", ["chain", "rebuild"])
def test_a_second_derivative(mode: str) -> None:
    layer = training(linear(16, 12, bias=False, dtype=torch.float64), **KINDS["centre in 4 bits"])
    layer.mode = mode
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    matrix, scales = matrix_of(layer)
    found: list[torch.Tensor] = []
    for result, leaves in ((layer(x), logs_of(layer)), (x @ matrix.T, scales)):
        of_x, *firsts = torch.autograd.grad(result.tanh().sum(), [x, *leaves], create_graph=True)
        logs = [
            first if leaf.dtype == torch.float32 else first * leaf for first, leaf in zip(firsts, leaves, strict=True)
        ]
        total = of_x.square().sum() + sum(first.square().sum() for first in logs)
        (second,) = torch.autograd.grad(total, leaves)
        found.append(second if leaves[0].dtype == torch.float32 else (second * leaves[0]).detach())
    close(found[0].detach(), found[1])


@pytest.mark.guarantee("x-and-cores")
@pytest.mark.parametrize("mode", ["chain", "rebuild"])
def test_backward_keeps_no_copy_of_the_integers(mode: str, config: dict[str, Any]) -> None:
    layer = training(linear(64, 96), **config)
    layer.mode = mode
    x = torch.randn(2, 64, requires_grad=True)
    kept = kept_for_backward(lambda: layer(x))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers(), x)}
    beside = [size for place, size in kept.items() if place not in own]
    assert sum(beside) <= sum(4 * logs.numel() for logs in logs_of(layer))  # what the scales are rounded to


@pytest.mark.guarantee("scales-as-held")
@pytest.mark.parametrize("mode", MODES)
def test_what_is_computed_with_is_what_is_saved(mode: str, config: dict[str, Any]) -> None:
    layer, _ = compressed(linear(24, 36), **config)
    layer.mode = mode
    x = torch.randn(5, 24)
    size, names, held = bytes_of(layer), list(layer.state_dict()), bits_held(layer)
    with torch.no_grad():
        before = layer(x)
    for core in layer.cores:
        core.train_scales() if isinstance(core, QuantizedCore) else None
    with torch.no_grad():
        assert torch.equal(layer(x), before)
        for logs in logs_of(layer):
            logs.add_(0.3 * torch.randn(logs.shape, generator=torch.Generator().manual_seed(1)))
        logs_of(layer)[0][0, 0] = -1e3
        changed = layer(x)
    assert not torch.equal(changed, before)
    assert torch.equal(layer(x).detach(), changed) or mode == "cached"  # a weight that was kept is multiplied otherwise
    state = layer.state_dict()
    assert list(state) == names
    fresh, _ = compressed(linear(24, 36), **config)
    fresh.mode = mode
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(x), changed)
    for core in layer.cores:
        core.train_scales(False) if isinstance(core, QuantizedCore) else None
    assert bytes_of(layer) == size
    with torch.no_grad():
        assert torch.equal(layer(x), changed)
    after = bits_held(layer)
    for name, tensor in held.items():
        if name.endswith("weight_scale"):
            assert torch.isfinite(after[name]).all()
            assert torch.equal(after[name].sign(), tensor.sign())
        else:
            assert torch.equal(after[name], tensor)


def test_loading_casts_and_copies(config: dict[str, Any]) -> None:
    layer, other = training(linear(24, 36), **config), training(linear(24, 36, seed=1), **config)
    other.load_state_dict(layer.state_dict())
    for ours, theirs in zip(logs_of(layer), logs_of(other), strict=True):
        assert torch.equal(ours, theirs)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert [logs.dtype for logs in logs_of(cast)] == [torch.float32] * len(logs_of(layer))
    cast(torch.randn(3, 24, dtype=torch.bfloat16)).sum().backward()
    assert all(logs.grad is not None and torch.isfinite(logs.grad).all() for logs in logs_of(cast))


def test_scales_that_do_not_train_get_no_gradient() -> None:
    layer = training(linear(24, 36), **KINDS["centre in 4 bits"])
    for logs in logs_of(layer):
        logs.requires_grad_(False)
    layer(torch.randn(3, 24)).sum().backward()
    assert all(logs.grad is None for logs in logs_of(layer))
