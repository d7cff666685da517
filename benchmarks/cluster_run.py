"""A checkpoint compressed under a Dask cluster whose worker is killed, and the run as well, as a user would.

``python benchmarks/cluster_run.py run FOLDER [--results FILE] [--layers 20 ...]``, further options being those of
``checkpoint.py``; ``table FILE`` prints the tables of docs/scale.md. Real commands in processes of their own: a
scheduler, two workers, a run that loses one of them and is killed itself, the same run again, one that nothing happens
to, ``verify``, and a script that loads and generates. The record is added as a line to FILE. Everything is written
below FOLDER, which is deleted afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import rows

PLAN = ("--keep", "0.5", "--sites", "low-rank")
WORKERS = 2
LOADS = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import mpo_tn.torch
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded = time.perf_counter() - began
given = AutoTokenizer.from_pretrained(sys.argv[1])("Once upon a time", return_tensors="pt")
found = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
print(f"{loaded:.1f} {found.shape[1] - given.input_ids.shape[1]}")
"""
POLL = 0.2
"""Seconds between two looks at the processes."""


class Watch:
    """The most memory that processes held, and their CPU seconds, each and with all that they started."""

    def __init__(self) -> None:
        self.found: dict[str, dict[int, tuple[float, float, float]]] = {}
        self._roots: dict[str, int] = {}
        self._stop = Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self._thread.start()

    def add(self, label: str, pid: int) -> None:
        """Follow a process under a label."""
        self._roots[label] = pid

    def most(self, label: str) -> dict[str, float]:
        """Of the process below a label that held most: MB of its own, and with mapped files; CPU seconds of all."""
        found = self.found.get(label, {}).values()
        return {
            "anonymous_mb": round(max((own for own, _, _ in found), default=0.0)),
            "resident_mb": round(max((held for _, held, _ in found), default=0.0)),
            "cpu_s": round(sum(seconds for _, _, seconds in found), 1),
        }

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(POLL):
            for label, root in list(self._roots.items()):
                for process in family(root):
                    self._look(label, process)

    def _look(self, label: str, process: int) -> None:
        try:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
            times = psutil.Process(process).cpu_times()
        except (OSError, psutil.Error):
            return
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmHWM"))}
        if not values:  # it has ended
            return
        before = self.found.setdefault(label, {}).get(process, (0.0, 0.0, 0.0))
        now = int(values["RssAnon"]) * 1.024e-3, int(values["VmHWM"]) * 1.024e-3, times.user + times.system
        self.found[label][process] = tuple(map(max, before, now))  # pyright: ignore[reportArgumentType]


def family(process: int) -> list[int]:
    """A process and all that it and those have started; of one that has ended, none."""
    found = [process]
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [number for child in file.read_text().split() for number in family(int(child))]
    return found


class Machine:
    """Processes that are watched, their output in files, and the record of what they took."""

    def __init__(self, home: Path) -> None:
        self.home, self.watch, self.record = home, Watch(), dict[str, Any]()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, label: str, *command: str | Path) -> subprocess.Popen[bytes]:
        """A process of this Python, watched."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        said, told = self._files(label)
        with said.open("wb") as out, told.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=out, stderr=err, env=environment, cwd=self.home
            )
        self._started.append(process)
        self.watch.add(label, process.pid)
        return process

    def said(self, label: str) -> str:
        """What it wrote."""
        return self._files(label)[0].read_text(encoding="utf-8")

    def _files(self, label: str) -> tuple[Path, Path]:
        return self.home / f"{label}.out", self.home / f"{label}.err"

    def ended(self, label: str, process: subprocess.Popen[bytes], began: float) -> None:
        """Wait for it, and note what it took.

        Raises:
            SystemExit: it failed.
        """
        code = process.wait()
        self.record[label] = {"wall_s": round(time.perf_counter() - began, 1), **self.watch.most(label)}
        if code != 0:
            raise SystemExit(f"{label} ended with {code}: {self._files(label)[1].read_text()[-2000:]}")

    def do(self, label: str, *command: str | Path) -> None:
        """Start, and wait."""
        began = time.perf_counter()
        self.ended(label, self.start(label, *command), began)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """``kill -9``, of all that it started, too."""
        for number in family(process.pid):
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Nothing stays."""
        for process in self._started:
            if process.poll() is None:
                self.kill(process)
        self.watch.close()


