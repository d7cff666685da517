"""finetune and squeeze as a user meets them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.task_folders import write_all

from mpo_tn.torch import MPOLayer
from mpo_tn.tuning.result import FinetuneResult
from mpo_tn.tuning.run import Run

SMALL = ("--batch-size", "12", "--sites", "3", "--max-length", "24")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("train"))


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "!doctype"):
            self.open.append(tag)
        self.links += [
            value or "" for key, value in attrs if key in ("src", "href") and not (value or "").startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_finetune_squeeze_and_the_one_shot_control(mpo_tn: Any, places: dict[str, Path], tmp_path: Path) -> None:
    """The walk of a newcomer: tune, squeeze what was tuned, and truncate at once to the same bonds."""
    tuned, squeezed, shot = (tmp_path / name for name in ("tuned", "squeezed", "shot"))
    task = ("--task", "MRPC", "--data-dir", places["mrpc"], *SMALL)
    code, printed, _ = mpo_tn("finetune", places["encoder"], *task, "--epochs", "2", "--out", tuned)
    words = " ".join(printed.split())
    assert code == 0
    assert "majority class 54.2 70.3" in words
    assert "epoch 2" in words
    assert "always '1', 69% of the training set" in words
    result = json.loads((tuned / "result.json").read_text())
    assert result["method"] == "lfa"
    assert f"mean of accuracy and f1 {result['headline']:.2f} at the end" in words
    assert f"{result['trainable']:,} of {result['total']:,}" in words

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tuned)
    assert sum(isinstance(module, MPOLayer) for module in model.modules()) == 13
    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    assert tokenizer("red dog")["input_ids"] == [2, 5, 8, 3]
    assert not (tuned / "checkpoint").exists()

    cut = ("--delta", "200", "--max-rounds", "2", "--cuts-per-round", "25", "--tune-steps", "2")
    code, printed, _ = mpo_tn("squeeze", tuned, *task, *cut, "--out", squeezed)
    assert code == 0
    assert "50 cuts" in printed
    result = json.loads((squeezed / "result.json").read_text())
    bonds = result["squeezing"]["bonds"]
    assert result["steps"] == 4
    words = " ".join(printed.split())
    reference = result["squeezing"]["reference"]
    assert ("there was nothing to lose" in words) == (reference <= result["baseline_headline"])
    code, printed, error = mpo_tn(
        "squeeze", tuned, "--task", "STS-B", "--data-dir", places["stsb"], "--out", tmp_path / "no"
    )  # fmt: skip
    assert code == 2
    assert "was tuned on MRPC, and the task is STS-B" in " ".join(error.split())
    page = (squeezed / "report.html").read_text()
    assert _Page(page).open == []
    assert _Page(page).links == []
    assert all(text in page for text in ("Rounds", "bert.pooler.dense", "<svg", "majority class"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(squeezed)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MPOLayer)}
    assert {name: list(module.spec.bonds) for name, module in layers.items()} == bonds

    code, printed, _ = mpo_tn(
        "finetune", places["encoder"], *task, "--method", "one-shot", "--bonds-from", squeezed, "--max-steps", "4",
        "--out", shot, "--json",
    )  # fmt: skip
    assert code == 0
    control = json.loads(printed)
    assert control["out"] == str(shot)
    assert control["matrix_parameters"] == result["matrix_parameters"]
    assert control["trainable"] == result["trainable"]
    assert control["steps"] == 4


def test_the_saved_model_is_the_one_that_was_scored(mpo_tn: Any, places: dict[str, Path], tmp_path: Path) -> None:
    """A new process reads the folder and finds the predictions behind the score; LoRA's are merged by then."""
    from mpo_tn.tuning.tasks.batches import task_batches
    from mpo_tn.tuning.tasks.data import TaskData, load_task

    for name in ("lfa", "lora"):
        out = tmp_path / name
        code, _, _ = mpo_tn(
            "finetune", places["encoder"], "--task", "MRPC", "--data-dir", places["mrpc"], *SMALL, "--method", name,
            "--max-steps", "3", "--lr", "1e-2", "--tensor-lr", "1e-2", "--out", out,
        )  # fmt: skip
        assert code == 0
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
        assert model.config.id2label == {0: "0", 1: "1"}
        data = load_task("MRPC", places["mrpc"])
        assert isinstance(data, TaskData)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        right = close = 0
        for batch in task_batches(data.dev["dev"], tokenizer, batch_size=7, max_length=24).in_order():
            with torch.no_grad():
                logits = model(**batch.inputs).logits
            right += int((logits.argmax(-1) == batch.labels).sum())
            # Other batches, and LoRA's matrices apart or merged, round otherwise: what is too close to call may turn.
            close += int(((logits[:, 0] - logits[:, 1]).abs() < 1e-4 * logits.norm(dim=1)).sum())
        accuracy = json.loads((out / "result.json").read_text())["scores"][-1]["accuracy"]
        assert close <= 2
        assert accuracy == pytest.approx(100 * right / 24, abs=100 * close / 24)


