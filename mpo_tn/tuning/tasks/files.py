"""Examples from the files GLUE was published as, from the datasets package, and text from folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import checked_file
from mpo_tn.tuning.tasks.glue import Label, Split, Task

MOST_TEXT = 2**31
"""Bytes of a file of text, which is read whole and takes ten times as much memory as tokens."""

Parts = tuple[Split, dict[str, Split], str, int]
"""The training split, the dev splits by name, where they are from, and how many lines were left out."""


def task_from_folder(task: Task, folder: Path) -> Parts:
    """A task from its original files.

    Raises:
        MPOError: no such folder, a missing file, and what :func:`read_split` raises.
    """
    if not folder.is_dir():
        raise MPOError(f"there is no folder {folder}: --data-dir names the folder with the files of {task.name}")
    if not (folder / "train.tsv").is_file() and (folder / task.name).is_dir():
        folder = folder / task.name
    wanted = ["train.tsv", *task.dev_files.values()]
    absent = [name for name in wanted if not (folder / name).is_file()]
    if absent:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise MPOError(f"{folder} has no {' and no '.join(absent)}, which {task.name} needs; it holds {there}")
    train, left_out = read_split(task, folder / "train.tsv")
    dev: dict[str, Split] = {}
    for split, name in task.dev_files.items():
        dev[split], more = read_split(task, folder / name)
        left_out += more
    return train, dev, str(folder), left_out


def read_split(task: Task, path: Path) -> tuple[Split, int]:
    """The examples of one original file, and how many of its lines were left out.

    Lines are split on tabs and on nothing else, quotes mean nothing, a byte-order mark is dropped.

    Raises:
        MPOError: wrong columns, a broken line, a label out of range, no examples.
    """
    lines = _lines(path)
    first = 1
    columns = list(task.header)
    if not columns:
        columns = next(lines, (0, ""))[1].split("\t")
        first = 2
    missing = [name for name in (*task.text, task.label) if name not in columns]
    if missing:
        raise MPOError(
            f"{path} is not a file of {task.name}: it has no column {' and no '.join(map(repr, missing))}, its columns "
            f"are {', '.join(map(repr, columns[:12]))}"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1 and name in (*task.text, task.label)]
    if twice:
        raise MPOError(f"{path} has the column {twice[0]!r} twice: keep one of them")
    places = [columns.index(name) for name in task.text]
    label_place = columns.index(task.label)
    texts: list[tuple[str, ...]] = []
    labels: list[Label] = []
    left_out = 0
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) != len(columns):
            if task.short_rows:
                left_out += 1
                continue
            raise MPOError(f"{path}, line {number}: {len(cells)} columns where {task.name} has {len(columns)}")
        labels.append(_label(task, cells[label_place], f"{path}, line {number}"))
        texts.append(tuple(cells[place] for place in places))
    if not texts:
        raise MPOError(f"{path} holds no examples: it ends after line {first - 1}")
    return Split(tuple(texts), tuple(labels)), left_out


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. Only a line feed ends a line: sentences hold other separators."""
    rows = read_utf8(path).split("\n")
    return ((k, row.removesuffix("\r")) for k, row in enumerate(rows, 1) if row.strip("\r"))


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        MPOError: it is not UTF-8, no file, or larger than text that is read whole may be.
    """
    try:
        return checked_file(path, "text", MOST_TEXT).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MPOError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from None


def _label(task: Task, written: str, where: str) -> Label:
    if task.is_regression:
        try:
            score = float(written)
        except ValueError:
            score = math.nan
        if not 0 <= score <= 5:
            raise MPOError(f"{where}: the label {written!r} is not a score from 0 to 5")
        return score
    if written not in task.labels:
        raise MPOError(f"{where}: the label {written!r} is not one of {', '.join(task.labels)}")
    labels: tuple[str, ...] = task.labels
    return labels.index(written)


def task_from_hub(task: Task, hub: str) -> Parts:
    """A task through the ``datasets`` package.

    Raises:
        MPOError: it is not installed, no network, another data set.
    """
    try:
        import datasets
    except ImportError:
        raise MPOError(
            f"fetching {hub} needs the datasets package: pip install datasets, or give the folder with the original "
            f"files of {task.name} (--data-dir)"
        ) from None
    try:
        tables: Any = datasets.load_dataset(hub, task.hub)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise MPOError(
            f"{hub} could not be fetched for {task.name} ({reason[0]}): check the network and the name, or give "
            "the folder with the original files (--data-dir)"
        ) from error
    names = {"dev": "validation", "matched": "validation_matched", "mismatched": "validation_mismatched"}
    dev = {split: _hub_split(task, tables, names[split], hub) for split in task.dev_files}
    return _hub_split(task, tables, "train", hub), dev, f"{hub}/{task.hub}", 0


def _hub_split(task: Task, tables: Any, split: str, hub: str) -> Split:
    if split not in tables:
        raise MPOError(f"{hub}/{task.hub} has no split {split!r}, only {', '.join(map(str, tables))}")
    table = tables[split]
    missing = [name for name in (*task.hub_text, "label") if name not in table.column_names]
    if missing:
        raise MPOError(
            f"{hub}/{task.hub} is not {task.name}: it has no column {' and no '.join(map(repr, missing))}, its columns "
            f"are {', '.join(map(repr, table.column_names))}"
        )
    labels = [float(value) if task.is_regression else int(value) for value in table["label"]]
    highest = 5 if task.is_regression else len(task.labels) - 1
    for row, value in enumerate(labels):
        if not 0 <= value <= highest:
            raise MPOError(f"{hub}/{task.hub}, {split} row {row}: the label {value} is not from 0 to {highest}")
    if not labels:
        raise MPOError(f"{hub}/{task.hub} has an empty split {split!r}")
    texts = zip(*(table[name] for name in task.hub_text), strict=True)
    return Split(tuple(tuple(map(str, row)) for row in texts), tuple(labels))


def text_from_folder(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts to train on and those to validate on.

    Raises:
        MPOError: no such folder, nothing in it, not UTF-8.
    """
    if not folder.is_dir():
        raise MPOError(f"there is no folder {folder}: --data-dir names a folder of .txt files")
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise MPOError(f"{folder} holds no .txt file")
    texts = {path: read_utf8(path) for path in paths}
    valid = tuple(text for path, text in texts.items() if path.name.startswith("valid") and text.strip())
    train = tuple(text for path, text in texts.items() if not path.name.startswith("valid") and text.strip())
    if not train:
        raise MPOError(f"{folder} holds no text to train on: its .txt files are empty or all named valid*")
    return (train, valid) if valid else last_tenth(train)


def last_tenth(texts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts in a row, cut into nine tenths to train on and one to validate on."""
    whole = "\n".join(texts)
    cut = len(whole) * 9 // 10
    return (whole[:cut],), (whole[cut:],)