@contextmanager
def machine(home: Path) -> Generator[Machine]:
    """In a new folder, which is deleted afterwards."""
    home.mkdir(parents=True)
    found = Machine(home)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(home)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def written(folder: Path) -> dict[str, int]:
    """Units that are finished, and when they were."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("[0-9]*.safetensors")}


def until(condition: Any, process: subprocess.Popen[bytes], what: str) -> None:
    """Wait for a condition while a process runs."""
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"it ended with {process.returncode} before {what}")
        time.sleep(POLL)


def cluster(home: Machine, model: Path, out: Path, units: int) -> None:
    """A run on Dask that loses a worker after a quarter of the units, is killed after a half, and is run again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    home.start(
        "scheduler", "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"
    )  # fmt: skip
    worker = ("-m", "dask", "worker", address, "--nthreads", "1", "--no-dashboard")
    workers = [home.start(f"worker {number}", *worker) for number in range(WORKERS)]
    command = ("-m", "mpo_tn", "compress", model, out, *PLAN, "--scheduler", address)
    work = out.with_name(f"{out.name}.work")
    began = time.perf_counter()
    run = home.start("run that is killed", *command)
    until(lambda: len(written(work)) >= units / 4, run, "a quarter was done")
    home.record["units when a worker is killed"] = len(written(work))
    home.kill(workers[0])
    home.start(f"worker {WORKERS}", *worker)
    until(lambda: len(written(work)) >= units / 2, run, "a half was done")
    home.kill(run)
    home.record["run that is killed"] = {
        "wall_s": round(time.perf_counter() - began, 1),
        **home.watch.most("run that is killed"),
    }
    kept = written(work)
    home.record["units when the run is killed"] = len(kept)
    began = time.perf_counter()
    again = home.start("run again", *command)
    until(lambda: len(written(work)) >= 0.9 * units, again, "most was done")
    now = written(work)
    home.record["of those done again"] = sum(now[name] != changed for name, changed in kept.items())
    home.ended("run again", again, began)
    for number in range(WORKERS + 1):
        home.record[f"worker {number}"] = home.watch.most(f"worker {number}")
    home.record["scheduler"] = home.watch.most("scheduler")


def run(home: Machine, options: Sequence[str]) -> dict[str, Any]:
    """All of it."""
    model, out, other = home.home / "model", home.home / "out", home.home / "undisturbed"
    home.do("checkpoint", Path(__file__).with_name("checkpoint.py").resolve(), model, *options)
    home.do("dry run", "-m", "mpo_tn", "compress", model, out, *PLAN, "--workers", str(WORKERS), "--dry-run", "--json")
    expected = json.loads(home.said("dry run"))
    cluster(home, model, out, expected["units"])
    home.do("undisturbed run", "-m", "mpo_tn", "compress", model, other, *PLAN, "--workers", str(WORKERS))
    home.do("verify", "-m", "mpo_tn", "verify", out, "--against", model)
    home.do("load and generate", "-c", LOADS, out)
    loaded, tokens = home.said("load and generate").split()[-2:]
    one, two = digests(out), digests(other)
    left = sorted(path.name for path in home.home.iterdir() if path.is_dir())
    return {
        "model_gb": round(sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9, 3),
        "result_gb": round(sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e9, 3),
        "units": expected["units"],
        "expected": expected,
        "took": home.record,
        "same_bytes": one == two,
        "files": len(one),
        "left_over": [name for name in left if name not in ("model", "out", "undisturbed")],
        "loaded_s": float(loaded),
        "generated": int(tokens),
    }


STEPS = {
    "run that is killed": "the run, until it is killed",
    "run again": "the same command again",
    "scheduler": "scheduler",
    "worker 0": "worker that is killed",
    "worker 1": "worker that stays",
    "worker 2": "worker in place of the first",
    "undisturbed run": "the run with two processes, none of which is killed",
    "verify": "verify --against",
    "load and generate": "load, generate 8 tokens",
}


def tables(row: dict[str, Any]) -> Iterator[str]:
    """A record in Markdown."""
    took, where = row["took"], row["surroundings"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    yield (
        f"{row['model_gb']:.2f} GB in {row['units']} matrices become {row['result_gb']:.2f} GB; a worker was killed "
        f"after {took['units when a worker is killed']}, the run after {took['units when the run is killed']}, of "
        f"which {took['of those done again']} were done again. Bytes of all {row['files']} files equal to those of the "
        f"undisturbed run: {'yes' if row['same_bytes'] else 'NO'}. Tokens generated: {row['generated']}."
    )
    yield f"{where['machine']}, 2 cores, load {where['load'][0]:.0f} to {where['load'][1]:.0f}; {versions}."
    yield ""
    yield from rows.markdown(
        ("process", "seconds on the wall", "CPU seconds", "anonymous memory, at most", "resident, at most"),
        [
            (
                shown,
                str(round(took[step]["wall_s"])) if "wall_s" in took[step] else "",
                str(round(took[step]["cpu_s"])),
                f"{took[step]['anonymous_mb']:.0f} MB",
                f"{took[step]['resident_mb']:.0f} MB",
            )
            for step, shown in STEPS.items()
        ],
    )


def main() -> None:
    """The record, or tables of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doing = commands.add_parser("run")
    doing.add_argument("folder", type=Path)
    doing.add_argument("--results", type=Path)
    commands.add_parser("table").add_argument("results", type=Path)
    asked, options = parser.parse_known_args()
    if asked.command == "table":
        for line in asked.results.read_text(encoding="utf-8").splitlines():
            print("\n".join(tables(json.loads(line))))
        return
    load = os.getloadavg()[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and nothing is left
    with machine(asked.folder.resolve()) as home:
        found = run(home, options)
    where = {**rows.surroundings(), "threads": 1, "load": [load, os.getloadavg()[1]]}
    where["versions"]["distributed"] = version("distributed")
    row = {**found, "options": options, "surroundings": {name: where[name] for name in where if name != "text"}}
    print("\n".join(tables(row)))
    if asked.results is not None:
        with asked.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if not found["same_bytes"] or found["left_over"]:
        raise SystemExit(f"the results differ, or something was left: {found['left_over']}")


if __name__ == "__main__":
    main()
