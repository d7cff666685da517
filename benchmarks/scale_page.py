"""The law fitted to rows of :mod:`scale`, and the marked sections and the picture of ``docs/scale.md``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import common  # threads, before NumPy  # noqa: F401
import numpy as np
import scale_runs
from commands import save
from rows import markdown
from scale_units import DTYPE, KINDS, effort, planned
from scipy.optimize import nnls

from mpo_tn import plot
from mpo_tn.planning.effort import Effort, effort_of, held_of, work_of
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.schedule import forecast
from mpo_tn.planning.structure import structure

Row = dict[str, Any]
WORKERS = (1, 8, 64)
WORKER, BEGUN = 160e6, 270e6
"""Bytes of the libraries in a worker, and in the process that is started, see "Memory" in docs/scale.md."""


def units(rows: Sequence[Row], kind: str | None = None) -> list[Row]:
    """The rows of matrices, the small ones first."""
    found = [row for row in rows if row["part"] == "unit" and kind in (None, row["kind"])]
    return sorted(found, key=lambda row: (list(KINDS).index(row["kind"]), row["out"] * row["in"]))


def runs(rows: Sequence[Row]) -> list[Row]:
    """The rows of streamed runs."""
    return sorted((row for row in rows if row["part"] == "run"), key=lambda row: row["workers"])


# --- the law ---


def fitted(
    amounts: Sequence[Mapping[str, float]], measured: Sequence[float], known: Sequence[float] | None = None
) -> dict[str, float]:
    """What each amount takes, none less than nothing, so that relative errors are least.

    Args:
        amounts: of every row.
        measured: of every row, in all.
        known: what of it is no matter of the amounts.
    """
    if not measured:
        return {}
    names = list(dict.fromkeys(name for each in amounts for name in each))
    whole = np.asarray(measured, dtype=float)
    table = np.array([[each.get(name, 0.0) for name in names] for each in amounts]) / whole[:, None]
    # Amounts differ by ten orders of magnitude: columns of one size, or the solver stops too early.
    sizes = np.linalg.norm(table, axis=0)
    sizes[sizes == 0] = 1.0
    found, _ = nnls(table / sizes, 1 - np.asarray([0.0] * len(whole) if known is None else known) / whole)
    return {name: float(f"{value:.3g}") for name, value in zip(names, found / sizes, strict=True)}


def rates(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds for each amount of work."""
    return fitted([work_of(plan_of(row)) for row in rows], [row["cpu"] for row in rows])


def held(rows: Sequence[Row]) -> dict[str, float]:
    """Bytes for each number that is held beside the matrix as it is stored."""
    stored = [row["out"] * row["in"] * DTYPE.itemsize for row in rows]
    return fitted([held_of(plan_of(row)) for row in rows], [row["memory"] for row in rows], stored)


def plan_of(row: Row) -> UnitPlan:
    return planned(row["kind"], row["out"], row["in"])


def law(rows: Sequence[Row]) -> Iterator[str]:
    """The constants, and how far off they are."""
    all_units = units(rows)
    seconds, memory = rates(all_units), held(all_units)
    yield f"RATES = {seconds}"
    yield f"BYTES = {memory}"
    for row in all_units:
        unit = plan_of(row)
        told = effort_of(unit, DTYPE.itemsize)
        fresh = sum(seconds[name] * amount for name, amount in work_of(unit).items())
        holds = unit.dense_parameters * 2 + sum(memory[name] * amount for name, amount in held_of(unit).items())
        yield (
            f"{row['kind']:24} {row['out']:5} {row['in']:5} {row['cpu']:9.3f} s, law {told.seconds:9.3f}, fitted "
            f"{fresh:9.3f}; {row['memory'] / 1e6:6.0f} MB, law {told.memory / 1e6:6.0f}, fitted {holds / 1e6:6.0f}"
        )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# --- what was measured ---


