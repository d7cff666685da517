"""A file of text to batches, for every command that takes one."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from helpers.task_folders import sentence, write_decoder, write_encoder

from mpo_tn import MPOError
from mpo_tn.app.sampling import Sampling
from mpo_tn.app.texts import batches_of, drawn, hold_back, in_random_order, kind_of, read_distinct
from mpo_tn.torch.hf.folder import load_model, load_tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("texts")
    source = random.Random(0)
    (home / "own.txt").write_text("".join(f"{sentence(source)} .\n\n" for _ in range(60)), encoding="utf-8")
    for name, write in (("encoder", write_encoder), ("decoder", write_decoder)):
        write(home / name)
    return home


def test_the_kind_of_a_model() -> None:
    def model(name: str, generates: bool, pair: bool = False) -> Any:
        made = type(name, (), {"can_generate": lambda self: generates})()
        made.config = SimpleNamespace(is_encoder_decoder=pair)
        return made

    assert kind_of(model("BertForMaskedLM", False)) == "encoder"
    assert kind_of(model("LlamaForCausalLM", True)) == "language model"
    assert kind_of(model("BertForSequenceClassification", False)) == "classifier"
    with pytest.raises(MPOError, match="a Pair reads one text and writes another"):
        kind_of(model("Pair", True, pair=True))


def test_a_text_that_comes_again_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("one\n two \n\none\nthree\ntwo\n")
    assert read_distinct(tmp_path / "own.txt", None, "encoder") == ("one", "two", "three")
    assert read_distinct(tmp_path / "own.txt", None, "language model") == ("one\n two \n\none\nthree\ntwo\n",)


def test_a_tenth_is_held_back_and_of_a_language_model_the_end(home: Path) -> None:
    tokenizer = load_tokenizer(home / "encoder")
    texts = read_distinct(home / "own.txt", None, "encoder")
    rows = batches_of(texts, "encoder", tokenizer, batch_size=4, max_length=16, seed=5)
    learnt, held = hold_back(rows, "encoder")
    assert (len(learnt.rows), len(held.rows)) == (len(texts) - len(texts) // 10, len(texts) // 10)
    every = [tuple(row["input_ids"]) for row in (*learnt.rows, *held.rows)]
    assert sorted(every) == sorted(tuple(row["input_ids"]) for row in rows.rows)
    assert [row["input_ids"] for row in held.rows] != [row["input_ids"] for row in rows.rows[-len(held.rows) :]]
    text = read_distinct(home / "own.txt", None, "language model")
    blocks = batches_of(text, "language model", tokenizer, batch_size=4, max_length=16)
    learnt, held = hold_back(blocks, "language model")
    assert [*learnt.rows, *held.rows] == list(blocks.rows)
    assert len(held.rows) == len(blocks.rows) // 10
    with pytest.raises(MPOError, match="there are 1 texts, or blocks"):
        hold_back(batches_of(["a dog"], "encoder", tokenizer, batch_size=4, max_length=16), "encoder")


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    items = list(range(100))
    assert drawn(items, 10, seed=1) == drawn(items, 10, seed=1) == sorted(drawn(items, 10, seed=1))
    assert drawn(items, 10, seed=1) != drawn(items, 10, seed=2)
    assert drawn(items, 100, seed=1) == drawn(items, 1000, seed=2) == items


@pytest.mark.parametrize(("name", "most"), [("encoder", None), ("decoder", None), ("encoder", 12), ("decoder", 12)])
def test_what_a_plan_is_decided_on(home: Path, name: str, most: int | None) -> None:
    """Every row once, at least five batches, so that one is held back; the seed says the order."""
    model = load_model(home / name)

    def ids(seed: int) -> list[list[list[int]]]:
        batches = Sampling(home / "own.txt", sample=most, max_length=8, seed=seed).of(model, str(home / name))
        assert isinstance(batches, list)
        model(**batches[0])
        return [batch["input_ids"].tolist() for batch in batches]

    once = ids(0)
    assert once == ids(0)
    assert once != ids(1)
    assert len(once) >= 5
    count = sum(map(len, once))
    assert count == most if most else count > 50
    assert max(len(row) for batch in once for row in batch) <= 8


def test_batches_in_random_order_hold_every_row_once(home: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "encoder")
    texts = read_distinct(home / "own.txt", None, "encoder")
    rows = batches_of(texts, "encoder", tokenizer, batch_size=7, max_length=16, seed=3)
    got = [
        row[mask].tolist()
        for batch in in_random_order(rows)
        for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    ]
    assert sorted(got) == sorted(row["input_ids"] for row in rows.rows)
    assert np.ptp([len(row) for row in got]) > 0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"texts": Path("a.txt"), "calibration": Path("b")}, "given together"),
        ({"text": "column"}, "--text names a column"),
        ({"texts": Path("a.txt"), "sample": 1}, "--sample 1 leaves nothing"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], match: str) -> None:
    with pytest.raises(MPOError, match=match):
        Sampling(**given)


def test_one_text_is_too_little(home: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a dog\n")
    for name, match in (("encoder", "gives one text: "), ("decoder", "one block of 32 tokens.*--max-length")):
        with pytest.raises(MPOError, match=match):
            Sampling(tmp_path / "one.txt").of(load_model(home / name), str(home / name))
