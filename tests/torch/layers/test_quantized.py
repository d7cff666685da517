"""Layers on cores in bits: what they compute, what they keep, what reaches them, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter import close, compressed, embedding, kept_for_backward, linear
from helpers.in_bits import bits_held, read_matrix
from helpers.modes import COMPUTING, MODES
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_tn import MPOError
from mpo_tn.torch import MPOLinear, QuantizedCore, set_mode
from mpo_tn.truncate.quantize import BITS, quantize

CENTRAL = {"sites": 3, "bits": {"central": 4}, "group": 16}
KINDS: dict[str, dict[str, Any]] = {
    "dense in 3 bits": {"sites": 1, "bits": 3, "group": 8},
    "centre in 4 bits": CENTRAL,
    "all in bits": {"sites": 5, "bits": {"central": 5, "auxiliary": 8}, "keep": 0.6},
    "centre in float16": {"sites": 3, "bits": {"central": 16}},
}


@pytest.fixture(params=KINDS, ids=lambda name: name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def norms(layer: MPOLinear) -> torch.Tensor:
    """As ``cores_norm``, of what the cores stand for."""
    return torch.stack([core.detach().double().norm() for core in layer.cores.forward()]).prod()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_mode_computes_with_what_the_bits_stand_for(mode: str, bias: bool, config: dict[str, Any]) -> None:
    layer, _ = compressed(linear(23, 34, bias=bias, dtype=torch.float64), **config)
    layer.mode = mode
    matrix = read_matrix(layer)
    close(layer.dense_weight().detach(), matrix, norms(layer))
    for tokens in (1, 40):
        x = torch.randn(tokens, 23, dtype=torch.float64, requires_grad=True)
        wanted = x @ matrix.T + (layer.bias if bias else 0)
        scale = norms(layer) * x.detach().norm() + (1 if bias else 0)
        close(layer(x).detach(), wanted.detach(), scale)
        with torch.no_grad():
            close(layer(x), wanted.detach(), scale)
        upstream = torch.randn(tokens, 34, dtype=torch.float64)
        layer(x).backward(upstream)
        close(x.grad, upstream @ matrix, norms(layer) * upstream.norm())


def frozen_twin(layer: MPOLinear) -> MPOLinear:
    """The same in full numbers, the cores that were in bits frozen."""
    spec = replace(layer.spec, bits=())
    values = zip(layer.cores.forward(), layer.spec.core_bits, strict=True)
    cores = [nn.Parameter(core.detach().clone(), requires_grad=bits is None) for core, bits in values]
    twin = MPOLinear(spec, cores, nn.Parameter(layer.bias.detach().clone()))
    twin.mode = layer.mode
    return twin


@pytest.mark.parametrize("mode", COMPUTING)
def test_gradients_reach_the_cores_that_are_not_in_bits(mode: str) -> None:
    layer, _ = compressed(linear(24, 36, dtype=torch.float64), **CENTRAL)
    layer.mode = mode
    assert [type(core) for core in layer.cores] == [nn.Parameter, QuantizedCore, nn.Parameter]
    assert [name for name, _ in layer.named_parameters()] == ["bias", "cores.0", "cores.2"]
    twin = frozen_twin(layer)
    x = torch.randn(5, 24, dtype=torch.float64)
    for module in (layer, twin):
        module(x).square().sum().backward()
    wanted = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    for parameter, other in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad.abs().max() > 0
        close(parameter.grad, other.grad)


def test_a_second_derivative() -> None:
    layer, _ = compressed(linear(8, 6, dtype=torch.float64), **{**CENTRAL, "group": 8})
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    found: list[list[torch.Tensor]] = []
    for module in (layer, frozen_twin(layer)):
        first = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)[0]
        cores = [core for core in module.cores if core.requires_grad]
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), cores)])
    for value, other in zip(*found, strict=True):
        close(value, other)


@pytest.mark.guarantee("x-and-cores")
@pytest.mark.parametrize("mode", ["chain", "rebuild"])
def test_backward_keeps_bits_and_not_what_they_stand_for(mode: str, config: dict[str, Any]) -> None:
    layer, _ = compressed(linear(64, 96), **config)
    layer.mode = mode
    x = torch.randn(2, 64, requires_grad=True)
    kept = kept_for_backward(lambda: layer(x))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    assert set(kept) <= {*own, x.untyped_storage().data_ptr()}


@pytest.mark.guarantee("bits-not-cast")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_cast_reaches_the_bits(dtype: torch.dtype, config: dict[str, Any]) -> None:
    layer, _ = compressed(linear(24, 36, bias=False), **config)
    before = bits_held(layer)
    casts = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}
    for change in (lambda m: m.to(dtype), lambda m: getattr(m, casts[dtype])(), lambda m: m.type(dtype)):
        changed = change(copy.deepcopy(layer))
        after = bits_held(changed)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )
        assert changed.dense_weight().dtype == dtype
        assert changed(torch.ones(2, 24, dtype=dtype)).dtype == dtype
        back = changed.float()
        assert torch.equal(back.dense_weight(), layer.dense_weight()) or dtype != torch.float64
    wide = copy.deepcopy(layer).double()
    close(wide.dense_weight().detach(), read_matrix(layer) if config["sites"] == 1 else wide.dense_weight().detach())


def test_devices_copies_and_memory() -> None:
    layer, _ = compressed(linear(24, 36), **CENTRAL)
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(other(x), layer(x))
        assert not {b.data_ptr() for b in other.buffers()} & {b.data_ptr() for b in layer.buffers()}
    empty = copy.deepcopy(layer).to("meta")
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    shared = copy.deepcopy(layer).share_memory()
    assert all(buffer.is_shared() for buffer in shared.buffers())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again, _ = compressed(linear(24, 36, seed=1), **CENTRAL)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(x), layer(x))
    assert f"QuantizedCore({layer.spec.core_shapes[1]}, bits=4, group=16)" in repr(layer)
    assert "Object of type" not in repr(layer)


def test_cached_weight_follows_bits_that_change() -> None:
    layer, _ = compressed(linear(24, 36), sites=1, bits=4)
    other, _ = compressed(linear(24, 36, seed=1), sites=1, bits=4)
    layer.mode = "cached"
    layer.eval()
    x = torch.randn(2, 24)
    first = layer(x)
    assert layer._dense is not None
    assert torch.equal(layer(x), first)
    layer.cores[0].weight_packed.copy_(other.cores[0].weight_packed)
    assert not torch.equal(layer(x), first)
    layer.replace_cores([other.cores[0]], ())
    with torch.no_grad():
        close(layer(x), nn.functional.linear(x, other.dense_weight(), layer.bias), x.norm() * norms(other) + 1)


@pytest.mark.parametrize("autocast", [False, True])
def test_within_autocast(autocast: bool, config: dict[str, Any]) -> None:
    layer, _ = compressed(linear(24, 36), **config)
    x = torch.randn(6, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "chain", "rebuild", "cached"])
def test_compiled_and_exported(mode: str, config: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = nn.Sequential(compressed(linear(24, 36), **config)[0], nn.Tanh())
    set_mode(model, mode)
    x = torch.randn(4, 24, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    close(y.detach(), model(x).detach(), 1 + x.detach().norm() * norms(model[0]))
    y.sum().backward()
    gradient, x.grad = x.grad, None
    model(x).sum().backward()
    close(gradient, x.grad, 1 + norms(model[0]) * 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x.detach(),))
    close(exported.module()(x.detach()), model(x).detach(), 1 + x.detach().norm() * norms(model[0]))


# --- tables


@given(
    st.integers(2, 40), st.integers(1, 24), st.sampled_from([1, 3]), st.sampled_from([2, 4, 7, 16]), st.integers(0, 9)
)
def test_a_table_gives_the_rows_it_stands_for(ids: int, width: int, sites: int, bits: int, seed: int) -> None:
    layer, _ = compressed(embedding(ids, width, seed=seed), sites=sites, bits={"central": bits}, group=8)
    chosen = torch.randint(0, ids, (3, 4), generator=torch.Generator().manual_seed(seed))
    close(layer(chosen), read_matrix(layer)[chosen].float(), 1 + norms(layer))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._is_view() is False and "view" not in str(func):
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.guarantee("table-never-built")
@pytest.mark.parametrize("sites", [1, 3])
def test_only_the_rows_asked_for_are_unpacked(sites: int) -> None:
    layer, _ = compressed(embedding(4096, 16), sites=sites, bits=3, bond=4)
    with Largest() as seen:
        layer(torch.arange(5))
    # Rows are unpacked in groups of 3 bytes for 8 numbers, of which a row has at least as many as 12 bytes hold.
    widest = max(left * max(in_ * right, 32) for left, _, in_, right in layer.spec.core_shapes)
    assert seen.entries <= 5 * widest
    assert seen.entries < 4096


# --- cores from elsewhere


def test_cores_from_integers_of_another_fit() -> None:
    matrix = np.random.default_rng(0).standard_normal((6, 20))
    found = quantize(matrix, 3, 8, metric=np.diag(np.arange(1.0, 21)))
    core = QuantizedCore.from_integers(found, (2, 3, 4, 5), dtype=torch.float64)
    assert np.array_equal(core.dequantize().numpy().reshape(6, 20), found.matrix())
    with pytest.raises(MPOError, match=r"\(6, 20\).*\(2, 3, 4, 4\)"):
        QuantizedCore.from_integers(found, (2, 3, 4, 4))
    found.scales[0, 0] = 0
    with pytest.raises(MPOError, match="weight_scale has scales of zero"):
        QuantizedCore.from_integers(found, (2, 3, 4, 5))


@pytest.mark.parametrize("bits", [1, 9, 0, True, 2.5, "4"])
def test_bits_out_of_range(bits: Any) -> None:
    with pytest.raises(MPOError, match=r"bits=.*16 for float16"):
        QuantizedCore((1, 2, 3, 1), bits)


def test_cores_that_are_not_what_the_spec_says() -> None:
    layer, _ = compressed(linear(24, 36), **CENTRAL)
    plain = [nn.Parameter(core) for core in layer.cores.forward()]
    with pytest.raises(MPOError, match=r"core 1 has bits, group = \(None, 16\).*\(4, 16\)"):
        MPOLinear(layer.spec, plain, layer.bias)
    cores = list(layer.cores)
    cores[1] = QuantizedCore.rounded(plain[1], 4, 8)
    with pytest.raises(MPOError, match=r"\(4, 8\)"):
        MPOLinear(layer.spec, cores, layer.bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.guarantee("replace-refused")
def test_new_cores_that_cannot_be_rounded_change_nothing(bad: float) -> None:
    layer, _ = compressed(linear(24, 36), **{**CENTRAL, "bits": {"central": 4}})
    before = copy.deepcopy(layer.state_dict())
    new = [core.clone() + 1 for core in layer.cores.forward()]
    new[1][0, 0, 0, 0] = bad
    with pytest.raises(MPOError):
        layer.replace_cores([tensor.detach() for tensor in new], layer.spec.bonds)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("bits", BITS)
def test_new_cores_are_rounded_to_as_many_bits(bits: int) -> None:
    layer, _ = compressed(linear(24, 36), sites=3, bits={"central": bits}, group=8)
    buffer, spec = layer.cores[1].weight_packed, layer.spec
    cores = [core.detach()[..., :3] if k == 0 else core.detach() for k, core in enumerate(layer.cores.forward())]
    cores[1] = 2 * cores[1][:3]
    layer.replace_cores(cores, (3, spec.bonds[1]))
    core = layer.cores[1]
    assert core.weight_packed is buffer
    assert core.shape == layer.spec.core_shapes[1] == (3, *spec.core_shapes[1][1:])
    assert torch.equal(core.dequantize(), QuantizedCore.rounded(cores[1], bits, 8).dequantize())


DAMAGE = {
    "weight_packed": (
        lambda value: value[:, :-1],
        r"cores\.1\.weight_packed is torch.int32 \(36, 2\) where .*\(36, 3\)",
    ),
    "weight_scale": (lambda value: value.fill_(0), r"cores\.1\.weight_scale has scales of zero"),
    "weight_shape": (lambda value: value + 1, r"cores\.1\.weight_shape is \[37, 25\] where \[36, 24\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_named(name: str) -> None:
    layer, _ = compressed(linear(24, 36), **CENTRAL)
    before = copy.deepcopy(layer.state_dict())
    change, message = DAMAGE[name]
    state = {key: value.clone() for key, value in before.items()}
    state[f"cores.1.{name}"] = change(state[f"cores.1.{name}"])
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before if key.startswith("cores.1"))
    broken = copy.deepcopy(layer).cores[1]
    broken._buffers[name] = state[f"cores.1.{name}"]
    with pytest.raises(MPOError, match=message):
        broken.check("cores.1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 16])
def test_numbers_that_are_not_finite(bad: float, bits: int) -> None:
    layer, _ = compressed(linear(24, 36), sites=1, bits=bits)
    name = "weight" if bits == 16 else "weight_scale"
    layer.cores[0].get_buffer(name).view(-1)[-1] = bad
    with pytest.raises(MPOError, match=rf"layer\.{name} has entries that are NaN or infinite"):
        layer.cores[0].check("layer")
