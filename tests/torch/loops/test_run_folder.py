"""The folder of a run: damage to its log or its state is one error, and nothing is changed or deleted for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.damage import MISSING, changed
from helpers.squeeze_task import Task, everything

from mpo_tn import MPOError


def interrupted(folder: Path) -> None:
    """Two rounds, and the process ends in the third."""
    task = Task()

    def train_step(step: int) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return task.train_step(step)

    with pytest.raises(KeyboardInterrupt):
        task.run(folder=folder, train_step=train_step)


def refused(folder: Path, match: str) -> None:
    task = Task()
    before, there = everything(task.model, task.optimizer), sorted(path.name for path in folder.iterdir())
    with pytest.raises(MPOError, match=match):
        task.run(folder=folder)
    assert everything(task.model, task.optimizer) == before
    assert sorted(path.name for path in folder.iterdir()) == there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    interrupted(folder)
    return folder


LOG: list[tuple[tuple[Any, ...], list[Any]]] = [
    (("state",), [3, None, MISSING, "", ".", "..", "state-000001", "state-2"]),
    (("settings",), [None, [1], [], "x", MISSING]),
    (("reference",), [math.nan, math.inf, None, "1", True, 10**400, MISSING]),
    (("start_digest",), [None, 3, MISSING]),
    (("start_bonds",), [None, [], {}, {"0": 3}, {"0": ["x"]}, MISSING]),
    (("rounds",), [[], None, {}, [{}], [None], MISSING]),
    (("result",), [3, None]),
    (("rounds", 0, "accepted"), [None, False, 1, "x", MISSING]),
    (("rounds", 1, "accepted"), [None, False, 1]),
    (("rounds", 0, "value"), ["x", None, math.inf, math.nan, True]),
    (("rounds", 0, "kept"), ["x", None]),
    (("rounds", 0, "gap"), ["x", None]),
    (("rounds", 0, "loss"), ["x", []]),
    (("rounds", 0, "number"), [9, "1", None, True]),
    (("rounds", 0, "position"), [-1, "x", None]),
    (("rounds", 0, "parameters"), [1.5, None]),
    (("rounds", 0, "random"), [3, None]),
    (("rounds", 0, "seconds"), ["x", None]),
    (("rounds", 0, "notes"), [None, [3]]),
    (("rounds", 0, "other"), [3]),
    (("rounds", 0, "cuts"), [None, [], [3], [{}]]),
    (("rounds", 0, "cuts", 0, "unit"), ["no", None, []]),
    (("rounds", 0, "cuts", 0, "bond"), [-1, 9, "x", None]),
    (("rounds", 0, "cuts", 0, "from"), [99, "x"]),
    (("rounds", 0, "cuts", 0, "to"), [0, 99, "x"]),
    (("rounds", 0, "cuts", 0, "score"), ["x", None]),
]


@pytest.mark.parametrize(("path", "values"), LOG, ids=lambda part: str(part)[:30])
def test_a_damaged_log_changes_nothing(folder: Path, path: tuple[Any, ...], values: list[Any]) -> None:
    file = folder / "log.json"
    text = file.read_text()
    try:
        for value in values:
            file.write_text(json.dumps(changed(json.loads(text), path, value)))
            refused(folder, "(damaged|state-000001, which is missing).*resume=False")
    finally:
        file.write_text(text)


def test_a_log_that_is_nested_too_deeply(folder: Path) -> None:
    file = folder / "log.json"
    text = file.read_text()
    try:
        file.write_text("[" * 200_000)
        refused(folder, "damaged.*resume=False")
    finally:
        file.write_text(text)


@pytest.mark.guarantee("state-refused")
@pytest.mark.parametrize("key", ["random", "extra", "which", "model", "saved", "left_out", "units", "optimizer"])
def test_a_damaged_state_of_a_run_changes_nothing(folder: Path, key: str) -> None:
    file = folder / "state-000002" / "state.json"
    text = file.read_text()
    try:
        for value in [None, [], {}, 3, MISSING]:
            file.write_text(json.dumps(changed(json.loads(text), (key,), value)))
            refused(folder, "resume=False")
    finally:
        file.write_text(text)


def test_what_is_not_damaged_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    task, whole = Task(), Task()
    result, expected = task.run(folder=tmp_path / "run"), whole.run()
    assert (result.bonds, result.value, result.stopped) == (expected.bonds, expected.value, expected.stopped)
