"""SqueezeCallback in a real Trainer, on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.squeeze_task import Task, everything
from helpers.tiny_models import outputs, tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, bond_spectra, compress
from mpo_tn.torch.hf.trainer import SqueezeCallback
from mpo_tn.torch.loops.evaluation import evaluated
from mpo_tn.torch.models.units import all_bonds, mpo_units
from mpo_tn.torch.state.training_state import capture

pytestmark = pytest.mark.slow


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    ids = torch.randint(0, 101, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int(row[0] > 50)} for row in ids]


class Watch(transformers.TrainerCallback):
    """Remembers the bonds and the shapes of the optimiser's state after every step."""

    def __init__(self) -> None:
        self.bonds: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        for parameter, values in optimizer.state.items():
            assert values["exp_avg"].shape == values["exp_avg_sq"].shape == parameter.shape
            assert int(values["step"]) <= state.global_step
        self.bonds.append(all_bonds(mpo_units(kwargs["model"])))


def trainer(callback: Any, folder: Path, *, metrics: bool = True, sites: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config)
    compress(model, MPOConfig(target_modules=r".*encoder.*(query|key|value|dense)", sites=sites))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=options.pop("max_steps", 12), per_device_train_batch_size=4,
        learning_rate=1e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
        dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=rows(32, 0), eval_dataset=rows(8, 1), callbacks=[callback, Watch()],
        compute_metrics=(lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())})
        if metrics
        else None,
    )  # fmt: skip


def test_it_cuts_as_training_goes_and_the_model_is_saved(tmp_path: Path) -> None:
    callback = SqueezeCallback(delta=math.inf, every_steps=3, cuts_per_round=2)
    run = trainer(callback, tmp_path)
    start = all_bonds(mpo_units(run.model))
    run.train()
    result = callback.result
    assert result is not None
    assert [part.position for part in result.rounds] == [6, 9, 12]  # the one at 3 is the reference, the last is judged
    assert all(part.accepted and sum(cut.before - cut.after for cut in part.cuts) == 2 for part in result.rounds)
    assert (result.stopped, result.best_round, result.start_bonds) == ("max_steps", 3, start)
    assert result.bonds == all_bonds(mpo_units(run.model)) == result.bonds_after(3)
    assert run.state.global_step == 12
    bonds = next(part for part in run.callback_handler.callbacks if isinstance(part, Watch)).bonds
    assert [bonds[step] != bonds[step - 1] for step in range(1, 12)] == [step in (3, 6, 9) for step in range(1, 12)]
    assert str(SqueezeCallback(delta=1).policy.higher_is_better) == "False"
    run.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert all_bonds(mpo_units(loaded)) == result.bonds
    assert torch.equal(outputs(loaded), outputs(run.model.eval()))
    run.evaluate()  # outside training it does nothing
    assert callback.result is result


def test_other_evaluations_decide_nothing_and_no_cut_is_left_untuned(tmp_path: Path) -> None:
    callback = SqueezeCallback(delta=math.inf, every_steps=3)
    run = trainer(callback, tmp_path, max_steps=11, eval_strategy="steps", eval_steps=2)
    run.train()
    assert [part.position for part in callback.result.rounds] == [6, 9]  # at 9 two steps are left, too few for a cut
    assert run.state.global_step == 11
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == [2, 3, 4, 6, 8, 9, 10, 11]


@pytest.mark.guarantee("trainer-goes-back")
@pytest.mark.parametrize("metric", [True, False])
def test_it_goes_back_when_the_gap_is_too_large(metric: bool, tmp_path: Path) -> None:
    values = iter([0.9, 0.8, 0.85, 0.2])
    kept: list[Any] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training
        assert metric or not torch.is_grad_enabled()
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(values)

    if metric:
        callback = SqueezeCallback(delta=0.2, metric="eval_accuracy", every_steps=2)
    else:
        callback = SqueezeCallback(delta=0.2, evaluate=evaluate, every_steps=2)
    run = trainer(callback, tmp_path, max_steps=20)
    if metric:
        run.compute_metrics = lambda _: {"accuracy": evaluate(run.model)}
    run.train()
    result = callback.result
    assert result is not None
    assert ([part.accepted for part in result.rounds], result.stopped) == ([True, True, False], "gap")
    assert (result.reference, result.value, result.best_round) == (0.9, 0.85, 2)
    assert [round(part.gap, 9) for part in result.rounds] == [0.1, 0.05, 0.7]
    assert run.state.global_step == 8
    assert result.bonds == result.bonds_after(2) == all_bonds(mpo_units(run.model))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, kept[2][name])


