"""Files of a user's own: one text a line, or tables with named columns, which the datasets package reads."""

from __future__ import annotations

import csv
import glob
import io
import math
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import checked_file
from mpo_tn.tuning.tasks.files import MOST_TEXT, Parts, read_utf8
from mpo_tn.tuning.tasks.glue import Label, Split, Task

TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The endings of tables, and what reads them."""

# Whole numbers with more different values than this are scores: no classifier of a few thousand texts has more classes.
MOST_CLASSES = 20

Row = tuple[Any, ...]


def read_texts(path: str | Path, text: str | Sequence[str] | None = None, *, whole: bool = False) -> tuple[str, ...]:
    """The texts of a file; blank ones are left out.

    Args:
        path: ``.txt`` (UTF-8, one text a line), ``.csv``, ``.tsv`` (as GLUE's: quotes mean nothing), ``.jsonl`` or
            ``.json`` (an object a line, or a list of them) or ``.parquet``.
        text: of a table: its column, or columns (a sequence, or names with commas between), whose texts are taken row
            by row. Without it the column ``text``.
        whole: take a ``.txt`` file as one text, as a language model reads it.

    Raises:
        MPOError: no such file, another ending, no such column, a file that is broken or holds no text.
    """
    path = _existing(path)
    if path.suffix.casefold() == ".txt":
        if text:
            raise MPOError(f"{path} holds one text a line and no columns: leave out --text, or give a table")
        content = read_utf8(path)
        found = [content] if whole else [line.removesuffix("\r") for line in content.split("\n")]
    else:
        found = [_as_text(cell) for cell in chain.from_iterable(read_rows(path, _columns(path, text)))]
    found = [one for one in found if one.strip()]
    if not found:
        raise MPOError(f"{path} holds no text: it is empty, or everything in it is blank")
    return tuple(found)


def task_from_files(
    train: str | Path, dev: str | Path | None, text: str | Sequence[str] | None, label: str
) -> tuple[Task, Parts]:
    """A classification or a regression, told from the labels of the training file, and its examples.

    Labels that are not all numbers are classes, and so are whole numbers with at most :data:`MOST_CLASSES` different
    values; all other numbers are scores. Rows without text are left out and counted.

    Args:
        train: a table, see :func:`read_texts`.
        dev: another; without it a tenth of the training examples, always the same, is kept for it.
        text: one column, or two for pairs.
        label: the column of the labels.

    Raises:
        MPOError: what :func:`read_texts` raises, more than two columns, a label that is missing, of an unknown class or
            no number, labels that are all the same.
    """
    train = _existing(train)
    columns = _columns(train, text)
    texts, written, left_out = _examples(train, columns, label)
    classes = _classes(written)
    if len(set(written)) == 1:
        raise MPOError(f"{train}: all labels are {written[0]!r}: there is nothing to learn")
    task = _task(train, columns, label, classes)
    rows = Split(tuple(texts), _labels(train, written, classes))
    read = f"{','.join(columns)} -> {label}"
    if dev is None:
        rows, held = rows.hold_out(0.1)
        return task, (rows, {"dev": held}, f"{train}: {read}", left_out)
    dev = _existing(dev)
    dev_texts, dev_written, more = _examples(dev, columns, label)
    held = Split(tuple(dev_texts), _labels(dev, dev_written, classes))
    return task, (rows, {"dev": held}, f"{train}, {dev}: {read}", left_out + more)


def examples_for(
    path: str | Path, text: str | Sequence[str] | None, label: str, classes: Sequence[str]
) -> tuple[Task, Split]:
    """The examples of one file, for a model that knows these classes (none: one that gives scores).

    Raises:
        MPOError: what :func:`task_from_files` raises.
    """
    path = _existing(path)
    columns = _columns(path, text)
    texts, written, _ = _examples(path, columns, label)
    return _task(path, columns, label, tuple(classes)), Split(tuple(texts), _labels(path, written, tuple(classes)))


def _task(path: Path, columns: tuple[str, ...], label: str, classes: tuple[str, ...]) -> Task:
    if len(columns) > 2:
        raise MPOError(f"--text {','.join(columns)} names {len(columns)} columns: a model reads one text, or a pair")
    metrics = ("accuracy",) if classes else ("pearson", "spearman")
    note = _kind(classes, label)
    return Task(path.name, columns, label, "", columns, labels=classes, metrics=metrics, note=note)


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """These columns of a table, row by row. Cells of text files are strings, whatever they look like.

    Raises:
        MPOError: another ending, no such column, a broken file.
    """
    ending = path.suffix.casefold()
    if ending not in TABLES:
        raise MPOError(
            f"{path} ends in {ending or 'nothing'}, which is not read: give .txt (one text a line), {', '.join(TABLES)}"
        )
    if path.stat().st_size == 0:
        raise MPOError(f"{path} is empty")
    # In memory and from a cache of its own: the common one would keep a copy of every file.
    with _explained(path), TemporaryDirectory() as cache:
        import datasets

        options: dict[str, Any] = {"cache_dir": cache, "keep_in_memory": True}
        if TABLES[ending] == "csv":
            options |= _csv_options(path, ending, columns, datasets)
        files = glob.escape(str(path.absolute()))
        try:
            table: Any = datasets.load_dataset(TABLES[ending], data_files=files, split="train", **options)
        except ValueError as error:
            if "corresponds to no data" in str(error):  # no rows, or of one column blank ones
                return []
            raise
        _check_columns(path, columns, table.column_names)
        return list(zip(*(table[name][:] for name in columns), strict=True))


def _csv_options(path: Path, ending: str, columns: Sequence[str], datasets: Any) -> dict[str, Any]:
    """How the package has to read it: as text. What it guesses turns 007 into 7 and the text null into nothing."""
    quotes: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {}
    _check_csv(path, columns, quotes)
    features = datasets.Features({name: datasets.Value("string") for name in dict.fromkeys(columns)})
    return {
        "features": features,
        "usecols": list(features),
        "keep_default_na": False,
        "encoding": "utf-8-sig",
        **quotes,
    }


def _check_csv(path: Path, columns: Sequence[str], quotes: dict[str, Any]) -> None:
    """Find the columns, and lines that are too long or short, in which the package would take one cell for another."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        lines = csv.reader(
            io.StringIO(read_utf8(path), newline=""), delimiter=quotes.get("sep", ","),
            quoting=quotes.get("quoting", csv.QUOTE_MINIMAL),
        )  # fmt: skip
        there = next(lines, [])
        _check_columns(path, columns, there)
        rows = 0
        for cells in lines:
            rows += bool(cells)
            if cells and len(cells) != len(there):
                raise MPOError(
                    f"{path}, line {lines.line_num}: {len(cells)} cells where the first line has {len(there)}: texts "
                    "that hold the separator need quotes"
                )
        if not rows:
            raise MPOError(f"{path} holds no text: it ends after the names of its columns")
    finally:
        csv.field_size_limit(limit)


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """Whatever the package raises is said in one way, and once: it would log it, too."""
    try:
        from datasets.exceptions import DatasetsError
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
    except ImportError:
        raise MPOError(
            f"reading {path} needs the datasets package: pip install datasets, or give a .txt file"
        ) from None
    bars, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except MPOError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, csv.Error, DatasetsError) as error:
        reason = error.__cause__ or error
        if isinstance(reason, UnicodeDecodeError):
            raise MPOError(f"{path} is not UTF-8 at byte {reason.start}: convert it first") from None
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        raise MPOError(f"{path} cannot be read as a table: {lines[0]}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir() or not path.exists():
        what = "is a folder: name a file in it" if path.is_dir() else "does not exist"
        raise MPOError(f"{path} {what}")
    return checked_file(path, "text", None if path.suffix.casefold() == ".parquet" else MOST_TEXT)


def _columns(path: Path, text: str | Sequence[str] | None) -> tuple[str, ...]:
    if path.suffix.casefold() == ".txt":
        raise MPOError(f"{path} has no columns, which labels need: give a table ({', '.join(TABLES)})")
    given = text.split(",") if isinstance(text, str) else text or ("text",)
    return tuple(name.strip() for name in given)


def _check_columns(path: Path, wanted: Sequence[str], there: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise MPOError(
            f"{path} has no column {' and no '.join(map(repr, missing))}; it has {', '.join(map(repr, there[:20]))}: "
            "name one of these"
        )
    twice = [name for name, count in Counter(there).items() if count > 1 and name in wanted]
    if twice:
        raise MPOError(f"{path} has the column {twice[0]!r} twice: keep one of them")


def _as_text(cell: Any) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else str(cell)


def _examples(path: Path, columns: Sequence[str], label: str) -> tuple[list[tuple[str, ...]], list[str], int]:
    """Texts and labels as written, and how many rows were left out because they have no text."""
    texts: list[tuple[str, ...]] = []
    written: list[str] = []
    left_out = 0
    for number, (*cells, value) in enumerate(read_rows(path, (*columns, label)), 1):
        row = tuple(map(_as_text, cells))
        if not any(text.strip() for text in row):
            left_out += 1
            continue
        name = _written(value)
        if not name:
            raise MPOError(
                f"{path}, row {number}: the label in column {label!r} is missing: fill it in, or drop the row"
            )
        texts.append(row)
        written.append(name)
    if not texts:
        raise MPOError(f"{path} holds no examples: it has no rows, or the text of all is blank")
    return texts, written, left_out


def _written(value: Any) -> str:
    """A label as a file of text would hold it; of whole numbers without a decimal point. Nothing if it is missing."""
    number = _number(value)
    if number is None or (not isinstance(value, str) and math.isnan(number)):
        return _as_text(value).strip() if number is None else ""
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else _as_text(value).strip()


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _classes(written: Sequence[str]) -> tuple[str, ...]:
    """The classes, in the order of their numbers; none if the labels are scores."""
    found = set(written)
    numbers = {name: _number(name) for name in found}
    if any(number is None or not math.isfinite(number) for number in numbers.values()):
        return tuple(sorted(found))
    if len(found) <= MOST_CLASSES and all(number is not None and number.is_integer() for number in numbers.values()):
        return tuple(sorted(found, key=float))
    return ()


def _labels(path: Path, written: Sequence[str], classes: tuple[str, ...]) -> tuple[Label, ...]:
    place = {name: number for number, name in enumerate(classes)}
    labels: list[Label] = []
    for name in written:
        label = place.get(name) if classes else _number(name)
        if label is None or not math.isfinite(label):
            there = f"not one of the classes that are known, {_some(classes)}" if classes else "no number"
            raise MPOError(f"{path}: the label {name!r} is {there}")
        labels.append(label)
    return tuple(labels)


def _kind(classes: tuple[str, ...], label: str) -> str:
    what = f"a choice of {len(classes)} classes ({_some(classes)})" if classes else "a regression on scores"
    return f"{what}, told from the labels in column {label!r}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
