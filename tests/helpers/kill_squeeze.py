"""Squeezes a small model, killing the process at one event after another, and compares what the restarted runs end in.

Run by tests/torch/loops/test_squeeze.py in a process of its own: ``python -m helpers.kill_squeeze FOLDER``. Prints what
differs and exits with 1, or prints how many kills there were.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.fuse import KILLED, Fuse
from mpo_tn.storage import places
from mpo_tn.torch import MPOConfig, SqueezeResult, compress, squeeze
from mpo_tn.torch.loops import policy, squeezer
from mpo_tn.torch.state import training_state as state

# Every second event, and every one in `make soak`.
EVERY = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else 2
PER_LIFE = 12  # events that a process lives through when it is killed again and again; a round has fewer


def run(folder: Path, fuse: Fuse) -> tuple[SqueezeResult, str]:
    """One call of squeeze from the start of a process; the result and a digest of every bit that counts."""
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 12)
    y = model.eval()(x).detach()  # so that every cut hurts
    compress(model.train(), MPOConfig(target_modules=["0", "3"], sites=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=12)

    def train_step(step: int) -> torch.Tensor:
        fuse.tick()
        model.train()
        rows = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(step))
        scale = 1 + 0.1 * random.random()
        loss = scale * (model(x[rows]) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    def evaluate(model: nn.Module) -> float:
        fuse.tick()
        return float((model(x) - y).square().mean()) + 1e-6 * random.random()

    result = squeeze(
        model, evaluate=evaluate, train_step=train_step, optimizer=optimizer, scheduler=scheduler, delta=0.02,
        higher_is_better=False, max_steps=9, score="error", cuts_per_round=2, tune_steps=2, folder=folder,
    )  # fmt: skip
    digest = hashlib.blake2b(state.random_digest().encode())
    captured = state.capture(model, optimizer, scheduler)
    for key in sorted(captured.tensors):
        digest.update(key.encode() + captured.tensors[key].numpy().tobytes())
    digest.update(repr([module.training for module in model.modules()]).encode())
    return result, digest.hexdigest()


def summary(result: SqueezeResult, digest: str) -> str:
    """All but the seconds."""
    values = result.to_dict()
    for part in values["rounds"]:
        del part["seconds"]
    return f"{values} {digest}"


def in_a_child(folder: Path, at: int | None) -> tuple[int, str]:
    """The exit code of a run in a forked process and what it ended in."""
    report = folder.with_suffix(".report")
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        fuse = Fuse(at)
        events: list[tuple[Any, str]] = [
            (Path, "rename"), (Path, "replace"), (Path, "write_text"), (places, "exchange"),
            (shutil, "rmtree"), (state, "save_file"), (policy, "cut_unit"), (squeezer, "restore"),
        ]  # fmt: skip
        for owner, name in events:
            fuse.wrap(owner, name)
        text = summary(*run(folder, fuse))
        report.write_text(text) if at is None else None
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, report.read_text() if report.exists() else ""


def main(home: Path, say: Callable[[str], None] = print) -> int:
    torch.set_num_threads(1)
    _, expected = in_a_child(home / "whole", None)
    assert "'stopped': 'gap'" in expected, expected
    _, again = in_a_child(home / "whole", None)  # a finished folder
    if again != expected:
        say(f"a finished folder gave\n{again}\nand not\n{expected}")
        return 1
    kills = 0
    for at in count(0, EVERY):
        folder = home / f"killed-{at}"
        code, _ = in_a_child(folder, at)
        if code == 0:
            break
        assert code == KILLED, code
        kills += 1
        code, text = in_a_child(folder, None)
        if (code, text) != (0, expected):
            say(f"killed at event {at} and resumed: {code}\n{text}\nand not\n{expected}")
            return 1
        left = sorted(path.name for path in folder.iterdir())
        if len(left) != 2 or left[0] != "log.json":
            say(f"killed at event {at} and resumed, it leaves {left}")
            return 1
        shutil.rmtree(folder)
    lives = 1
    while in_a_child(home / "often", PER_LIFE)[0] == KILLED:
        lives += 1
        if lives > 50:
            say("a run that is killed again and again does not end")
            return 1
    code, text = in_a_child(home / "often", None)
    if (code, text) != (0, expected):
        say(f"killed {lives - 1} times: {code}\n{text}\nand not\n{expected}")
        return 1
    say(f"{kills} kills, {lives} lives")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
