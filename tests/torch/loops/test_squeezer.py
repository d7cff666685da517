"""The engine of squeezing by itself: no Trainer, no folder, values out of thin air where that will do."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.squeeze_task import Task, everything, without_seconds
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.spec import kept_ratio
from mpo_tn.torch import SqueezeResult
from mpo_tn.torch.loops.evaluation import evaluated
from mpo_tn.torch.loops.policy import Policy
from mpo_tn.torch.loops.squeezer import Squeezer
from mpo_tn.torch.models.evaluating import set_training, training_flags
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.torch.state.training_state import TrainingState

DEFAULTS: dict[str, Any] = {
    "delta": 1.0, "higher_is_better": False, "max_steps": 100, "cuts_per_round": 1, "tune_steps": 1, "score": "error",
    "keep": None, "minimum_bond": 1,
}  # fmt: skip


def policy(**options: Any) -> Policy:
    return Policy(**{**DEFAULTS, **options})


def engine(task: Task, reference: float | None = None, scheduler: Any = None, **options: Any) -> Squeezer:
    return Squeezer(task.model, policy(**options), task.optimizer, scheduler, reference)


def test_judging_what_was_not_cut_makes_no_round() -> None:
    task = Task()
    squeezer = engine(task)
    assert (squeezer.reference, squeezer.accepted, squeezer.reason_to_stop()) == (None, False, "")
    assert squeezer.judge(5.0, position=3) is None
    assert (squeezer.reference, squeezer.accepted, squeezer.position) == (5.0, True, 3)
    assert squeezer.judge(7.0, position=4) is None  # worse than delta allows, but nothing was cut for it
    assert (squeezer.accepted, squeezer.position, squeezer.reason_to_stop()) == (False, 3, "")
    assert squeezer.judge(5.5, position=5) is None
    assert (squeezer.reference, squeezer.rounds, squeezer.best_round) == (5.0, [], 0)
    squeezer.cut()
    part = squeezer.judge(6.0, position=8, loss=0.25)
    assert part is not None
    assert (part.number, part.value, part.gap, part.loss, part.position) == (1, 6.0, 1.0, 0.25, 8)
    assert part.accepted
    assert [(cut.before - cut.after) for cut in part.cuts] == [1]
    assert part.kept == kept_ratio(unit.spec for unit in squeezer.units.values())
    assert part.parameters == sum(parameter.numel() for parameter in task.model.parameters())
    assert squeezer.judge(6.0, position=9) is None
    result = squeezer.finish()
    assert (result.rounds, result.value, result.reference, result.best_round) == ((part,), 6.0, 5.0, 1)
    assert result.bonds == result.bonds_after(1) == task.bonds()


def test_a_model_that_was_never_judged_has_no_reference() -> None:
    task = Task()
    result = engine(task).finish()
    assert math.isnan(result.reference)
    assert math.isnan(result.value)
    assert (result.rounds, result.stopped, result.bonds) == ((), "max_steps", task.bonds())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reference_that_is_not_finite(bad: float) -> None:
    with pytest.raises(MPOError, match=f"the reference is {bad}"):
        engine(Task(), reference=bad)
    squeezer = engine(Task())
    with pytest.raises(MPOError, match=f"the reference is {bad}"):
        squeezer.judge(bad, position=0)
    assert squeezer.reference is None
    squeezer.judge(0.0, position=0)  # the next one may do
    squeezer.cut()
    part = squeezer.judge(math.nan, position=1)
    assert part is not None
    assert (part.accepted, squeezer.reason_to_stop()) == (False, "gap")


def test_what_cannot_be_squeezed() -> None:
    with pytest.raises(MPOError, match="no MPO modules"):
        Squeezer(nn.Sequential(nn.Linear(3, 3)), policy())
    with pytest.raises(MPOError, match="every bond is at minimum_bond=99"):
        engine(Task(), minimum_bond=99)
    task = Task()
    with pytest.raises(MPOError, match="none of the model's parameters"):
        Squeezer(task.model, policy(), torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
    foreign = torch.optim.SGD([*task.model.parameters(), nn.Parameter(torch.zeros(7))])
    with pytest.raises(MPOError, match=r"a parameter of shape \(7,\) that is not the model's"):
        Squeezer(task.model, policy(), foreign).mark_good()


def test_it_is_cut_when_judged_and_not_otherwise() -> None:
    task = Task()
    squeezer, start = engine(task), task.bonds()
    with pytest.raises(MPOError, match="judge it before it is cut"):
        squeezer.cut()
    squeezer.judge(0.0, position=0)
    squeezer.cut()
    once = task.bonds()
    with pytest.raises(MPOError, match="judge it before it is cut"):
        squeezer.cut()
    assert task.bonds() == once != start
    squeezer.judge(9.0, position=1)
    assert task.bonds() == once  # for the driver to look at, until it goes back
    with pytest.raises(MPOError, match="no further round: gap"):
        squeezer.cut()
    squeezer.go_back()
    assert task.bonds() == start
    with pytest.raises(MPOError, match="no further round: gap"):
        squeezer.cut()
    assert [part.accepted for part in squeezer.finish().rounds] == [False]


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.sampled_from([0, 1]))
def test_it_goes_back_bit_for_bit(
    rounds: int, steps: int, cuts: int, given_reference: bool, judged: bool, momentum: int
) -> None:
    """Parameters, bonds, optimiser, scheduler and random generators, whatever came after they were good."""
    task = Task()
    if momentum:
        task.optimizer = torch.optim.SGD(task.model.parameters(), lr=1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(task.optimizer, 0.9)
    squeezer = engine(task, 0.0 if given_reference else None, scheduler, cuts_per_round=cuts)
    done = 0

    def tune(count: int) -> None:
        nonlocal done
        for _ in range(count):
            task.train_step(done)
            scheduler.step()
            torch.rand(1)
            random.random()
            done += 1

    tune(1)  # so that there are moments to go back to
    if not given_reference:
        squeezer.judge(0.0, position=done)
    for _ in range(rounds):
        squeezer.cut()
        tune(steps)
        squeezer.judge(0.5, position=done)
    position = done if rounds or not given_reference else 0
    good, bonds = everything(task.model, task.optimizer, scheduler), task.bonds()
    squeezer.cut()
    tune(steps + 1)
    if judged:
        part = squeezer.judge(1.5, position=done)
        assert part is not None
        assert not part.accepted
    assert everything(task.model, task.optimizer, scheduler) != good
    assert task.bonds() != bonds
    squeezer.go_back()
    assert everything(task.model, task.optimizer, scheduler) == good
    assert squeezer.position == position
    tune(2)
    result = squeezer.finish()  # it is back already: what trained on since stays
    assert everything(task.model, task.optimizer, scheduler) != good
    assert (result.best_round, result.stopped) == (rounds, "gap" if judged else "max_steps")
    assert (result.bonds, len(result.rounds)) == (bonds, rounds + judged)


@pytest.mark.parametrize("judged", [True, False])
def test_finishing_goes_back_from_what_was_not_accepted(judged: bool) -> None:
    task = Task()
    squeezer = engine(task)
    task.train_step(0)
    squeezer.judge(0.0, position=1)
    good = everything(task.model, task.optimizer)
    squeezer.cut()
    task.train_step(1)
    if judged:
        squeezer.judge(2.0, position=2)
    result = squeezer.finish()
    assert everything(task.model, task.optimizer) == good
    assert (result.best_round, len(result.rounds), result.bonds) == (0, judged, result.start_bonds)
    assert squeezer.finish() == result


@settings(max_examples=40)
@given(
    st.booleans(), st.sampled_from([None, 0.1, 0.7, 2.0]), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([1, 3, 1000]),
)  # fmt: skip
@example(False, 0.7, 1, 1, 1000)  # the gap before everything
@example(True, 2.0, 3, 1, 1000)  # the kept ratio before the bonds
@example(True, None, 3, 1, 1000)  # the bonds before the number of rounds
def test_what_stops_it_and_in_which_order(good: bool, keep: float | None, minimum: int, most: int, cuts: int) -> None:
    task = Task()
    squeezer = engine(task, keep=keep, minimum_bond=minimum, max_steps=most, cuts_per_round=cuts)
    squeezer.judge(0.0, position=0)
    if keep == 2.0:
        assert squeezer.reason_to_stop() == "keep"
        return
    assert squeezer.reason_to_stop() == ""
    squeezer.cut()
    squeezer.judge(0.0 if good else 9.0, position=0)
    holds = {
        "gap": not good,
        "keep": keep is not None and kept_ratio(unit.spec for unit in mpo_units(task.model).values()) <= keep,
        "nothing left to cut": max(bond for bonds in task.bonds().values() for bond in bonds) <= minimum,
        "max_steps": most == 1,
    }
    expected = next((reason for reason, so in holds.items() if so), "")
    assert squeezer.reason_to_stop() == expected
    if good:
        assert squeezer.finish().stopped == (expected or "max_steps")


def loop(task: Task, squeezer: Squeezer) -> SqueezeResult:
    """What ``squeeze`` does, written by hand."""
    flags = training_flags(task.model)
    if squeezer.reference is None:
        squeezer.judge(evaluated(task.model, task.evaluate), position=0)
    step = 0
    while not squeezer.reason_to_stop():
        squeezer.cut()
        set_training(flags)
        losses = [float(task.train_step(step + k).detach()) for k in range(squeezer.policy.tune_steps)]
        step += len(losses)
        loss = sum(losses) / len(losses) if losses else None
        squeezer.judge(evaluated(task.model, task.evaluate), position=step, loss=loss)
    set_training(flags)
    return squeezer.finish()


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "delta": st.sampled_from([0.0, 0.003, 0.02, 0.1, math.inf]),
            "max_steps": st.integers(1, 6),
            "cuts_per_round": st.integers(1, 8),
            "tune_steps": st.integers(0, 3),
            "score": st.sampled_from(["error", "error_per_parameter"]),
            "keep": st.sampled_from([None, 0.6, 0.9]),
            "minimum_bond": st.integers(1, 4),
        }
    ),
    st.sampled_from([None, 0.0, 0.01]),
)
def test_squeeze_is_the_loop_over_it(options: dict[str, Any], reference: float | None) -> None:
    mine, its = Task(), Task()
    assume(any(bond > options["minimum_bond"] for bonds in mine.bonds().values() for bond in bonds))
    expected = its.run(**options, reference=reference)
    result = loop(mine, engine(mine, reference, **options))
    assert result.bonds == mine.bonds() == its.bonds()
    # The generators are the process's, and stand elsewhere for the second run.
    for values in (found := without_seconds(result), wanted := without_seconds(expected)):
        values["rounds"] = [{**part, "random": ""} for part in values["rounds"]]
    assert found == wanted
    assert {**everything(mine.model, mine.optimizer), "random": None} == {
        **everything(its.model, its.optimizer), "random": None,
    }  # fmt: skip


def test_it_resumes_from_what_it_was() -> None:
    task, whole = Task(), Task()
    options: dict[str, Any] = {"delta": math.inf, "max_steps": 5, "tune_steps": 2}
    expected = loop(whole, engine(whole, **options))
    assert expected.best_round == 5
    squeezer = engine(task, **options)
    squeezer.judge(evaluated(task.model, task.evaluate), position=0)
    for number in range(2):
        squeezer.cut()
        task.train_step(2 * number)
        task.train_step(2 * number + 1)
        squeezer.judge(evaluated(task.model, task.evaluate), position=2 * number + 2)
    good, rounds, reference = squeezer.good, tuple(squeezer.rounds), squeezer.reference
    assert reference is not None
    squeezer.cut()  # and here the process ends

    fresh = Task()
    resumed = engine(fresh, **options)
    resumed.resume(good, squeezer.start_bonds, rounds, reference)
    assert (resumed.position, resumed.best_round, resumed.reference) == (4, 2, reference)
    assert (resumed.bonds, resumed.start_bonds) == (expected.bonds_after(2), expected.start_bonds)
    other = Task()
    other.model.add_module("extra", nn.Linear(8, 8))
    refusing, before = engine(other, **options), everything(other.model, other.optimizer)
    with pytest.raises(MPOError, match="of another model: extra"):
        refusing.resume(good, squeezer.start_bonds, rounds, reference)
    assert everything(other.model, other.optimizer) == before
    assert (refusing.rounds, refusing.reference, refusing.position) == ([], None, 0)
    while not resumed.reason_to_stop():
        resumed.cut()
        fresh.model.train()
        fresh.train_step(resumed.position)
        fresh.train_step(resumed.position + 1)
        resumed.judge(evaluated(fresh.model, fresh.evaluate), position=resumed.position + 2)
    result = resumed.finish()
    assert (result.bonds, result.value, result.stopped) == (expected.bonds, expected.value, "max_steps")


@pytest.mark.parametrize("position", [None, "3", -1, 1.5, True])
def test_a_state_without_a_position_changes_nothing(position: Any) -> None:
    task = Task()
    squeezer = engine(task)
    squeezer.judge(0.0, position=0)
    good = squeezer.good
    extra = {} if position is None else {"position": position}
    bad = TrainingState(good.tensors, {**good.values, "extra": extra})
    task.train_step(0)
    before = everything(task.model, task.optimizer)
    with pytest.raises(MPOError, match="damaged: the position"):
        squeezer.resume(bad, squeezer.start_bonds, (), 0.0)
    with pytest.raises(MPOError, match="the reference is nan"):
        squeezer.resume(good, squeezer.start_bonds, (), math.nan)
    assert everything(task.model, task.optimizer) == before


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("delta", [1.0, math.inf])
def test_a_value_that_is_not_finite_is_a_gap(value: float, higher: bool, delta: float) -> None:
    squeezer = engine(Task(), delta=delta, higher_is_better=higher)
    squeezer.judge(0.0, position=0)
    squeezer.cut()
    part = squeezer.judge(value, position=1)
    assert part is not None
    assert (part.accepted, squeezer.reason_to_stop()) == (False, "gap")
    assert not part.gap <= 1e300


@pytest.mark.parametrize("name", ["keep", "delta"])
@pytest.mark.parametrize("bad", ["x", True, [1], math.nan, -1])
def test_a_policy_of_what_is_no_number(name: str, bad: Any) -> None:
    with pytest.raises(MPOError, match=f"{name}="):
        policy(**{name: bad})
    assert (policy(keep=np.float32(0.5)).keep, policy(delta=0).delta) == (0.5, 0)


def test_a_number_too_large_for_a_float() -> None:
    with pytest.raises(MPOError, match="evaluate returned a number that is too large"):
        evaluated(Task().model, lambda _: 10**400)
