"""Tunes a small model, killing the process at every event of two checkpoints, and compares the resumed runs.

Run by tests/tuning/test_finetune.py in a process of its own: ``python -m helpers.kill_finetune FOLDER``. Prints what
differs and exits with 1, or prints how many kills there were.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import torch

from helpers.fuse import KILLED, Fuse, in_a_child
from helpers.task_folders import write_encoder, write_mrpc
from mpo_tn.storage import places
from mpo_tn.torch.state import training_state
from mpo_tn.tuning import Method, Settings, finetune, load_task
from mpo_tn.tuning.run import Run

# A checkpoint after step 2, and one that replaces it after step 3.
SETTINGS = Settings(epochs=1, max_steps=3, batch_size=12, max_length=24, save_every=2)


def attempt(home: Path, folder: Path | None, at: int | None, *, resume: bool) -> tuple[int, str]:
    """The exit code of a run in a forked process, and what it ended in."""
    report = home / "report"
    report.unlink(missing_ok=True)

    def tune() -> None:
        if at is not None:
            fuse = Fuse(at)
            for owner, name in (
                (Run, "step"), (Path, "rename"), (Path, "write_text"), (shutil, "rmtree"),
                (training_state, "save_file"), (places, "exchange"),
            ):  # fmt: skip
                fuse.wrap(owner, name)
        method = Method("lfa", sites=3, lr=1e-2, tensor_lr=1e-2)
        data = load_task("MRPC", home / "mrpc")
        result, model = finetune(home / "encoder", data, method, SETTINGS, folder=folder, resume=resume)
        digest = hashlib.blake2b(repr((result.losses, result.scores, result.steps)).encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        with report.open("w") as file:  # not write_text, which is an event
            file.write(digest.hexdigest())

    code = in_a_child(tune)
    return code, report.read_text() if report.exists() else ""


def main(home: Path) -> int:
    torch.set_num_threads(1)
    write_encoder(home / "encoder")
    write_mrpc(home / "mrpc")
    code, expected = attempt(home, None, None, resume=False)
    assert code == 0, code
    assert expected
    kills = 0
    while True:
        folder = home / f"killed-{kills}"
        code, _ = attempt(home, folder, kills, resume=False)
        if code == 0:
            break
        assert code == KILLED, code
        kills += 1
        code, found = attempt(home, folder, None, resume=True)
        if (code, found) != (0, expected):
            print(f"killed at event {kills - 1} and resumed: {code} {found}, not {expected}")
            return 1
    print(f"{kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
