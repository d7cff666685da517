"""Rows of results: each is made once, measured, and kept as a line of JSON; tables of them."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common  # threads, before NumPy
import torch
from torch import nn

from mpo_tn import plot
from mpo_tn.storage.files import write_whole
from mpo_tn.tuning.result import plain

Made = tuple[nn.Module, float, dict[str, Any]]
"""A model, its bits per weight of the matrices that were meant, and what else is to be known."""


@dataclass(frozen=True)
class Job:
    """One row to make. ``key`` tells it from all others of its part."""

    part: str
    method: str
    key: Mapping[str, Any]
    make: Callable[[], Made]

    def made(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is this one."""
        return row["method"] == self.method and all(row.get(name) == value for name, value in self.key.items())


def surroundings(**text: Any) -> dict[str, Any]:
    """Versions, machine and what the text was."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    packages = ("mpo-tn", "numpy", "torch", "transformers", "peft")
    return {
        "text": text,
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": common.processor(),
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if common.CPU_TIME else "seconds on the wall",
        "load": os.getloadavg()[0],
    }


def read(results: Path, part: str) -> list[dict[str, Any]]:
    """The rows of a part that are there."""
    files = sorted(results.glob(f"{part}-*.json"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]


def write(results: Path, row: Mapping[str, Any], job: Job) -> None:
    """Add a row, in the place of an earlier one of the same job. A file a method: runs side by side do not meet."""
    rows = [other for other in read(results, job.part) if other["method"] == job.method and not job.made(other)]
    lines = [json.dumps(plain(other)) for other in (*rows, row)]
    results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", job.method.lower())
    write_whole(results / f"{job.part}-{name}.json", ("\n".join(lines) + "\n").encode())


def shown(value: float) -> str:
    """A number of a table."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def with_error(value: float, error: float) -> str:
    """A number with its standard error."""
    return f"{shown(value)} ± {shown(error)}"


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def points(
    rows: Sequence[Mapping[str, Any]],
    drawn: Mapping[str, Sequence[str]],
    value: Callable[[Mapping[str, Any]], float],
    *,
    least: Callable[[Mapping[str, Any]], float] | None = None,
    error: Callable[[Mapping[str, Any]], float] | None = None,
) -> list[plot.Point]:
    """The points of lines against bits per weight.

    Args:
        rows: of the encoder, or of a model.
        drawn: the methods of every line, by the name it has in figures.
        value: of a row.
        least: what the one row of a line at a size has least of; ``value`` if not given.
        error: the standard error of the value.
    """
    found: dict[tuple[str, float], Mapping[str, Any]] = {}
    for name, methods in drawn.items():
        for row in rows:
            if row["method"] in methods and row.get("group", 128) == 128:
                place = name, row.get("budget", row["bits_per_weight"])
                found[place] = min(found.get(place, row), row, key=least or value)
    return [
        plot.Point(name, row["bits_per_weight"], value(row), None if error is None else error(row))
        for (name, _), row in found.items()
    ]
