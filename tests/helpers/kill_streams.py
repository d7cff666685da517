"""Kills streamed runs at random moments: in one process, in a pool (a worker, or the run), on Dask (the same).

Run by tests/promises/test_kills.py and ``make soak``: ``python -m helpers.kill_streams FOLDER [KILLS] [SEED] [KINDS]``.
Every run that was killed is run again and compared with one that was not; meanwhile ``verify`` is asked about whatever
there is. Prints a line a kind; what is wrong is printed, too, and the exit code is then 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import psutil
import torch

from helpers.fuse import in_a_child
from helpers.streaming import CONFIG, SHARD, contents, source_in
from mpo_tn import MPOError
from mpo_tn.torch.hf.stream import compress_folder
from mpo_tn.torch.hf.verify import verify_folder

MARK = "MPO_TN_KILL_STREAMS"
"""In the environment of all processes of a run: whoever has it and no run is left behind."""

Victims = Callable[[int], list[int]]
"""Of a run by its process number: the workers that can be killed now."""


class Home:
    """A source, what becomes of it, and how a kind of run is made of it."""

    def __init__(self, folder: Path, scratch: Path, go: Callable[[Path, Path], None], victims: Victims) -> None:
        self.folder, self.scratch, self.go, self.victims = folder, scratch, go, victims
        folder.mkdir(parents=True)
        self.source, self.out = source_in(folder), folder / "out"
        compress_folder(self.source, self.out, CONFIG, shard_bytes=SHARD)
        self.wanted = contents(self.out)
        self.units = len(json.loads((self.out / "mpo_record.json").read_text())["units"])

    def start(self) -> int:
        """The number of a process that does a run."""
        shutil.rmtree(self.out, ignore_errors=True)
        child = os.fork()
        if child == 0:
            os.environ |= {MARK: str(self.folder), "TMPDIR": str(self.scratch)}
            tempfile.tempdir = None
            sys.modules["__main__"] = ModuleType("__main__")  # workers would import this file and all that it imports
            try:
                self.go(self.source, self.out)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        return child

    def done(self) -> int:
        """Units that are there by now."""
        return len(list((self.folder / "out.work" / "units").glob("[0-9]*.safetensors")))

    def fooled(self) -> str:
        """What ``verify`` takes for a whole result and is none."""
        for path in self.folder.iterdir():
            if path.name == "source" or not path.is_dir():
                continue
            try:
                is_good = verify_folder(path, self.source).is_good
            except MPOError:
                continue
            if is_good and contents(path) != self.wanted:
                return f"verify takes {path.name} for whole"
        return ""

    def wrong(self) -> str:
        """What is not as it should be after a run that ended."""
        there = contents(self.out)
        if other := sorted(name for name in {*there, *self.wanted} if there.get(name) != self.wanted.get(name)):
            return f"the result is another one: {', '.join(other)}"
        if not verify_folder(self.out, self.source).is_good:
            return "verify does not take the result for whole"
        if left := {path.name for path in self.folder.iterdir()} - {"source", "out"}:
            return f"{', '.join(sorted(left))} is still there"
        return ""


def survivors(folder: Path) -> list[int]:
    """Processes that a run has left."""
    mark, found = f"{MARK}={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def attempt(home: Home, kill_worker: bool, moment: random.Random) -> tuple[str, str]:
    """Kill a run or a worker of it at a random moment; what it came to, and what is wrong."""
    child, after = home.start(), moment.randrange(home.units)
    while home.done() < after and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)
    time.sleep(moment.uniform(0, 0.03))
    victims = home.victims(child) if kill_worker else [child]
    for victim in moment.sample(victims, min(1, len(victims))):
        os.kill(victim, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if kill_worker:
        return (
            "a worker was killed" if victims else "ended before"
        ), home.wrong() if code == 0 else f"exit code {code}"
    if code not in (0, -signal.SIGKILL):
        return "", f"exit code {code}"
    for _ in range(400):
        if not survivors(home.folder):
            break
        time.sleep(0.05)
    else:
        return "", f"processes {survivors(home.folder)} were left"
    if fault := home.fooled():
        return "", fault
    if in_a_child(lambda: compress_folder(home.source, home.out, CONFIG, shard_bytes=SHARD)) != 0:
        return "", "run again, it failed"
    return ("the run was killed" if code else "ended before"), home.wrong()


def one_process(source: Path, out: Path) -> None:
    compress_folder(source, out, CONFIG, shard_bytes=SHARD)


def pool(source: Path, out: Path) -> None:
    compress_folder(source, out, CONFIG, shard_bytes=SHARD, workers=2)


def workers_below(process: int) -> list[int]:
    """Processes that another has started to work, of a pool its fork server's."""
    found: list[int] = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                command = " ".join(child.cmdline())
                is_server = "forkserver" in command and child.ppid() == process
                if command and "resource_tracker" not in command and not is_server:
                    found.append(child.pid)
    return found


