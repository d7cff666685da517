"""How defaults of fine-tuning and squeezing were chosen, on a tenth of the training set that is not trained on.

``python benchmarks/choices.py rates DATA_DIR RESULTS --tasks MRPC STS-B`` tries learning rates, and
``python benchmarks/choices.py scores DATA_DIR RESULTS --tasks MRPC`` what is cut first. Runs that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two of them side by side on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import transformers
from glue import ENCODER, LIMIT, number, table

from mpo_tn.app.demo import demo_model
from mpo_tn.storage.files import write_whole
from mpo_tn.tuning import (
    Method,
    Settings,
    SqueezePhase,
    Squeezing,
    TaskData,
    carry_out,
    finetune,
    hold_out,
    load_task,
    phases_of,
    start,
)

EPOCHS = 3
TRIED = (
    ("lfa", 5e-5, 2e-4), ("lfa", 5e-5, 5e-4), ("lfa", 5e-5, 1e-3), ("lfa", 2e-4, 5e-4), ("lora", 5e-5, 5e-4),
    ("lora", 5e-5, 1e-3), ("lora", 2e-4, 5e-4), ("full", 5e-5, 5e-4), ("full", 1e-4, 5e-4), ("low-rank", 5e-5, 5e-5),
    ("low-rank", 5e-5, 1e-4), ("low-rank", 5e-5, 2e-4), ("low-rank", 5e-5, 5e-4), ("low-rank", 1e-4, 1e-4),
    ("low-rank", 2e-4, 1e-4), ("low-rank", 2e-4, 2e-4), ("lfa-cores", 2e-4, 2e-5), ("lfa-cores", 2e-4, 5e-5),
    ("lfa-cores", 2e-4, 1e-4), ("lfa-cores", 2e-4, 2e-4),
)  # fmt: skip
"""Methods with the rates of dense parameters and of tensors that are tried on held-out examples.

``lfa-cores`` trains the central tensors as well.
"""
SCORES = ("error_per_parameter", "error")
CUTS, ROUNDS = 100, 8


def try_rates(data: TaskData, results: Path, bf16: bool) -> None:
    """Each method at each of its rates, trained without and scored on the held-out tenth, into one file each."""
    rest, held = hold_out(data)
    for name, lr, tensor_lr in TRIED:
        file = results / f"{data.name}-{name}-{lr:g}-{tensor_lr:g}.json"
        if not file.exists():
            keep = 0.6 if name == "low-rank" else None
            kind, policy = ("lfa", "cores") if name == "lfa-cores" else (name, "auxiliary")
            how = Method(kind, target=ENCODER, keep=keep, policy=policy, lr=lr, tensor_lr=tensor_lr)
            settings = Settings(epochs=EPOCHS, bf16=bf16)
            result, _ = finetune(demo_model(), replace(rest, dev=held.dev), how, settings)
            document = {key: result.to_dict()[key] for key in ("headline", "scores", "losses", "steps", "versions")}
            write_whole(file, json.dumps(document, indent=1).encode())
            print(f"{file.stem}: {result.headline:.2f}", flush=True)


def rates_table(results: Path) -> str:
    """The headline by method and rates, a column each task."""
    tasks = sorted({file.stem.partition("-lfa")[0] for file in results.glob("*-lfa-*.json")})
    cells: list[tuple[str, ...]] = []
    for name, lr, tensor_lr in TRIED:
        files = [results / f"{task}-{name}-{lr:g}-{tensor_lr:g}.json" for task in tasks]
        scores = [json.loads(file.read_text())["headline"] if file.exists() else "-" for file in files]
        shown = [score if score == "-" else number(score) for score in scores]
        cells.append((name, f"{lr:g}", "" if name == "full" else f"{tensor_lr:g}", *shown))
    return "\n".join(table(("method", "lr", "tensor_lr", *tasks), cells))


def try_scores(data: TaskData, results: Path, bf16: bool) -> None:
    """LFA, then cuts without tuning, by each score from the same state."""
    file = results / f"{data.name}-scores.json"
    if file.exists():
        return
    rest, held = hold_out(data)
    method, settings = Method("squeeze", target=ENCODER), Settings(EPOCHS, bf16=bf16)
    tune = replace(phases_of(method, settings)[0], scored=False)
    run = start(demo_model(), replace(rest, dev=held.dev), method, settings, [tune])
    carry_out(run)
    mark = run.mark()
    found: dict[str, object] = {"start": run.data.headline(run.evaluate())}
    for score in SCORES:
        how = Squeezing(delta=100.0, cuts_per_round=CUTS, tune_steps=0, max_rounds=ROUNDS, score=score)
        run.go_on_with(SqueezePhase(how, scored=False))
        carry_out(run)
        found[score] = [(part["kept"], part["value"]) for part in run.squeezed["rounds"]]
        run.go_back(mark)
    write_whole(file, json.dumps(found, indent=1).encode())


def scores_table(results: Path) -> str:
    """Kept ratio and score by the number of cuts."""
    lines: list[str] = []
    for file in sorted(results.glob("*-scores.json")):
        found = json.loads(file.read_text())
        columns = [name for score in SCORES for name in (f"{score}: kept", "headline")]
        cells = [
            (str(CUTS * (k + 1)), *(part for score in SCORES for part in _pair(found[score][k]))) for k in range(ROUNDS)
        ]
        task = file.stem.removesuffix("-scores")
        lines += [f"{task}, before the first cut {found['start']:.1f}", "", *table(("cuts", *columns), cells), ""]
    return "\n".join(lines)


def _pair(part: tuple[float, float]) -> tuple[str, str]:
    return f"{part[0]:.3f}", number(part[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("rates", "scores"))
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["MRPC", "STS-B"])
    parser.add_argument("--float32", action="store_true", help="without autocast to bfloat16")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make = try_rates if arguments.what == "rates" else try_scores
    for task in arguments.tasks:
        data = load_task(task, arguments.data_dir, limit=LIMIT.get(task))
        make(data, arguments.results, not arguments.float32)
    print((rates_table if arguments.what == "rates" else scores_table)(arguments.results))


if __name__ == "__main__":
    main()
