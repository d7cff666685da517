"""squeeze: what it cuts, when it stops, what it rolls back, what it writes, and how it goes on after a kill."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot, small
from helpers.paths import ROOT, TESTS
from helpers.squeeze_task import Task, without_seconds
from helpers.tiny_models import settled, token_ids
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.spec import kept_ratio
from mpo_tn.torch import (
    MPOLayer,
    SqueezeResult,
    bond_spectra,
    load_state,
    squeeze,
)
from mpo_tn.torch.layers import layer as layers
from mpo_tn.torch.loops import policy
from mpo_tn.torch.loops.run_folder import RunFolder
from mpo_tn.torch.models.units import all_bonds, mpo_units
from mpo_tn.torch.state.training_state import TrainingState, capture


@pytest.mark.guarantee("last-good-state")
@pytest.mark.parametrize("frozen", [False, True])
def test_it_stops_at_the_gap_and_goes_back(frozen: bool) -> None:
    task = Task(frozen=frozen)
    start, parameters = task.bonds(), list(task.model.parameters())
    result = task.run(delta=0.05)
    assert result.stopped == "gap"
    assert [part.accepted for part in result.rounds] == [True] * result.best_round + [False]
    assert result.best_round >= 3
    assert result.rounds[-1].gap > 0.05 >= result.rounds[-2].gap
    assert result.bonds == task.bonds() == result.bonds_after(result.best_round) != result.bonds_after(99)
    assert result.start_bonds == start == result.bonds_after(0)
    with torch.no_grad():
        assert float(task.evaluate(task.model.eval())) == result.value == result.rounds[-2].value
    assert all(a is b for a, b in zip(parameters, task.model.parameters(), strict=True))
    assert [core.shape for unit in mpo_units(task.model).values() for core in unit.cores] == [
        shape for unit in mpo_units(task.model).values() for shape in unit.spec.core_shapes
    ]
    assert result.parameters == sum(parameter.numel() for parameter in parameters)
    assert result.kept == kept_ratio(unit.spec for unit in mpo_units(task.model).values()) == result.rounds[-2].kept
    assert task.seen == list(range(3 * len(result.rounds)))  # the data position counts on, whatever is cut
    assert [part.position for part in result.rounds] == [3 * part.number for part in result.rounds]
    for parameter, state in task.optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
        assert int(state["step"]) == 3 * result.best_round
    task.train_step(99)  # and it trains on


def test_each_round_cuts_what_the_spectra_of_that_moment_say(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task()
    expected: list[Any] = []
    inner = policy.choose_cuts

    def watched(specs: Any, spectra: Any, count: int, **options: Any) -> Any:
        fresh = bond_spectra(task.model)
        assert all((a == b).all() for name in fresh for a, b in zip(fresh[name], spectra[name], strict=True))
        scores = {
            (name, k): float(fresh[name][k][bond - 1]) ** 2 / fresh[name].norm ** 2
            for name, spec in specs.items()
            for k, bond in enumerate(spec.bonds)
            if bond > 1
        }
        expected.append(min(scores, key=lambda place: scores[place]))
        return inner(specs, spectra, count, **options)

    monkeypatch.setattr(policy, "choose_cuts", watched)
    result = task.run(max_steps=6, delta=0.2)
    assert result.stopped == "max_steps"
    assert [(part.cuts[0].unit, part.cuts[0].bond) for part in result.rounds] == expected
    assert all(len(part.cuts) == 1 and part.cuts[0].before - part.cuts[0].after == 1 for part in result.rounds)


def test_several_cuts_a_round_and_the_other_score() -> None:
    task, per_parameter = Task(), Task()
    result = task.run(max_steps=1, cuts_per_round=5, delta=math.inf)
    assert sum(cut.before - cut.after for cut in result.rounds[0].cuts) == 5
    assert len({(cut.unit, cut.bond) for cut in result.rounds[0].cuts}) == len(result.rounds[0].cuts)
    other = per_parameter.run(max_steps=1, cuts_per_round=5, delta=math.inf, score="error_per_parameter")
    assert other.bonds != result.bonds
    assert other.parameters <= result.parameters
    third = Task()
    chosen = third.run(max_steps=2, score=lambda name, k, values, new, spec: (name, k) != ("2", 1))
    assert {(cut.unit, cut.bond) for part in chosen.rounds for cut in part.cuts} == {("2", 1)}


def test_cuts_without_training_and_no_matrix_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a matrix was built")

    monkeypatch.setattr(MPOLayer, "dense_weight", never)
    monkeypatch.setattr(layers, "mpo_linear", never)
    result = squeeze(task.model, evaluate=lambda model: 1.0, delta=0, optimizer=task.optimizer)
    assert result.stopped == "nothing left to cut"
    assert {bond for bonds in task.bonds().values() for bond in bonds} == {1}
    assert all(part.loss is None and part.position == 0 for part in result.rounds)
    assert str(result).endswith("1 -> 1; stopped: nothing left to cut")


def test_it_stops_at_the_kept_ratio_the_minimum_and_the_step_limit() -> None:
    task = Task()
    result = task.run(delta=math.inf, keep=0.6, cuts_per_round=50, tune_steps=0)
    assert (result.stopped, len(result.rounds)) == ("keep", 1)
    units = mpo_units(task.model)
    assert result.kept <= 0.6
    last = result.rounds[0].cuts[-1]
    before = {**units}[last.unit].spec.sites.num_parameters(
        [bond + (k == last.bond) for k, bond in enumerate(units[last.unit].spec.bonds)]
    )
    dense = sum(unit.spec.out_features * unit.spec.in_features for unit in units.values())
    assert result.kept + (before - units[last.unit].spec.num_parameters) / dense > 0.6  # one cut less is too many
    assert task.run(delta=math.inf, keep=0.6).rounds == ()
    result = task.run(delta=math.inf, minimum_bond=2)
    assert result.stopped == "nothing left to cut"
    assert min(bond for bonds in task.bonds().values() for bond in bonds) <= 2
    with pytest.raises(MPOError, match="nothing is left to cut: every bond is at minimum_bond=2"):
        task.run(minimum_bond=2)
    result = task.run(delta=math.inf, max_steps=1)
    assert (result.stopped, len(result.rounds)) == ("max_steps", 1)


def test_higher_is_better_and_the_reference() -> None:
    for sign, higher in ((1.0, False), (-1.0, True)):
        task = Task()
        result = task.run(evaluate=lambda m, t=task, s=sign: s * t.evaluate(m), higher_is_better=higher)
        assert result.rounds[0].gap > 0
        assert result.value == pytest.approx(sign * 0.02, abs=0.02)
    task = Task()
    result = task.run(reference=-1.0)
    assert (result.stopped, result.best_round, result.value, result.bonds) == ("gap", 0, -1.0, result.start_bonds)


def test_what_evaluate_and_train_step_see() -> None:
    task = Task()
    task.model[1].eval()  # a flag that is to come back
    modes: list[list[bool]] = []

    def train_step(step: int) -> float:
        assert all(parameter.grad is None for parameter in task.model.parameters()) or step % 3
        modes.append([module.training for module in task.model])
        return float(task.train_step(step).detach())

    def evaluate(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        return float(task.evaluate(model))

    calls: list[Any] = []
    task.run(
        train_step=train_step, evaluate=evaluate, max_steps=2, on_round=calls.append,
        progress=lambda *parts: calls.append(parts),
    )  # fmt: skip
    assert modes == [[True, False, True]] * 6
    assert [module.training for module in task.model] == [True, False, True]
    assert [calls[0].number, calls[1][:2], calls[2].number, calls[3][:2]] == [1, (1, 2), 2, (2, 2)]
    assert "->" in calls[1][2]


@pytest.mark.guarantee("last-good-state")
@pytest.mark.parametrize("bad", [math.nan, math.inf, "text", None])
def test_a_loss_that_is_no_number_leaves_the_last_good_state(bad: Any, tmp_path: Path) -> None:
    task = Task()

    def train_step(step: int) -> Any:
        loss = task.train_step(step)
        if step == 7:
            with torch.no_grad():
                task.model[0].cores[0].fill_(math.nan)
            return bad
        return loss

    reference = Task()
    expected = reference.run(max_steps=2)
    match = "round 3 is .* at step 7.*after round 2" if isinstance(bad, float) else f"train_step returned {bad!r}"
    with pytest.raises(MPOError, match=match):
        task.run(train_step=train_step, folder=tmp_path)
    assert task.bonds() == expected.bonds
    for name, value in task.model.state_dict().items():
        assert torch.equal(value, reference.model.state_dict()[name])
    log = json.loads((tmp_path / "log.json").read_text())
    assert len(log["rounds"]) == 2
    fresh = Task()
    load_state(tmp_path / log["state"], model=fresh.model, optimizer=fresh.optimizer)
    assert fresh.bonds() == expected.bonds


def test_an_interrupt_leaves_the_last_good_state() -> None:
    task = Task()

    def train_step(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return task.train_step(step)

    with pytest.raises(KeyboardInterrupt):
        task.run(train_step=train_step)
    reference = Task()
    assert task.bonds() == reference.run(max_steps=1).bonds
    assert all(module.training for module in task.model)


class StoppedError(Exception):
    """What some function of a caller raises."""


class Randomly(Task):
    """With a scheduler, and steps that draw from the generators."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=20)
        random.seed(0)

    def train_step(self, step: int) -> torch.Tensor:
        loss = super().train_step(step) * (1 + 0.1 * random.random() + 0.1 * torch.rand(()))
        self.scheduler.step()
        return loss

    def everything(self) -> TrainingState:
        return capture(self.model, self.optimizer, self.scheduler)


