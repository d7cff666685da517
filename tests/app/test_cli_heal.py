"""mpo-tn heal as a user meets it: a better folder, a report, and one sentence for a mistake."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.task_folders import sentence, write_decoder, write_encoder

from mpo_tn.torch.loops import healer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a decoder, each dense and compressed, and text."""
    from mpo_tn.torch import MPOConfig, compress
    from mpo_tn.torch.hf.folder import load_model, save_model

    home = tmp_path_factory.mktemp("heal")
    source = random.Random(0)
    (home / "texts.txt").write_text("".join(f"{sentence(source)} .\n\n" for _ in range(120)), encoding="utf-8")
    for name, write in (("encoder", write_encoder), ("decoder", write_decoder)):
        write(home / name)
        model = load_model(home / name)
        compress(model, MPOConfig(sites=3, bond=4))
        save_model(model, home / name, home / f"small-{name}")
    return home


def asked(home: Path, name: str = "encoder") -> tuple[str | Path, ...]:
    return (
        "heal", home / f"small-{name}", "--against", home / name, "--texts", home / "texts.txt", "--steps", "20",
        "--batch-size", "16", "--max-length", "16",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "unit"), [("encoder", "D, relative squared"), ("decoder", "KL from the teacher")])
def test_a_new_folder_is_closer_to_the_dense_model(
    mpo_tn: Any, home: Path, tmp_path: Path, name: str, unit: str
) -> None:
    code, printed, _ = mpo_tn(*asked(home, name), "--out", tmp_path / "new")
    assert code == 0
    words = " ".join(printed.split())
    report = json.loads((tmp_path / "new" / "healing.json").read_text())
    assert report["after"] < report["before"]
    assert f"held-out batches: {report['before']:.4g} -> {report['after']:.4g}" in words
    assert unit in words
    assert len(report["losses"]) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # nothing is left of the run
    kind = transformers.AutoModel if name == "encoder" else transformers.AutoModelForCausalLM
    ids = {"input_ids": torch.tensor([[2, 5, 6, 7, 8, 3]])}
    with torch.no_grad():
        there, before, after = (
            kind.from_pretrained(folder).eval()(**ids)[0]
            for folder in (home / name, home / f"small-{name}", tmp_path / "new")
        )
    assert (after - there).norm() < (before - there).norm()
    assert (tmp_path / "new" / "vocab.txt").read_bytes() == (home / name / "vocab.txt").read_bytes()


def test_in_place(mpo_tn: Any, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "small-encoder", tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    arguments = asked(home)
    command = (arguments[0], tmp_path / "model", *arguments[2:])
    code, _, error = mpo_tn(*command)
    assert (code, "--overwrite" in error) == (2, True)
    code, printed, _ = mpo_tn(*command, "--overwrite", "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["after"] < report["before"]
    assert report["out"] == str(tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    code, printed, _ = mpo_tn(*command, "--overwrite", "--json", "--steps", "2")  # goes on from there
    assert json.loads(printed)["before"] == pytest.approx(report["after"], rel=1e-3)  # read back: other roundings


def test_stopped_and_resumed(mpo_tn: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (*asked(home), "--json", "--out")
    code, printed, _ = mpo_tn(*command, tmp_path / "whole")
    whole = json.loads(printed)
    inner, calls = healer.Healer.step, []

    def step(self: Any) -> float:
        calls.append(1)
        if len(calls) == 8:
            raise OSError("the power went")
        return inner(self)

    with monkeypatch.context() as patch:
        patch.setattr(healer.Healer, "step", step)
        code, _, error = mpo_tn(*command, tmp_path / "new")
        assert (code, "the power went" in error) == (2, True)
    assert not (tmp_path / "new").exists()
    code, _, error = mpo_tn(*command, tmp_path / "new")
    assert (code, "new.healing holds a run that was stopped: pass --resume" in error) == (2, True)
    code, printed, _ = mpo_tn(*command, tmp_path / "new", "--resume")
    assert code == 0
    again = json.loads(printed)
    assert [again["held_out"][0], len(again["losses"])] == [whole["held_out"][0], 20]
    assert again["losses"] == pytest.approx(whole["losses"], rel=1e-3)  # loaded tensors may lie elsewhere
    code, printed, error = mpo_tn(*command, tmp_path / "other", "--resume")
    assert code == 0
    assert "no run to go on with" in error


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"--texts": "nowhere.txt"}, "nowhere.txt"),
        ({"--texts": "empty.txt"}, "empty.txt holds no text"),
        ({"--texts": "latin.txt"}, "latin.txt is not UTF-8 at byte 1"),
        ({"--texts": "greek.txt"}, "unknown to the tokenizer"),
        ({"--against": "nowhere"}, "nowhere"),
        ({"--against": "small-encoder", "--train": "all"}, "train='all'"),
        ({"--objective": "loss"}, "--objective loss is of language models"),
        ({"--objective": "logits"}, "gives no logits"),
        ({"--steps": "0"}, "steps=0"),
        ({"--minutes": "1"}, "both say how long"),
        ({"--out": "encoder"}, "exists and is not empty"),
        ({"--batch-size": "0"}, "batch_size=0"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(
    mpo_tn: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], match: str
) -> None:
    monkeypatch.chdir(home)
    (home / "empty.txt").write_text("\n \n")
    (home / "latin.txt").write_bytes(b"d\xe9j\xe0\n")
    (home / "greek.txt").write_text("\u03b4\u03ae\u03bc\n\u03c0\u03cc\u03bb\n", encoding="utf-8")
    options = {
        "--against": "./encoder", "--texts": "texts.txt", "--steps": "2", "--out": str(tmp_path / "new"),
        **{key: f"./{value}" if key == "--against" else value for key, value in change.items()},
    }  # fmt: skip
    code, printed, error = mpo_tn("heal", "small-encoder", *[part for pair in options.items() for part in pair])
    assert code == 2
    assert printed == ""
    assert match in " ".join(error.split())
    assert error.strip().startswith("mpo-tn: ")
    assert not (tmp_path / "new").exists()
