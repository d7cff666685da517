"""torch.jit.trace records what is right for any other batch, without a warning, whatever the mode."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from mpo_tn.torch import MPOConfig, compress, set_mode
from mpo_tn.torch.layers.packing import pack, unpack
from mpo_tn.torch.layers.quantized import quantized_cores

CONFIGS = [
    {"sites": 3, "keep": 0.7}, {"sites": 1, "bits": 4, "group": 8}, {"sites": 3, "keep": 0.7, "bits": {"central": 5}},
    {"sites": 3, "bits": 16},
]  # fmt: skip


# torch 2.13 says that it would rather have torch.export.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def traced(model: nn.Module, example: torch.Tensor) -> Any:
    """What is traced, saved and read again; anything that could not be recorded would be a warning, here an error."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (example,)), file)
    file.seek(0)
    return torch.jit.load(file)


def net(config: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(31, 24, padding_idx=0), nn.Linear(24, 18), nn.Linear(18, 20, bias=False)).eval()
    compress(model, MPOConfig(target_modules=".*", **config))
    return model


@pytest.mark.guarantee("jit-traced")
@pytest.mark.parametrize("mode", ["auto", "chain", "rebuild", "cached"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_trace_is_right_for_other_batches(config: dict[str, Any], mode: str) -> None:
    model = net(config)
    set_mode(model, mode)
    example, ids = torch.arange(12).reshape(2, 6), torch.randint(0, 31, (3, 7))
    expected = model(ids).detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(traced(model, example)(ids), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids), expected)  # and nothing of it stays


@pytest.mark.guarantee("jit-traced")
def test_a_trace_has_the_gradients_of_the_model() -> None:
    model = net({"sites": 3, "keep": 0.7, "bits": {"central": 5}})
    for core in quantized_cores(model).values():
        core.train_scales()
    recorded, ids = traced(model, torch.arange(12).reshape(2, 6)), torch.randint(0, 31, (3, 7))
    found: list[dict[str, torch.Tensor]] = []
    for each in (model, recorded):
        each(ids).square().sum().backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("scale" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_the_same_however_they_are_unpacked(bits: int) -> None:
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 23), dtype=torch.int8)
    packed = pack(values, bits)
    recorded = torch.jit.trace(lambda words: unpack(words, bits, 23), (packed[:2],))
    assert torch.equal(recorded(packed), values)
    assert torch.equal(unpack(packed, bits, 23), values)
