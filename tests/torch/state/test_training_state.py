"""save_state and load_state: bit for bit, whole or not at all, and clear about what does not fit."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter import small
from helpers.damage import MISSING, changed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress, cut_model, load_state, save_state
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.torch.state import training_state as state
from mpo_tn.torch.state.nested_values import decode, encode


class Net(nn.Module):
    """Two MPO layers, one dense and frozen, one with buffers, dropout."""

    def __init__(self, *, seed: int = 0, sites: int = 3, frozen: bool = True, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(11, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 24), nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Tanh(), nn.Linear(24, 16)
        )
        self.head = nn.Linear(16, 3)
        self.table.weight.requires_grad_(not frozen)
        compress(self, MPOConfig(target_modules=r"layers\..*", sites=sites))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.table(ids)))


SCHEDULERS: dict[str, Any] = {
    "none": lambda optimizer: None,
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=9),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 2, 5]),
    "cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30, cycle_momentum=False),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), foreach=False),
}


class Training:
    def __init__(self, optimizer: str = "adamw", scheduler: str = "linear", **options: Any) -> None:
        self.model = Net(**options)
        cores = [p for name, p in self.model.named_parameters() if ".cores." in name]
        rest = [p for name, p in self.model.named_parameters() if ".cores." not in name and p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": cores}, {"params": rest, "weight_decay": 0.0}])
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def steps(self, count: int) -> list[float]:
        """Batches by all three global generators."""
        losses: list[float] = []
        for _ in range(count):
            ids = torch.randint(0, 11, (8,)) + random.randrange(1) + int(np.random.randint(1))  # noqa: NPY002
            weight = random.random() + np.random.random()  # noqa: NPY002
            self.optimizer.zero_grad()
            loss = weight * nn.functional.cross_entropy(self.model(ids), ids % 3)
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            losses.append(float(loss.detach()))
        return losses

    def bits(self) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {}
        rest = encode([self.optimizer.state_dict()], "o", tensors)
        model = {name: value.clone() for name, value in self.model.state_dict().items()}
        return {**model, **tensors, "rest": rest, "random": state.random_digest()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
            assert value.dtype == second[key].dtype
        else:
            assert value == second[key], key


@pytest.mark.guarantee("state-bits")
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [("adamw", name) for name in SCHEDULERS] + [(name, "none") for name in OPTIMIZERS if name != "adamw"],
)
def test_a_training_goes_on_with_the_same_bits(optimizer: str, scheduler: str, tmp_path: Path) -> None:
    first = Training(optimizer, scheduler)
    first.steps(3)
    bonds = {name: [bond - 1 for bond in unit.spec.bonds] for name, unit in mpo_units(first.model).items()}
    cut_model(first.model, bonds, first.optimizer)
    first.steps(2)
    extra = {"position": 5, "best": (0.5, None), "loss": float("inf"), "tensor": torch.arange(3)}
    save_state(tmp_path / "state", **first.parts(), extra=extra)
    saved = first.bits()
    expected = first.steps(4)

    second = Training(optimizer, scheduler)
    second.steps(1)
    back = load_state(tmp_path / "state", **second.parts())
    assert torch.equal(back.pop("tensor"), extra.pop("tensor"))
    assert back == extra
    assert_same(second.bits(), saved)
    assert {name: unit.spec for name, unit in mpo_units(second.model).items()} == {
        name: unit.spec for name, unit in mpo_units(first.model).items()
    }
    assert second.steps(4) == expected
    assert_same(second.bits(), first.bits())
    load_state(tmp_path / "state", **first.parts())  # and back in the same process
    assert_same(first.bits(), saved)


@pytest.mark.guarantee("state-bits")
def test_before_the_first_step_and_without_an_optimiser(tmp_path: Path) -> None:
    first, second = Training(), Training()
    save_state(tmp_path / "state", **first.parts())
    expected = first.steps(3)
    second.steps(2)
    load_state(tmp_path / "state", **second.parts())
    assert second.steps(3) == expected
    save_state(tmp_path / "state", model=first.model)  # replaced
    assert load_state(tmp_path / "state", model=second.model) == {}
    with pytest.raises(MPOError, match="saved with no optimiser and is read into AdamW"):
        load_state(tmp_path / "state", **second.parts())


@pytest.mark.guarantee("state-bits")
def test_what_is_none_is_not_read(tmp_path: Path) -> None:
    """An optimiser and a scheduler that are not handed over stay as they are, whatever the folder holds of them."""
    first, second = Training(), Training()
    first.steps(3)
    save_state(tmp_path / "state", **first.parts())
    second.steps(1)
    optimizer = encode(second.optimizer.state_dict(), "o", before := {})
    scheduler = second.scheduler.state_dict()
    load_state(tmp_path / "state", model=second.model)
    after: dict[str, torch.Tensor] = {}
    assert encode(second.optimizer.state_dict(), "o", after) == optimizer
    assert_same(after, before)
    assert second.scheduler.state_dict() == scheduler
    assert_same(dict(second.model.state_dict()), dict(first.model.state_dict()))
    load_state(tmp_path / "state", model=second.model, optimizer=second.optimizer)
    assert second.scheduler.state_dict() == scheduler


def test_going_back_over_a_cut_brings_the_error_of_the_compression_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    compress(model, MPOConfig(sites=3, bond=3))
    spec, before = model[0].spec, state.capture(model)
    assert spec.rel_error
    cut_model(model, {"0": [1, 1]})
    assert model[0].spec.rel_error is None
    state.restore(before, model)
    assert model[0].spec == spec


def test_frozen_tensors_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    net = Net()
    central = net.layers[0].cores[1].requires_grad_(False)
    save_state(tmp_path / "some", model=net)
    save_state(tmp_path / "all", model=net, which="all")
    some, everything = (state.read_state(tmp_path / name).tensors for name in ("some", "all"))
    assert "model/table.weight" not in some
    assert torch.equal(some["model/layers.0.cores.1"], central)  # a cut reshapes frozen cores too
    assert torch.equal(some["model/layers.1.running_mean"], net.layers[1].running_mean)
    assert set(everything) - set(some) == {"model/table.weight"}
    with pytest.raises(MPOError, match="which='most'"):
        save_state(tmp_path / "most", model=net, which="most")


def test_tied_modules_and_a_model_without_mpo_modules(tmp_path: Path) -> None:
    first, second = small("bert"), small("bert")
    name = next(name for name in mpo_units(first) if "word" in name)
    cut_model(first, {name: [2, 2]})
    save_state(tmp_path / "tied", model=first)
    load_state(tmp_path / "tied", model=second)
    assert second.config.quantization_config.modules[name].bonds == (2, 2)  # what save_pretrained writes
    assert second.get_input_embeddings().cores[0] is second.get_output_embeddings().cores[0]
    assert [module.spec.bonds for module in mpo_units(second)[name].modules] == [(2, 2), (2, 2)]
    dense, other = nn.Linear(3, 3), nn.Linear(3, 3)
    save_state(tmp_path / "dense", model=dense)
    load_state(tmp_path / "dense", model=other)
    assert torch.equal(dense.weight, other.weight)


def refused(folder: Path, training: Training, match: str) -> None:
    before = training.bits()
    with pytest.raises(MPOError, match=match):
        load_state(folder, **training.parts())
    assert_same(training.bits(), before)


@pytest.mark.guarantee("state-refused")
def test_a_state_of_something_else_changes_nothing(tmp_path: Path) -> None:
    first = Training()
    first.steps(1)
    save_state(tmp_path / "state", **first.parts())
    folder = tmp_path / "state"
    refused(folder, Training(width=32), r"another model: table.weight is .*16.* there and .*32")
    refused(folder, Training(sites=2), r"another model: layers.0.cores")
    refused(folder, Training(seed=1), r"another model: the 1 frozen tensors .*other values")
    refused(folder, Training(frozen=False), r"other parameters frozen, for instance table.weight")
    refused(folder, Training("sgd"), "saved with AdamW and is read into SGD")
    refused(folder, Training("adamw", "steps"), "saved with LinearLR and is read into MultiStepLR")
    other = Training()
    other.optimizer.param_groups[0]["params"].reverse()
    refused(folder, other, "same groups in the same order")
    foreign = Training()
    foreign.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    refused(folder, foreign, "same groups")
    with pytest.raises(MPOError, match=r"parameter of shape \(2,\) that is not the model's"):
        save_state(tmp_path / "foreign", **foreign.parts())
    with pytest.raises(MPOError, match="extra/thing is a Training"):
        save_state(tmp_path / "foreign", model=first.model, extra={"thing": first})
    assert not (tmp_path / "foreign").exists()


@pytest.mark.guarantee("state-refused")
def test_damaged_folders_change_nothing(tmp_path: Path) -> None:
    training = Training()
    refused(tmp_path / "none", training, "is not the folder of a state.*missing")
    folder = tmp_path / "state"

    def damage(file: str, change: Any, match: str) -> None:
        save_state(folder, **training.parts())
        path = folder / file
        data = path.read_bytes()
        path.write_bytes(change(data)) if change else path.unlink()
        refused(folder, training, match)

    def values(**changed: Any) -> Any:
        return lambda data: json.dumps({**json.loads(data), **changed}).encode()

    damage("tensors.safetensors", None, "tensors.safetensors is missing")
    damage("state.json", None, "state.json is missing")
    damage("tensors.safetensors", lambda data: data[:-4], "is damaged")
    damage("tensors.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged")
    damage("state.json", lambda data: data[: len(data) // 2], "cannot be read, it is damaged")
    damage("state.json", lambda data: b"[]", "cannot be read, it is damaged")
    damage("state.json", values(format_version=99), "has format 99, and this version reads 1: upgrade")
    damage("state.json", lambda data: b"\xff\xfe", "cannot be read, it is damaged")


@pytest.mark.parametrize("module", ["table", "head"])  # frozen and left out; trainable
def test_a_model_without_values_is_neither_saved_nor_read_into(module: str, tmp_path: Path) -> None:
    save_state(tmp_path / "state", model=Net())
    model = Net()
    getattr(model, module).to("meta")
    with pytest.raises(MPOError, match=f"{module}.weight is on the meta device"):
        save_state(tmp_path / "other", model=model)
    with pytest.raises(MPOError, match=f"{module}.weight is on the meta device"):
        load_state(tmp_path / "state", model=model)
    assert not (tmp_path / "other").exists()


@pytest.mark.guarantee("state-whole")
def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    save_state(tmp_path / "state", **training.parts())
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    training.steps(1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(MPOError, match="No space left"):
        save_state(tmp_path / "state", **training.parts())
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_equal_trainings_give_equal_files(tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        training = Training()
        random.seed(0), np.random.seed(0), torch.manual_seed(5)  # noqa: NPY002
        training.steps(2)
        save_state(tmp_path / name, **training.parts())
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_the_digest_sees_every_generator() -> None:
    seen = {state.random_digest()}
    for draw in (lambda: random.random(), lambda: np.random.random(), lambda: torch.rand(1)):  # noqa: NPY002
        draw()
        seen.add(state.random_digest())
    assert len(seen) == 4
    assert state.random_digest() in seen


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=3)
        | st.lists(part, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.just("$"), part, max_size=3)
        | st.dictionaries(st.integers(0, 9), part, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_values_survive_json(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    back = decode(json.loads(json.dumps(encode(value, "x", tensors))), tensors)
    assert back == value
    assert repr(back) == repr(value)  # tells tuples from lists, and 1 from True


def test_tensors_and_counters_survive_json() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": [torch.eye(2)[0], (np.float32(0.5),)], "c": Counter({3: 2}), "a/0": torch.ones(1)}
    back = decode(json.loads(json.dumps(encode(value, "x", tensors))), tensors)
    assert torch.equal(back["a"][0], torch.tensor([1.0, 0.0]))
    assert (back["a"][1], back["c"]) == ((0.5,), Counter({3: 2}))
    assert isinstance(back["c"], Counter)
    assert torch.equal(back["a/0"], torch.ones(1))
    back["a"][0].zero_()
    assert tensors["x/a/0"].any()
    with pytest.raises(MPOError, match="x/a/0 is a set"):
        encode({"a": [{1}]}, "x", {})


WRONG: list[Any] = [None, [], {}, 3, "x", True, [None], {"$": "tuple"}, {"$": "tensor", "key": "no", "host": True}]
PLACES: list[tuple[Any, ...]] = [
    ("which",), ("model",), ("saved",), ("left_out",), ("units",), ("random",), ("extra",), ("optimizer",),
    ("scheduler",), ("tensors",), ("format_version",), ("units", "layers.0"), ("units", "layers.0", "bonds"),
    ("units", "layers.0", "exact"), ("random", "python"), ("random", "numpy"), ("random", "torch"),
    ("optimizer", "kind"), ("optimizer", "groups"), ("optimizer", "states"), ("optimizer", "groups", 0),
    ("optimizer", "groups", 0, "parameters"), ("optimizer", "groups", 0, "options"),
    ("optimizer", "groups", 1, "options", "betas"), ("optimizer", "states", "head.bias"),
    ("scheduler", "kind"), ("scheduler", "state"), ("scheduler", "state", "base_lrs"),
]  # fmt: skip
# Where one of the wrong values is one that is written, or where the state is of nothing else than what it says.
RIGHT: dict[tuple[Any, ...], list[Any]] = {
    ("extra",): [{}], ("scheduler", "state", "base_lrs"): [[], [None]], ("optimizer", "states"): [{}],
    ("optimizer", "states", "head.bias"): [MISSING, {}], ("units", "layers.0", "exact"): [True],
}  # fmt: skip


@pytest.mark.guarantee("state-refused")
@pytest.mark.parametrize("path", PLACES, ids=lambda path: "/".join(map(str, path)))
def test_whatever_is_missing_or_of_another_kind_changes_nothing(path: tuple[Any, ...], tmp_path: Path) -> None:
    training = Training()
    training.steps(2)
    save_state(tmp_path / "state", **training.parts(), extra={"position": 2})
    file = tmp_path / "state" / "state.json"
    good = json.loads(file.read_text())
    other = Training()
    other.steps(1)
    for wrong in [MISSING, *WRONG]:
        if not any(wrong is right or wrong == right for right in RIGHT.get(path, [])):
            file.write_text(json.dumps(changed(good, path, wrong)))
            refused(tmp_path / "state", other, "damaged|saved with|has format|of another model|frozen|same groups")
    file.write_text(json.dumps(good))
    assert load_state(tmp_path / "state", **other.parts()) == {"position": 2}


@pytest.mark.guarantee("state-refused")
def test_bonds_that_the_cores_do_not_have_and_other_damage(tmp_path: Path) -> None:
    training = Training()
    save_state(tmp_path / "state", **training.parts())
    file = tmp_path / "state" / "state.json"
    good = json.loads(file.read_text())
    for path, value in [
        (("units", "layers.0", "bonds"), [1, 1]),
        (("units", "layers.0", "bonds"), [0, 1]),
        (("units", "layers.4", "bonds"), good["units"]["layers.4"]["bonds"] + [1]),
        (("units", "layers.4", "rel_error"), "x"),
        (("random", "numpy", "of", 2), 10**6),
        (("random", "python", "of", 0), 99),
        (("optimizer", "groups", 1, "options", "lr"), "x"),
        (("optimizer", "groups", 1, "options", "lr"), MISSING),
        (("optimizer", "groups", 1, "options", "params"), []),
        (("scheduler", "state", "last_epoch"), MISSING),
        (("which",), "most"),
    ]:
        file.write_text(json.dumps(changed(good, path, value)))
        refused(tmp_path / "state", training, "damaged.*nothing has been changed")
    file.write_text("[" * 200_000)
    refused(tmp_path / "state", training, "damaged.*nested too deeply")


def test_a_scheduler_that_does_not_take_its_state_changes_nothing(tmp_path: Path) -> None:
    training = Training("adamw", "sequence")
    save_state(tmp_path / "state", **training.parts())
    file = tmp_path / "state" / "state.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(changed(good, ("scheduler", "state", "_schedulers"), MISSING)))
    training.steps(1)
    before = training.scheduler.state_dict()
    refused(tmp_path / "state", training, "SequentialLR does not take its state")
    assert training.scheduler.state_dict() == before