def raising(function: Any, at: int) -> Any:
    """The same function, which raises when it is called for the time number ``at``."""
    calls = iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise StoppedError
        return function(*args, **kwargs)

    return call


# How many rounds are good when call 0, 1, ... of a function raises; a round has three steps, and three rounds are good.
GOOD = {
    "train_step": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "evaluate": [0, 0, 1, 2, 3],
    "on_round": [1, 2, 3, 3],
    "progress": [1, 2, 3, 3],
    "write": [0, 1, 2, 3, 3, 3],
}


@pytest.mark.guarantee("last-good-state")
@pytest.mark.parametrize(("who", "at"), [(who, at) for who, good in GOOD.items() for at in range(len(good))])
def test_whatever_raises_the_last_good_state_is_left(
    who: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model, the optimiser, the scheduler and the generators, bit for bit."""
    values = [0.0, 0.1, 0.1, 0.1, 9.0]  # the reference, three rounds within delta, one beyond
    reference = Randomly()
    states = [reference.everything()]
    given = iter(values)
    result = reference.run(
        evaluate=lambda _: next(given), scheduler=reference.scheduler, delta=1.0,
        on_round=lambda part: states.append(reference.everything()),
    )  # fmt: skip
    assert (result.stopped, result.best_round, len(states)) == ("gap", 3, 5)

    task = Randomly()
    given = iter(values)
    functions: dict[str, Any] = {
        "train_step": task.train_step, "evaluate": lambda _: next(given), "on_round": lambda _: None,
        "progress": lambda *_: None,
    }  # fmt: skip
    if who == "write":
        monkeypatch.setattr(RunFolder, "save", raising(RunFolder.save, at))
    else:
        functions[who] = raising(functions[who], at)
    with pytest.raises(StoppedError):
        task.run(scheduler=task.scheduler, delta=1.0, folder=tmp_path / "run", **functions)
    expected, found = states[GOOD[who][at]], task.everything()
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(value, found.tensors[name]) for name, value in expected.tensors.items())


def test_an_evaluation_that_turns_nan_is_a_gap() -> None:
    task, values = Task(), iter([0.5, 0.5, math.nan])
    result = task.run(evaluate=lambda model: next(values))
    assert (result.stopped, result.best_round) == ("gap", 1)
    with pytest.raises(MPOError, match="the reference is nan"):
        task.run(evaluate=lambda model: math.nan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"delta": -0.1}, "delta=-0.1 must be at least 0"),
        ({"delta": math.nan}, "delta=nan"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"cuts_per_round": 1.5}, "cuts_per_round=1.5"),
        ({"tune_steps": -1}, "tune_steps=-1"),
        ({"minimum_bond": 0}, "minimum_bond=0"),
        ({"keep": 0}, "keep=0"),
        ({"keep": math.nan}, "keep=nan"),
        ({"score": "loss"}, "score='loss'"),
        ({"evaluate": lambda model: "good"}, "evaluate returned 'good'"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, "none of the model's parameters"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    task = Task()
    before = Snapshot(task.model)
    with pytest.raises(MPOError, match=match):
        task.run(**options, folder=tmp_path / "run")
    before.assert_same(task.model)
    assert not (tmp_path / "run" / "log.json").exists()
    with pytest.raises(MPOError, match="no MPO modules"):
        squeeze(nn.Linear(3, 3), evaluate=lambda model: 0.0, delta=0.1)


def test_a_folder_holds_the_log_and_a_finished_one_answers_at_once(tmp_path: Path) -> None:
    task = Task()
    result = task.run(folder=tmp_path / "a" / "b", max_steps=3)
    log = json.loads((tmp_path / "a" / "b" / "log.json").read_text())
    assert [part["number"] for part in log["rounds"]] == [1, 2, 3]
    assert {"cuts", "loss", "value", "gap", "kept", "parameters", "seconds", "random", "position"} <= set(
        log["rounds"][0]
    )
    assert set(log["rounds"][0]["cuts"][0]) == {"unit", "bond", "from", "to", "score"}
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["log.json", "state-000003"]
    assert SqueezeResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result

    def never(*_: Any) -> Any:
        raise AssertionError("it was called")

    for again in (task, Task()):  # the model as it is now, and a fresh one
        answer = again.run(folder=tmp_path / "a" / "b", max_steps=3, train_step=never, evaluate=never)
        assert answer == result
        assert again.bonds() == result.bonds
        for name, value in again.model.state_dict().items():
            assert torch.equal(value, task.model.state_dict()[name])
    fresh = Task()
    assert without_seconds(fresh.run(folder=tmp_path / "a" / "b", max_steps=3, resume=False)) == without_seconds(result)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    Task().run(folder=tmp_path / "run", max_steps=2)
    for options, match in [
        ({"max_steps": 3}, "is of a run with max_steps=2, and this one has 3"),
        ({"max_steps": 2, "delta": 0.5}, "delta=0.02, and this one has 0.5"),
        ({"max_steps": 2, "score": lambda *_: 0.0}, "score='error'.*lambda"),
        ({"max_steps": 2, "train_step": None}, "tune_steps=3|tuned=True"),
        ({"max_steps": 2, "reference": 0.0}, "reference=None"),
    ]:
        with pytest.raises(MPOError, match=match):
            Task().run(folder=tmp_path / "run", **options)
    other = Task()
    other.model[0] = nn.Linear(12, 16)
    with pytest.raises(MPOError, match="another model: it started from the bonds"):
        other.run(folder=tmp_path / "run", max_steps=2)
    wider = Task()
    wider.model.add_module("extra", nn.Linear(8, 8))
    with pytest.raises(MPOError, match=r"cannot be resumed: the state is of another model: extra.weight"):
        wider.run(folder=tmp_path / "run", max_steps=2)
    moved = Task()
    with torch.no_grad():
        next(p for p in moved.model.parameters() if p.requires_grad).mul_(1.5)
    before = {name: value.clone() for name, value in moved.model.state_dict().items()}
    with pytest.raises(MPOError, match="other values at the start"):
        moved.run(folder=tmp_path / "run", max_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in moved.model.state_dict().items())
    log = tmp_path / "run" / "log.json"
    good = log.read_text()
    for text, match in [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({**json.loads(good), "format_version": 9}), "has format 9"),
        (json.dumps({**json.loads(good), "state": "state-000077"}), "state-000077, which is missing"),
        (json.dumps({**json.loads(good), "rounds": [{}]}), "damaged"),
    ]:
        log.write_text(text)
        with pytest.raises(MPOError, match=f"{match}.*resume=False|resume=False.*{match}"):
            Task().run(folder=tmp_path / "run", max_steps=2)
        if "77" not in match:  # nothing was deleted
            assert (tmp_path / "run" / "state-000002").is_dir()
    log.unlink()
    log.mkdir()
    with pytest.raises(MPOError, match="resume=False"):
        Task().run(folder=tmp_path / "run", max_steps=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(MPOError, match="is a file"):
        Task().run(folder=tmp_path / "file")


@pytest.mark.guarantee("killed-same-bits")
@pytest.mark.slow
def test_killed_at_any_point_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "helpers.kill_squeeze", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    kills, lives = (int(part.split()[0]) for part in done.stdout.split(", "))
    assert kills > 10
    assert lives > 2


@pytest.mark.parametrize("family", ["albert", "gpt2"])
def test_a_transformer_with_shared_layers(family: str, tmp_path: Path) -> None:
    model = small(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = token_ids()

    def train_step(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return loss

    result = squeeze(
        model, evaluate=lambda m: m(ids, labels=ids).loss, train_step=train_step, optimizer=optimizer, delta=1.0,
        higher_is_better=False, max_steps=3, tune_steps=2, cuts_per_round=2, folder=tmp_path / "run",
    )  # fmt: skip
    cuts = [cut.unit for part in result.rounds for cut in part.cuts]
    assert set(cuts) <= set(mpo_units(model))
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert all_bonds(mpo_units(loaded)) == result.bonds
    with torch.no_grad():
        assert torch.equal(settled(loaded)(ids).logits, settled(model.eval())(ids).logits)


@pytest.mark.guarantee("squeeze-alone")
def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = small("bert")
    bonds = all_bonds(mpo_units(model))
    with pytest.raises(MPOError, match="one of 2 processes"):
        squeeze(model, evaluate=lambda _: 0.0, delta=1.0)
    assert all_bonds(mpo_units(model)) == bonds
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    squeeze(model, evaluate=lambda _: 0.0, delta=1.0, max_steps=1)
