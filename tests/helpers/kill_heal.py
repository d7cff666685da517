"""Heals a small model, killing the process at every event in turn, and compares what the restarted runs end in.

Run by tests/torch/loops/test_heal.py in a process: ``python -m helpers.kill_heal FOLDER [BITS]``. Prints what
differs and exits with 1, or prints how many kills there were.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers.fuse import KILLED, Fuse
from helpers.heal_task import Task, bits, without_seconds
from mpo_tn.storage import places
from mpo_tn.torch.state import training_state as state

BITS = int(sys.argv[2]) if len(sys.argv) > 2 else None
"""Of all cores, or none."""


def run(folder: Path, fuse: Fuse) -> str:
    """One call of heal from the start of a process: all that came of it."""
    torch.manual_seed(0)
    random.seed(0)  # which a fork seeds anew
    task = Task(bits=BITS)
    result = task.run(folder=folder, steps=4, every=2, tensor_lr=0.03, progress=lambda *_: fuse.tick())
    return f"{without_seconds(result)} {bits(task.model)} {state.random_digest()}"


def in_a_child(folder: Path, at: int | None) -> tuple[int, str]:
    """The exit code of a run in a forked process and what it ended in."""
    report = folder.with_suffix(".report")
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        fuse = Fuse(at)
        events: list[tuple[Any, str]] = [
            (Path, "rename"), (Path, "replace"), (Path, "write_text"), (places, "exchange"),
            (shutil, "rmtree"), (state, "save_file"),
        ]  # fmt: skip
        for owner, name in events:
            fuse.wrap(owner, name)
        text = run(folder, fuse)
        report.write_text(text) if at is None else None
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, report.read_text() if report.exists() else ""


def main(home: Path, say: Callable[[str], None] = print) -> int:
    torch.set_num_threads(1)
    Task(bits=BITS)  # made once, before the forks
    _, expected = in_a_child(home / "whole", None)
    assert "best_step" in expected, expected
    kills = 0
    while True:
        folder = home / f"killed-{kills}"
        code, _ = in_a_child(folder, kills)
        if code == 0:
            break
        assert code == KILLED, code
        kills += 1
        code, text = in_a_child(folder, None)
        if (code, text) != (0, expected):
            say(f"killed at event {kills - 1} and resumed: {code}\n{text[:1000]}\nand not\n{expected[:1000]}")
            return 1
        left = sorted(path.name for path in folder.iterdir())
        if len(left) != 2 or left[0] != "log.json":
            say(f"killed at event {kills - 1} and resumed, it leaves {left}")
            return 1
        shutil.rmtree(folder)
    say(f"{kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