def test_several_seeds(mpo_tn: Any, places: dict[str, Path], tmp_path: Path) -> None:
    args = ("finetune", places["encoder"], "--task", "sts-b", "--data-dir", places["stsb"], *SMALL, "--method", "full")
    code, printed, _ = mpo_tn(*args, "--max-steps", "2", "--seed", "0", "--seed", "3", "--out", tmp_path / "o")
    words = " ".join(printed.split())
    assert code == 0
    assert "undefined" in words
    headlines = [json.loads((tmp_path / "o" / f"seed-{s}" / "result.json").read_text())["headline"] for s in (0, 3)]
    assert f"2 seeds: mean {sum(headlines) / 2:.2f}" in words

    # Interrupted in the second seed: the first one is read and not run again.
    shutil.rmtree(tmp_path / "o" / "seed-3")
    first = (tmp_path / "o" / "seed-0" / "result.json").read_bytes()
    seeds = ("--max-steps", "2", "--seed", "0", "--seed", "3", "--out", tmp_path / "o", "--resume")
    code, printed, error = mpo_tn(*args, *seeds)
    assert code == 0
    assert [line for line in error.splitlines() if "afresh" in line] == [
        f"mpo-tn: there is no checkpoint in {tmp_path / 'o' / 'seed-3'}: starting afresh"
    ]
    assert f"2 seeds: mean {sum(headlines) / 2:.2f}" in " ".join(printed.split())
    assert (tmp_path / "o" / "seed-0" / "result.json").read_bytes() == first
    code, _, error = mpo_tn(*args, *seeds, "--lr", "1e-3")
    assert code == 2
    assert "lr was 5e-05 and is 0.001" in " ".join(error.split())


def test_text(mpo_tn: Any, places: dict[str, Path], tmp_path: Path) -> None:
    args = ("finetune", places["decoder"], "--task", "text", "--data-dir", places["text"], *SMALL, "--max-steps", "2")
    code, printed, _ = mpo_tn(*args, "--method", "full", "--out", tmp_path / "o")
    assert code == 0
    assert "byte perplexity" in " ".join(printed.split())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o").config.vocab_size == 20


