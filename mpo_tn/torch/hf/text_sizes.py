"""What running a model block by block takes, by its configuration and the text alone: room on the disk, and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mpo_tn.planning.entries import UnitPlan
from mpo_tn.torch.hf.stream_job import Job

_TABLE = "embedding"
_LOGITS = 4
"""So many times what a language model gives for a batch is held in double precision, while gradients come of it."""


T = TypeVar("T")


@dataclass(frozen=True)
class TextSizes:
    """At most, in bytes.

    Attributes:
        disk: of hidden states, gradients and moments that wait in files.
        memory: of weights, moments and logits.
        read: of weights, from files.
    """

    disk: int = 0
    memory: int = 0
    read: int = 0

    @classmethod
    def of(cls, job: Job) -> TextSizes:
        """Of a run; nothing if no matrix is fitted to text."""
        if job.text is None:
            return cls()
        config = job.model.config.get_text_config()
        layers, width = (int(getattr(config, name, 0) or 0) for name in ("num_hidden_layers", "hidden_size"))
        vocabulary = int(getattr(config, "vocab_size", 0) or 0) if job.model.can_generate() else 0
        tokens, held = ([_positions(batch) for batch in part] for part in (job.text.batches, job.text.held_back))
        row = width * job.model.dtype.itemsize
        planned = [job.pairs[number][0] for number in job.on_text.values()]
        parts = _by_part((unit.name, unit) for unit in planned)
        moments = max(sum(_given(unit) + _own(unit) for unit in part) for part in parts.values())
        disk = (layers + 3) * sum(tokens) * row + moments
        if job.anchored:
            widest = max(sum(unit.spec.in_features for unit in part) for part in parts.values())
            after = sum(tokens) * (4 * row + widest * job.model.dtype.itemsize) + 2 * moments
            judging = 3 * (layers + 1) * sum(held) * row + 4 * sum(held) * (vocabulary or width)
            kept = sum(_own(unit) + unit.bytes for unit in planned)
            disk = kept + max(disk, after, judging)
        stored = [*job.names.stored.items(), *job.names.kept.items()]
        weights = _by_part((name, tensor.nbytes) for name, tensor in stored)
        memory = max(map(sum, weights.values())) + moments + _LOGITS * 8 * max(tokens) * vocabulary
        return cls(disk, memory, (4 if job.anchored else 2) * job.checkpoint.nbytes)


def _given(unit: UnitPlan) -> int:
    """Of what a layer is given; layers that share it have it once."""
    return 0 if unit.spec.kind == _TABLE else 8 * unit.spec.in_features**2


def _own(unit: UnitPlan) -> int:
    """Of the gradients at its output, or of counts."""
    return 8 * unit.spec.out_features ** (1 if unit.spec.kind == _TABLE else 2)


def _by_part(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """By what the names have up to their first number, as blocks have one: those without belong together."""
    found: dict[str, list[T]] = {}
    for name, value in named:
        parts = name.split(".")
        first = next((k for k, part in enumerate(parts) if part.isdigit()), None)
        found.setdefault("" if first is None else ".".join(parts[: first + 1]), []).append(value)
    return found


def _positions(batch: Mapping[str, Any]) -> int:
    return next((value.numel() for value in batch.values() if isinstance(value, torch.Tensor)), 0)