def measured_table(rows: Sequence[Row], what: str) -> list[str]:
    """Seconds or memory by kind and size, the law in brackets."""
    sizes = sorted({(row["out"], row["in"]) for row in units(rows)}, key=math.prod)
    cells: list[list[str]] = []
    for kind in KINDS:
        by_size = {(row["out"], row["in"]): row for row in units(rows, kind)}
        line = [kind]
        for size in sizes:
            told = effort(kind, *size)
            law_says = shown_seconds(told.seconds) if what == "cpu" else f"{told.memory / 1e6:.0f}"
            if size in by_size:
                value = by_size[size][what]
                line.append(f"{shown_seconds(value) if what == 'cpu' else f'{value / 1e6:.0f}'} ({law_says})")
            else:
                line.append(f"({law_says})")
        cells.append(line)
    return markdown([what_it_is[what], *(f"{out} x {in_}" for out, in_ in sizes)], cells)


what_it_is = {"cpu": "seconds (the law)", "memory": "MB (the law)"}


def exponents_table(rows: Sequence[Row]) -> list[str]:
    """How seconds, flops and memory grow with the number of entries, and how far off the law is."""
    cells: list[list[str]] = []
    for kind in KINDS:
        found = units(rows, kind)
        told = [effort_of(plan_of(row), DTYPE.itemsize) for row in found]
        entries = [float(row["out"] * row["in"]) for row in found]
        flops = [flops_of(plan_of(row)) for row in found]
        seconds, memory = ([row[what] for row in found] for what in ("cpu", "memory"))
        powers = ((entries, seconds), (entries, flops), (flops, seconds), (entries, memory))
        cells.append(
            [
                kind,
                *(f"{exponent(x, y):.2f}" for x, y in powers),
                f"{furthest(seconds, [each.seconds for each in told]):.2f}",
                f"{furthest(memory, [each.memory for each in told]):.2f}",
                held_out(rows, kind),
            ]
        )
    head = ["", "seconds by entries", "flops by entries", "seconds by flops", "memory by entries", "law off, seconds",
            "law off, memory", "largest, foretold by smaller ones"]  # fmt: skip
    return markdown(head, cells)


def furthest(measured: Sequence[float], told: Sequence[float]) -> float:
    """The factor by which what was told is off at most."""
    return max(max(one / other, other / one) for one, other in zip(measured, told, strict=True))


def flops_of(unit: UnitPlan) -> float:
    """Of decompositions and products; rounding is counted with 500 operations an entry."""
    weights = {"entry": 10.0, "cube": 9.0, "rounded": 500.0, "unit": 0.0, "sweep": 100.0}
    return sum(weights.get(name, 1.0) * amount for name, amount in work_of(unit).items())


def held_out(rows: Sequence[Row], kind: str) -> str:
    """The seconds of the largest matrix of a kind over those of the law fitted to all rows of smaller ones."""
    largest = units(rows, kind)[-1]
    smaller = [row for row in units(rows) if row["out"] * row["in"] < largest["out"] * largest["in"]]
    fit = rates(smaller)
    if not fit:
        return ""
    told = sum(fit.get(name, 0.0) * amount for name, amount in work_of(plan_of(largest)).items())
    return f"{largest['out']} x {largest['in']}: {told:.3g} s for {largest['cpu']:.3g}"


def bytes_table(rows: Sequence[Row]) -> list[str]:
    """Bytes read and written at one size."""
    cells: list[list[str]] = []
    for kind in KINDS:
        row = units(rows, kind)[-1]
        told = effort_of(plan_of(row), DTYPE.itemsize)
        dense = row["out"] * row["in"] * DTYPE.itemsize
        cells.append(
            [
                kind,
                f"{row['out']} x {row['in']}",
                f"{dense / 1e6:.1f}",
                f"{row['read'] / 1e6:.1f} ({told.bytes_read / 1e6:.1f})",
                f"{row['written'] / 1e6:.1f} ({told.bytes_written / 1e6:.1f})",
            ]
        )
    return markdown(["", "largest matrix", "MB in bfloat16", "MB read (the law)", "MB written (the law)"], cells)


# --- what it says of large models ---


@dataclass(frozen=True)
class Model:
    """The matrices of a model: (kind, rows, columns, matrices in one tensor) and how many there are of each."""

    name: str
    matrices: tuple[tuple[str, int, int, int, int], ...]
    beside: int
    """Numbers of what stays as it is: tables and norms."""

    @property
    def numbers(self) -> int:
        """In all."""
        return sum(rows * columns * count for _, rows, columns, _, count in self.matrices) + self.beside

    @property
    def count(self) -> int:
        """Of matrices."""
        return sum(count for *_, count in self.matrices)


