"""What matrices of a streamed run cost, the law fitted to that, and what it says of large models.

``python benchmarks/scale.py run RESULTS`` measures units and streamed runs, each in processes of their own of one
thread, and adds what is missing to RESULTS, a file of JSON lines; it may be stopped and started again at any time.
``law RESULTS`` fits the constants of :mod:`mpo_tn.planning.effort` to them, ``page RESULTS PAGE`` writes the marked
sections of ``docs/scale.md``, and ``plot RESULTS FILE`` the picture.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("MPO_TN_BENCH_CPU", "1")  # one thread

import common  # threads, before NumPy  # noqa: F401
import scale_page
import scale_runs
from rows import surroundings
from scale_units import KINDS, effort, measure, planned, prepare

from mpo_tn.storage.files import write_whole

SIZES = ((512, 512), (1024, 1024), (1024, 2816), (2048, 2048), (2048, 5504), (4096, 4096), (4096, 11008))
LONGEST = 150.0
"""Seconds, by the law, beyond which a unit is left out."""
WORKERS = (1, 2, 4)

Row = dict[str, Any]


def read(results: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def write(results: Path, row: Row, key: Mapping[str, Any]) -> None:
    """Add a row, in the place of an earlier one."""
    rows = [other for other in read(results) if not is_of(other, key)]
    rows.append({**key, **row, "surroundings": surroundings()})
    results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(results, ("\n".join(json.dumps(each) for each in rows) + "\n").encode())


def is_of(row: Row, key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def run(results: Path, kinds: Sequence[str], parts: Sequence[str], most: int, again: bool) -> None:
    """Measure what is missing, the small ones first."""
    if "units" in parts:
        for out, in_ in (size for size in SIZES if math.prod(size) <= most):
            for kind in kinds:
                key = {"part": "unit", "kind": kind, "out": out, "in": in_}
                told = effort(kind, out, in_).seconds
                if told <= LONGEST and (again or not any(is_of(row, key) for row in read(results))):
                    row = unit_row(kind, out, in_)
                    write(results, row, key)
                    print(f"{kind} {out} x {in_}: {row['cpu']:.2f} s, the law {told:.2f} s", flush=True)
    if "runs" in parts:
        missing = [
            n for n in WORKERS if again or not any(r["part"] == "run" and r["workers"] == n for r in read(results))
        ]
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "source")
                scale_runs.write_source(source)
                for workers in missing:
                    row = scale_runs.measure(source, Path(folder, f"out-{workers}"), workers)
                    write(results, row, {"part": "run", "workers": workers})
                    print(f"{workers} workers: {row['seconds']:.1f} s", flush=True)


def unit_row(kind: str, out: int, in_: int) -> Row:
    """One unit in a process of its own, forked from this one, which has loaded what is loaded late."""
    warm(kind)
    repeats = 3 if out * in_ <= 2**20 else 1
    with tempfile.TemporaryDirectory() as folder:
        _apart(prepare, kind, out, in_, Path(folder))
        row = _apart(measure, kind, out, in_, Path(folder), repeats)
    return {**row, "plan": planned(kind, out, in_).to_dict()}


@cache
def warm(kind: str) -> None:
    """Do a small unit."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(kind, 128, 128, Path(folder))
        measure(kind, 128, 128, Path(folder), 1)


def _apart(call: Callable[..., Any], *given: Any) -> Any:
    """What a call gives in a fork."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(call(*given)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{call.__name__}{given}: the process ended") from None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "law", "page", "plot"):
        commands.add_parser(name).add_argument("results", type=Path)
    choices = commands.choices
    choices["run"].add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    choices["run"].add_argument("--parts", nargs="+", default=["units", "runs"])
    choices["run"].add_argument("--most", type=int, default=10**9, help="entries of a matrix; larger ones wait")
    choices["run"].add_argument("--again", action="store_true", help="measure what is there anew")
    for name in ("page", "plot"):
        choices[name].add_argument("file", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.results)
    if arguments.command == "law":
        print("\n".join(scale_page.law(rows)))
    elif arguments.command == "page":
        page = scale_page.with_sections(arguments.file.read_text(encoding="utf-8"), rows)
        write_whole(arguments.file, page.encode())
    elif arguments.command == "plot":
        scale_page.picture(rows, arguments.file)
    else:
        run(arguments.results, arguments.kinds, arguments.parts, arguments.most, arguments.again)


if __name__ == "__main__":
    main()
