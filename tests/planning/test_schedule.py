from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.effort import Effort
from mpo_tn.planning.schedule import finish_time, forecast

# Whole numbers: sums of them are exact in double precision.
JOBS = st.lists(st.integers(0, 1000).map(float), max_size=40)
SOME = st.integers(1, 12)


@pytest.mark.guarantee("finish-bounds")
@given(JOBS, SOME, st.none() | st.floats(0.25, 16))
def test_a_run_takes_no_less_than_its_work_and_little_more(
    jobs: list[float], workers: int, cores: float | None
) -> None:
    found = finish_time(jobs, workers, cores=cores)
    speed = workers if cores is None else min(workers, cores)
    longest, slack = max(jobs, default=0.0), 1e-9 * (1 + sum(jobs))
    # With less than one core even a job that is alone is slowed down.
    alone = longest * max(1.0, 1 / speed)
    assert max(sum(jobs) / speed, longest) <= found + slack
    assert found <= sum(jobs) / speed + alone + slack


@given(JOBS, SOME, st.data())
def test_a_run_never_ends_sooner_with_more_to_do_or_fewer_to_do_it(
    jobs: list[float], workers: int, data: st.DataObject
) -> None:
    found = finish_time(jobs, workers)
    assert finish_time(jobs, workers + data.draw(SOME)) <= found
    assert found <= finish_time([*jobs, float(data.draw(st.integers(0, 1000)))], workers)
    longer = [job + data.draw(st.integers(0, 100)) for job in jobs]
    assert found <= finish_time(longer, workers)
    few, more = sorted(data.draw(st.floats(0.25, 16)) for _ in range(2))
    slack = 1e-9 * (1 + sum(jobs))
    assert finish_time(jobs, workers, cores=more) <= finish_time(jobs, workers, cores=few) + slack
    assert found <= finish_time(jobs, workers, cores=more) + slack


@given(JOBS, SOME)
def test_with_a_core_for_each_worker_none_waits(jobs: list[float], workers: int) -> None:
    assert finish_time(jobs, workers, cores=workers) == pytest.approx(finish_time(jobs, workers), rel=1e-12)
    assert finish_time(jobs, workers, cores=1) == pytest.approx(sum(jobs), rel=1e-9)
    assert finish_time(reversed(jobs), workers) == finish_time(jobs, workers)


def test_four_workers_on_two_cores_are_no_faster_than_two() -> None:
    jobs = [8.0, 8.0, 4.0, 4.0, 4.0, 4.0]
    assert (finish_time(jobs, 2, cores=2), finish_time(jobs, 4, cores=2), finish_time(jobs, 4)) == (16.0, 16.0, 8.0)


def test_no_order_is_better_by_more_than_a_third() -> None:
    """Graham's example for two workers: 3 + 3 against 2 + 2 + 2 is the best, longest first gives 7."""
    assert finish_time([3, 3, 2, 2, 2], 2) == 7.0 <= 4 / 3 * 6


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20), SOME)
def test_memory_is_that_of_those_that_are_done_at_a_time(units: list[tuple[int, int]], workers: int) -> None:
    efforts = [Effort(float(seconds), 10 * memory, 3, 2) for seconds, memory in units]
    found = forecast(efforts, workers, beside=7)
    largest = sorted((effort.memory for effort in efforts), reverse=True)
    assert found.memory == largest[0] <= found.together <= sum(largest[:workers])
    if workers == 1 or len(units) == 1:
        assert found.together == found.memory
    if workers >= len(units):
        assert found.together == sum(largest)
    # Units, and the result; the source, and every unit once to be checked and once for the result.
    assert found.bytes_written == 2 * 2 * len(units) + 7
    assert found.bytes_read == 3 * len(units) + 7 + 2 * 2 * len(units)
    assert 0 < found.busy <= 1
    assert forecast(efforts, 1).busy == 1.0


def test_what_is_done_is_not_done_again_but_is_in_the_result() -> None:
    effort = Effort(5.0, 100, 10, 4)
    whole, rest = forecast([effort, effort], 1), forecast([effort], 1, done=4)
    assert whole.seconds - rest.seconds == pytest.approx(5.0, rel=1e-9)
    assert whole.bytes_written - rest.bytes_written == 4
    assert forecast([], 1, done=8).memory == 0
    assert forecast([effort], 1, most_shard=1000).memory == 1000


def test_what_is_no_number_of_workers_or_cores_is_refused() -> None:
    for workers in (0, -1, 1.5, True, "two"):
        with pytest.raises(MPOError, match="workers="):
            finish_time([1.0], workers)  # type: ignore[arg-type]
    with pytest.raises(MPOError, match=r"cores=0 must be positive"):
        finish_time([1.0], 1, cores=0)
