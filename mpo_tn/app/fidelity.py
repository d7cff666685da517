"""How much of what a sentence encoder says survives compression, measured on text that every Python carries."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.evaluating import evaluating
from mpo_tn.tuning.tasks.batches import Batches, sentence_batches


@dataclass(frozen=True)
class Fidelity:
    """How close the embeddings of a compressed encoder are to those of the dense one.

    ``cosine`` is the mean over sentences, ``worst_cosine`` the smallest. ``neighbours`` is the mean share of each
    sentence's ten nearest other sentences that stay among its ten nearest. ``rank_correlation`` is Spearman's, over all
    pairs of sentences, of their similarities.
    """

    cosine: float
    worst_cosine: float
    neighbours: float
    rank_correlation: float

    def to_dict(self) -> dict[str, float]:
        """A dictionary that JSON can hold."""
        return asdict(self)


def sample_sentences(count: int) -> list[str]:
    """``count`` sentences of Python's own language reference, spread evenly over it; the same for the same Python.

    >>> len(sample_sentences(3))
    3
    """
    from pydoc_data.topics import topics

    text = " ".join(re.sub(r"\s+", " ", topics[key]) for key in sorted(topics))
    sentences = [s.strip() for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text)]
    wanted = [s for s in dict.fromkeys(sentences) if 40 <= len(s) <= 300 and s.count(" ") >= 6]
    if count > len(wanted):
        raise MPOError(f"{count} sentences were asked for and Python's documentation here has {len(wanted)}")
    return [wanted[k * len(wanted) // count] for k in range(count)]


def embed(
    model: torch.nn.Module,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Mean-pooled, normalised sentence embeddings, shape (len(sentences), width), as sentence-transformers makes them.

    Args:
        model: an encoder whose output has ``last_hidden_state``.
        tokenizer: its tokenizer.
        sentences: the text; what is longer than the model reads is cut.
        batch_size: sentences at a time.
        progress: called with the number of sentences done and their total.
    """
    length = reading_length(model, tokenizer)
    batches = sentence_batches(sentences, tokenizer, batch_size=batch_size, max_length=length)
    return embed_batches(model, batches, progress=progress)


def embed_batches(
    model: torch.nn.Module, batches: Batches, *, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """What :func:`embed` gives, of text that is encoded already, in the order of the text."""
    found: np.ndarray | None = None
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    done = 0
    with evaluating(model), torch.inference_mode():
        for batch in batches.in_order():
            inputs = batch.to(device).inputs
            hidden = model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).cpu().numpy()
            if found is None:
                found = np.empty((len(batches.rows), pooled.shape[1]), dtype=np.float32)
            found[list(batch.examples)] = pooled
            done += len(pooled)
            if progress:
                progress(done, len(batches.rows))
    assert found is not None
    return found


def reading_length(model: Any, tokenizer: Any, most: int = 512) -> int:
    """How many tokens of a text a model reads, and at most so many."""
    limit = getattr(model.config, "max_position_embeddings", None) or most
    return int(min(tokenizer.model_max_length, limit, most))


def fidelity(reference: np.ndarray, other: np.ndarray, *, nearest: int = 10) -> Fidelity:
    """Compare normalised embeddings of the same sentences, row by row and as rankings.

    >>> round(fidelity(np.eye(12), np.eye(12)).cosine, 6)
    1.0
    """
    if reference.shape != other.shape or len(reference) <= nearest:
        raise MPOError(
            f"embeddings have shapes {reference.shape} and {other.shape}: need the same, over {nearest} rows"
        )
    cosines = (reference * other).sum(axis=1)
    before, after = _similarities(reference), _similarities(other)
    order_before, order_after = (np.argsort(-s, axis=1, kind="stable")[:, :nearest] for s in (before, after))
    shared = [len(set(a) & set(b)) / nearest for a, b in zip(order_before, order_after, strict=True)]
    pairs = np.triu_indices(len(reference), 1)
    constant = np.ptp(before[pairs]) == 0 or np.ptp(after[pairs]) == 0
    correlation = float("nan") if constant else float(np.asarray(spearmanr(before[pairs], after[pairs]))[0])
    return Fidelity(float(cosines.mean()), float(cosines.min()), float(np.mean(shared)), correlation)


def _similarities(rows: np.ndarray) -> np.ndarray:
    similar = rows @ rows.T
    np.fill_diagonal(similar, -np.inf)
    return similar
