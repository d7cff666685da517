"""Examples to padded batches. A batch is a function of the seed and the step alone, so that a step is a position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.tuning.tasks.data import TextData
from mpo_tn.tuning.tasks.glue import Label, Split

# Batches whose examples are sorted together: enough to bring like lengths together, few enough to stay random.
_BATCHES_SORTED_TOGETHER = 25

Row = dict[str, list[int]]
"""One example as the tokenizer gives it."""


@dataclass(frozen=True)
class Batch:
    """``inputs`` go to the model as they are; ``labels`` are class numbers, scores or next tokens (-100: not scored).

    ``examples`` are the positions in the split.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    examples: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Positions that hold text."""
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = {key: value.to(device) for key, value in self.inputs.items()}
        return Batch(moved, self.labels.to(device), self.examples)


@dataclass(frozen=True)
class Batches:
    """The batches of one split.

    Args:
        rows: the examples, encoded.
        labels: one per example; None for text, where the next token is the label.
        padding: what fills each field up.
        batch_size: examples at a time; the last batch of an epoch may hold fewer.
        seed: of the order.
    """

    rows: Sequence[Row]
    labels: Sequence[Label] | None
    padding: Mapping[str, int]
    batch_size: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Batches that show every example once."""
        return math.ceil(len(self.rows) / self.batch_size)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs; every epoch holds every example once."""
        epoch, place = divmod(step, self.per_epoch)
        return self._collate(self._order(epoch)[place])

    def in_order(self) -> Iterator[Batch]:
        """Every example once, longest first, for evaluation: what does not fit in memory fails at once."""
        order = np.argsort([-len(row["input_ids"]) for row in self.rows], kind="stable")
        for start in range(0, len(order), self.batch_size):
            yield self._collate(order[start : start + self.batch_size])

    def _order(self, epoch: int) -> list[np.ndarray]:
        cached = self.__dict__.get("_epoch")
        if cached is None or cached[0] != epoch:
            cached = epoch, self._plan(epoch)
            object.__setattr__(self, "_epoch", cached)
        return cached[1]

    def _plan(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.rows))
        lengths = np.array([len(row["input_ids"]) for row in self.rows])
        together = self.batch_size * _BATCHES_SORTED_TOGETHER
        batches: list[np.ndarray] = []
        for start in range(0, len(order), together):
            chunk = order[start : start + together]
            chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
            batches += [chunk[k : k + self.batch_size] for k in range(0, len(chunk), self.batch_size)]
        return [batches[k] for k in random.permutation(len(batches))]

    def _collate(self, chosen: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in chosen]
        longest = max(len(row["input_ids"]) for row in rows)
        inputs = {
            key: torch.tensor([row[key] + [self.padding.get(key, 0)] * (longest - len(row[key])) for row in rows])
            for key in rows[0]
        }
        examples = tuple(int(i) for i in chosen)
        if self.labels is None:
            # The first token is context alone: of overlapping blocks each token is then scored once.
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            labels[:, 0] = -100
            return Batch(inputs, labels, examples)
        return Batch(inputs, torch.tensor([self.labels[i] for i in examples]), examples)


def task_batches(split: Split, tokenizer: Any, *, batch_size: int, max_length: int, seed: int = 0) -> Batches:
    """Sentences or pairs, cut to ``max_length`` tokens.

    Raises:
        MPOError: a batch size or length that holds nothing.
    """
    _check(batch_size, max_length)
    columns = list(zip(*split.texts, strict=True))
    rows = _encoded(columns, tokenizer, max_length)
    return Batches(rows, split.labels, padding_of(tokenizer), batch_size, seed)


def sentence_batches(
    texts: Sequence[str], tokenizer: Any, *, batch_size: int, max_length: int, seed: int = 0
) -> Batches:
    """Texts without labels, each a row cut to ``max_length`` tokens: to embed, to calibrate on, to measure a model on.

    Raises:
        MPOError: no text, a batch size or length that holds nothing, text that the tokenizer does not know.
    """
    _check(batch_size, max_length)
    if not texts:
        raise MPOError("there is no text: give at least one")
    return Batches(_encoded([texts], tokenizer, max_length), None, padding_of(tokenizer), batch_size, seed)


def text_batches(texts: Sequence[str], tokenizer: Any, *, batch_size: int, max_length: int, seed: int = 0) -> Batches:
    """Blocks of ``max_length`` tokens of all texts in a row; neighbours share one token: each is predicted once.

    Raises:
        MPOError: the text is shorter than two tokens.
    """
    _check(batch_size, max_length)
    start = first_token(tokenizer)
    ids: list[int] = []
    for text in texts:
        ids += [] if start is None else [start]
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise MPOError(f"the text has {len(ids)} tokens: two at least are needed to predict one from the other")
    blocks = [ids[k : k + max_length] for k in range(0, len(ids) - 1, max_length - 1)]
    rows = [{"input_ids": block, "attention_mask": [1] * len(block)} for block in blocks]
    _check_known(rows, tokenizer)
    return Batches(rows, None, padding_of(tokenizer), batch_size, seed)


def first_token(tokenizer: Any) -> int | None:
    """What is put before every text, as context alone: the token that begins texts, or ends them, if there is one."""
    return next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)


def text_bytes(data: TextData) -> int:
    """Bytes of the validation text, over which a byte perplexity is spread."""
    return sum(len(text.encode()) for text in data.valid)


def padding_of(tokenizer: Any) -> dict[str, int]:
    """What fills each field up; a tokenizer without a padding token pads with 0, which the mask hides."""
    return {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0, "attention_mask": 0}


def unknown_share(rows: Sequence[Row], tokenizer: Any) -> float:
    """The share of tokens that stand for what the tokenizer does not know, special tokens apart.

    Tokenizers that spell out bytes know everything: 0.
    """
    unknown = tokenizer.unk_token_id
    special = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
    if unknown is None or unknown in special:
        return 0.0
    ids = np.concatenate([row["input_ids"] for row in rows])
    text = ids[~np.isin(ids, [number for number in special if number is not None])]
    return float((text == unknown).mean()) if len(text) else 0.0


# Half of the words lost is no longer the text; English has a few in a thousand.
_MOST_UNKNOWN = 0.5


def _check_known(rows: Sequence[Row], tokenizer: Any) -> None:
    share = unknown_share(rows, tokenizer)
    if share > _MOST_UNKNOWN:
        raise MPOError(
            f"{share:.0%} of the tokens of the text are unknown to the tokenizer of the model: it is of another "
            "language or script than the model was trained on; give other text, or another model"
        )


def _encoded(columns: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> list[Row]:
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length, padding=False)
    keys = list(encoded)
    rows = [dict(zip(keys, values, strict=True)) for values in zip(*(encoded[key] for key in keys), strict=True)]
    _check_known(rows, tokenizer)
    return rows


def _check(batch_size: int, max_length: int) -> None:
    if batch_size < 1:
        raise MPOError(f"batch_size={batch_size} holds no example: give at least 1")
    if max_length < 4:
        raise MPOError(f"max_length={max_length} holds no text between the special tokens: give for instance 128")
