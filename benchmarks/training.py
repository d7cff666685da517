"""A training step of every method on a sentence encoder, and what a decision of squeezing costs.

``python benchmarks/training.py`` prints step times (all methods take turns in one process, on the same batches), peak
memory (a process each: the largest resident set, less what it was before the first step), the size of the optimiser's
state, and the time of fresh spectra and of one ranking of all bonds. The batches are made up: 32 texts of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import SEED, clock, header, print_head, print_row, take_turns  # isort: skip

import numpy as np
import torch
import transformers

from mpo_tn.app.demo import demo_model
from mpo_tn.app.fidelity import sample_sentences
from mpo_tn.torch import MPOLayer, Ranking, bond_spectra
from mpo_tn.tuning import Method, Run, Settings, start
from mpo_tn.tuning.tasks import Split, TaskData, find_task

ENCODER = r".*encoder.*(query|key|value|dense)"
METHODS = ("full", "lfa", "lora", "last-layers")


def data() -> TaskData:
    """Long texts with labels at random: the time of a step does not depend on what they say."""
    text = " ".join(sample_sentences(400))
    rng = np.random.default_rng(SEED)
    places = rng.integers(0, len(text) - 2000, 64)
    split = Split(tuple((text[k : k + 2000],) for k in places), tuple(int(label) for label in rng.integers(0, 2, 64)))
    return TaskData(find_task("SST-2"), split, {"dev": split}, "made up")


def run_of(method: str, bf16: bool) -> Run:
    settings = Settings(bf16=bf16, epochs=100, seed=SEED)
    return start(demo_model(), data(), Method(method, target=ENCODER), settings)


def peak(method: str, bf16: bool) -> dict[str, float]:
    """Megabytes: the largest resident set before and after three steps, and the optimiser's state."""
    run = run_of(method, bf16)
    before = high_water()
    for _ in range(3):
        run.step()
    tensors = [v for state in run.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    state = sum(v.numel() * v.element_size() for v in tensors) / 2**20
    return {"before": before, "peak": high_water(), "state": state}


def high_water() -> float:
    """The largest resident set of this process in megabytes; ``getrusage`` would tell that of its parent, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def steps(repeats: int, bf16: bool) -> None:
    print(f"\nA step of 32 texts of 128 tokens, {'bfloat16 autocast' if bf16 else 'float32'}\n")
    print_head("method", "s a step", "of full", "peak MB", "of which before the first step", "optimiser's state MB")
    runs = {method: run_of(method, bf16) for method in METHODS}
    medians, _ = take_turns({method: run.step for method, run in runs.items()}, repeats)
    for method in METHODS:
        command = [sys.executable, __file__, "--peak", method, *(["--bf16"] if bf16 else [])]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(told.splitlines()[-1])
        print_row(
            method, f"{medians[method]:.2f}", f"{medians[method] / medians['full']:.2f}", f"{found['peak']:.0f}",
            f"{found['before']:.0f}", f"{found['state']:.1f}",
        )  # fmt: skip


def decision(repeats: int) -> None:
    print("\nOne decision of squeezing, 36 matrices at full bonds\n")
    model = run_of("lfa", False).model
    spectra = bond_spectra(model)
    specs = {name: module.spec for name, module in model.named_modules() if isinstance(module, MPOLayer)}
    cuts: dict[int, list[float]] = {1: [], 150: []}
    for _ in range(repeats):
        for count, times in cuts.items():
            began = clock()
            ranking = Ranking(spectra, specs)
            for _ in range(count):
                best = ranking.best()
                assert best is not None
                ranking.take(best)
            times.append(clock() - began)
    fresh: list[float] = []
    for _ in range(repeats):
        began = clock()
        bond_spectra(model)
        fresh.append(clock() - began)
    print_head("what", "ms")
    print_row("fresh spectra of all bonds", f"{1000 * np.median(fresh):.0f}")
    for count, times in cuts.items():
        print_row(f"all bonds ranked and the best {count} cuts taken", f"{1000 * np.median(times):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--peak", choices=METHODS, help="only that, as JSON")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, arguments.bf16)))
        return
    print(header(arguments.repeats))
    for bf16 in (False, True):
        steps(arguments.repeats, bf16)
    decision(arguments.repeats)


if __name__ == "__main__":
    main()