@pytest.mark.slow
def test_killed_and_resumed(
    mpo_tn: Any, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (
        "finetune", places["encoder"], "--task", "MRPC", "--data-dir", places["mrpc"], *SMALL, "--max-steps", "6",
        "--save-every", "2", "--out",
    )  # fmt: skip
    mpo_tn(*args, tmp_path / "whole")
    whole, count = Run.step, 0

    def step(self: Run) -> float:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", step)
        code, _, _ = mpo_tn(*args, tmp_path / "out")
        assert code != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint"]
    code, _, error = mpo_tn(*args, tmp_path / "out")
    assert code == 2
    assert "--resume" in " ".join(error.split())
    code, _, _ = mpo_tn(*args, tmp_path / "out", "--resume")
    assert code == 0
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert mpo_tn(*args, tmp_path / "new", "--resume")[2].strip() == (
        f"mpo-tn: there is no checkpoint in {tmp_path / 'new'}: starting afresh"
    )
    assert files[0].read_bytes() == files[1].read_bytes()


MISTAKES = {
    "unknown task": (("finetune", "{encoder}", "--task", "SNLI", "--data-dir", "{mrpc}"), "unknown task 'SNLI'"),
    "no task": (("finetune", "{encoder}"), "nothing to tune on: give --task, or your own examples"),
    "two tasks": (
        ("finetune", "{encoder}", "--task", "MRPC", "--train-file", "{text}/valid.txt"),
        "--train-file and --task both say what to tune on",
    ),
    "columns of a task": (
        ("finetune", "{encoder}", "--task", "MRPC", "--label", "y"), "--label says how to read your own examples"
    ),
    "no table": (
        ("squeeze", "{encoder}", "--train-file", "{text}/valid.txt", "--label", "y"), "has no columns, which"
    ),
    "unknown method": (("finetune", "{encoder}", "--task", "MRPC", "--method", "magic"), "unknown method 'magic'"),
    "another task's files": (
        ("finetune", "{encoder}", "--task", "RTE", "--data-dir", "{mrpc}"),
        "it has no column 'sentence1' and no 'sentence2' and no 'label', its columns are 'Quality'",
    ),
    "no model": (("finetune", "{mrpc}", "--task", "MRPC", "--data-dir", "{mrpc}"), "is not a model folder"),
    "delta negative": (("squeeze", "{encoder}", "--task", "MRPC", "--delta", "-1"), "delta=-1"),
    "no squeezed run": (
        ("finetune", "{encoder}", "--task", "MRPC", "--method", "one-shot", "--bonds-from", "{mrpc}"), "result.json"
    ),
    "no size": (("finetune", "{encoder}", "--task", "MRPC", "--method", "low-rank"), "needs a size"),
    "the same seed twice": (
        ("finetune", "{encoder}", "--task", "MRPC", "--seed", "1", "--seed", "1"), "not different"
    ),
    "no sites": (("finetune", "{encoder}", "--task", "MRPC", "--sites", "none"), "--sites 'none'"),
    "output in use": (("finetune", "{encoder}", "--task", "MRPC", "--out", "{mrpc}"), "not empty"),
    "overwrite something else": (
        ("finetune", "{encoder}", "--task", "MRPC", "--out", "{mrpc}", "--overwrite"), "not an earlier result"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_code_2(
    mpo_tn: Any, places: dict[str, Path], tmp_path: Path, mistake: str
) -> None:
    args, names = MISTAKES[mistake]
    filled = [arg.format(**places) for arg in args]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out")]
    code, printed, error = mpo_tn(*filled)
    assert code == 2
    assert names in " ".join(error.split())
    assert "Traceback" not in error
    assert printed == ""
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in places["mrpc"].iterdir()) == ["dev.tsv", "train.tsv"]


def test_examples_of_ones_own(mpo_tn: Any, places: dict[str, Path], tmp_path: Path) -> None:
    """A table of texts and classes is tuned on, squeezed on and scored on; the model knows the classes by name."""
    (tmp_path / "own.csv").write_text(
        "text,verdict\n" + "".join(f"red {('dog', 'cat')[k % 2]} runs,{('bark', 'meow')[k % 2]}\n" for k in range(40))
    )
    own = ("--train-file", tmp_path / "own.csv", "--dev-file", tmp_path / "own.csv", "--label", "verdict", *SMALL)
    code, printed, _ = mpo_tn("finetune", places["encoder"], *own, "--max-steps", "2", "--out", tmp_path / "tuned")
    assert code == 0
    words = " ".join(printed.split())
    assert "majority class 50.0" in words
    assert "own.csv is a choice of 2 classes (bark, meow), told from the labels in column 'verdict'" in words
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert model.config.id2label == {0: "bark", 1: "meow"}
    result = json.loads((tmp_path / "tuned" / "result.json").read_text())
    code, printed, _ = mpo_tn(
        "eval", tmp_path / "tuned", "--texts", tmp_path / "own.csv", "--label", "verdict", "--json"
    )  # fmt: skip
    assert code == 0
    # In other batches what is too close to call may turn: the sentences are two.
    found = json.loads(printed)["rows"][0]["scores"][0]["value"]
    assert found == pytest.approx(result["headline"], abs=50.1)
    cut = ("--delta", "200", "--max-rounds", "1", "--cuts-per-round", "5", "--tune-steps", "1")
    code, printed, _ = mpo_tn("squeeze", tmp_path / "tuned", *own, *cut, "--out", tmp_path / "small")
    assert code == 0
    assert "5 cuts" in printed
    (tmp_path / "a.txt").write_text("red dog runs . " * 40)
    code, printed, _ = mpo_tn(
        "finetune", places["decoder"], "--train-file", tmp_path / "a.txt", "--max-steps", "1", *SMALL, "--out",
        tmp_path / "language",
    )  # fmt: skip
    assert code == 0
    assert "perplexity" in printed


def test_the_page_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from mpo_tn.app.finetune_page import finetune_page

    result = FinetuneResult(
        "lfa", "WNLI", 0, scores=[{"accuracy": 50.0}], losses=[0.7], headline=50.0, best=50.0,
        baseline={"accuracy": 56.3}, baseline_headline=56.3, baseline_is="always '0'",
        note="uninformative: <why>", matrix_dense=1, total=2,
    )  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = finetune_page(result)
    assert "matplotlib is not installed" in page
    assert "At the end the model is no better than the majority class." in page
    assert "WNLI is uninformative: &lt;why&gt;" in page
    assert _Page(page).open == []


def test_help_needs_no_torch() -> None:
    """The help pages appear at once."""
    script = (
        "import sys\nfrom mpo_tn.app import cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'imported too early'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