def llama(name: str, layers: int, hidden: int, inner: int, heads_of_keys: int, vocabulary: int) -> Model:
    """A dense one, whose heads are 128 wide."""
    keys = 128 * heads_of_keys
    shapes = ((hidden, hidden, 2), (keys, hidden, 2), (inner, hidden, 2), (hidden, inner, 1))
    return Model(
        name,
        tuple(("linear", rows, columns, 1, layers * count) for rows, columns, count in shapes),
        2 * vocabulary * hidden,
    )


def experts(name: str, layers: int, hidden: int, inner: int, count: int, vocabulary: int, *, fused: bool) -> Model:
    """Attention with 8 heads of keys; experts one tensor each, or all of a layer in two tensors."""
    attention = (("linear", hidden, hidden, 1, 2 * layers), ("linear", 1024, hidden, 1, 2 * layers))
    rows_first, rows_second = 2 * inner, hidden
    if fused:
        inside = (
            ("parameter", count * rows_first, hidden, count, layers),
            ("parameter", count * rows_second, inner, count, layers),
        )
    else:
        inside = (("linear", inner, hidden, 1, 2 * layers * count), ("linear", hidden, inner, 1, layers * count))
    return Model(name, (*attention, *inside), (2 * vocabulary + layers * count) * hidden)


MODELS = (
    llama("7B", 32, 4096, 11008, 32, 32000),
    llama("70B", 80, 8192, 28672, 8, 128256),
    llama("405B", 126, 16384, 53248, 8, 128256),
    experts("400B, 60 x 128 experts, a tensor each", 60, 6144, 2816, 128, 128256, fused=False),
    experts("400B, 60 x 128 experts, fused", 60, 6144, 2816, 128, 128256, fused=True),
)
"""Shapes of Llama 2 7B, Llama 3 70B and 405B; and of a mixture of experts as large as the last."""
BECOMES = ("low rank", "5 sites", "dense in 4 bits", "low rank, metric")
"""Experts that are one tensor have no moments, and are left out of the last."""


@cache
def effort_in(kind: str, rows: int, columns: int, blocks: int, becomes: str) -> Effort:
    config, metric = KINDS[becomes]
    spec = structure(kind, rows, columns, config, blocks)
    return effort_of(UnitPlan(("layer",), spec, "bfloat16", metric=metric), DTYPE.itemsize)


def models_table(rows: Sequence[Row]) -> list[str]:
    """Time, memory and disk of large models."""
    cells: list[list[str]] = []
    for model in MODELS:
        fused = any(blocks > 1 for *_, blocks, _ in model.matrices)
        for becomes in BECOMES[: -1 if fused else None]:
            largest = max(row["out"] * row["in"] for row in units(rows, becomes))
            efforts = [
                effort_in(kind, out, in_, blocks, becomes)
                for kind, out, in_, blocks, count in model.matrices
                for _ in range(count)
            ]
            told = {n: forecast(efforts, n, beside=model.beside * DTYPE.itemsize) for n in WORKERS}
            beyond = any(out * in_ > largest for _, out, in_, _, _ in model.matrices)
            cells.append(
                [
                    f"{model.name}, {model.numbers / 1e9:.0f} G" if becomes == BECOMES[0] else "",
                    becomes + (" *" if beyond else ""),
                    f"{model.count:,}",
                    *(shown_time(told[n].seconds) for n in WORKERS),
                    shown_bytes(told[1].memory + WORKER),
                    *(shown_bytes(told[n].together + n * WORKER + BEGUN) for n in WORKERS[1:]),
                    shown_bytes(told[1].bytes_read),
                    shown_bytes(told[1].bytes_written),
                ]
            )
    head = [
        "model, numbers", "becomes", "matrices", *(f"{n} worker{'s' * (n > 1)}" for n in WORKERS), "a process holds",
        *(f"{n} together" for n in WORKERS[1:]), "read", "written",
    ]  # fmt: skip
    return markdown(head, cells)


