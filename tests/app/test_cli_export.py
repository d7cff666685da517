"""mpo-tn export as a user meets it: what it will take is said, then it is written; one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.tiny_models import tiny
from safetensors.torch import load_file

from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf import export as export_module


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed folder with other files beside the weights."""
    folder = tmp_path_factory.mktemp("export") / "small"
    model = tiny("bert")
    compress(model, MPOConfig(sites=1, bits=4, group=32, overrides={"query": {"sites": 3, "bond": 4, "bits": None}}))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_what_it_takes_is_said_and_then_written(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = mpo_tn("export", small, out, "--format", "compressed-tensors")
    assert code == 0
    words = " ".join(printed.split())
    tensors = load_file(out / "model.safetensors")
    assert f"{sum(tensor.nbytes for tensor in tensors.values()):,} bytes of weights" in words
    for part in ("4 bits, group 32", "dense float32", "a chain of 3 cores", "groups of 32 do not divide 48 columns"):
        assert part in words
    assert (out / "vocab.txt").read_bytes() == (small / "vocab.txt").read_bytes()
    assert (out / "1_Pooling" / "config.json").is_file()
    transformers.AutoModelForMaskedLM.from_pretrained(out)


def test_nothing_is_written_before_it_is_said(
    mpo_tn: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise OSError("stopped")

    monkeypatch.setattr(export_module, "write_export", interrupted)
    code, printed, error = mpo_tn("export", small, tmp_path / "out")
    assert (code, "stopped" in error, "The folder will take" in printed) == (2, True, True)
    assert not list(tmp_path.iterdir())


def test_json(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    code, printed, _ = mpo_tn("export", small, tmp_path / "out", "--json")
    assert code == 0
    report = json.loads(printed)
    assert (report["out"], report["format"], report["loss"]) == (str(tmp_path / "out"), "compressed-tensors", "")
    assert {row["note"] for row in report["multiplied_out"]} == {"a chain of 3 cores"}
    assert report["bytes_before"] > 0


def test_mistakes(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "dense")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for arguments, said in (
        ((tmp_path / "dense", tmp_path / "out"), "is dense, not compressed by mpo-tn"),
        ((tmp_path / "missing", tmp_path / "out"), "there is no model folder"),
        ((small, tmp_path / "taken"), "exists and is not empty"),
        ((small, tmp_path / "taken", "--overwrite"), "will not be replaced"),
        ((small, small), "holds the input"),
        ((small, tmp_path / "out", "--format", "gguf"), "name one of compressed-tensors"),
    ):
        code, printed, error = mpo_tn("export", *arguments)
        assert (code, printed) == (2, "")
        assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "taken"]


def test_overwrite_replaces_an_earlier_result(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    assert mpo_tn("export", small, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "old.txt").write_text("old")
    assert mpo_tn("export", small, tmp_path / "out", "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "old.txt").exists()
