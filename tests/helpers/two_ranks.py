"""Two processes of one group, in which heal, refine, calibrate and plain training are held against one process.

Run by tests/torch/models/test_ranks.py, once for each rank: ``python -m helpers.two_ranks CHECKS RANK FOLDER``. What
went wrong is an exception, with which the process ends.
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from helpers.heal_task import BATCHES, COUNTING, DEV, Task, batch, bits, without_seconds
from mpo_tn import MPOError
from mpo_tn.torch.state.host_values import tensors_digest


def join(rank: int, folder: Path, name: str = "group") -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / name}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )


def same_everywhere(value: Any) -> None:
    told: list[Any] = [None, None]
    distributed.all_gather_object(told, value)
    assert told[0] == told[1]


def double(family: str, in_bits: int | None = None) -> Task:
    """In double precision: Adam makes a step of any gradient, of one that is rounding alone too."""
    task = Task(family, in_bits)
    task.model.double()
    task.teacher.double()
    return task


def apart(one: Any, other: Any) -> float:
    """The largest difference of two models, relative to the largest entry of each tensor."""
    here, there = dict(one.state_dict()), dict(other.state_dict())
    return max(
        float((here[name].double() - there[name].double()).abs().max() / there[name].double().abs().max().clamp(min=1e-3))
        for name in here
        if here[name].is_floating_point()
    )


RAGGED = [batch(1), batch(2, rows=1), batch(3, rows=3)]
SOME_LABELS = [{**part, "labels": part["input_ids"].clone().index_fill_(0, torch.tensor([0, 2, 4]), -100)} for part in COUNTING]

CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "features": ("bert", None, {}),
    "blocks": ("bert", None, {"blocks": 0.5}),
    "scales": ("bert", 3, {}),
    "logits": ("llama", None, {"objective": "logits"}),
    "loss": ("llama", None, {"objective": "loss", "batches": SOME_LABELS, "dev": COUNTING}),
    "ragged": ("bert", None, {"batches": RAGGED, "dev": RAGGED}),
}


def heal_as_one(rank: int, folder: Path) -> None:
    """Losses, held-out values and tensors are those of one process; the ranks have the same bits."""
    alone = {}
    for name, (family, in_bits, options) in CASES.items():
        task = double(family, in_bits)
        alone[name] = task.run(steps=6, every=2, **options), task.model
    join(rank, folder)
    for name, (family, in_bits, options) in CASES.items():
        task = double(family, in_bits)
        if rank:  # what the first has counts
            next(task.model.parameters()).data.add_(1.0)
        result = task.run(steps=6, every=2, **options)
        expected, model = alone[name]
        same_everywhere((result, tensors_digest(task.model.state_dict().values())))
        print(name, apart(task.model, model), max(abs(a - b) for a, b in zip(result.losses, expected.losses)),
              [x[1]-y[1] for x,y in zip(result.held_out, expected.held_out)], result.best_step, expected.best_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