def shown_seconds(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 1 else f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def shown_time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown_bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            value = number / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{number / 1e6:.0f} MB"


# --- the check ---


def runs_table(rows: Sequence[Row]) -> list[str]:
    """Streamed runs here, and what was foretold."""
    cells: list[list[str]] = []
    efforts, beside = scale_runs.efforts()
    for row in runs(rows):
        workers = row["workers"]
        left = max(row["cores"] - row["cores_of_others"], 0.05)
        alone, shared = (forecast(efforts, workers, cores=n, beside=beside) for n in (row["cores"], left))
        told_cpu = sum(each.seconds for each in efforts)
        own, libraries = (BEGUN, BEGUN) if workers == 1 else (WORKER, BEGUN + WORKER * (workers + 1))
        process = max(alone.memory + own, BEGUN + scale_runs.SHARD)
        cells.append(
            [
                str(workers),
                f"{row['cpu_units']:.1f} ({told_cpu:.1f})",
                f"{row['cores_of_others']:.1f}",
                f"{row['seconds']:.0f}",
                f"{shared.seconds:.0f}",
                f"{alone.seconds:.0f}",
                f"{row['memory'] / 1e6:.0f} ({process / 1e6:.0f})",
                f"{row['together'] / 1e6:.0f} ({(alone.together + libraries) / 1e6:.0f})",
                f"{row['written'] / 1e6:.0f} ({alone.bytes_written / 1e6:.0f})",
            ]
        )
    head = [
        "workers", "CPU s of matrices (foretold)", "cores that others took", "s on the wall",
        "foretold with the cores left", "foretold for a quiet machine", "MB a process (foretold)", "MB together",
        "MB written",
    ]  # fmt: skip
    return markdown(head, cells)


# --- the page ---


def sections(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The marked sections by name."""
    return {
        "where": [where(rows)],
        "seconds": measured_table(rows, "cpu"),
        "memory": measured_table(rows, "memory"),
        "bytes": bytes_table(rows),
        "exponents": exponents_table(rows),
        "models": models_table(rows),
        "runs": runs_table(rows),
    }


def where(rows: Sequence[Row]) -> str:
    """Machine and versions."""
    about = [row["surroundings"] for row in rows]
    last = about[-1]
    loads = [each["load"] for each in about]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items() if name != "peft")
    return (
        f"{last['machine']}, two cores, {versions}; in one thread, CPU seconds; the load of the machine was "
        f"{min(loads):.0f} to {max(loads):.0f} meanwhile."
    )


def with_sections(page: str, rows: Sequence[Row]) -> str:
    """A page with its marked sections written anew."""
    for name, lines in sections(rows).items():
        begin, end = f"<!-- scale.py: {name} -->", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"the page has no section {begin} ... {end}, or several")
        text = "\n".join((begin, *lines, end))
        page = pattern.sub(lambda _, text=text: text, page)
    return page


DRAWN = [kind for kind in KINDS if kind != "low rank in 4 bits"]
"""That one is as low rank, and a little more."""


def picture(rows: Sequence[Row], file: Path) -> None:
    """Seconds against the number of entries, and the law through and beyond them."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sides = [2 ** (k / 4) for k in range(36, 63)]
    squares = [int(side) // 64 * 64 for side in sides]
    with rc_context(plot.style()):
        figure = Figure(figsize=(7.6, 4.8))
        ax = figure.subplots()
        colours = plot.style()["axes.prop_cycle"].by_key()["color"]
        for kind, colour in zip(DRAWN, colours, strict=True):
            found = units(rows, kind)
            entries = [row["out"] * row["in"] for row in found]
            ax.plot(entries, [row["cpu"] for row in found], "o", color=colour)
            told = [(side**2, effort(kind, side, side).seconds) for side in squares]
            within = [point for point in told if point[0] <= entries[-1]]
            beyond = [within[-1], *(point for point in told if point[0] > entries[-1])]
            ax.plot(*zip(*within, strict=True), color=colour, label=kind)
            ax.plot(*zip(*beyond, strict=True), ":", color=colour)
        ax.set(xscale="log", yscale="log", xlabel="numbers of the matrix", ylabel="CPU time of one thread")
        ticks = {0.01: "10 ms", 0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h",
                 36000: "10 h", 86400: "1 d", 864000: "10 d"}  # fmt: skip
        ax.set_yticks(list(ticks), list(ticks.values()))
        ax.minorticks_off()
        ax.set_title("points: measured; lines: the law for square matrices, dotted beyond what was measured")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, file, "CPU seconds of one matrix against its numbers: measured, and the law")
