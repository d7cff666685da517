"""docs/scale.md: the law against what was measured, and that the page is what its rows say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT

from mpo_tn.planning.effort import Effort, effort_of
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.schedule import forecast

RESULTS, PAGE = ROOT / "benchmarks/results/scale.jsonl", ROOT / "docs/scale.md"
SECONDS, MEMORY = 1.5, 1.4
"""The law is off by no more than these factors, for every matrix that was measured."""


@cache
def rows(part: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["part"] == part]


def law(row: dict[str, Any]) -> Effort:
    return effort_of(UnitPlan.from_dict(row["plan"]), 2)


def test_the_law_is_near_every_matrix_that_was_measured() -> None:
    assert len(rows("unit")) >= 40
    for row in rows("unit"):
        told = law(row)
        assert 1 / SECONDS < told.seconds / row["cpu"] < SECONDS, row
        assert 1 / MEMORY < told.memory / row["memory"] < MEMORY, row


def test_the_law_knows_what_is_read_and_written() -> None:
    for row in rows("unit"):
        told = law(row)
        # Headers and records beside the numbers, and what tells of the memory, looked at every 3 milliseconds.
        watching = 40 * row["seconds"] / 0.003
        assert told.bytes_read <= row["read"] <= 1.01 * told.bytes_read + watching + 50_000, row
        assert told.bytes_written <= row["written"] <= 1.02 * told.bytes_written + 20_000, row


def test_the_longest_first_by_the_law_are_the_longest_first_by_the_clock() -> None:
    """Whichever of two matrices took twice as long as the other comes before it."""
    for one in rows("unit"):
        for other in rows("unit"):
            if one["cpu"] > 2 * other["cpu"]:
                assert law(one).seconds > law(other).seconds, (one, other)


def test_runs_took_the_work_that_was_foretold() -> None:
    assert [row["workers"] for row in rows("run")] == [1, 2, 4]
    for row in rows("run"):
        efforts = [effort_of(UnitPlan.from_dict(unit), 2) for unit in row["units"]]
        told = forecast(efforts, row["workers"], cores=row["cores"])
        assert 1 / SECONDS < sum(effort.seconds for effort in efforts) / row["cpu_units"] < SECONDS
        # Other processes take cores away: no run can have been faster, but the law is off by so much.
        assert told.seconds < SECONDS * row["seconds"]


@pytest.mark.slow
def test_the_page_is_what_the_rows_say(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    shutil.copy(PAGE, page)
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/scale.py"), "page", str(RESULTS), str(page)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
