"""Every command that writes, killed at random moments and run again; a few here and 30 of each in ``make soak``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS


@pytest.mark.slow
@pytest.mark.guarantee("old-or-new", "leftovers-cleared", "resumed-same-bits", "heal-same-bits")
def test_killed_and_run_again_a_command_ends_in_the_same_bytes(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    command = [sys.executable, "-m", "helpers.kill_commands", str(tmp_path / "home"), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = re.findall(r"^.*: (\d+) kills, (\d+) resumed", done.stdout, flags=re.MULTILINE)
    assert len(lines) >= 7, done.stdout
    assert sum(int(kills) for kills, _ in lines) >= 5, done.stdout


@pytest.mark.slow
@pytest.mark.guarantee("stream-any-workers", "stream-resumes", "unit-whole")
def test_streamed_runs_and_their_workers_are_killed_and_end_in_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra [distributed] is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    with (tmp_path / "log").open("w") as file:  # through a pipe it would be waited for workers that outlive it
        done = subprocess.run(
            [sys.executable, "-m", "helpers.kill_streams", str(tmp_path / "home"), "2"],
            env=environment, stdout=file, stderr=file, check=False, timeout=1800,
        )  # fmt: skip
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, said[-4000:]
    found = re.findall(r"^(one process|pool|dask): (\d+) kills", said, flags=re.MULTILINE)
    assert len(found) == 3, said
    assert sum(int(kills) for _, kills in found) >= 5, said
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
