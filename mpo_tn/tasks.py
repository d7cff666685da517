"""The nine GLUE tasks and folders of plain text: what the files look like, what is measured, what a constant scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo_tn.exceptions import MPOError

Label = int | float
"""A class number, or a score."""


@dataclass(frozen=True)
class Task:
    """One GLUE task: the columns of its original files and what is measured.

    ``labels`` are the classes as the files spell them, in the order of their numbers; none means a score from 0 to 5.
    ``header`` names the columns of files without a header line. ``hub`` and ``hub_text`` are the task's name and
    columns in the ``datasets`` version. ``short_rows`` says that the original files are known to hold broken lines,
    which are left out and counted. ``note`` is printed beside every score.
    """

    name: str
    text: tuple[str, ...]
    label: str
    hub: str
    hub_text: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()
    short_rows: bool = False
    note: str = ""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """How many outputs the model's head needs."""
        return len(self.labels) or 1

    @property
    def dev_files(self) -> dict[str, str]:
        """The splits that are scored and their file names; only MNLI has two."""
        if self.name == "MNLI":
            return {"matched": "dev_matched.tsv", "mismatched": "dev_mismatched.tsv"}
        return {"dev": "dev.tsv"}


_ENTAILMENT: tuple[str, ...] = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), "label", "cola", ("sentence",), metrics=("matthews",),
             header=("source", "label", "star", "sentence")),
        Task("SST-2", ("sentence",), "label", "sst2", ("sentence",)),
        Task("MRPC", ("#1 String", "#2 String"), "Quality", "mrpc", _PAIR, metrics=("accuracy", "f1")),
        Task("STS-B", _PAIR, "score", "stsb", _PAIR, labels=(), metrics=("pearson", "spearman")),
        Task("QQP", ("question1", "question2"), "is_duplicate", "qqp", ("question1", "question2"),
             metrics=("accuracy", "f1"), short_rows=True),
        Task("MNLI", _PAIR, "gold_label", "mnli", ("premise", "hypothesis"),
             labels=("entailment", "neutral", "contradiction")),
        Task("QNLI", ("question", "sentence"), "label", "qnli", ("question", "sentence"), labels=_ENTAILMENT),
        Task("RTE", _PAIR, "label", "rte", _PAIR, labels=_ENTAILMENT),
        Task("WNLI", _PAIR, "label", "wnli", _PAIR, note=(
            "uninformative: the dev set repeats sentences of the training set with the other label, so that learning "
            "makes the score worse than a constant")),
    )
}  # fmt: skip
"""The nine tasks of GLUE by name."""


@dataclass(frozen=True)
class Split:
    """Examples: ``texts[i]`` is one sentence or a pair, ``labels[i]`` its class number or score."""

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[Label, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, limit: int, seed: int) -> Split:
        """``limit`` examples drawn without replacement, the same for the same seed, in the order of the file."""
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:limit])
        return Split(tuple(self.texts[i] for i in chosen), tuple(self.labels[i] for i in chosen))


@dataclass(frozen=True)
class TaskData:
    """A task and its examples. ``dev`` has one split, or MNLI's two. ``left_out`` counts broken lines of the files."""

    task: Task
    train: Split
    dev: Mapping[str, Split]
    source: str
    left_out: int = 0

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def higher_is_better(self) -> bool:
        """Every GLUE score grows."""
        return True

    def scores(self, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The task's metrics in points (0 to 100), from class numbers or scores by split.

        Of MNLI's two splits each metric is named after both: ``accuracy matched``.
        """
        found: dict[str, float] = {}
        for split, predicted in predictions.items():
            suffix = "" if len(self.dev) == 1 else f" {split}"
            truth = np.asarray(self.dev[split].labels)
            for metric in self.task.metrics:
                found[metric + suffix] = 100 * _METRICS[metric](truth, np.asarray(predicted))
        return found

    def headline(self, scores: Mapping[str, float]) -> float:
        """What GLUE averages: the mean of the task's metrics (and of MNLI's two splits)."""
        return sum(scores.values()) / len(scores)

    def baseline(self) -> tuple[dict[str, float], str]:
        """What a constant scores on the dev set, and which: the commonest class of the training set, or its mean.

        A constant has no correlation, so that the scores of a regression's baseline are NaN.
        """
        if self.task.is_regression:
            mean = float(np.mean(self.train.labels))
            return (
                self.scores({split: np.full(len(self.dev[split]), mean) for split in self.dev}),
                f"always {mean:.2f}, the mean of the training set: a constant has no correlation",
            )
        label, count = Counter(self.train.labels).most_common(1)[0]
        constant = {split: np.full(len(self.dev[split]), label) for split in self.dev}
        share = count / len(self.train)
        return self.scores(constant), f"always {self.task.labels[int(label)]!r}, {share:.0%} of the training set"


@dataclass(frozen=True)
class TextData:
    """Plain text for a language model. Scores are perplexities on ``valid``: lower is better."""

    train: tuple[str, ...]
    valid: tuple[str, ...]
    source: str
    name: str = field(default="text", init=False)
    left_out: int = field(default=0, init=False)

    @property
    def higher_is_better(self) -> bool:
        """A perplexity falls."""
        return False

    def headline(self, scores: Mapping[str, float]) -> float:
        """Perplexity per token."""
        return scores["perplexity"]

    def baseline(self) -> tuple[dict[str, float], str]:
        """The byte perplexity of the training text's byte frequencies; a token has no such baseline."""
        counts = np.bincount(np.frombuffer("\n".join(self.train).encode(), dtype=np.uint8), minlength=256) + 1
        log_share = np.log(counts / counts.sum())
        seen = np.frombuffer("\n".join(self.valid).encode(), dtype=np.uint8)
        return (
            {"perplexity": math.nan, "byte perplexity": float(np.exp(-log_share[seen].mean()))},
            "every byte drawn by its frequency in the training text; tokens have no such baseline",
        )


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    hub: str = "nyu-mll/glue",
    limit: int | None = None,
    seed: int = 0,
) -> TaskData | TextData:
    """Read a GLUE task, or with ``"text"`` a folder of text files.

    Args:
        name: one of the nine, in any case and with or without the dash, or ``"text"``.
        data_dir: the folder with the task's original ``train.tsv`` and ``dev.tsv`` (MNLI: ``dev_matched.tsv``,
            ``dev_mismatched.tsv``), or the folder that holds one such folder per task; for ``"text"`` a folder with
            ``.txt`` files, of which those named ``valid*`` are for validation (without any, the last tenth of the
            text). Without a folder the task is fetched with the ``datasets`` package.
        hub: the data set's name there.
        limit: at most so many training examples, drawn by ``seed``, whatever the seed of a run is. The dev set is
            always whole.
        seed: of that draw.

    Raises:
        MPOError: an unknown task, a missing file or column, a label out of range, an empty file.
    """
    if limit is not None and limit < 1:
        raise MPOError(f"limit={limit} leaves no training example: give at least 1")
    if name.casefold() == "text":
        if data_dir is None:
            raise MPOError("the task text needs a folder of .txt files: give --data-dir")
        return _read_text(Path(data_dir))
    task = find_task(name)
    data = _from_hub(task, hub) if data_dir is None else _from_folder(task, Path(data_dir))
    if limit is None or limit >= len(data.train):
        return data
    return TaskData(task, data.train.subset(limit, seed), data.dev, data.source, data.left_out)


