"""Tuning a sentence encoder on GLUE tasks, every way there is at equal steps: the runs behind ``docs/results.md``.

``python benchmarks/glue.py run DATA_DIR RESULTS --tasks MRPC --seeds 0 1`` makes the runs that are missing in RESULTS,
one file each, so that it can be stopped and started again; ``python benchmarks/glue.py table RESULTS`` prints tables,
and ``python benchmarks/glue.py plot RESULTS FILE`` draws scores against sizes.
The squeezed runs of a task and seed come before their controls, which take their bonds and their number of steps.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs side by side on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from commands import Commands, save

from mpo_tn import plot
from mpo_tn.app.demo import demo_model
from mpo_tn.storage.files import write_whole
from mpo_tn.tuning import (
    FinetuneResult,
    Method,
    Settings,
    Squeezing,
    TaskData,
    carry_out,
    finetune,
    load_task,
    phases_of,
    result_of,
    start,
)

ENCODER = r".*encoder.*(query|key|value|dense)"
EPOCHS = {"SST-2": 2}
"""Where it is not three. A squeezed run has one less on full bonds, and one after the last cut."""
CUTS, STEPS, RATE = 50, 15, 0.5
"""Of a round of squeezing: bonds lowered by one, training steps after them, and the share of the rates there."""
KEPT = (0.8, 0.6, 0.4)
LIMIT = {"SST-2": 10_000}
PLAIN = ("full", "lfa", "lora", "last-layers")
SQUEEZED: dict[str, dict[str, Any]] = {"squeeze": {}, "squeeze-cores": {"policy": "cores"}}
"""Ways to squeeze: with auxiliary tensors trained alone, and with every core."""
CONTROLS = ("one-shot", "low-rank")
"""To the bonds and the number of steps of ``squeeze``."""


@dataclass(frozen=True)
class Maker:
    """Makes the runs of one task and seed that are missing in a folder."""

    data: TaskData
    seed: int
    results: Path
    bf16: bool

    def make(self, plain: list[str], kept: list[float]) -> None:
        """The rows named, the squeezed ones before their controls."""
        for name in plain:
            if not self.file(name).exists():
                self.tune(name, None, method(name), self.settings(self.epochs))
        kept = sorted(kept, reverse=True)
        for row in SQUEEZED:
            if any(not self.file(row, keep).exists() for keep in kept):
                self.squeeze(row, kept)
        for keep in kept:
            squeezed = json.loads(self.file("squeeze", keep).read_text(encoding="utf-8"))
            for name in CONTROLS:
                if not self.file(name, keep).exists():
                    how = method(name, bonds=squeezed["squeezing"]["bonds"])
                    self.tune(name, keep, how, self.settings(max_steps=squeezed["steps"]))

    @property
    def epochs(self) -> int:
        """Passes over the training set."""
        return EPOCHS.get(self.data.name, 3)

    def settings(self, epochs: int = 3, max_steps: int | None = None) -> Settings:
        """The settings of a run; ``max_steps`` comes before ``epochs``."""
        return Settings(epochs=epochs, max_steps=max_steps, seed=self.seed, bf16=self.bf16)

    def file(self, row: str, keep: float | None = None) -> Path:
        """Where a run is kept."""
        return self.results / f"{self.data.name}-{self.seed}-{row}{'' if keep is None else f'-{keep:g}'}.json"

    def tune(self, row: str, keep: float | None, how: Method, settings: Settings) -> None:
        """One run without squeezing."""
        result, _ = finetune(demo_model(), self.data, how, settings)
        self.write(row, keep, result)

    def squeeze(self, row: str, kept: list[float]) -> None:
        """One way down through all kept ratios; at each a final epoch is tuned, and then gone back on."""
        began = time.perf_counter()
        how, settings = method("squeeze", **SQUEEZED[row]), self.settings(self.epochs - 1)
        ways = {keep: phases_to(keep, how, settings) for keep in kept}
        tune, _, _ = ways[kept[0]]
        run = start(demo_model(), self.data, how, settings, [tune])
        carry_out(run)
        rounds: list[dict[str, Any]] = []
        for keep, (_, squeeze, last) in ways.items():
            run.go_on_with(squeeze)
            carry_out(run)
            mark = run.mark()
            run.go_on_with(last)
            carry_out(run)
            run.score()
            result = result_of(run, time.perf_counter() - began)
            there = result.squeezing["rounds"]
            rounds += [{key: value for key, value in part.items() if key != "cuts"} for part in there]
            self.write(row, keep, replace(result, squeezing={**result.squeezing, "rounds": rounds}))
            run.go_back(mark)

    def write(self, row: str, keep: float | None, result: FinetuneResult) -> None:
        """Keep a run, without anything that belongs to this machine alone."""
        document = {**result.to_dict(), "row": row, "keep": keep, "threads": torch.get_num_threads()}
        document["settings"]["source"] = "all-MiniLM-L6-v2"
        document["settings"]["data"] = self.data.name  # a name, not a place on this machine
        file = self.file(row, keep)
        write_whole(file, json.dumps(document, indent=1, default=float).encode())
        print(f"{file.stem}: {result.headline:.2f} after {result.steps} steps, {result.seconds:.0f} s", flush=True)


def method(name: str, **options: Any) -> Method:
    """A method on the matrices of the encoder, at its own learning rates."""
    return Method(name, target=ENCODER, **options)


def phases_to(keep: float, how: Method, settings: Settings) -> list[Any]:
    """Tuning, squeezing to a kept ratio and a final epoch; the dev set is scored by whoever asks for it."""
    # No delta: the rows are compared at equal bonds, not at equal loss.
    squeezing = Squeezing(100.0, CUTS, STEPS, keep, rate=RATE, final_epochs=1)
    return [replace(phase, scored=False) for phase in phases_of(how, settings, squeezing)]


def rows() -> list[tuple[str, float | None]]:
    """Every row of the table: the method and the kept ratio it is squeezed to."""
    squeezed = [(name, keep) for keep in KEPT for name in (*SQUEEZED, *CONTROLS)]
    return [*((name, None) for name in PLAIN), *squeezed]


Runs = dict[tuple[str, float | None], dict[int, dict[str, Any]]]
"""The runs of a task by row, kept ratio and seed."""


def tables(results: Path) -> str:
    """The tables of the runs that are there, as Markdown."""
    return "\n".join(
        line for task, runs in read(results).items() for line in ("", f"## {task}", "", *_task_tables(runs))
    )


def read(results: Path) -> dict[str, Runs]:
    """The runs that are there, by task."""
    found: dict[str, Runs] = {}
    for file in sorted(results.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(run["task"], {}).setdefault((run["row"], run["keep"]), {})[run["seed"]] = run
    return dict(sorted(found.items()))


def _task_tables(found: Runs) -> list[str]:
    first = next(iter(next(iter(found.values())).values()))
    metrics = list(first["baseline"])
    mean = ("mean",) if len(metrics) > 1 else ()
    head = ("row", "kept", *metrics, *mean, "seeds", "trained in the matrices", "trained in all", "steps")
    lines = table(head, [_cells(row, found[row, keep], metrics) for row, keep in rows() if (row, keep) in found])
    constant = ", ".join(f"{name} {number(value)}" for name, value in first["baseline"].items())
    lines += ["", f"A constant answer scores {constant}: {first['baseline_is']}."]
    differences = [cells for pair in pairs() if (cells := _difference(*pair, found))]
    return [*lines, "", *table(("difference of the means, seed by seed", "points", "seeds"), differences)]


def pairs() -> list[tuple[tuple[str, float | None], tuple[str, float | None]]]:
    """The questions: which two rows are compared."""
    plain: list[Any] = [(("lfa", None), (other, None)) for other in ("full", "lora", "last-layers")]
    others = {"squeeze": CONTROLS, "squeeze-cores": ("squeeze", "low-rank")}
    return plain + [((one, keep), (other, keep)) for keep in KEPT for one in others for other in others[one]]


def _difference(one: tuple[str, float | None], other: tuple[str, float | None], found: Runs) -> tuple[str, ...]:
    seeds = sorted(set(found.get(one, {})) & set(found.get(other, {})))
    scores = [[found[row][seed]["headline"] for row in (one, other)] for seed in seeds]
    if not seeds or any(value is None for pair in scores for value in pair):
        return ()
    at = "" if one[1] is None else f", kept {one[1]:g}"
    what = f"{shown(one[0])} minus {shown(other[0])}{at}"
    return what, _spread([a - b for a, b in scores], "+"), ", ".join(map(str, seeds))


def _cells(row: str, by_seed: dict[int, dict[str, Any]], metrics: list[str]) -> tuple[str, ...]:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    kept = np.mean([run["matrix_parameters"] / run["matrix_dense"] for run in runs])
    scores = [_spread([run["scores"][-1][name] for run in runs]) for name in metrics]
    if len(metrics) > 1:
        scores.append(_spread([run["headline"] for run in runs]))
    return (
        shown(row), f"{kept:.3f}", *scores, ", ".join(map(str, sorted(by_seed))),
        _count(runs, "matrix_trainable"), _count(runs, "trainable"), f"{np.mean([run['steps'] for run in runs]):.0f}",
    )  # fmt: skip


def shown(row: str) -> str:
    """The name of a row that a stranger understands."""
    return plot.look(row).name


def table(head: tuple[str, ...], cells: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *cells)]


def _spread(values: list[float | None], sign: str = "") -> str:
    """The mean, and with several values the standard deviation of one."""
    if any(value is None for value in values):
        return "undefined"
    numbers = np.array(values, dtype=float)
    return f"{numbers.mean():{sign}.1f}" + (f" ± {numbers.std(ddof=1):.1f}" if len(values) > 1 else "")


def number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1f}"


def _count(runs: list[dict[str, Any]], key: str) -> str:
    return f"{np.mean([run[key] for run in runs]) / 1e6:.2f} M"


def picture(results: Path, file: Path) -> None:
    """Scores against the size of the model, one panel a task: the mean over the seeds, and each seed as a dash.

    A correlation that is undefined, of a model that answers with a constant, is drawn at zero.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = read(results)
    with rc_context(plot.style()):
        figure = Figure(figsize=(3.9 * len(found), 4.2))
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for attempt in range(2):  # texts look for their places again once the legend has taken its own
            for ax, (task, runs) in zip(panels, found.items(), strict=True):
                ax.clear()
                _panel(ax, task, runs)
            if attempt == 0:
                figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, file, "Scores on " + ", ".join(found) + " against the size of the model")


