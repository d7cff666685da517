"""Texts and examples from files of a user's own."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers.task_folders import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.tuning.tasks import Split, TaskData, TextData, load_files, read_texts
from mpo_tn.tuning.tasks.batches import sentence_batches, text_batches, unknown_share
from mpo_tn.tuning.tasks.data import load_labelled
from mpo_tn.tuning.tasks.own_files import MOST_CLASSES

Rows = Sequence[dict[str, Any]]
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def write(path: Path, rows: Rows) -> Path:
    """A table of these rows, in the format that the ending says."""
    match path.suffix:
        case ".csv":
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        case ".tsv":
            lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(list(rows)))
        case _:
            datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def no_bars() -> None:
    datasets.disable_progress_bars()


# What a reader that guesses would change: numbers that are none, words that mean nothing, quotes, other line ends.
AWKWARD = ("007", "null", "NA", 'she said "no", and left', "1e3", "True", "naïve \u2028 café", "2024-01-01")


@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_are_what_was_written(ending: str, tmp_path: Path) -> None:
    rows = [{"n": k, "body": text, "other": "x"} for k, text in enumerate(AWKWARD)]
    assert read_texts(write(tmp_path / f"a [1]*{ending}", rows), "body") == AWKWARD
    assert read_texts(tmp_path / f"a [1]*{ending}", "body,other")[:3] == ("007", "x", "null")


def test_columns_are_found_by_name_and_blank_texts_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": "one\ntwo", "b": "1"}, {"text": " ", "b": ""}, {"text": "", "b": "3"}])
    assert read_texts(path) == ("one\ntwo",)
    assert read_texts(path, ["b"]) == ("1", "3")
    missing = tmp_path / "b.jsonl"
    missing.write_text('{"text": "a"}\n{"other": 1}\n{"text": null}\n{"text": "b"}\n')
    assert read_texts(missing) == ("a", "b")


def test_a_plain_file_is_one_text_a_line_or_one_in_all(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone \u2028 line\r\n\r\ntwo\n".encode())
    assert read_texts(path) == ("one \u2028 line", "two")
    assert read_texts(path, whole=True) == ("one \u2028 line\r\n\r\ntwo\n",)


def test_nothing_is_left_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a file that was changed within the second could be read as it was."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "a.csv"
    for text in ("one", "two"):
        assert read_texts(write(path, [{"text": text}])) == (text,)
    assert not list(tmp_path.rglob("*.arrow"))


def labelled(path: Path, labels: Sequence[Any]) -> Path:
    return write(path, [{"text": f"text {k}", "y": label} for k, label in enumerate(labels)])


KINDS = {
    "words": (["good", "bad", "good"], ("bad", "good")),
    "whole numbers": ([10, 2, 10], ("2", "10")),
    "with decimal points": ([1.0, 0.0, 1.0], ("0", "1")),
    "yes or no": ([True, False, True], ("False", "True")),
    "words and a number": (["1", "none", "2.5"], ("1", "2.5", "none")),
    "scores": ([0.5, 2.0, 1.0], ()),
    "many numbers": (list(range(MOST_CLASSES + 1)), ()),
    "as many as there may be": (list(range(MOST_CLASSES)), tuple(map(str, range(MOST_CLASSES)))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_the_labels_are_is_told_from_them(kind: str, ending: str, tmp_path: Path) -> None:
    labels, classes = KINDS[kind]
    if kind == "words and a number" and ending == ".parquet":
        labels = [str(label) for label in labels]
    path = labelled(tmp_path / f"a{ending}", labels)
    data = load_files(path, path, label="y")
    assert isinstance(data, TaskData)
    assert data.task.labels == classes
    assert data.task.is_regression == (not classes)
    shown = [data.task.labels[int(label)] if classes else label for label in data.train.labels]
    expected = [f"{x:g}" if isinstance(x, float) else str(x) for x in labels] if classes else list(map(float, labels))
    assert shown == expected
    assert data.dev["dev"] == data.train
    assert data.task.note == (
        f"{f'a choice of {len(classes)} classes' if classes else 'a regression on scores'}"
        + (
            f" ({', '.join(classes[:8])}{f' and {len(classes) - 8} more' if len(classes) > 8 else ''})"
            if classes
            else ""
        )
        + ", told from the labels in column 'y'"
    )
    again = load_labelled(path, None, "y", classes)
    assert again.dev["dev"] == data.train


def test_pairs_and_rows_without_text(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "s": 1.5}, {"a": " ", "b": "", "s": 3}, {"a": "", "b": "z", "s": 0}]
    data = load_files(write(tmp_path / "a.csv", rows), tmp_path / "a.csv", text="a, b", label="s")
    assert isinstance(data, TaskData)
    assert data.train == Split((("x", "y"), ("", "z")), (1.5, 0.0))
    assert data.left_out == 2  # one of each file
    assert data.name == "a.csv"
    assert data.source == f"{tmp_path / 'a.csv'}, {tmp_path / 'a.csv'}: a,b -> s"


def test_without_a_dev_file_a_tenth_is_held_out(tmp_path: Path) -> None:
    texts = [f"text {k}" for k in range(50)]
    path = write(tmp_path / "a.jsonl", [{"text": text, "y": k % 2} for k, text in enumerate(texts)])
    first, again = load_files(path, label="y"), load_files(path, label="y")
    assert isinstance(first, TaskData)
    assert first == again
    held = set(first.dev["dev"].texts)
    assert len(held) == 5
    assert held.isdisjoint(first.train.texts)
    assert held | set(first.train.texts) == {(text,) for text in texts}
    few = load_files(path, label="y", limit=7)
    assert isinstance(few, TaskData)
    assert len(few.train) == 7
    assert few.dev == first.dev


def test_text_for_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree four")
    data = load_files(tmp_path / "a.txt", tmp_path / "a.txt")
    assert isinstance(data, TextData)
    assert data.train == data.valid == ("one\ntwo\nthree four",)
    cut = load_files(tmp_path / "a.txt")
    assert isinstance(cut, TextData)
    assert cut.train[0] + cut.valid[0] == "one\ntwo\nthree four"
    rows = load_files(write(tmp_path / "b.csv", [{"body": "a"}, {"body": "b"}]), tmp_path / "b.csv", text="body")
    assert isinstance(rows, TextData)
    assert rows.train == ("a", "b")


def _bad(name: str, content: bytes) -> Any:
    def act(folder: Path) -> None:
        (folder / name).write_bytes(content)
        load_files(folder / name, label="y") if b"y" in content else read_texts(folder / name)

    return act


BAD = {
    "no file": (lambda f: read_texts(f / "none.csv"), "none.csv does not exist"),
    "a folder": (lambda f: read_texts(f), "is a folder: name a file in it"),
    "another ending": (_bad("a.docx", b"x"), r"ends in \.docx, which is not read: give \.txt \(one text a line\)"),
    "no ending": (_bad("a", b"x"), "ends in nothing"),
    "empty table": (_bad("a.parquet", b""), "is empty"),
    "empty lines": (_bad("a.txt", b"\n \n"), "holds no text: it is empty, or everything in it is blank"),
    "blank column": (_bad("a.csv", b"text\n \n \n"), "holds no text: it is empty"),
    "only a header": (_bad("a.csv", b"text,b\n"), "holds no text"),
    "no column": (_bad("a.csv", b"a,b\n1,2\n"), "has no column 'text'; it has 'a', 'b': name one of these"),
    "no column in JSON": (_bad("a.jsonl", b'{"a": 1, "b": 2}\n'), "has no column 'text'; it has 'a', 'b'"),
    "column twice": (_bad("a.csv", b"text,text\n1,2\n"), "has the column 'text' twice"),
    "not JSON": (_bad("a.jsonl", b'{"text": "a"\nxx'), "cannot be read as a table: "),
    "not Parquet": (_bad("a.parquet", b"text"), "cannot be read as a table: "),
    "ragged": (_bad("a.csv", b"text,b\n1,2\n1,2,3\n"), "line 3: 3 cells where the first line has 2: texts that"),
    "not UTF-8": (_bad("a.txt", b"\xff\xfe"), "is not UTF-8 at byte 0"),
    "not UTF-8 in a table": (_bad("a.csv", b"text\na\n\xff\n"), "is not UTF-8 at byte"),
    "columns of lines": (lambda f: (_bad("a.txt", b"x")(f), read_texts(f / "a.txt", "b")), "no columns: leave out"),
    "labels of lines": (_bad("a.txt", b"y"), "has no columns, which labels need"),
    "label missing": (_bad("a.csv", b"text,y\na,1\nb,\n"), "row 2: the label in column 'y' is missing"),
    "label NaN": (lambda f: load_files(labelled(f / "a.parquet", [1.0, float("nan")]), label="y"), "row 2: the label"),
    "one label": (_bad("a.csv", b"text,y\na,1\nb,1\n"), "all labels are '1': there is nothing to learn"),
    "no rows": (_bad("a.csv", b"text,y\n"), "holds no text: it ends after"),
    "three texts": (
        lambda f: load_files(labelled(f / "a.csv", [1, 2]), text="text,y,text", label="y"),
        "names 3 columns",
    ),
    "a class that is new": (
        lambda f: load_files(labelled(f / "a.csv", ["p", "q"]), labelled(f / "b.csv", ["p", "r"]), label="y"),
        r"b\.csv: the label 'r' is not one of the classes that are known, p, q",
    ),
    "a word among scores": (
        lambda f: load_files(labelled(f / "a.csv", [0.5, 1]), labelled(f / "b.csv", ["p", 1]), label="y"),
        "the label 'p' is no number",
    ),
    "one example": (_bad("a.csv", b"text,y\na,1\na,1\n"), "there is nothing to learn"),
    "no limit": (lambda f: load_files(f, label="y", limit=0), "limit=0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD)
def test_bad_files(mistake: str, tmp_path: Path) -> None:
    act, message = BAD[mistake]
    with pytest.raises(MPOError, match=message):
        act(tmp_path)


def test_without_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.csv", [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "datasets.utils", raising=False)
    with pytest.raises(MPOError, match=r"pip install datasets, or give a \.txt file"):
        read_texts(tmp_path / "a.csv")


class Words:
    """A tokenizer of single letters that knows ``a`` to ``e``; 0 is unknown, 1 begins and 2 ends a text."""

    unk_token_id, bos_token_id, eos_token_id, pad_token_id = 0, 1, 2, None

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        def ids(one: str) -> list[int]:
            found = [3 + "abcde".index(letter) if letter in "abcde" else 0 for letter in one]
            return [1, *found, 2] if add_special_tokens else found

        if isinstance(text, str):
            return {"input_ids": ids(text)}
        return {"input_ids": [ids(one) for one in text], "attention_mask": [[1] * len(ids(one)) for one in text]}


@given(st.lists(st.text("abcdeXYZ", min_size=2), min_size=1, max_size=5))
def test_text_of_another_language_is_refused(texts: list[str]) -> None:
    whole = "".join(texts)
    share = sum(letter in "XYZ" for letter in whole) / len(whole)
    for make in (
        lambda: sentence_batches(texts, Words(), batch_size=2, max_length=100).rows,
        lambda: text_batches(texts, Words(), batch_size=2, max_length=10**6).rows,
    ):
        if share > 0.5:
            with pytest.raises(MPOError, match=f"{share:.0%} of the tokens of the text are unknown"):
                make()
        else:
            assert unknown_share(make(), Words()) == pytest.approx(share)


def test_a_tokenizer_without_an_unknown_token_knows_everything(tmp_path: Path) -> None:
    rows = [{"input_ids": [50256, 50256, 1]}]

    class Bytes:
        unk_token_id = bos_token_id = eos_token_id = 50256
        pad_token_id = None

    assert unknown_share(rows, Bytes()) == 0
    import transformers

    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batches = sentence_batches(["red dog", "xyz cat sings ."], tokenizer, batch_size=2, max_length=16)
    assert unknown_share(batches.rows, tokenizer) == pytest.approx(1 / 6)
    (batch,) = batches.in_order()
    assert batch.inputs["attention_mask"].sum(1).tolist() == [6, 4]
    with pytest.raises(MPOError, match="there is no text"):
        sentence_batches([], tokenizer, batch_size=2, max_length=16)
