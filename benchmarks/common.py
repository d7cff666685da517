"""What the benchmarks share: thread counts, turns, tables. Import it before NumPy."""

from __future__ import annotations

import os

CPU_TIME = "MPO_TN_BENCH_CPU" in os.environ
"""Set it on a machine that others use: CPU seconds of one thread instead of wall time of two."""
THREADS = 1 if CPU_TIME else 2
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = str(THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import platform
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_tn import Sites

torch.set_num_threads(THREADS)
# torchTT says at import that its C++ part is missing (it does not have one for what is measured here).
warnings.filterwarnings("ignore", message=r"[\s\S]*C\+\+ implementation not available", category=Warning)
warnings.filterwarnings("ignore", module="tensorly")
warnings.filterwarnings("ignore", module="tensornetwork")

clock = time.process_time if CPU_TIME else time.perf_counter
Cores = list[np.ndarray]
SEED = 0
PAUSE = 0.3
LIBRARIES = ("numpy", "scipy", "torch", "tensorly", "tensornetwork", "torchTT", "quimb")


def header(repeats: int, libraries: tuple[str, ...] = LIBRARIES) -> str:
    """Machine, versions, threads and seed, as a line for above a table."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    measure = "CPU seconds of one thread" if CPU_TIME else f"seconds on the wall of {THREADS} threads"
    return (
        f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"{versions}; {measure}, seed {SEED}, medians of {repeats} rounds in which the libraries take turns\n"
    )


def processor() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def take_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds and last result of each: see :func:`in_turns`."""
    times, results = in_turns(runs, repeats)
    return {name: float(np.median(values)) for name, values in times.items()}, results


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds by round and last result of each, after one round that warms up.

    In turns, so that whatever else the machine does slows them all alike, and with a pause between: NumPy, SciPy and
    torch bring a pool of threads each, and those of the last turn spin for a while on the cores the next one needs.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = clock()
            results[name] = run()
            times[name].append(clock() - start)
    return {name: values[1:] for name, values in times.items()}, results


def print_row(*cells: object) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*cells: str) -> None:
    """The head of a Markdown table."""
    print_row(*cells)
    print_row(*("---" for _ in cells))


def interleaved(matrix: np.ndarray, sites: Sites) -> np.ndarray:
    """The matrix as a tensor with one axis a site."""
    n = len(sites)
    axes = [axis for k in range(n) for axis in (k, n + k)]
    return np.ascontiguousarray(matrix.reshape(*sites.out, *sites.in_).transpose(axes).reshape(sites.sizes))


def rebuilt_error(matrix: np.ndarray, cores: Iterable[np.ndarray]) -> float:
    """The relative error of cores, contracted in double precision by plain NumPy."""
    w = np.ones((1, 1, 1))
    for core in cores:
        w = np.tensordot(w, np.asarray(core, dtype=np.float64), axes=1).transpose(0, 2, 1, 3, 4)
        w = w.reshape(w.shape[0] * w.shape[1], w.shape[2] * w.shape[3], w.shape[4])
    # In double precision: a sum of squares in single precision is off in the fifth digit.
    wide = matrix.astype(np.float64)
    return float(np.linalg.norm(w[:, :, 0] - wide) / np.linalg.norm(wide))
