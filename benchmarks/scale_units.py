"""One matrix of a streamed run: what there is to measure of it, and how. Part of :mod:`scale`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

os.environ.setdefault("MPO_TN_BENCH_CPU", "1")  # one thread

import common  # threads, before NumPy  # noqa: F401
import torch
from torch import nn

from mpo_tn.planning.effort import Effort, effort_of
from mpo_tn.planning.entries import ACTIVATION, FROBENIUS, UnitPlan
from mpo_tn.planning.structure import structure
from mpo_tn.storage.checkpoint import WEIGHTS, open_checkpoint, write_shard
from mpo_tn.torch import Moments, MPOConfig
from mpo_tn.torch.models.stream_unit import UnitTask, do_unit, raw, versions, write_moments
from mpo_tn.torch.models.survey import DenseUnit

KINDS: dict[str, tuple[MPOConfig, str]] = {
    "low rank": (MPOConfig(sites="low-rank", keep=0.5), FROBENIUS),
    "5 sites": (MPOConfig(sites=5, keep=0.5), FROBENIUS),
    "dense in 4 bits": (MPOConfig(sites=1, bits=4), FROBENIUS),
    "low rank in 4 bits": (MPOConfig(sites="low-rank", keep=0.5, bits=4), FROBENIUS),
    "low rank, metric": (MPOConfig(sites="low-rank", keep=0.5), ACTIVATION),
    "5 sites, metric": (MPOConfig(sites=5, keep=0.5), ACTIVATION),
    "dense in 4 bits, metric": (MPOConfig(sites=1, bits=4), ACTIVATION),
}
"""What matrices become, half of their numbers where there is a choice, and in what the error is made small."""
DTYPE = torch.bfloat16
_STRONG = 64
"""Directions that stand out of the noise."""
_NOISE, _TIMES = 0.46, 2.0
_EVERY = 0.003


def planned(kind: str, out: int, in_: int) -> UnitPlan:
    """What a matrix becomes."""
    config, metric = KINDS[kind]
    return UnitPlan(("layer",), structure("linear", out, in_, config), "bfloat16", metric=metric)


def effort(kind: str, out: int, in_: int) -> Effort:
    """What the law says of it."""
    return effort_of(planned(kind, out, in_), DTYPE.itemsize)


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Numbers of the spectrum that trained matrices have: noise, and 64 directions up to twice as strong as that.

    The first singular value is 4 to 8 times the median, and the first quarter of them has .55 to .8 of the energy, as
    those of MiniLM (4.2 to 7.1 times, .55 to .81).
    """
    edge = _NOISE * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
    return _strong_in_noise(rows, columns, seed, lambda k: _TIMES * edge / k**0.5).mul_(0.02)


def moments(size: int, seed: int = 1) -> Moments:
    """Second moments such as text has: some inputs vary a thousand times more than others, and many vary together."""
    together = _strong_in_noise(size, min(2 * _STRONG, size), seed, lambda k: 1 / k).mul_(0.02).double()
    second = together @ together.T
    second.diagonal().add_(torch.logspace(0, -3, size, dtype=torch.float64) * 1e-3)
    return Moments(tokens=10 * size, second=second)


def _strong_in_noise(rows: int, columns: int, seed: int, size: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    few = min(_STRONG, rows, columns)
    strong = torch.randn(rows, few, generator=generator) * size(torch.arange(1, few + 1))
    noise = torch.randn(rows, columns, generator=generator).mul_(torch.logspace(0, -1, columns)[None, :])
    return noise.addmm_(strong, torch.randn(few, columns, generator=generator))


def prepare(kind: str, out: int, in_: int, folder: Path) -> None:
    """Write the weight, and moments where they are needed."""
    weight = weights(out, in_, seed=0).to(DTYPE)
    write_shard(folder / WEIGHTS, {"layer.weight": raw(weight)})
    if KINDS[kind][1] == ACTIVATION:
        write_moments(folder / "moments.safetensors", moments(in_))


def task(kind: str, out: int, in_: int, folder: Path, number: int = 0) -> UnitTask:
    """The unit of work, as a streamed run makes it."""
    with torch.device("meta"):
        layer = nn.Linear(in_, out, bias=False, dtype=DTYPE)
    unit = DenseUnit(layer.weight, (layer,), (("layer",),), ("linear",))
    in_metric = KINDS[kind][1] == ACTIVATION
    known = str(folder / "moments.safetensors") if in_metric else None
    stored = open_checkpoint(folder).tensors["layer.weight"]
    return UnitTask(
        planned(kind, out, in_), unit, stored, {}, str(folder / f"{number}.safetensors"), known, versions(), "scale"
    )


def anonymous(pid: int | str = "self") -> int:
    """Bytes of memory that a process has to itself."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def transferred(pid: int | str = "self") -> tuple[int, int]:
    """Bytes that a process has read and written by calls so far, from and to the disk or its cache."""
    lines = Path(f"/proc/{pid}/io").read_text(encoding="utf-8").splitlines()
    numbers = dict(line.split(": ") for line in lines)
    return int(numbers["rchar"]), int(numbers["wchar"])


@contextmanager
def watched() -> Generator[list[int]]:
    """The most anonymous memory meanwhile, looked at every few milliseconds, as the one entry of a list."""
    most, over = [anonymous()], Event()

    def watch() -> None:
        while not over.wait(_EVERY):
            most[0] = max(most[0], anonymous())

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def measure(kind: str, out: int, in_: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Do the unit so often; the least of the times counts."""
    walls: list[float] = []
    cpus: list[float] = []
    peaks: list[int] = []
    for number in range(repeats):
        own = task(kind, out, in_, folder, number)
        held, before = anonymous(), transferred()
        with watched() as most:
            start, cpu = time.perf_counter(), time.thread_time()  # BLAS has no other thread
            do_unit(own)
            walls.append(time.perf_counter() - start)
            cpus.append(time.thread_time() - cpu)
        after = transferred()
        peaks.append(most[0] - held)
    # Moments are mapped, which no call tells of.
    mapped = 0 if own.moments is None else Path(own.moments).stat().st_size
    return {
        "seconds": min(walls),
        "cpu": min(cpus),
        "repeats": repeats,
        "memory": peaks[0],
        "read": after[0] - before[0] + mapped,
        "written": after[1] - before[1],
    }
