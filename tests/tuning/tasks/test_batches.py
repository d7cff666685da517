"""Texts to batches without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.task_folders import write_tokenizer

from mpo_tn import MPOError
from mpo_tn.torch.hf.folder import load_tokenizer
from mpo_tn.tuning.tasks.batches import sentence_batches

TEXTS = ["red dog .", "blue", "green cat runs now here often .", "bird sings"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return load_tokenizer(folder)


def test_every_text_is_by_itself_and_cut(tokenizer: Any) -> None:
    batches = sentence_batches(TEXTS, tokenizer, batch_size=2, max_length=6)
    assert [len(row["input_ids"]) for row in batches.rows] == [5, 3, 6, 4]
    seen = sorted(k for step in range(2) for k in batches.at(step).examples)
    assert seen == [0, 1, 2, 3]
    (longest, shortest) = batches.in_order()
    assert longest.examples == (2, 0)
    assert longest.inputs["attention_mask"].sum(1).tolist() == [6, 5]
    assert shortest.inputs["input_ids"].shape == (2, 4)


def test_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MPOError, match="there is no text"):
        sentence_batches([], tokenizer, batch_size=2, max_length=6)
    with pytest.raises(MPOError, match="max_length=2"):
        sentence_batches(TEXTS, tokenizer, batch_size=2, max_length=2)
