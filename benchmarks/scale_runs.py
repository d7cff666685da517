"""Streamed runs of a checkpoint of middle size, watched from outside: ``python benchmarks/scale_runs.py SOURCE OUT N``
is one of them, in N processes. :mod:`scale` starts them, and compares with what was predicted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("MPO_TN_BENCH_CPU", "1")  # one thread

import common  # threads, before NumPy  # noqa: F401
import torch
import transformers
from scale_units import DTYPE, anonymous, transferred, weights

from mpo_tn.planning.effort import Effort, effort_of
from mpo_tn.torch import MPOConfig, plan
from mpo_tn.torch.hf.stream import compress_folder

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 1024, "tie_word_embeddings": False,
}  # fmt: skip
"""Of a Llama: 28 matrices of three sizes."""
CONFIG = MPOConfig(
    sites="low-rank",
    keep=0.5,
    overrides={"re:.*(gate|up)_proj": {"sites": 5}, "re:.*down_proj": {"sites": 1, "keep": None, "bits": 4}},
)
"""Attention in low rank, two of the feed-forward matrices in chains, one in integers: short and long ones."""
SHARD = 200_000_000
_EVERY = 0.05


def model() -> Any:
    """The model, without numbers."""
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(DTYPE)


def write_source(folder: Path) -> None:
    """Random weights with singular values such as trained ones have."""
    dense = model().to_empty(device="cpu")
    for number, parameter in enumerate(dense.parameters()):
        with torch.no_grad():
            one = parameter.ndim < 2
            parameter.copy_(torch.ones_like(parameter) if one else weights(*parameter.shape, seed=number))
    dense.save_pretrained(folder, max_shard_size="500MB")


def efforts() -> tuple[list[Effort], int]:
    """What the law says of every matrix, and the bytes of what stays as it is."""
    dense = model()
    units = plan(dense, CONFIG).units
    total = sum(parameter.numel() for parameter in dense.parameters())
    beside = total - sum(unit.dense_parameters for unit in units)
    return [effort_of(unit, DTYPE.itemsize) for unit in units], beside * DTYPE.itemsize


def measure(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """A run in a process of its own and its workers: wall, CPU seconds, memory and bytes, and what others took."""
    busy = _busy_everywhere()
    start = time.perf_counter()
    command = [sys.executable, __file__, str(source), str(out), str(workers)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    cpu: dict[int, float] = {}
    moved: dict[int, tuple[int, int]] = {}
    most: dict[int, int] = {}
    depths: dict[int, int] = {}
    together = 0
    while child.poll() is None:
        held = 0
        for pid, depth in _family(child.pid):
            depths[pid] = depth
            with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
                cpu[pid], moved[pid], now = _cpu_seconds(pid), transferred(pid), anonymous(pid)
                held += now
                most[pid] = max(most.get(pid, 0), now)
        together = max(together, held)
        time.sleep(_EVERY)
    elapsed = time.perf_counter() - start
    assert child.stdout is not None
    if child.returncode:
        raise SystemExit(f"the run with {workers} workers failed")
    told = json.loads(child.stdout.read().splitlines()[-1])
    # The pool's server imports everything, its children do the work.
    workers_cpu = sum(seconds for pid, seconds in cpu.items() if depths[pid] == 2)
    phases = told["phases"]
    others = _busy_everywhere() - busy - sum(cpu.values())
    return {
        **told,
        "cpu_units": phases["write"][1] - phases["compress"][1] if workers == 1 else workers_cpu,
        "units": [unit.to_dict() for unit in plan(model(), CONFIG).units],
        "memory": max(most.values()),
        "together": together,
        "processes": len(most),
        "read": told["moved"][0] + sum(moved[pid][0] for pid in moved if depths[pid] == 2),
        "written": told["moved"][1] + sum(moved[pid][1] for pid in moved if depths[pid] == 2),
        "cores": os.cpu_count(),
        "cores_of_others": max(others, 0.0) / elapsed,
    }


def _family(pid: int, depth: int = 0) -> Iterator[tuple[int, int]]:
    """A process and all that it has started, with their generation."""
    yield pid, depth
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child), depth + 1)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy_everywhere() -> float:
    """CPU seconds that all processes of the machine have taken."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    source, out, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    transformers.logging.set_verbosity_error()
    began = [time.perf_counter(), time.process_time()]
    moved = transferred()
    phases: dict[str, list[float]] = {}

    def tell(done: int, total: int, what: str) -> None:
        phase = "write" if what == "writing the model" else "look" if what.startswith("looking") else "compress"
        phases.setdefault(phase, [time.perf_counter() - began[0], time.process_time() - began[1]])

    compress_folder(source, out, CONFIG, workers=workers, shard_bytes=SHARD, progress=tell)
    ended = [time.perf_counter() - began[0], time.process_time() - began[1]]
    found = {
        "seconds": ended[0],
        "cpu_main": ended[1],
        "moved": [after - before for after, before in zip(transferred(), moved, strict=True)],
        "phases": {**phases, "end": ended},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
