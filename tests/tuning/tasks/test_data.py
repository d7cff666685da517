"""Reading of tasks, their metrics and their baselines."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.task_folders import write_mrpc, write_text
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.tuning.tasks import TASKS, Split, Task, TaskData, TextData, find_task, load_task, shown

# The header lines of the files GLUE publishes.
HEADERS = {
    "CoLA": None,
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
METRICS = {
    "CoLA": ("matthews",), "MRPC": ("accuracy", "f1"), "QQP": ("accuracy", "f1"), "STS-B": ("pearson", "spearman")
}  # fmt: skip


def write(task: Task, folder: Path, rows: list[tuple[str, ...]]) -> Path:
    """Rows of (texts..., label), in the task's own columns."""
    folder.mkdir(parents=True, exist_ok=True)
    header = HEADERS[task.name]
    columns = (header or "source\tlabel\tstar\tsentence").split("\t")
    lines = [] if header is None else [header]
    for row in rows:
        cells = dict(zip((*task.text, task.label), row, strict=True))
        lines.append("\t".join(cells.get(column, "x") for column in columns))
    for name in ("train.tsv", *task.dev_files.values()):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_the_original_files_of_all_nine(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    texts = [(f'a "quoted \u2028 {k}', f"b, {k}")[: len(task.text)] for k in range(3)]
    written = [task.labels[k % len(task.labels)] if task.labels else str(1.5 * k) for k in range(3)]
    folder = write(task, tmp_path / "here", [(*text, label) for text, label in zip(texts, written, strict=True)])
    data = load_task(name.lower().replace("-", ""), folder)
    assert isinstance(data, TaskData)
    assert list(data.train.texts) == texts
    assert data.train.labels == tuple(1.5 * k if task.is_regression else k % len(task.labels) for k in range(3))
    assert task.metrics == METRICS.get(name, ("accuracy",))
    assert list(data.dev) == (["matched", "mismatched"] if name == "MNLI" else ["dev"])
    assert task.num_labels == {"STS-B": 1, "MNLI": 3}.get(name, 2)
    # Whoever is right everywhere gets full marks, whatever the metric.
    scores = data.scores({split: np.array(rows.labels) for split, rows in data.dev.items()})
    assert data.headline(scores) == pytest.approx(100)
    assert bool(task.note) == (name == "WNLI")


def test_marks_line_ends_and_quotes_are_no_part_of_the_text(tmp_path: Path) -> None:
    folder = write_mrpc(tmp_path, train=5, dev=3)
    assert (folder / "dev.tsv").read_bytes().startswith(b"\xef\xbb\xbf")
    (folder / "train.tsv").write_bytes((folder / "train.tsv").read_bytes().replace(b"\n", b"\r\n"))
    data = load_task("MRPC", tmp_path)
    assert isinstance(data, TaskData)
    assert len(data.train) == 5
    assert len(data.dev["dev"]) == 3
    assert all(first.endswith('"') and second.endswith(".") for first, second in data.train.texts)


def test_a_folder_of_task_folders(tmp_path: Path) -> None:
    write_mrpc(tmp_path / "MRPC")
    data = load_task("mrpc", tmp_path)
    assert data.source == str(tmp_path / "MRPC")


def test_broken_lines_are_counted_where_they_are_known_to_occur(tmp_path: Path) -> None:
    folder = write(TASKS["QQP"], tmp_path, [("q1", "q2", "0"), ("q3", "q4", "1")])
    with (folder / "train.tsv").open("a") as file:
        file.write("7\tbroken\n")
    data = load_task("QQP", folder)
    assert (len(data.train), data.left_out) == (2, 1)


labels = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


def _data(name: str, truth: list[Any], train: list[Any] | None = None) -> TaskData:
    def split(values: list[Any]) -> Split:
        return Split(tuple(("a", "b") for _ in values), tuple(values))

    return TaskData(TASKS[name], split(train or truth), {"dev": split(truth)}, "here")


@given(labels)
def test_class_metrics_by_counting(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = [t for t, _ in pairs], np.array([p for _, p in pairs])
    tp, fp, fn, tn = (sum(pair == which for pair in pairs) for which in ((1, 1), (0, 1), (1, 0), (0, 0)))
    f1 = 200 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    matthews = 100 * (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0
    # Sums of at most 40 ones are exact; a quotient and a root lose a few units in the last place.
    assert _data("MRPC", truth).scores({"dev": predicted}) == pytest.approx(
        {"accuracy": 100 * (tp + tn) / len(pairs), "f1": f1}, rel=1e-12
    )
    assert _data("CoLA", truth).scores({"dev": predicted}) == pytest.approx({"matthews": matthews}, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-50, 50)), min_size=3, max_size=30))
