"""Kills every command that writes, at random moments, runs it again, and compares what there is with an untouched run.

Run by tests/promises/test_kills.py and ``make soak``: ``python -m helpers.kill_commands FOLDER [KILLS] [SEED]``. Prints
a line a command: kills, and how many runs were resumed, were started over or had been done by then. What is wrong is
printed, too, and the exit code is then 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from helpers.task_folders import sentence, write_encoder, write_mrpc

TIMED = ("result.json", "report.html", "healing.json")
"""Files that hold seconds, and are another every time."""


@dataclass(frozen=True)
class Command:
    """Arguments with ``OUT`` for what is written; what is there before; whether a second run may resume."""

    name: str
    arguments: str
    earlier: str = ""
    resumes: bool = False


COMMANDS = (
    Command("compress", "compress encoder OUT --sites 3 --bond 3"),
    Command("compress --overwrite", "compress encoder OUT --sites 3 --bond 3 --overwrite", earlier="small"),
    Command("plan --out", "plan encoder --out OUT --sites 3 --bond 3"),
    Command("export", "export small OUT"),
    Command("to-dense", "to-dense small OUT"),
    Command("heal", "heal small --against encoder --texts texts.txt --out OUT --steps 8 --batch-size 4", resumes=True),
    Command(
        "finetune",
        "finetune encoder --out OUT --task MRPC --data-dir mrpc --max-steps 6 --batch-size 8 --save-every 1 --sites 3",
        resumes=True,
    ),
    Command(
        "squeeze",
        "squeeze encoder --out OUT --task MRPC --data-dir mrpc --batch-size 12 --limit 24 --sites 3 --max-rounds 2 "
        "--tune-steps 1 --delta 100 --cuts-per-round 2",
        resumes=True,
    ),
)


def run(arguments: str, out: Path, kill_after: float | None = None) -> tuple[int, str, float]:
    """The exit code of the program in a forked process (-9 if it was killed), what it said, and the seconds it took."""
    said, began = out.parent / "said", time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        with said.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(io.StringIO()):
            from mpo_tn.app import cli, terminal

            terminal.err.file = file
            terminal.out.file = io.StringIO()
            sys.argv = ["mpo-tn", *(str(out) if word == "OUT" else word for word in arguments.split())]
            try:
                cli.main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException as error:
                file.write(repr(error))
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds, text = time.perf_counter() - began, said.read_text()
    said.unlink()
    return code, text, seconds


def digest(path: Path) -> str:
    """Of every name and byte that is not a matter of time; empty if nothing is there."""
    found = hashlib.sha256()
    if not path.exists():
        return ""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(f"{file.relative_to(path)} {file.is_dir()}".encode())
        if file.is_file() and file.name not in TIMED:
            found.update(file.read_bytes())
    return found.hexdigest()


def attempt(command: Command, place: Path, expected: str, after: float) -> tuple[str, str]:
    """What a run came to that was killed after so many seconds and run again, and what is wrong with it."""
    place.mkdir()
    out = place / "out"
    before = ""
    if command.earlier:
        shutil.copytree(command.earlier, out)
        before = digest(out)
    code, _, _ = run(command.arguments, out, after)
    was = "killed" if code == -signal.SIGKILL else "ended"
    if command.earlier and digest(out) not in (before, expected):
        return was, "neither the old nor the new is there"
    again = command.arguments + (" --resume" if command.resumes else "")
    had, resumable = digest(out) == expected, out.is_dir() or any(place.glob("out.healing/log.json"))
    code, said, _ = run(again, out)
    if digest(out) != expected:
        return was, f"run again it ends with {code} in other bytes: {said[-500:]}"
    if left := sorted(path.name for path in place.iterdir() if path.name != "out"):
        return was, f"it leaves {left}"
    if code != 0 and not had:
        return was, f"run again it ends with {code}: {said[-500:]}"
    if was == "ended":
        return was, ""
    return "done" if had else "resumed" if command.resumes and resumable else "started over", ""


def main(home: Path, kills: int = 3, seed: int = 0) -> int:
    import torch

    torch.set_num_threads(1)
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    write_encoder(Path("encoder"))
    write_mrpc(Path("mrpc"))
    source = random.Random(seed)
    Path("texts.txt").write_text("".join(f"{sentence(source)}\n" for _ in range(40)))
    made = run("compress encoder OUT --sites 3 --bond 2", home / "small")
    assert made[0] == 0, made
    wrong, moments = 0, random.Random(seed)
    for number, command in enumerate(COMMANDS):
        whole = home / f"whole-{number}"
        whole.mkdir()
        code, said, seconds = run(command.arguments, whole / "out")
        assert code == 0, (command.name, said)
        expected, counts = digest(whole / "out"), Counter[str]()
        while sum(counts.values()) - counts["ended"] < kills and sum(counts.values()) < 10 * kills:
            place = home / f"{number}-{sum(counts.values())}"
            after = moments.uniform(0, 1.02 * seconds)
            what, fault = attempt(command, place, expected, after)
            counts[what] += 1
            if fault:
                wrong += 1
                print(f"{command.name}, killed after {after:.3f} of {seconds:.3f} s in {place}: {fault}", flush=True)
            else:
                shutil.rmtree(place)
        killed = sum(counts.values()) - counts["ended"]
        print(
            f"{command.name}: {killed} kills, {counts['resumed']} resumed, {counts['started over']} started over, "
            f"{counts['done']} were done; {wrong} wrong so far",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