@contextlib.contextmanager
def dask(folder: Path) -> Generator[tuple[Callable[[Path, Path], None], Victims]]:
    """A scheduler and two workers that are replaced when they die, and how a run uses them."""
    from mpo_tn.app.cluster import dask_executor

    folder.mkdir(parents=True)
    file = folder / "scheduler.json"
    with (folder / "log").open("wb") as log:
        dask = [sys.executable, "-m", "dask"]
        options = ["--no-dashboard", "--scheduler-file", str(file)]
        began = [
            subprocess.Popen(
                [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *options], stdout=log, stderr=log, cwd=folder
            )
        ]
        while not file.exists():
            time.sleep(0.1)
        workers = ["--nthreads", "1", "--nworkers", "2", "--local-directory", str(folder)]
        began.append(subprocess.Popen([*dask, "worker", *options, *workers], stdout=log, stderr=log, cwd=folder))
    address = json.loads(file.read_text())["address"]

    def go(source: Path, out: Path) -> None:
        with dask_executor(address, [source, out.parent]) as executor:
            compress_folder(source, out, CONFIG, shard_bytes=SHARD, executor=executor)

    try:
        yield go, lambda _run: workers_below(began[1].pid)
    finally:
        for process in reversed(began):
            process.terminate()
            process.wait()


def main(folder: Path, kills: int = 3, seed: int = 0, *kinds: str) -> int:
    torch.set_num_threads(1)
    faults = 0
    with contextlib.ExitStack() as open_:
        # Of pools that were killed a socket is left, whose path must not be long.
        scratch = Path(open_.enter_context(tempfile.TemporaryDirectory()))
        for kind in kinds or ("one process", "pool", "dask"):
            if kind == "dask":
                go, victims = open_.enter_context(dask(folder / "cluster"))
            else:
                go, victims = (one_process, lambda _run: []) if kind == "one process" else (pool, workers_below)
            home = Home(folder / kind.replace(" ", "-"), scratch, go, victims)
            moment, counts = random.Random(seed), Counter[str]()
            began = time.perf_counter()
            while sum(counts.values()) - counts["ended before"] < kills and sum(counts.values()) < 5 * kills:
                # Of a pool and of Dask a worker is killed, and the next time the run itself.
                what, fault = attempt(home, kind != "one process" and sum(counts.values()) % 2 == 0, moment)
                counts[what] += 1
                if fault:
                    faults += 1
                    print(f"{kind}, {what}: {fault}", flush=True)
                    shutil.rmtree(home.folder / "out.work", ignore_errors=True)
            shutil.rmtree(home.folder)
            said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            killed = sum(counts.values()) - counts["ended before"]
            seconds = time.perf_counter() - began
            print(f"{kind}: {killed} kills ({said}), {faults} wrong so far, {seconds:.0f} s", flush=True)
    shutil.rmtree(folder)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:4]), *sys.argv[4:]))