def test_correlations(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs, dtype=float).T
    scores = _data("STS-B", (truth / 10).tolist()).scores({"dev": predicted})
    if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        assert all(math.isnan(value) for value in scores.values())
        return
    assert scores["pearson"] == pytest.approx(100 * np.corrcoef(truth, predicted)[0, 1], abs=1e-6)
    # Spearman's sees the order alone.
    again = _data("STS-B", (truth / 10).tolist()).scores({"dev": np.arctan(predicted / 100)})
    assert again["spearman"] == pytest.approx(scores["spearman"], abs=1e-9)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.lists(st.integers(0, 1), min_size=1, max_size=30))
def test_the_baseline_is_the_commonest_class_of_the_training_set(train: list[int], dev: list[int]) -> None:
    scores, words = _data("MRPC", dev, train).baseline()
    chosen = int("'1'" in words)
    assert train.count(chosen) >= len(train) / 2
    assert scores["accuracy"] == pytest.approx(100 * dev.count(chosen) / len(dev))


def test_a_regression_has_a_baseline_without_a_score() -> None:
    scores, words = _data("STS-B", [0.0, 5.0], [1.0, 2.0]).baseline()
    assert all(math.isnan(value) for value in scores.values())
    assert "1.50" in words
    assert shown(scores) == "pearson undefined, spearman undefined"


def test_two_dev_sets_are_averaged(tmp_path: Path) -> None:
    data = load_task("MNLI", write(TASKS["MNLI"], tmp_path, [("a", "b", "neutral"), ("c", "d", "entailment")]))
    assert isinstance(data, TaskData)
    scores = data.scores({"matched": np.array([1, 0]), "mismatched": np.array([1, 1])})
    assert scores == {"accuracy matched": 100, "accuracy mismatched": 50}
    assert data.headline(scores) == 75


def test_a_subset_depends_on_its_seed_alone(tmp_path: Path) -> None:
    write_mrpc(tmp_path)
    whole, first, again, other = (
        load_task("MRPC", tmp_path, limit=limit, seed=seed) for limit, seed in ((None, 0), (10, 0), (10, 0), (10, 1))
    )
    assert isinstance(first, TaskData)
    assert isinstance(whole, TaskData)
    assert first == again
    assert first.train != other.train
    assert len(first.train) == 10
    assert first.dev == whole.dev
    places = [whole.train.texts.index(text) for text in first.train.texts]
    assert places == sorted(set(places))
    assert load_task("MRPC", tmp_path, limit=1000) == whole


BAD = {
    "unknown task": (lambda f: load_task("SNLI", f), "unknown task 'SNLI': there are CoLA, SST-2"),
    "no folder": (lambda f: load_task("MRPC", f / "none"), "there is no folder"),
    "no dev split": (lambda f: (f / "dev.tsv").unlink(), "has no dev.tsv, which MRPC needs; it holds train.tsv"),
    "empty file": (lambda f: (f / "dev.tsv").write_text(""), "it has no column '#1 String'"),
    "no examples": (lambda f: (f / "dev.tsv").write_text(f"{HEADERS['MRPC']}\n\n"), "holds no examples"),
    "wrong columns": (
        lambda f: (f / "train.tsv").write_text("sentence\tlabel\nx\t1\n"),
        "is not a file of MRPC: it has no column '#1 String' and no '#2 String' and no 'Quality', its columns are "
        "'sentence', 'label'",
    ),
    "column twice": (
        lambda f: (f / "train.tsv").write_text(f"{HEADERS['MRPC']}\tQuality\n"), "the column 'Quality' twice"
    ),
    "label out of range": (lambda f: _append(f, "2\t1\t1\ta\tb"), r"train.tsv, line 50: the label '2' is not one of 0"),
    "label missing": (lambda f: _append(f, "\t1\t1\ta\tb"), "line 50: the label '' is not"),
    "too few columns": (lambda f: _append(f, "1\t1\ta"), "line 50: 3 columns where MRPC has 5"),
    "not text": (lambda f: (f / "train.tsv").write_bytes(b"\xff\xfe\x00"), "is not UTF-8 at byte 0"),
    "no limit": (lambda f: load_task("MRPC", f, limit=0), "limit=0"),
}  # fmt: skip


def _append(folder: Path, line: str) -> None:
    with (folder / "train.tsv").open("a") as file:
        file.write(line + "\n")


@pytest.mark.parametrize("mistake", BAD)
def test_bad_folders(mistake: str, tmp_path: Path) -> None:
    write_mrpc(tmp_path)
    spoil, message = BAD[mistake]

    def attempt() -> None:
        spoil(tmp_path)
        load_task("MRPC", tmp_path)

    with pytest.raises(MPOError, match=message):
        attempt()


