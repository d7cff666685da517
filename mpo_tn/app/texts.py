"""A file of text to batches: a row a text for encoders and classifiers, blocks of tokens for a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.tuning import read_texts
from mpo_tn.tuning.tasks.batches import Batches, sentence_batches, text_batches

T = TypeVar("T")

Kind = Literal["encoder", "classifier", "language model"]

_MOST_HELD_BACK = 256


def kind_of(model: Any) -> Kind:
    """What a model makes of text: ``"encoder"``, ``"classifier"`` or ``"language model"``.

    Raises:
        MPOError: a model that reads one text and writes another.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise MPOError(
            f"a {type(model).__name__} reads one text and writes another, and there are no batches for it here"
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "classifier"
    return "language model" if model.can_generate() else "encoder"


def read_distinct(path: Path, column: str | None, kind: Kind) -> tuple[str, ...]:
    """The texts of a file, see :func:`~mpo_tn.tuning.tasks.read_texts`; one that comes again is left out.

    A language model gets a ``.txt`` file whole.

    Raises:
        MPOError: the file cannot be read, or there is no text.
    """
    if kind == "language model":
        return read_texts(path, column, whole=True)
    return tuple(dict.fromkeys(text.strip() for text in read_texts(path, column)))


def batches_of(
    texts: Sequence[str], kind: Kind, tokenizer: Any, *, batch_size: int, max_length: int, seed: int = 0
) -> Batches:
    """Texts as a model of this kind reads them: a row each, cut to ``max_length`` tokens, or blocks of that length.

    Raises:
        MPOError: no text, text that the tokenizer does not know, a batch size or length that holds nothing.
    """
    make = text_batches if kind == "language model" else sentence_batches
    return make(texts, tokenizer, batch_size=batch_size, max_length=max_length, seed=seed)


def hold_back(batches: Batches, kind: Kind) -> tuple[Batches, Batches]:
    """What is learnt from, and a tenth that is not: of a language model the end of the text, else rows drawn from it.

    Raises:
        MPOError: there is one row.
    """
    count = len(batches.rows)
    if count < 2:
        raise MPOError(
            f"there are {count} texts, or blocks, to learn from and to judge by: two at least are needed; give more "
            "text, or a smaller --max-length"
        )
    back = max(1, min(_MOST_HELD_BACK, count // 10))
    if kind == "language model":
        learnt, held = np.arange(count - back), np.arange(count - back, count)
    else:
        order = np.random.default_rng(batches.seed).permutation(count)
        learnt, held = np.sort(order[back:]), np.sort(order[:back])
    return _some(batches, learnt), replace(_some(batches, held), seed=0)


def in_random_order(batches: Batches) -> list[Mapping[str, torch.Tensor]]:
    """What a model is called with, every row once; batches come in the order that their seed says."""
    return [batches.at(step).inputs for step in range(batches.per_epoch)]


def drawn(items: Sequence[T], most: int, seed: int) -> list[T]:
    """At most so many, drawn by the seed, in the order in which they stand.

    >>> drawn("abcdef", 3, seed=0), drawn("ab", 3, seed=0)
    (['c', 'd', 'f'], ['a', 'b'])
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(items))[:most])
    return [items[int(k)] for k in chosen]


def _some(batches: Batches, rows: np.ndarray) -> Batches:
    return replace(batches, rows=[batches.rows[int(k)] for k in rows], labels=None)
