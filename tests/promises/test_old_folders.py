"""Folders that an earlier release wrote are read, and written in the same way today."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import TESTS
from safetensors.torch import load_file
from torch import nn

from mpo_tn import MPOError, Sites
from mpo_tn.torch import ModuleSpec, MPOLinear, cut_model, load_cores, load_state, save_cores, save_state

FIXTURES = TESTS / "fixtures"


class Training:
    """As it was when the fixtures were written by 0.1.0, before its two steps and the cut of its bond from 3 to 2."""

    def __init__(self) -> None:
        spec = ModuleSpec("linear", Sites((2, 3), (2, 2)), (3,), out_features=6, in_features=4, bias=True)
        table = nn.Embedding(3, 2, dtype=torch.bfloat16)
        self.model = nn.Sequential(MPOLinear(spec), nn.BatchNorm1d(6), nn.Linear(6, 2), table)
        start = 0
        with torch.no_grad():
            for value in self.model.parameters():
                value.copy_(torch.arange(start, start + value.numel()).reshape(value.shape) / 64 - 0.25)
                start += 7
        table.weight.requires_grad_(False)
        self.model[2].bias.requires_grad_(False)
        wanted = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(wanted, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


def contents(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values and tensors of a folder, without the state of generators that a machine has or has not."""
    values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    values.pop("tensors", None)
    values.get("random", {}).pop("cuda", None)
    (file,) = folder.glob("*.safetensors")
    return values, {key: value for key, value in load_file(file).items() if "/cuda/" not in key}


def assert_same(first: Path, second: Path, name: str) -> None:
    values, tensors = contents(first, name)
    other_values, other_tensors = contents(second, name)
    assert json.dumps(values) == json.dumps(other_values)  # the order of keys counts
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())
    assert all(value.dtype == other_tensors[key].dtype for key, value in tensors.items())


@pytest.fixture
def training() -> Training:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    return Training()


def test_a_state(training: Training, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="lr_scheduler.step"):  # of torch, which has seen no step in this process
        training.scheduler.step()
    extra = load_state(FIXTURES / "state-0.1.0", **training.parts())
    assert torch.equal(extra.pop("t"), torch.arange(3))
    assert extra == {"position": 5, "best": (0.5, None)}
    assert training.model[0].spec.bonds == (2,)
    assert training.scheduler.last_epoch == 2
    assert torch.equal(training.model[1].num_batches_tracked, torch.tensor(2))
    save_state(tmp_path / "state", **training.parts(), extra={**extra, "t": torch.arange(3)})
    assert_same(tmp_path / "state", FIXTURES / "state-0.1.0", "state")


def test_saved_cores(training: Training, tmp_path: Path) -> None:
    with pytest.raises(MPOError, match=r"bonds \[3\], not \[2\]"):
        load_cores(training.model, FIXTURES / "cores-0.1.0")
    cut_model(training.model, {"0": [2]})
    names = load_cores(training.model, FIXTURES / "cores-0.1.0")
    assert save_cores(training.model, tmp_path / "cores") == names
    assert_same(tmp_path / "cores", FIXTURES / "cores-0.1.0", "cores")


def test_they_belong_to_that_model_alone(training: Training) -> None:
    with torch.no_grad():
        training.model[3].weight[0, 0] += 1
    with pytest.raises(MPOError, match=r"the 2 frozen tensors .*other values"):
        load_state(FIXTURES / "state-0.1.0", **training.parts())
    cut_model(training.model, {"0": [2]})
    with pytest.raises(MPOError, match=r"3\.weight is frozen and has other numbers"):
        load_cores(training.model, FIXTURES / "cores-0.1.0")
