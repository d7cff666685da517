"""The record beside the weights: a changed byte is refused when the folder is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import small
from helpers.streaming import CONFIG, SHARD, source_in
from helpers.tiny_models import outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import tensors_in
from mpo_tn.torch import to_dense
from mpo_tn.torch.hf.record import NAME, check_files
from mpo_tn.torch.hf.stream import compress_folder
from mpo_tn.torch.hf.verify import verify_folder

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return transformers.BertForMaskedLM.from_pretrained(folder)


def changed(folder: Path, place: int, bits: int) -> None:
    """Flip bits of a byte of the weights."""
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


@pytest.mark.guarantee("loaded-as-saved")
@pytest.mark.parametrize("what", ["core", "bias", "norm", "record", "last"])
def test_a_changed_bit_of_any_tensor_is_refused(saved: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    tensors = tensors_in(tmp_path / WEIGHTS)
    chosen = {
        "core": next(each for each in tensors if each.key.endswith("query.cores.1")),
        "bias": next(each for each in tensors if each.key.endswith("query.bias")),
        "norm": next(each for each in tensors if each.key.endswith("LayerNorm.weight")),
        "record": next(each for each in tensors if each.dtype == "uint8"),
        "last": max((each for each in tensors if each.dtype == "float32"), key=lambda each: each.stop),
    }[what]
    changed(tmp_path, chosen.stop - 1, 1)
    said = f"{chosen.key} in .*altered.*mpo-tn verify" if what != "record" else "record beside the weights is damaged"
    with pytest.raises(MPOError, match=said):
        load(tmp_path)
    assert not verify_folder(tmp_path).is_good


@pytest.mark.guarantee("loaded-as-saved")
@pytest.mark.slow
@given(st.data())
@settings(max_examples=40)
def test_any_byte_counts(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("changed")
    for name in (WEIGHTS, NAME):
        shutil.copy(saved / name, folder / name)
    header = tensors_in(folder / WEIGHTS)[0].start
    size = (folder / WEIGHTS).stat().st_size
    place = data.draw(st.integers(0, header - 1) | st.integers(header, size - 1), label="place")
    changed(folder, place, data.draw(st.integers(1, 255), label="bits"))
    with pytest.raises(MPOError):
        check_files([folder / WEIGHTS])
    shutil.rmtree(folder)


@pytest.mark.guarantee("loaded-as-saved")
def test_shapes_alone_would_not_tell_a_header(saved: Path, tmp_path: Path) -> None:
    """Two tensors of one shape change places, and nothing else in the file."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    data = (tmp_path / WEIGHTS).read_bytes()
    one, other, none = (b"layer.%s.attention.self.query.bias" % number for number in (b"0", b"1", b"-"))
    swapped = data.replace(one, none).replace(other, one).replace(none, other)
    (tmp_path / WEIGHTS).write_bytes(swapped)
    with pytest.raises(MPOError, match="the header of"):
        load(tmp_path)


def test_the_way_out_is_to_delete_the_record(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / WEIGHTS)
    save_file(
        {**state, "cls.predictions.bias": state["cls.predictions.bias"] + 1}, tmp_path / WEIGHTS, {"format": "pt"}
    )
    with pytest.raises(MPOError, match=f"delete {NAME}"):
        load(tmp_path)
    (tmp_path / NAME).unlink()
    load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "mpo_tn.record", "version": 2}', "[" * 10_000])
def test_a_damaged_record_is_one_error(saved: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(MPOError, match=r"cannot be read.*delete it"):
        load(tmp_path)
    record = json.loads((saved / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**record, "checksums": {WEIGHTS: []}}, indent=1) + "\n")
    with pytest.raises(MPOError, match=r"cannot be read.*delete it"):
        load(tmp_path)


def test_it_is_of_what_was_saved_last(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        model.cls.predictions.bias += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), outputs(model))
    assert verify_folder(tmp_path).is_good
    to_dense(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / NAME).exists()
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


@pytest.mark.guarantee("loaded-as-saved")
def test_of_a_streamed_folder(tmp_path: Path) -> None:
    compress_folder(source_in(tmp_path), tmp_path / "out", CONFIG, shard_bytes=SHARD)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    path = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    last = max((each for each in tensors_in(path) if each.dtype != "uint8"), key=lambda each: each.stop)
    data = bytearray(path.read_bytes())
    data[last.stop - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MPOError, match=last.key):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
