"""Calibrations in files, told from those of other models, and what they say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.calibrating import padded_batches
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.storage.tensors import read_tensors, write_tensors
from mpo_tn.torch import Calibration, MPOConfig, calibrate, calibrate_blocks, compress
from mpo_tn.torch.models.calibration import FORMAT, VERSION, Moments


def full() -> Calibration:
    """One with everything in it: shared inputs, a table, gradients."""
    model = tiny("bert")
    return calibrate(
        model, padded_batches(), target_modules=r".*(word_embeddings|query|key|dense)", gradients=True, seed=7
    )


def crossed() -> Calibration:
    """The second block after the first was changed."""
    model: Any = tiny("llama")
    for step in calibrate_blocks(model, padded_batches()):
        if step.name.endswith("1"):
            return step.calibration
        assert step.block is not None
        compress(step.block, MPOConfig(target_modules=r".*", sites=2, bond=3))
    raise AssertionError("no second block")


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.guarantee("calibration-bits")
@pytest.mark.parametrize("make", [full, crossed])
def test_what_was_saved_comes_back_bit_for_bit(make: Any, tmp_path: Path) -> None:
    before: Calibration = make()
    before.save(tmp_path / "a.safetensors")
    after = Calibration.load(tmp_path / "a.safetensors")
    for name in ("inputs", "units", "tokens", "fingerprint", "seed", "notes"):
        assert getattr(after, name) == getattr(before, name), name
    assert str(after) == str(before)
    assert after.summary() == before.summary()
    assert after.moments.keys() == before.moments.keys()
    for unit in before.units:
        x, y = before.of(unit), after.of(unit)
        assert x is not None
        assert y is not None
        assert x.tokens == y.tokens
        assert all(same(getattr(x, part), getattr(y, part)) for part in ("second", "cross", "outer", "rows"))
    assert before.bytes <= (tmp_path / "a.safetensors").stat().st_size <= before.bytes + 40_000
    after.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.guarantee("calibration-whole")
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])
    found.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpo_tn.storage.tensors.serialize_file", full_disk)
    with pytest.raises(MPOError, match="No space left"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.ones(3, 2)]).save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(MPOError, match="could not be written"):
        found.save(tmp_path / "nowhere" / "a")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MPOError, match="is no file"):
        Calibration.load(tmp_path / "none")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(MPOError, match="damaged"):
        Calibration.load(tmp_path / "text")
    full().save(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    data[-3] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(MPOError, match="it does not hold what was written"):
        Calibration.load(tmp_path / "flipped")
    (tmp_path / "short").write_bytes(data[:-9])
    with pytest.raises(MPOError, match="damaged"):
        Calibration.load(tmp_path / "short")
    arrays, record = read_tensors(tmp_path / "a", FORMAT, VERSION)
    for change, message in (
        ({"version": 2}, "version 2 and this one reads up to 1: upgrade"),
        ({"format": "x"}, "does not hold mpo_tn.calibration"),
        ({"counted": {"y": 1}}, "damaged"),
        ({"inputs": 3}, "damaged"),
        ({"parameters": {"a": ["float32"]}}, "damaged"),
    ):
        write_tensors(tmp_path / "b", arrays, {**record, **change})
        with pytest.raises(MPOError, match=message):
            Calibration.load(tmp_path / "b")
    write_tensors(tmp_path / "b", {**arrays, "third.x": np.ones(1)}, record)
    with pytest.raises(MPOError, match="damaged"):
        Calibration.load(tmp_path / "b")


def test_another_model_is_refused_and_what_differs_is_named() -> None:
    model = tiny("bert")
    found = calibrate(model, padded_batches())
    found.check(model)
    found.check(tiny("bert"))
    with pytest.raises(MPOError, match=r"of a BertForMaskedLM, is not of this GPT2LMHeadModel: .* and \d+ more"):
        found.check(tiny("gpt2"))
    weight = model.get_submodule("bert.encoder.layer.1.output.dense").weight
    with torch.no_grad():
        weight.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(
        MPOError, match=r"BertForMaskedLM: bert\.encoder\.layer\.1\.output\.dense\.weight has other numbers; cal"
    ):
        found.check(model)
    with pytest.raises(MPOError, match=r"LayerNorm.bias is bfloat16 \[32\], not float32 \[32\]; .* and 39 more"):
        found.check(tiny("bert").bfloat16())
    compressed = tiny("bert")
    compress(compressed, MPOConfig(target_modules=["query"], bond=3))
    with pytest.raises(MPOError, match=r"query\.cores\.0 is new"):
        found.check(compressed)
    with torch.device("meta"), pytest.raises(MPOError, match=r"0\.weight"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])


def test_it_says_how_many_tokens_and_what_is_missing() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x.repeat(1, 3, 1)).mean()

    batch = {"x": torch.randn(2, 5, 8), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])}
    found = calibrate(Part(), [batch])
    assert found.unreached == ("c",)
    assert found.of("c") is None
    lines = str(found).splitlines()
    assert lines[0] == "5 tokens; 3 matrices read 2 distinct inputs; 0.0 MB"
    assert lines[1] == "2 inputs of width 8, rank at most 5 to 8"
    assert lines[2] == "note: too few tokens for 1 inputs, a: below 8 tokens S has no full rank"
    assert lines[3] == "note: nothing reached c: there is no metric for these"
    assert lines[4] == "note: padding could not be told in the inputs of b, so it was counted"
    assert found.of("a").rank() == 5  # type: ignore[union-attr]
    assert Moments(3).rank() == Moments(3).most_rank == 0
    with pytest.raises(MPOError, match="d was not calibrated: the units are a, b, c"):
        found.of("d")