def _panel(ax: Any, task: str, runs: Runs) -> None:
    lines = {row: [runs[row, keep] for keep in KEPT if (row, keep) in runs] for row in (*SQUEEZED, *CONTROLS)}
    # Squeezing and cutting at once begin at the full bonds of LFA.
    for row in ("squeeze", "one-shot"):
        lines[row].append(runs["lfa", None])
    full = next(iter(runs["full", None].values()))
    constant = full["baseline"]
    floor = {} if None in constant.values() else {"a constant answer": float(np.mean(list(constant.values())))}
    ax.set_title(task)
    plot.frontier(
        [_point(row, by_seed) for row, steps in lines.items() for by_seed in steps]
        + [_point(row, runs[row, None]) for row in ("lora", "last-layers")],
        ylabel="mean of " + " and\n".join(constant) if len(constant) > 1 else next(iter(constant)),
        dense=_point("full", runs["full", None]), floor=floor, zero="", labels=False,
        ax=ax,
    )  # fmt: skip


def _point(row: str, by_seed: dict[int, dict[str, Any]]) -> plot.Point:
    """The mean over the seeds, and MB of all weights in float32."""
    scores = [run["headline"] or 0.0 for run in by_seed.values()]
    size = float(np.mean([4e-6 * run["total"] for run in by_seed.values()]))
    return plot.Point(row, size, float(np.mean(scores)), each=tuple(scores))


def main() -> None:
    commands = Commands(__doc__)
    commands.run.add_argument("--tasks", nargs="+", default=["MRPC", "STS-B", "SST-2"])
    commands.run.add_argument("--float32", action="store_true", help="without autocast to bfloat16")
    commands.run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    commands.run.add_argument("--plain", nargs="*", default=list(PLAIN))
    commands.run.add_argument("--kept", nargs="*", type=float, default=list(KEPT))
    arguments = commands.asked(tables, picture)
    if arguments is None:
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    tasks = [load_task(task, arguments.data_dir, limit=LIMIT.get(task)) for task in arguments.tasks]
    for seed in arguments.seeds:
        for data in tasks:
            Maker(data, seed, arguments.results, not arguments.float32).make(arguments.plain, arguments.kept)


if __name__ == "__main__":
    main()
