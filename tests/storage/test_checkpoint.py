from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import (
    INDEX,
    WEIGHTS,
    RawTensor,
    notes_of,
    open_checkpoint,
    shard_names,
    write_index,
    write_shard,
)


def raw(seed: int, *shape: int) -> RawTensor:
    array = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return RawTensor("float32", shape, array.reshape(-1).view(np.uint8))


TENSORS = {"b.weight": raw(0, 5, 3), "a.weight": raw(1, 200), "none": raw(2, 0), "one": raw(3)}


def write(folder: Path, most: int = 100) -> None:
    (folder / "config.json").write_text("{}")
    shards = shard_names({key: tensor.data.nbytes for key, tensor in TENSORS.items()}, most)
    for name, keys in shards.items():
        write_shard(folder / name, {key: TENSORS[key] for key in keys})
    write_index(folder, shards, 0)


@pytest.mark.parametrize("most", [100, 10**9])
def test_what_is_written_is_read(tmp_path: Path, most: int) -> None:
    write(tmp_path, most)
    assert (tmp_path / WEIGHTS).exists() == (most > 100)
    found = open_checkpoint(tmp_path).tensors
    assert found.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(found[key].read(), tensor.data)
    every = found["a.weight"].sample(10).reshape(-1).view(np.float32)
    assert np.array_equal(every, TENSORS["a.weight"].data.view(np.float32)[::20])


def test_notes_are_in_the_header_in_their_order(tmp_path: Path) -> None:
    notes = {name: f"of {name} ☃" for name in "zyxabc"}
    for name in ("one", "other"):
        write_shard(tmp_path / name, TENSORS, notes)
    assert list(notes_of(tmp_path / "one").items()) == [("format", "pt"), *notes.items()]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    (tmp_path / WEIGHTS).write_bytes((tmp_path / "one").read_bytes())
    assert open_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()
    for damaged in (b"", b"12345678", b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "damaged").write_bytes(damaged)
        assert notes_of(tmp_path / "damaged") == {}
    assert notes_of(tmp_path / "nothing") == {}


def test_a_fingerprint_follows_numbers_and_not_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "shards", "other")]
    for folder, most in zip(folders, (10**9, 100, 10**9), strict=True):
        folder.mkdir()
        write(folder, most)
    with (folders[2] / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    one, shards, other = (open_checkpoint(folder).fingerprint() for folder in folders)
    assert one == shards != other


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    write(tmp_path)
    wanted = open_checkpoint(tmp_path).fingerprint()
    for k, path in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(k))
        path.symlink_to(tmp_path / "blobs" / str(k))
    assert open_checkpoint(tmp_path).fingerprint() == wanted


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MPOError, match=r"names model-00002-of-00003\.safetensors, and there is no such file"):
        open_checkpoint(tmp_path)


def test_one_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    write_shard(tmp_path / "model-00001-of-00003.safetensors", {**TENSORS})
    with pytest.raises(MPOError, match=r"is in model-00001-of-00003\.safetensors and in model-00002-of-00003"):
        open_checkpoint(tmp_path)


def test_a_key_that_is_not_where_the_index_says_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["c.weight"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(MPOError, match=r"c\.weight is in model-00001"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        "\ufeff{}",
        '{"weight_map": {}}',
        '{"weight_map": null}',
        '{"weight_map": "a"}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "/etc/x.safetensors"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": "x\\u0000"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
    ],
)
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(MPOError, match=r"index\.json is damaged"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_no_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "model-00002-of-00003.safetensors"
    for made in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name)):
        path.unlink() if path.is_file() or path.is_symlink() else None
        made()
        with pytest.raises(MPOError, match=r"names model-00002-of-00003\.safetensors, and there is no such file"):
            open_checkpoint(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(MPOError, match="and there is no such file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "[1]",
        "[" * 200_000,
        "\ufeff{}x",
        '{"a": "x"}',
        '{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1180591620717411303424], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": 8}}',
        '{"a": {"dtype": "F32", "shape": [2]}}',
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: str) -> None:
    data = header.encode()
    (tmp_path / WEIGHTS).write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
    with pytest.raises(MPOError, match=r"model\.safetensors is damaged"):
        open_checkpoint(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 900, len(whole) - 1):
        (tmp_path / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(MPOError, match=r"model\.safetensors is damaged"):
            open_checkpoint(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole + b"\0")
    with pytest.raises(MPOError, match=r"model\.safetensors is damaged"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("change", ["truncate", "touch", "remove"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, change: str) -> None:
    write(tmp_path, 10**9)
    found = open_checkpoint(tmp_path).tensors
    path = tmp_path / WEIGHTS
    if change == "truncate":
        os.truncate(path, 50)
    elif change == "touch":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    for key in ("a.weight", "b.weight"):
        with pytest.raises(MPOError, match=f"{key} is in it"):
            found[key].read()
        with pytest.raises(MPOError, match=f"{key} is in it"):
            found[key].sample(2)
