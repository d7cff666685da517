"""What is read and copied of a model folder beside its weights: nothing that a link leads out to, nothing endless."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import outputs, tiny

from mpo_tn import MPOError
from mpo_tn.torch.hf.companions import copy_companions
from mpo_tn.torch.hf.folder import load_model, load_tokenizer, save_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    tiny("bert").save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


@pytest.mark.guarantee("links-stay-inside")
def test_links_are_followed_within_the_folder_only(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.txt").write_text("not yours")
    (source / "link.txt").symlink_to(tmp_path / "secret")
    (source / "tokenizer.json").symlink_to("../secret")
    (source / "passwd").symlink_to("/etc/passwd")
    (source / "folder").symlink_to(tmp_path / "secrets")
    (source / "zero.txt").symlink_to("/dev/null")
    (source / "again.txt").symlink_to("vocab.txt")
    (source / "nothing.txt").symlink_to("nowhere")
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match="not copied from .*source, .*: link.txt, passwd, tokenizer.json$"):
        copy_companions(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["again.txt", "vocab.txt"]
    assert (tmp_path / "out" / "again.txt").read_text() == "[PAD]\n[UNK]\n"


@pytest.mark.guarantee("links-stay-inside")
def test_a_snapshot_of_the_hub_is_links_to_its_blobs(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--some--bert"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for path in source.iterdir():
        shutil.move(path, home / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    (snapshot / "other.txt").symlink_to("../../refs/main")
    model = load_model(snapshot)
    with pytest.warns(UserWarning, match="other.txt"):
        save_model(model, snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n[UNK]\n"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert outputs(load_model(tmp_path / "out")).equal(outputs(model))


@pytest.mark.guarantee("files-that-end")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"])
def test_pipes_devices_and_endless_files_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    for read in (load_model, load_tokenizer):
        with pytest.raises(MPOError, match=r"pipe, a socket or a device|has no config.json"):
            read(source)
    (source / name).unlink()
    with (source / name).open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(MPOError, match=r"is read whole, up to|cannot be read as a model"):
        load_model(source)


def test_a_source_that_is_deleted_midway_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (source, Path("source")):
        model = load_model(name)
        shutil.move(source, tmp_path / "elsewhere")
        with pytest.raises(MPOError, match="is gone, it was deleted or renamed while it was being read"):
            save_model(model, name, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        shutil.move(tmp_path / "elsewhere", source)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: Path("nowhere").read_bytes())
    with pytest.raises(MPOError, match=r"was changed while it was being read, vocab.txt is gone"):
        save_model(load_model(source), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("pwned",))


def test_pickled_weights_are_read_as_tensors_or_refused_with_advice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_model(source)
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    torch.save(expected.state_dict(), file)
    assert outputs(load_model(source)).equal(outputs(expected))
    whole = file.read_bytes()
    torch.save({"x": Evil()}, tmp_path / "evil")
    damaged = [(tmp_path / "evil").read_bytes(), pickle.dumps(Evil()), b"", b"\0" * 1000, whole[: len(whole) // 2]]
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(MPOError, match=r"has pickled weights .* get the model as safetensors"):
            load_model(source)
    with file.open("wb") as sparse:
        sparse.truncate(20 * 2**30)
    with pytest.raises(MPOError, match="has pickled weights"):
        load_model(source)
    assert not (tmp_path / "pwned").exists()
