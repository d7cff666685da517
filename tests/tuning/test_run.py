"""A run changes by its own methods, phase by phase, and can go back to where it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.task_folders import write_encoder, write_mrpc
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch import MPOLayer
from mpo_tn.tuning import (
    Method,
    NotFiniteError,
    Run,
    Settings,
    SqueezePhase,
    Squeezing,
    TrainPhase,
    carry_out,
    finetune,
    load_task,
    phases_of,
    result_of,
    start,
)

QUICK = Settings(epochs=1, batch_size=12, max_length=24)
LFA = Method("squeeze", sites=3, lr=1e-2, tensor_lr=1e-2)
SQUEEZING = Squeezing(delta=200.0, cuts_per_round=15, tune_steps=2, max_rounds=2, final_epochs=1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("run")
    return write_encoder(root / "encoder"), load_task("MRPC", write_mrpc(root / "mrpc"))


def begin(places: tuple[Path, Any], phases: Any = None) -> Run:
    return start(*places, LFA, QUICK, phases)


def state(run: Run) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["done", "losses", "squeezed", "phases", "phase", "begin", "end", "resumed_at"])
def test_what_is_done_is_not_written_from_outside(places: tuple[Path, Any], name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(begin(places), name, 3)


def test_a_copy_of_the_record_is_a_copy(places: tuple[Path, Any]) -> None:
    run = begin(places)
    run.step()
    record = run.record()
    record.losses.append(0.0)
    record.done = 7
    assert (run.done, len(run.losses)) == (1, 1)


def test_phases_one_by_one_are_the_same_run(places: tuple[Path, Any]) -> None:
    """Scoring apart: who carries phases out himself gets the bits of ``finetune``."""
    expected, model = finetune(*places, LFA, QUICK, squeezing=SQUEEZING)
    train, squeeze, last = (replace(phase, scored=False) for phase in phases_of(LFA, QUICK, SQUEEZING))
    run = begin(places, [train])
    carry_out(run)
    assert (run.done, run.begin, run.end, run.phase) == (4, 4, 4, None)
    run.go_on_with(squeeze, last)
    assert (run.phase, run.end) == (squeeze, None)
    carry_out(run)
    run.score()
    result = result_of(run, 1.0)
    assert same(state(run), {key: value.clone() for key, value in model.state_dict().items()})
    assert result.scores == expected.scores[-1:]
    assert result.losses == []
    assert (result.steps, result.matrix_parameters, result.matrix_trainable, result.settings) == (
        expected.steps, expected.matrix_parameters, expected.matrix_trainable, expected.settings,
    )  # fmt: skip
    assert result.squeezing is not None
    assert expected.squeezing is not None
    assert result.squeezing["bonds"] == expected.squeezing["bonds"]


def test_every_phase_has_its_own_rates(places: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from where the phase began; the rates that the parameters have are those of the method."""
    whole, seen = Run.step, list[float]()

    def step(self: Run) -> float:
        loss = whole(self)
        shares = {group["lr"] / group["initial_lr"] for group in self.optimizer.param_groups}
        assert {group["initial_lr"] for group in self.optimizer.param_groups} == {1e-2}
        seen.append(*shares)
        return loss

    monkeypatch.setattr(Run, "step", step)
    finetune(*places, LFA, QUICK, squeezing=SQUEEZING)
    assert seen == pytest.approx([1, 1, 2 / 3, 1 / 3, *[0.1] * 4, 0.1, 0.075, 0.05, 0.025], rel=1e-12)


@pytest.mark.slow
@hypothesis_settings(max_examples=5, deadline=None)
@given(st.lists(st.sampled_from([TrainPhase(1, 2, share=0.5), SqueezePhase(SQUEEZING)]), min_size=1, max_size=3))
def test_going_back_leaves_no_trace(places: tuple[Path, Any], phases: list[Any]) -> None:
    """Whatever was done in between, bonds cut too: the steps after it are the steps that would have been."""
    run = begin(places, [TrainPhase(1, 6)])
    for _ in range(2):
        run.step()
    mark = run.mark()
    before = run.record()
    carry_out(run)
    end, losses = state(run), list(run.losses)
    run.go_on_with(*phases)
    carry_out(run)
    run.go_back(mark)
    assert run.record().scores == []
    assert (run.record(), run.phases, run.end) == (before, (TrainPhase(1, 6),), 6)
    carry_out(run)
    assert same(end, state(run))
    assert list(run.losses) == losses


def test_counts_follow_the_bonds(places: tuple[Path, Any]) -> None:
    run = begin(places, [SqueezePhase(SQUEEZING)])
    full = run.matrix_counts()
    assert full == (run.prepared.matrix_parameters, run.prepared.matrix_trainable)
    carry_out(run)
    cores = [core for module in run.model.modules() if isinstance(module, MPOLayer) for core in module.cores]
    now = sum(core.numel() for core in cores), sum(core.numel() for core in cores if core.requires_grad)
    assert run.matrix_counts() == now
    assert now[0] < full[0]
    assert now[1] < full[1]


def test_without_a_phase_there_is_no_step(places: tuple[Path, Any]) -> None:
    run = begin(places, [TrainPhase(1, 1)])
    carry_out(run)
    with pytest.raises(MPOError, match="all 1 phases of the run are behind it"):
        run.step()
    run.go_on_with(TrainPhase(1, 1))
    run.step()
    assert run.done == 2


def test_in_a_squeezing_nobody_knows_of_how_many_steps(
    places: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(places, [SqueezePhase(SQUEEZING)])
    monkeypatch.setattr("mpo_tn.tuning.run.loss_of", lambda logits, _batch: logits.sum() * math.nan)
    with pytest.raises(NotFiniteError, match=r"the loss is nan in step 1 \(epoch 1\); training stopped"):
        carry_out(run)
