"""Tuning a sentence encoder on GLUE tasks, every way there is at equal steps: the runs behind ``docs/results.md``.

``python benchmarks/glue.py run DATA_DIR RESULTS --tasks MRPC --seeds 0 1`` makes the runs that are missing in RESULTS,
one file each, so that it can be stopped and started again; ``python benchmarks/glue.py table RESULTS`` prints tables.
The squeezed run of a task, seed and kept ratio comes first: the controls take its bonds and its number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs side by side on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import transformers

from mpo_tn.demo import demo_model
from mpo_tn.files import write_whole
from mpo_tn.tuning import Method, Settings, Squeezing, finetune, load_task

ENCODER = r".*encoder.*(query|key|value|dense)"
EPOCHS = 3
TUNED_EPOCHS, FINAL_EPOCHS = 2, 1
"""Of a squeezed run: on full bonds before the first cut, and after the last one."""
CUTS, STEPS = 150, 15
"""Of a round of squeezing: bonds lowered by one, and training steps after them."""
KEPT = (0.6, 0.4, 0.8)
LIMIT = {"SST-2": 10_000}
PLAIN = ("full", "lfa", "lora", "last-layers")
CONTROLS = ("one-shot", "low-rank")


def rows(plain: tuple[str, ...] = PLAIN, kept: tuple[float, ...] = KEPT) -> list[tuple[str, float | None]]:
    """Every row of the table: the method and the kept ratio it is squeezed to."""
    squeezed = [(method, keep) for keep in kept for method in ("squeeze", *CONTROLS)]
    return [*((method, None) for method in plain), *squeezed]


def run_one(task: str, seed: int, method: str, keep: float | None, data_dir: Path, results: Path, bf16: bool) -> None:
    """One run, into one file, unless it is there."""
    file = results / f"{task}-{seed}-{method}{'' if keep is None else f'-{keep:g}'}.json"
    if file.exists():
        return
    data = load_task(task, data_dir, limit=LIMIT.get(task))
    settings = Settings(epochs=EPOCHS, seed=seed, bf16=bf16)
    squeezing = None
    how = Method(method, target=ENCODER) if keep is None else None
    if method == "squeeze":
        how = Method("squeeze", target=ENCODER)
        settings = Settings(epochs=TUNED_EPOCHS, seed=seed, bf16=bf16)
        # No delta: the rows are compared at equal bonds, not at equal loss.
        squeezing = Squeezing(delta=100.0, cuts_per_round=CUTS, tune_steps=STEPS, keep=keep, final_epochs=FINAL_EPOCHS)
    elif keep is not None:
        squeezed = json.loads((results / f"{task}-{seed}-squeeze-{keep:g}.json").read_text(encoding="utf-8"))
        how = Method(method, target=ENCODER, bonds=squeezed["squeezing"]["bonds"])
        settings = Settings(max_steps=squeezed["steps"], seed=seed, bf16=bf16)
    transformers.logging.set_verbosity_error()  # the head is new, which need not be said every time
    transformers.logging.disable_progress_bar()
    result, _ = finetune(demo_model(), data, how, settings, squeezing=squeezing)
    document = {**result.to_dict(), "row": method, "keep": keep, "threads": torch.get_num_threads()}
    for part in (document["squeezing"] or {}).get("rounds", ()):
        part.pop("cuts", None)  # thousands
    write_whole(file, json.dumps(document, indent=1, default=float).encode())
    print(f"{file.stem}: {result.headline:.2f} after {result.steps} steps, {result.seconds:.0f} s", flush=True)


def tables(results: Path) -> str:
    """The tables of the runs that are there, as Markdown."""
    found: dict[tuple[str, str, float | None], list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        values = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault((values["task"], values["row"], values["keep"]), []).append(values)
    lines: list[str] = []
    for task in sorted({key[0] for key in found}):
        metrics = list(next(runs for key, runs in found.items() if key[0] == task)[0]["scores"][-1])
        lines += ["", f"## {task}", ""]
        head = ("row", "kept", *metrics, "seeds", "trained in the matrices", "trained in all", "steps")
        lines += ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
        for method, keep in rows(kept=tuple(sorted(KEPT, reverse=True))):
            runs = found.get((task, method, keep), [])
            if runs:
                lines.append(_line(method, runs, metrics))
        first = next(runs for key, runs in found.items() if key[0] == task)[0]
        constant = ", ".join(
            f"{name} {'undefined' if value is None else f'{value:.1f}'}" for name, value in first["baseline"].items()
        )
        lines.append(f"\nA constant answer scores {constant}: {first['baseline_is']}.")
    return "\n".join(lines)


def _line(method: str, runs: list[dict[str, Any]], metrics: list[str]) -> str:
    scores = [_spread([run["scores"][-1][name] for run in runs]) for name in metrics]
    kept = np.mean([run["matrix_parameters"] / run["matrix_dense"] for run in runs])
    seeds = ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"]))
    cells = (
        method, f"{kept:.3f}", *scores, seeds, _count(runs, "matrix_trainable"), _count(runs, "trainable"),
        f"{np.mean([run['steps'] for run in runs]):.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _count(runs: list[dict[str, Any]], key: str) -> str:
    return f"{np.mean([run[key] for run in runs]) / 1e6:.2f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("run")
    make.add_argument("data_dir", type=Path)
    make.add_argument("results", type=Path)
    make.add_argument("--tasks", nargs="+", default=["MRPC", "STS-B", "SST-2"])
    make.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    make.add_argument("--plain", nargs="*", default=list(PLAIN))
    make.add_argument("--kept", nargs="*", type=float, default=list(KEPT))
    make.add_argument("--float32", action="store_true", help="without autocast to bfloat16")
    show = commands.add_parser("table")
    show.add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(tables(arguments.results))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method, keep in rows(tuple(arguments.plain), tuple(arguments.kept)):
                run_one(task, seed, method, keep, arguments.data_dir, arguments.results, not arguments.float32)


if __name__ == "__main__":
    main()
