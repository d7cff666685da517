"""The nine GLUE tasks: the columns of their files, their labels and their metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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

    def hold_out(self, share: float) -> tuple[Split, Split]:
        """The examples but for a share, always the same one, and that share; what occurs twice goes as one.

        Raises:
            MPOError: nothing would be left.
        """
        held = self.subset(max(1, round(share * len(self))), seed=0)
        taken = set(zip(held.texts, held.labels, strict=True))
        rest = [pair for pair in zip(self.texts, self.labels, strict=True) if pair not in taken]
        if not rest:
            raise MPOError(f"holding out a part of {len(self)} examples leaves nothing to train on: give a dev set")
        return Split(tuple(text for text, _ in rest), tuple(label for _, label in rest)), held


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


def _accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float((truth == predicted).mean())


def _f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predicted, zero_division=0))  # pyright: ignore[reportArgumentType]


def _matthews(truth: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return 0.0  # by convention; of a single class scikit-learn warns
    return float(matthews_corrcoef(truth, predicted))


def _correlation(name: str, truth: np.ndarray, predicted: np.ndarray) -> float:
    from scipy import stats

    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return math.nan
    return float(getattr(stats, name)(truth, predicted).statistic)


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": lambda truth, predicted: _correlation("pearsonr", truth, predicted),
    "spearman": lambda truth, predicted: _correlation("spearmanr", truth, predicted),
}


"""What compares true with predicted labels, by name; from 0 (or -1) to 1."""
