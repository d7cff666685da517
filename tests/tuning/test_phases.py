"""What a run does, decided before anything is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.tuning import Method, Settings, SqueezePhase, Squeezing, TrainPhase, phases_of
from mpo_tn.tuning.methods import METHODS
from mpo_tn.tuning.phases import learning_rate_factor, squeezing_of

settings = st.builds(
    Settings, epochs=st.integers(0, 4), max_steps=st.none() | st.integers(1, 50), warmup=st.floats(0, 0.9)
)
squeezings = st.builds(Squeezing, rate=st.floats(0.01, 1), final_epochs=st.integers(0, 3), tune_steps=st.integers(0, 9))


def method(name: str) -> Method:
    return Method(name, keep=0.5 if name in ("one-shot", "low-rank") else None)


@given(st.sampled_from(sorted(set(METHODS) - {"squeeze"})), settings)
def test_without_squeezing_a_run_trains_and_is_scored(name: str, how: Settings) -> None:
    if how.epochs == 0 and how.max_steps is None:
        with pytest.raises(MPOError, match="epochs=0: train for at least one"):
            phases_of(method(name), how)
        return
    assert phases_of(method(name), how) == (TrainPhase(how.epochs, how.max_steps, warmup=how.warmup),)
    with pytest.raises(MPOError, match=f"the method is {name}: use the method squeeze"):
        phases_of(method(name), how, Squeezing())


@given(settings, st.none() | squeezings)
def test_squeezing_comes_between_two_trainings_and_something_is_scored_at_the_end(
    how: Settings, given_squeezing: Squeezing | None
) -> None:
    phases = phases_of(Method("squeeze"), how, given_squeezing)
    squeezing = given_squeezing or Squeezing()
    before = [] if how.epochs == 0 and how.max_steps is None else [TrainPhase]
    after = [TrainPhase] if squeezing.final_epochs else []
    assert [type(phase) for phase in phases] == [*before, SqueezePhase, *after]
    assert squeezing_of(phases) == squeezing
    assert phases[-1].scored
    assert [phase.scored for phase in phases].count(True) == len(before) + 1  # not twice in the same state
    assert len({str(phase) for phase in phases}) == len(phases)


@given(st.integers(1, 60), st.floats(0, 0.9), st.floats(0.01, 1))
def test_rates_of_a_phase(steps: int, warmup: float, share: float) -> None:
    phase = TrainPhase(3, steps, share=share, warmup=warmup)
    rates = [phase.rate(step, 7) for step in range(steps)]
    assert rates == [share * learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert 0 < max(rates) <= share
    assert phase.rate(steps, 7) == 0
    assert TrainPhase(3).steps(7) == 21
    constant = SqueezePhase(Squeezing(rate=share))
    assert {constant.rate(step, 7) for step in range(steps)} == {share}
    assert constant.steps(7) is None


def test_a_phase_is_a_value() -> None:
    phase: Any = TrainPhase(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        phase.epochs = 2
    assert {TrainPhase(1), TrainPhase(1), SqueezePhase(Squeezing())} == {phase, SqueezePhase(Squeezing())}
