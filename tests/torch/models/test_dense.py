"""to_dense: what compress took apart comes back as it was, with the matrices that the cores stand for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers.adapter import reference_matrix
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, compress, to_dense
from mpo_tn.torch.models import dense as dense_module
from mpo_tn.torch.models.host import NoHost, use_host

# Two matrices of at most 24 x 18 that are rounded once, and cores of up to 5 sites in double precision.
_SLACK = 2.0


class Shared(nn.Module):
    """A module under two names, a tied pair, and a bias that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(19, 12, padding_idx=3)
        self.once = self.twice = nn.Linear(12, 18)
        self.other = nn.Linear(12, 18)
        self.other.bias = self.once.bias
        self.head = nn.Linear(12, 19, bias=False)
        self.head.weight = self.table.weight


CONFIGS = [
    {"sites": 3, "keep": 0.7}, {"sites": 1, "bits": 4, "group": 8}, {"sites": 3, "keep": 0.7, "bits": {"central": 3}},
    {"sites": "low-rank", "keep": 0.5},
]  # fmt: skip


@pytest.mark.guarantee("to-dense")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_come_back_with_what_their_cores_stand_for(config: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Shared().to(dtype).eval()
    compress(model, MPOConfig(target_modules=".*", **config))
    matrices = {name: reference_matrix(module) if not module.spec.bits else None for name, module in
                model.named_modules() if isinstance(module, MPOLayer)}  # fmt: skip
    half = {name: model.get_submodule(name).dense_weight() for name in matrices}
    bias = model.once.bias
    assert to_dense(model) == ["table", "once", "other"]
    assert [type(module) for module in model.children()] == [nn.Embedding, nn.Linear, nn.Linear, nn.Linear]
    assert model.once is model.twice
    assert model.head.weight is model.table.weight
    assert model.once.bias is model.other.bias is bias
    assert model.head.bias is None
    assert model.table.padding_idx == 3
    for name, matrix in matrices.items():
        weight = model.get_submodule(name).weight
        assert (weight.dtype, weight.is_contiguous(), weight.requires_grad) == (dtype, True, True)
        expected = half[name] if matrix is None else matrix
        eps = torch.finfo(dtype if matrix is not None else torch.bfloat16 if dtype == torch.bfloat16 else dtype).eps
        assert (weight.double() - expected.double()).norm() <= _SLACK * eps * 5 * expected.double().norm()
    assert not any(module.training for module in model.modules())
    assert not any(isinstance(module, MPOLayer) for module in model.modules())


@pytest.mark.guarantee("to-dense")
def test_conv1d_hooks_and_what_trains() -> None:
    model = tiny("gpt2")
    compress(model, MPOConfig(target_modules=["c_attn", "c_fc"], sites=3, keep=0.8))
    layer, frozen = (block.attn.c_attn for block in model.transformer.h)
    for core in list(frozen.cores)[:2]:
        core.requires_grad_(False)
    for core in model.transformer.h[1].mlp.c_fc.cores:
        core.requires_grad_(False)
    seen: list[int] = []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    layer.train()
    x = torch.randn(3, 32)
    with torch.no_grad():
        expected = layer(x)
    to_dense(model)
    again, partly = (block.attn.c_attn for block in model.transformer.h)
    assert (type(again).__name__, again.weight.shape, again.nf) == ("Conv1D", (32, 96), 96)
    assert (again.weight.requires_grad, partly.weight.requires_grad) == (True, True)
    assert not model.transformer.h[1].mlp.c_fc.weight.requires_grad
    assert (again.training, partly.training) == (True, False)
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    again(x)
    assert len(seen) == 2


def test_only_what_matches() -> None:
    model = Shared()
    compress(model, MPOConfig(target_modules=".*", sites=3, keep=0.7))
    assert to_dense(model, ["head"]) == ["table"]  # whose cores it has
    assert [isinstance(module, MPOLayer) for module in model.children()] == [False, True, True, False]
    with pytest.raises(MPOError, match=r"\['nothing'\] matches none of the 2.*once"):
        to_dense(model, ["nothing"])


def test_compress_and_back_again_and_again() -> None:
    model = Shared()
    for _ in range(2):
        compress(model, MPOConfig(target_modules=".*", sites=3))
        to_dense(model)
    compressed = Shared()
    compress(compressed, MPOConfig(target_modules=".*", sites=3))
    names = [name for name, _ in Shared().named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    del compressed
    gc.collect()


@pytest.mark.guarantee("to-dense-all-or-nothing")
def test_nothing_is_swapped_when_something_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Shared()
    compress(model, MPOConfig(target_modules=".*", sites=3))
    before = dict(model.named_modules(remove_duplicate=False))
    calls = iter([None, RuntimeError("memory")])
    actual = dense_module.dense_weight

    def failing(*args: Any) -> torch.Tensor:
        if (error := next(calls)) is not None:
            raise error
        return actual(*args)

    monkeypatch.setattr(dense_module, "dense_weight", failing)
    with pytest.raises(RuntimeError, match="memory"):
        to_dense(model)
    assert dict(model.named_modules(remove_duplicate=False)) == before


def test_what_cannot_be_made_dense_is_refused() -> None:
    with pytest.raises(MPOError, match="compress it first"):
        to_dense(Shared())
    holder = nn.Sequential(nn.Linear(8, 8))
    compress(holder, MPOConfig(sites=3))
    with pytest.raises(MPOError, match=r"itself an MPOLinear.*dense_weight\(\)"):
        to_dense(holder[0])
    holder.to("meta")
    with pytest.raises(MPOError, match=r"0\.bias holds no data|0\.cores\.0 holds no data"):
        to_dense(holder)
    gpt2 = tiny("gpt2")
    compress(gpt2, MPOConfig(target_modules=["c_attn"], sites=3))
    before = use_host(NoHost())
    try:
        with pytest.raises(MPOError, match="transformers, which is not installed"):
            to_dense(gpt2)
    finally:
        use_host(before)
