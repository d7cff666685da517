"""What planning and compressing cost: seconds and memory of a whole model, and of one matrix of 4096 x 4096.

``python benchmarks/planning.py model DATA_DIR`` calibrates on sentences of STS-B, plans and compresses MiniLM with
default settings, in a process of its own, and says by how much its peak exceeds what the loaded model needs;
``python benchmarks/planning.py matrix`` fits a matrix in a metric as low rank and as a chain of four sites.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SEED, print_head, print_row, processor  # isort: skip
import numpy as np
import torch
import transformers

from mpo_tn import MPO, LowRankFits, Metric, Sites, Truncation
from mpo_tn.app.demo import demo_model
from mpo_tn.torch import MPOConfig, compress, plan
from mpo_tn.torch.hf.folder import load_model, load_tokenizer
from mpo_tn.torch.models.survey import find_units
from mpo_tn.tuning import load_task
from mpo_tn.tuning.tasks.batches import sentence_batches

SENTENCES, BITS = 1024, 2.3
SIZE, BOND, SEEN = 4096, 64, 8192
"""Of the matrix, of the bonds of its chain, and inputs that its metric is of."""
MB = 1e6


def memory(name: str) -> float:
    """Bytes resident now (``VmRSS``), or at the most since the last reset (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def timed(run: Callable[[], Any]) -> tuple[Any, float, float, float]:
    """A result; seconds on the wall, CPU seconds of all threads, and bytes of the peak above what was resident."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    wall, processed = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - processed, memory("VmHWM") - before


def model_table(folder: Path) -> None:
    """MiniLM through its default settings."""
    source = demo_model()
    train = load_task("STS-B", folder).train
    texts = list(dict.fromkeys(text for side in zip(*train.texts, strict=True) for text in side))
    drawn = [texts[k] for k in np.random.default_rng(SEED).permutation(len(texts))[:SENTENCES]]
    batches = sentence_batches(drawn, load_tokenizer(source), batch_size=32, max_length=128, seed=SEED)
    model = load_model(source).eval()
    given = [dict(batch.inputs) for batch in batches.in_order()]
    with torch.no_grad():
        model(**given[0])  # what torch allocates once
    dense = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    config = MPOConfig(bits_per_weight=BITS)
    largest = max(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    fitted = max(unit.weight.numel() for unit in find_units(model, config.target_modules)[0])
    decided, *planning = timed(lambda: plan(model, config, calibration=given))
    _, *doing = timed(lambda: compress(model, decided))
    print(f"MiniLM, {dense / MB:.1f} MB; {SENTENCES} sentences; its largest matrix, the word table, takes "
          f"{8 * largest / MB:.1f} MB in float64, the largest that is compressed {8 * fitted / MB:.1f}\n")  # fmt: skip
    print_head("step", "seconds on the wall", "CPU seconds", "peak above the loaded model, MB")
    for name, (wall, seconds, peak) in {"plan": planning, "compress": doing}.items():
        print_row(name, f"{wall:.0f}", f"{seconds:.0f}", f"{peak / MB:.0f}")
    both = [a + b for a, b in zip(planning, doing, strict=True)]
    print_row("both", f"{both[0]:.0f}", f"{both[1]:.0f}", f"{max(planning[2], doing[2]) / MB:.0f}")
    print(f"\n3 x its largest matrix in float64: {3 * 8 * largest / MB:.0f} MB; of the process at the most "
          f"{1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB:.0f} MB")  # fmt: skip


def matrix_table(sweeps: int) -> None:
    """One large matrix in the metric of correlated inputs."""
    rng = np.random.default_rng(SEED)
    weight = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    inputs = rng.standard_normal((SEEN, SIZE)).astype(np.float32) / np.arange(1, SIZE + 1, dtype=np.float32) ** 0.5
    second = (inputs.T @ inputs / SEEN).astype(np.float64)
    weight, second = torch.from_numpy(weight), torch.from_numpy(second)
    sites = Sites((8,) * 4, (8,) * 4)
    print_head("what", "seconds on the wall", "CPU seconds", "peak above the matrix and its moments, MB", "error")

    def told(name: str, found: Any, wall: float, seconds: float, peak: float) -> Any:
        print_row(name, f"{wall:.1f}", f"{seconds:.1f}", f"{peak / MB:.0f}", found[1] if found[1] is None else
                  f"{found[1]:.4f}")  # fmt: skip
        return found[0]

    def low_rank() -> tuple[Any, float]:
        fits = LowRankFits(weight, Metric(second))
        return fits.cut(SIZE // 8), fits.error(SIZE // 8) / fits.norm

    def chain() -> tuple[Any, float]:
        start, _ = MPO.from_matrix(weight, sites, Truncation(max_bond=BOND))
        better, report = start.fit(weight, sweeps=sweeps, metric=Metric(second))
        return better, report.error / report.norm

    told(f"low rank, rank {SIZE // 8}, all ranks known", *timed(low_rank))
    told(f"four sites of 8 x 8 legs, bond {BOND}, {sweeps} sweeps", *timed(chain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("model")
    whole.add_argument("data_dir", type=Path)
    one = commands.add_parser("matrix")
    one.add_argument("--sweeps", type=int, default=2)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{processor()}, {torch.get_num_threads()} threads\n")
    if arguments.command == "model":
        model_table(arguments.data_dir)
    else:
        matrix_table(arguments.sweeps)


if __name__ == "__main__":
    main()