@pytest.mark.guarantee("trainer-goes-back")
def test_the_optimiser_goes_back_with_the_model(tmp_path: Path) -> None:
    """Bit for bit to the evaluation before the last cut, and what training changed since is gone."""
    values, seen = iter([0.9, 0.9, 0.2]), []

    def optimizer_of(run: Any) -> Any:
        return getattr(run.optimizer, "optimizer", run.optimizer)

    def evaluate(_: nn.Module) -> float:
        seen.append(capture(run.model, optimizer_of(run)))
        return next(values)

    callback = SqueezeCallback(delta=0.2, evaluate=evaluate, every_steps=2)
    run = trainer(callback, tmp_path, max_steps=20)
    run.train()
    after, last = capture(run.model, optimizer_of(run)), seen[1]
    own = [name for name in last.tensors if name.startswith(("model/", "optimizer/"))]
    assert any(name.startswith("optimizer/") for name in own)
    assert [name for name in after.tensors if name.startswith(("model/", "optimizer/"))] == own
    assert all(torch.equal(after.tensors[name], last.tensors[name]) for name in own)
    assert after.values["optimizer"] == last.values["optimizer"]
    assert after.values["units"] == last.values["units"] != seen[2].values["units"]


def test_a_given_reference_is_reached_before_anything_is_cut(tmp_path: Path) -> None:
    values = iter([0.1, 0.4, 0.9, 0.95, 0.9, 0.9])
    callback = SqueezeCallback(
        delta=0.2, evaluate=lambda model: next(values), every_steps=2, reference=1.0, max_rounds=1
    )
    trainer(callback, tmp_path).train()
    assert [(part.position, part.value) for part in callback.result.rounds] == [(8, 0.95)]
    assert (callback.result.stopped, callback.result.reference) == ("max_steps", 1.0)


def test_it_stops_cutting_where_enough_is_cut(tmp_path: Path) -> None:
    callback = SqueezeCallback(delta=math.inf, every_steps=2, cuts_per_round=1000, keep=0.5)
    run = trainer(callback, tmp_path)
    run.train()
    assert (callback.result.stopped, len(callback.result.rounds), run.state.global_step) == ("keep", 1, 12)
    assert callback.result.kept <= 0.5
    callback = SqueezeCallback(delta=math.inf, every_steps=2, cuts_per_round=1000)
    run = trainer(callback, tmp_path)
    run.train()
    assert callback.result.stopped == "nothing left to cut"
    with pytest.raises(MPOError, match="nothing is left to cut"):
        run.train()


@pytest.mark.guarantee("trainer-goes-back")
def test_a_cut_that_no_evaluation_judged_is_taken_back(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    callback = SqueezeCallback(delta=math.inf, every_steps=2)
    run = trainer(callback, tmp_path)
    run.add_callback(Stop())
    run.train()
    assert [part.position for part in callback.result.rounds] == [4]
    assert callback.result.bonds == callback.result.bonds_after(1) == all_bonds(mpo_units(run.model))


def test_what_is_refused_before_training(tmp_path: Path) -> None:
    for options, match in [
        ({"delta": -1.0}, "delta=-1.0"),
        ({"delta": 1.0, "every_steps": 0}, "every_steps=0"),
        ({"delta": 1.0, "max_rounds": 0}, "max_rounds=0"),
    ]:
        with pytest.raises(MPOError, match=match):
            SqueezeCallback(**options)

    def begin(
        model: nn.Module, optimizer: Any = None, step: int = 0, mode: str = "not_parallel", **options: Any
    ) -> None:
        arguments: Any = SimpleNamespace(
            **{"fsdp": None, "deepspeed": None, "load_best_model_at_end": False, **options},
            parallel_mode=SimpleNamespace(value=mode),
        )
        state: Any = SimpleNamespace(global_step=step, max_steps=10)
        optimizer = optimizer or torch.optim.AdamW(model.parameters())
        SqueezeCallback(delta=1.0).on_train_begin(arguments, state, Any, model=model, optimizer=optimizer)

    model = nn.Sequential(nn.Linear(12, 8))
    with pytest.raises(MPOError, match="no MPO modules"):
        begin(model)
    compress(model, MPOConfig(sites=3))
    begin(model)
    begin(model, mode="not_distributed")
    for options, match in [
        ({"fsdp": True}, "fsdp keeps .*sharded"),
        ({"deepspeed": "config.json"}, "deepspeed keeps .*sharded"),
        ({"mode": "distributed"}, "spread over processes .*buckets"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"step": 5}, "resumes at step 5.*with a folder"),
    ]:
        with pytest.raises(MPOError, match=match):
            begin(model, **options)
    flat = nn.Parameter(torch.zeros(3))
    flat.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(MPOError, match="sharded over processes"):
        begin(model, torch.optim.AdamW([flat]))
    run = trainer(SqueezeCallback(delta=1.0), tmp_path)
    run.model = run.model_wrapped = transformers.BertForSequenceClassification(tiny("bert").config)
    with pytest.raises(MPOError, match="no MPO modules"):
        run.train()
    assert run.state.global_step == 0


def test_an_evaluation_without_the_metric(tmp_path: Path) -> None:
    run = trainer(SqueezeCallback(delta=1.0, metric="eval_f1", every_steps=2), tmp_path)
    with pytest.raises(MPOError, match=r"at step 2 did not report metric='eval_f1', only .*eval_accuracy"):
        run.train()
    assert bond_spectra(run.model)


