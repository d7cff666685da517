"""Tasks to tune on: the nine of GLUE and folders of plain text; what is measured, and what a constant scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.tuning.tasks.files import last_tenth, task_from_folder, task_from_hub, text_from_folder
from mpo_tn.tuning.tasks.glue import METRICS, Split, Task, find_task
from mpo_tn.tuning.tasks.own_files import examples_for, read_texts, task_from_files


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
                found[metric + suffix] = 100 * METRICS[metric](truth, np.asarray(predicted))
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


Data = TaskData | TextData
"""What one tunes on."""


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    hub: str = "nyu-mll/glue",
    limit: int | None = None,
    seed: int = 0,
) -> Data:
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
    _check_limit(limit)
    if name.casefold() == "text":
        if data_dir is None:
            raise MPOError("the task text needs a folder of .txt files: give --data-dir")
        return TextData(*text_from_folder(Path(data_dir)), str(data_dir))
    task = find_task(name)
    parts = task_from_hub(task, hub) if data_dir is None else task_from_folder(task, Path(data_dir))
    return _limited(TaskData(task, *parts), limit, seed)


def load_files(
    train: str | Path,
    dev: str | Path | None = None,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Read a task from files of one's own: a classification or a regression; without labels text for a language model.

    Args:
        train: a table with named columns, or for a language model a ``.txt`` file, which is one text; see
            :func:`~mpo_tn.tuning.tasks.own_files.read_texts` for the kinds.
        dev: what is scored; without it a tenth of the training examples, or the last tenth of the text.
        text: the column of the text, or two of pairs; ``text`` by default.
        label: the column of the labels. What they are is told from the training file, see
            :func:`~mpo_tn.tuning.tasks.own_files.task_from_files`.
        limit: at most so many training examples, drawn by ``seed``.
        seed: of that draw.

    Raises:
        MPOError: no such file or column, a broken file, no text, labels that are missing, unknown or all the same.
    """
    _check_limit(limit)
    if label is not None:
        task, parts = task_from_files(train, dev, text, label)
        return _limited(TaskData(task, *parts), limit, seed)
    texts = read_texts(train, text, whole=True)
    if dev is None:
        return TextData(*last_tenth(texts), str(train))
    return TextData(texts, read_texts(dev, text, whole=True), f"{train}, {dev}")


def load_labelled(path: str | Path, text: str | Sequence[str] | None, label: str, classes: Sequence[str]) -> TaskData:
    """Examples to score a model on that is tuned already and knows these classes; none if it gives scores.

    Raises:
        MPOError: what :func:`load_files` raises.
    """
    task, rows = examples_for(path, text, label, classes)
    return TaskData(task, rows, {"dev": rows}, f"{path}: {','.join(task.text)} -> {label}")


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise MPOError(f"limit={limit} leaves no training example: give at least 1")


def _limited(data: TaskData, limit: int | None, seed: int) -> TaskData:
    if limit is None or limit >= len(data.train):
        return data
    return replace(data, train=data.train.subset(limit, seed))


def shown(scores: Mapping[str, float]) -> str:
    """Scores in one line.

    >>> shown({"accuracy": 78.431, "f1": float("nan")})
    'accuracy 78.4, f1 undefined'
    """
    return ", ".join(f"{name} {'undefined' if math.isnan(value) else f'{value:.1f}'}" for name, value in scores.items())


def examples_seen(data: Data) -> Sequence[int]:
    """Sizes for tables: training examples (or characters), then those of each dev split."""
    if isinstance(data, TextData):
        return [sum(map(len, data.train)), sum(map(len, data.valid))]
    return [len(data.train), *(len(split) for split in data.dev.values())]