def find_task(name: str) -> Task:
    """The task of that name, whatever its case and dashes.

    >>> find_task("sst2").name
    'SST-2'
    """
    plain = {known.casefold().replace("-", ""): task for known, task in TASKS.items()}
    try:
        return plain[name.casefold().replace("-", "").replace("_", "")]
    except KeyError:
        raise MPOError(f"unknown task {name!r}: there are {', '.join(TASKS)} and text") from None


def _from_folder(task: Task, folder: Path) -> TaskData:
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
    return TaskData(task, train, dev, str(folder), left_out)


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
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MPOError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from None
    rows = text.split("\n")
    return ((k, row.removesuffix("\r")) for k, row in enumerate(rows, 1) if row.strip("\r"))


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


def _from_hub(task: Task, hub: str) -> TaskData:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
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
    return TaskData(task, _hub_split(task, tables, "train", hub), dev, f"{hub}/{task.hub}")


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


def _read_text(folder: Path) -> TextData:
    if not folder.is_dir():
        raise MPOError(f"there is no folder {folder}: --data-dir names a folder of .txt files")
    paths = sorted(folder.rglob("*.txt"))
    if not paths:
        raise MPOError(f"{folder} holds no .txt file")
    texts: dict[Path, str] = {}
    for path in paths:
        try:
            texts[path] = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MPOError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from None
    valid = tuple(text for path, text in texts.items() if path.name.startswith("valid") and text.strip())
    train = tuple(text for path, text in texts.items() if not path.name.startswith("valid") and text.strip())
    if not train:
        raise MPOError(f"{folder} holds no text to train on: its .txt files are empty or all named valid*")
    if not valid:
        whole = "\n".join(train)
        cut = len(whole) * 9 // 10
        train, valid = (whole[:cut],), (whole[cut:],)
    return TextData(train, valid, str(folder))


def _accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float((truth == predicted).mean())


def _f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predicted, zero_division=0))  # pyright: ignore[reportArgumentType]


def _matthews(truth: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, predicted))


def _correlation(name: str, truth: np.ndarray, predicted: np.ndarray) -> float:
    from scipy import stats

    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return math.nan
    return float(getattr(stats, name)(truth, predicted).statistic)


_METRICS: Mapping[str, Any] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": lambda truth, predicted: _correlation("pearsonr", truth, predicted),
    "spearman": lambda truth, predicted: _correlation("spearmanr", truth, predicted),
}


def shown(scores: Mapping[str, float]) -> str:
    """Scores in one line.

    >>> shown({"accuracy": 78.431, "f1": float("nan")})
    'accuracy 78.4, f1 undefined'
    """
    return ", ".join(f"{name} {'undefined' if math.isnan(value) else f'{value:.1f}'}" for name, value in scores.items())


def examples_seen(data: TaskData | TextData) -> Sequence[int]:
    """Sizes for tables: training examples (or characters), then those of each dev split."""
    if isinstance(data, TextData):
        return [sum(map(len, data.train)), sum(map(len, data.valid))]
    return [len(data.train), *(len(split) for split in data.dev.values())]
