"""Models of anybody's with PyTorchModelHubMixin come back with their MPO modules, or do not load at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOLayer, compress, to_dense

CLASS = """
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

class Mine(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(21, width)
        self.body = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, width))
        self.experts = nn.Module()
        self.experts.proj = nn.Parameter(torch.randn(4, width, width) / 4)
        self.head = nn.Linear(width, 21)
        self.head.weight = self.table.weight
        self.again = self.body[0]

    def forward(self, ids):
        x = self.body(self.table(ids))
        return self.head(x + sum(x @ each for each in self.experts.proj))
"""
IDS = torch.arange(12).reshape(3, 4)
exec(compile(CLASS, "<class>", "exec"))  # the other process has the same
Mine: Any = globals()["Mine"]
ALL = [MPOConfig(target_modules=r".*", sites=3, keep=0.8), MPOConfig(target_modules=r".*", sites=1, bits=8, group=8)]


def made(config: MPOConfig | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Mine(**options).eval()
    if config is not None:
        compress(model, config)
    return model


@pytest.mark.guarantee("mixin-as-it-is")
@pytest.mark.parametrize(
    ("config", "strict", "dtype"),
    [
        (ALL[0], False, torch.float32),
        (ALL[0], True, torch.bfloat16),
        (ALL[1], True, torch.float32),
        (MPOConfig(target_modules=["body.0"], sites=2), False, torch.bfloat16),
        (MPOConfig(target_modules=["proj"], sites=2), True, torch.float32),
    ],
)
def test_it_comes_back_as_it_is(config: MPOConfig, strict: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(config, width=12)
    if dtype != torch.float32:
        model = model.to(dtype)
    model.save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path, strict=strict)
    again = again.to(dtype)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(again(IDS), model(IDS))
    assert again.again is again.body[0]
    layers = {name: module for name, module in again.named_modules() if isinstance(module, MPOLayer)}
    assert layers.keys() == {name for name, module in model.named_modules() if isinstance(module, MPOLayer)}
    if "head" in layers:
        assert next(iter(again.head.cores)) is next(iter(again.table.cores))
    again.save_pretrained(tmp_path / "second")
    first, second = (load_file(place / "model.safetensors") for place in (tmp_path, tmp_path / "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.guarantee("mixin-as-it-is")
def test_a_dense_one_is_none_of_our_business(tmp_path: Path) -> None:
    model = made(ALL[0])
    to_dense(model)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() < model.state_dict().keys()
    assert torch.equal(Mine.from_pretrained(tmp_path, strict=True)(IDS), model(IDS))


@pytest.mark.guarantee("mixin-as-it-is")
@pytest.mark.slow
@pytest.mark.parametrize("config", [ALL[0], MPOConfig(target_modules=["proj"], sites=2)])
def test_without_this_package_it_does_not_load(config: MPOConfig, tmp_path: Path) -> None:
    made(config).save_pretrained(tmp_path)
    code = f"{CLASS}\nMine.from_pretrained({str(tmp_path)!r}, strict=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "size mismatch" in done.stderr


@pytest.mark.guarantee("mixin-as-it-is")
@pytest.mark.parametrize("what", ["a core", "its shape", "an entry", "a name", "another class"])
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    made(ALL[0]).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    key = next(key for key, value in state.items() if value.dtype == torch.uint8)
    told = json.loads(state[key].numpy().tobytes())
    core = next(name for name in state if name.startswith("body.2.cores.1"))
    if what == "a core":
        del state[core]
    elif what == "its shape":
        state[core] = state[core].flatten(0, 1)
    elif what == "an entry":
        del told["modules"]["body.2"]["bonds"]
    elif what == "a name":
        told["modules"]["body.7"] = told["modules"].pop("body.2")
    state[key] = torch.frombuffer(bytearray(json.dumps(told, separators=(",", ":")).encode()), dtype=torch.uint8)
    save_file(state, path)

    class Other(nn.Module, PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 24))

    with pytest.raises(MPOError):
        (Other if what == "another class" else Mine).from_pretrained(tmp_path)
