"""mpo-tn to-dense as a user meets it: a plain folder, the bytes, and how far both models are apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import VOCAB, outputs, tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.app.dense_check import Difference, Sample, output_difference, sample_inputs
from mpo_tn.torch import MPOConfig, compress


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "small"
    model = tiny("bert")
    compress(
        model,
        MPOConfig(target_modules=".*", sites=3, keep=0.5, overrides={"query": {"sites": 1, "keep": None, "bits": 4}}),
    )
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


def test_a_dense_folder_is_written_and_compared(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    code, printed, _ = mpo_tn("to-dense", small, tmp_path / "dense", "--check")
    assert code == 0
    words = " ".join(printed.split())
    size = (tmp_path / "dense/model.safetensors").stat().st_size
    for said in ("matrices are dense again", f"{size:,} bytes of weights", "drawn ids", "of their norm"):
        assert said in words
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense").eval()
    assert {type(module) for module in loaded.modules()} == {type(module) for module in tiny("bert").modules()}
    expected = outputs(transformers.AutoModelForMaskedLM.from_pretrained(small))
    torch.testing.assert_close(outputs(loaded), expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "dense/vocab.txt").is_file()


def test_json_and_mistakes(mpo_tn: Any, small: Path, tmp_path: Path) -> None:
    code, printed, _ = mpo_tn("to-dense", small, tmp_path / "dense", "--check", "--json")
    report = json.loads(printed)
    assert (code, report["out"]) == (0, str(tmp_path / "dense"))
    assert report["bytes"] > report["bytes_before"] > 0
    assert 0 <= report["check"]["relative"] < 1e-5
    for arguments, said in (
        ((tmp_path / "dense", tmp_path / "again"), "is dense, not compressed by mpo-tn"),
        ((small, tmp_path / "dense"), "exists and is not empty"),
        ((small, small, "--overwrite"), "holds the input"),
    ):
        code, printed, error = mpo_tn("to-dense", *arguments)
        assert (code, printed, said in error) == (2, "", True), error
    assert mpo_tn("to-dense", small, tmp_path / "dense", "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_samples_and_differences() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    vision = transformers.ViTModel(config)
    sample = sample_inputs(vision, "nowhere/at-all")
    assert (sample.inputs["pixel_values"].shape, sample.words) == ((2, 3, 16, 16), "2 drawn pictures")
    found = output_difference(vision, vision, sample)
    assert (found.largest, "bit for bit" in found.sentence()) == (0, True)
    speech = type("Speech", (nn.Module,), {"main_input_name": "input_values", "config": config})()
    with pytest.raises(MPOError, match=r"takes input_values.*--check"):
        sample_inputs(speech, "nowhere/at-all")
    ids = Sample({"input": torch.arange(3)}, "3 ids")
    table = nn.Embedding(VOCAB, 2)
    half = nn.Embedding(VOCAB, 2, _weight=table.weight.detach() / 2)
    assert output_difference(half, table, ids).relative == pytest.approx(0.5)
    with pytest.raises(MPOError, match="have not the same shapes"):
        output_difference(nn.Embedding(VOCAB, 3), table, ids)
    with torch.no_grad():
        half.weight.fill_(torch.inf)
    half.dtype = torch.float32
    with pytest.raises(MPOError, match="not finite"):
        output_difference(half, half, ids)
    assert "largest difference is 0.5" in Difference(0.1, 0.5, "text").sentence()