@pytest.mark.parametrize("score", ["5.1", "-0.1", "nan", "inf", "five"])
def test_scores_out_of_range(score: str, tmp_path: Path) -> None:
    write(TASKS["STS-B"], tmp_path, [("a", "b", "5.000"), ("c", "d", score)])
    with pytest.raises(MPOError, match=f"line 3: the label '{score}' is not a score from 0 to 5"):
        load_task("STS-B", tmp_path)


class _Table:
    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, ...]]:
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_task_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _Table(premise=["a"], hypothesis=["b"], label=[2], idx=[0])
    asked = _hub(monkeypatch, {"train": table, "validation_matched": table, "validation_mismatched": table})
    data = load_task("MNLI")
    assert isinstance(data, TaskData)
    assert asked == [("nyu-mll/glue", "mnli")]
    assert data.train == Split((("a", "b"),), (2,))
    assert list(data.dev) == ["matched", "mismatched"]


def test_a_data_set_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, on a folder that is laid out as ``nyu-mll/glue`` is: Parquet files named by a card."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    labels = {"train": [0, 1, 1], "validation": [1, 0], "test": [-1, -1]}
    features = datasets.Features({
        "sentence1": datasets.Value("string"), "sentence2": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["not_equivalent", "equivalent"]), "idx": datasets.Value("int32"),
    })  # fmt: skip
    card = ["---", "configs:", "- config_name: mrpc", "  data_files:"]
    (tmp_path / "glue" / "mrpc").mkdir(parents=True)
    for split, values in labels.items():
        rows = {"sentence1": [f"{split} {k}" for k in range(len(values))], "sentence2": ["b"] * len(values)}
        table = datasets.Dataset.from_dict({**rows, "label": values, "idx": list(range(len(values)))}, features)
        table.to_parquet(tmp_path / "glue" / "mrpc" / f"{split}-00000-of-00001.parquet")
        card += [f"  - split: {split}", f"    path: mrpc/{split}-*"]
    (tmp_path / "glue" / "README.md").write_text("\n".join([*card, "---", ""]))
    data = load_task("MRPC", hub=str(tmp_path / "glue"))
    assert isinstance(data, TaskData)
    assert data.train == Split((("train 0", "b"), ("train 1", "b"), ("train 2", "b")), (0, 1, 1))
    assert data.dev == {"dev": Split((("validation 0", "b"), ("validation 1", "b")), (1, 0))}
    with pytest.raises(MPOError, match="could not be fetched for RTE"):
        load_task("RTE", hub=str(tmp_path / "glue"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            ConnectionError("no route to host\nmore"),
            r"be fetched for RTE \(no route to host\): check the net",
        ),
        ({"train": _Table(text=["a"], label=[0])}, "has no split 'validation', only train"),
        ({"validation": _Table(text=["a"], label=[0])}, "no column 'sentence1' and no 'sentence2', its columns are"),
        (
            {"validation": _Table(sentence1=["a"], sentence2=["b"], label=[-1])},
            "row 0: the label -1 is not",
        ),
        ({"validation": _Table(sentence1=[], sentence2=[], label=[])}, "empty split 'validation'"),
    ],
)
def test_the_hub_may_fail(answer: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hub(monkeypatch, answer)
    with pytest.raises(MPOError, match=message):
        load_task("RTE")


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MPOError, match="pip install datasets, or give the folder"):
        load_task("RTE")


def test_text_with_and_without_a_validation_file(tmp_path: Path) -> None:
    data = load_task("text", write_text(tmp_path / "a"))
    assert isinstance(data, TextData)
    assert (len(data.train), len(data.valid)) == (2, 1)
    scores, _ = data.baseline()
    # No code for bytes beats their entropy; add-one smoothing and another text only cost.
    assert 1 < scores["byte perplexity"] < 256
    assert not data.higher_is_better
    cut = load_task("text", write_text(tmp_path / "b", valid=False))
    assert isinstance(cut, TextData)
    whole = "\n".join((tmp_path / "b" / name).read_text() for name in ("train_a.txt", "train_b.txt"))
    assert cut.train[0] + cut.valid[0] == whole
    assert len(cut.valid[0]) == math.ceil(len(whole) / 10)


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "holds no .txt file"), ({"a.txt": ""}, "no text to train on"), ({"valid.txt": "x"}, "no text to train on")],
)
def test_bad_text_folders(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(MPOError, match=message):
        load_task("text", tmp_path)
    with pytest.raises(MPOError, match="needs a folder"):
        load_task("text")


def test_names_in_any_spelling() -> None:
    assert {find_task(name).name for name in ("STS-B", "stsb", "sts_b", "StsB")} == {"STS-B"}
