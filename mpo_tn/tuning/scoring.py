"""What a model scores: its losses on text, and its predictions on a task, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpo_tn.torch.models.evaluating import evaluating
from mpo_tn.tuning.settings import Settings
from mpo_tn.tuning.tasks.batches import Batch, Batches, text_bytes
from mpo_tn.tuning.tasks.data import Data, TextData


def scores_of(model: Any, data: Data, splits: Mapping[str, Batches], settings: Settings) -> dict[str, float]:
    """The scores of a model with a head on a dev set, or its perplexities; the mode of the model is restored.

    Args:
        model: one for the task.
        data: the task, or the text.
        splits: the batches of each dev split; of text those of ``"valid"``.
        settings: where and in which precision to compute.
    """
    with evaluating(model):
        if isinstance(data, TextData):
            losses, counts = losses_of(model, splits["valid"], settings)
            return perplexities(losses, counts, text_bytes(data))
        predictions = {
            split: predictions_of(model, batches, settings, data.task.is_regression)
            for split, batches in splits.items()
        }
        return data.scores(predictions)


def logits_of(model: Any, batch: Batch, settings: Settings) -> torch.Tensor:
    """The logits in single precision, whatever they were computed in."""
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=settings.bf16):
        return model(**batch.inputs).logits.float()


def loss_of(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The mean loss: cross entropy of classes or next tokens, the squared error of scores."""
    if logits.ndim == 3:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    if batch.labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1), batch.labels)
    return functional.cross_entropy(logits, batch.labels)


def losses_of(model: Any, batches: Batches, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Of every block of text the sum of the losses of its tokens, in nats, and how many of them are scored.

    The first token of a block is context alone; see :func:`~mpo_tn.tuning.tasks.batches.text_batches`.
    """
    sums, counts = np.zeros(len(batches.rows)), np.zeros(len(batches.rows), dtype=np.int64)
    with evaluating(model), torch.no_grad():
        for batch in batches.in_order():
            moved = batch.to(settings.device)
            logits, labels = logits_of(model, moved, settings)[:, :-1], moved.labels[:, 1:]
            losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            chosen = list(batch.examples)
            sums[chosen] = losses.double().sum(1).cpu().numpy()
            counts[chosen] = (labels != -100).sum(1).cpu().numpy()
    return sums, counts


def perplexities(losses: np.ndarray, counts: np.ndarray, size: int) -> dict[str, float]:
    """Per token, and per byte of a text of that size, from what :func:`losses_of` gives.

    >>> perplexities(np.log([2.0, 8.0]), np.array([1, 1]), 4)
    {'perplexity': 4.0, 'byte perplexity': 2.0}
    """
    total = float(losses.sum())
    return {"perplexity": _exp(total / int(counts.sum())), "byte perplexity": _exp(total / size)}


def predictions_of(model: Any, batches: Batches, settings: Settings, is_regression: bool) -> np.ndarray:
    """Class numbers or scores, in the order of the examples."""
    found = np.zeros(len(batches.rows), dtype=np.float64 if is_regression else np.int64)
    with evaluating(model), torch.no_grad():
        for batch in batches.in_order():
            logits = logits_of(model, batch.to(settings.device), settings)
            predicted = logits.squeeze(-1) if is_regression else logits.argmax(-1)
            found[list(batch.examples)] = predicted.cpu().numpy()
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