def test_a_given_reference_that_is_no_number(tmp_path: Path) -> None:
    run = trainer(SqueezeCallback(delta=0.2, reference=math.nan), tmp_path)
    with pytest.raises(MPOError, match="the reference is nan"):
        run.train()
    assert run.state.global_step == 0


class ByHand:
    """A training of ``steps`` steps in which a callback is called as a Trainer does."""

    def __init__(self, task: Task, callback: SqueezeCallback, steps: int) -> None:
        self.task, self.callback = task, callback
        self.arguments: Any = SimpleNamespace(
            fsdp=None, deepspeed=None, load_best_model_at_end=False, parallel_mode=SimpleNamespace(value="not_parallel")
        )
        self.state: Any = SimpleNamespace(global_step=0, max_steps=steps)
        self.control: Any = SimpleNamespace(should_evaluate=False, should_training_stop=False)
        callback.on_train_begin(self.arguments, self.state, self.control, model=task.model, optimizer=task.optimizer)

    def step(self) -> None:
        self.task.train_step(self.state.global_step)
        self.state.global_step += 1
        self.callback.on_step_end(self.arguments, self.state, self.control)
        if self.control.should_evaluate:
            self.control.should_evaluate = False
            value = evaluated(self.task.model, self.task.evaluate)
            self.task.model.train()
            self.callback.on_evaluate(self.arguments, self.state, self.control, {"eval_loss": value})

    def end(self) -> Any:
        self.callback.on_train_end(self.arguments, self.state, self.control)
        assert self.callback.result is not None
        return self.callback.result

    def all(self) -> Any:
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.step()
        return self.end()


def test_it_is_back_before_a_checkpoint_of_that_step_is_written() -> None:
    task, values = Task(), iter([0.0, 0.5, 2.0])
    callback = SqueezeCallback(delta=1.0, evaluate=lambda _: next(values), higher_is_better=False, every_steps=1)
    run = ByHand(task, callback, 9)
    run.step()
    once = task.bonds()
    run.step()
    assert task.bonds() != once
    run.step()
    assert run.control.should_training_stop
    assert task.bonds() == once
    task.train_step(3)  # whatever still goes on, the end takes nothing back
    trained = everything(task.model, task.optimizer)
    assert run.end().stopped == "gap"
    assert everything(task.model, task.optimizer) == trained


def test_nothing_is_evaluated_once_cutting_has_ended() -> None:
    task, values = Task(), iter([0.0, 0.5])  # a third evaluation would raise
    callback = SqueezeCallback(delta=1.0, evaluate=lambda _: next(values), every_steps=2, max_rounds=1)
    run = ByHand(task, callback, 20)
    result = run.all()
    assert (result.stopped, len(result.rounds), run.state.global_step) == ("max_steps", 1, 20)
    assert all(int(state["step"]) == 20 for state in task.optimizer.state.values())  # what is left tunes on


def test_an_evaluation_that_raises_leaves_the_training_flags() -> None:
    def evaluate(model: nn.Module) -> float:
        assert not model.training
        raise KeyboardInterrupt

    run = ByHand(Task(), SqueezeCallback(delta=1.0, evaluate=evaluate, every_steps=1), 9)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert all(module.training for module in run.task.model.modules())


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "delta": st.sampled_from([0.0, 0.003, 0.02, 0.1, math.inf]),
            "cuts_per_round": st.integers(1, 8),
            "score": st.sampled_from(["error", "error_per_parameter"]),
            "keep": st.sampled_from([None, 0.6, 0.9]),
            "minimum_bond": st.integers(1, 3),
        }
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
)
# The last evaluation, after which nothing is cut, is the one that finds the kept ratio reached.
@example({"delta": math.inf, "cuts_per_round": 50, "score": "error", "keep": 0.6}, 1, 2, True)
def test_it_ends_where_squeeze_does(options: dict[str, Any], rounds: int, every: int, metric: bool) -> None:
    """On the same batches, in the same bonds, with the same values, and for the same reason."""
    task, its = Task(), Task()
    callback = SqueezeCallback(
        **options,
        every_steps=every,
        max_rounds=rounds,
        higher_is_better=False,
        evaluate=None if metric else task.evaluate,
    )
    result = ByHand(task, callback, every * (rounds + 1)).all()
    for step in range(every):  # before the reference is taken
        its.train_step(step)
    expected = its.run(
        **options, max_steps=rounds, tune_steps=every, train_step=lambda step: its.train_step(every + step)
    )
    assert result.stopped == expected.stopped
    assert result.bonds == expected.bonds == task.bonds()
    assert (result.reference, result.value, result.best_round) == (
        expected.reference, expected.value, expected.best_round,
    )  # fmt: skip
    assert [(part.cuts, part.value, part.accepted, part.position) for part in result.rounds] == [
        (part.cuts, part.value, part.accepted, part.position + every) for part in expected.rounds
    ]
    if result.stopped == "gap":  # otherwise the callback may train on
        states = [everything(part.model, part.optimizer) for part in (task, its)]
        assert {**states[0], "random": None} == {**states[1], "random": None}
