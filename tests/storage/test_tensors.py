"""Errors of safetensors as the kinds that writing and reading know, and digests that do not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.storage.files import file_beside, written_beside
from mpo_tn.storage.tensors import as_damaged, as_os_error, bytes_digest, file_digest, read_tensors, write_tensors


def test_what_safetensors_cannot_write_is_an_os_error(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "file"
    with pytest.raises(OSError, match="No such file or directory") as caught, as_os_error():
        save_file({"a": np.zeros(3)}, nowhere)
    assert type(caught.value.__cause__).__name__ == "SafetensorError"
    with pytest.raises(MPOError, match=r"could not be written.*No such file or directory.*nothing was changed"):
        _write(tmp_path / "out", nowhere)
    assert list(tmp_path.iterdir()) == []


def _write(out: Path, nowhere: Path) -> None:
    with written_beside(out), as_os_error():
        save_file({"a": np.zeros(3)}, nowhere)


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), MPOError("x"), KeyboardInterrupt("x"), OSError("x")])
def test_other_errors_pass_through_writing(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, as_os_error():
        raise error
    assert caught.value is error


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no file": lambda path: (path / "none").read_bytes(),
    "a folder": lambda path: path.read_bytes(),
    "no safetensors": lambda path: load_file(path / "text"),
    "no JSON": lambda path: json.loads((path / "text").read_text()),
    "no text": lambda path: (path / "bytes").read_text(encoding="utf-8"),
    "no entry": lambda path: {}["entry"],
    "too short a list": lambda path: [][0],
    "a list for a dictionary": lambda path: json.loads("[]")["entry"],
    "a number for a dictionary": lambda path: json.loads("3").items(),
}


@pytest.mark.parametrize("read", DAMAGE.values(), ids=DAMAGE.keys())
def test_whatever_does_not_fit_is_damage(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("{ this is neither")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(MPOError) as caught, as_damaged(tmp_path, "write it again"):
        read(tmp_path)
    message, cause = str(caught.value), caught.value.__cause__
    assert message.startswith(f"{tmp_path} cannot be read, it is damaged ({type(cause).__name__}: ")
    assert message.endswith("): write it again")


@pytest.mark.parametrize("error", [MPOError("of another version"), ZeroDivisionError("x"), KeyboardInterrupt("x")])
def test_what_is_no_damage_passes_through_reading(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, as_damaged(Path("folder"), "write it again"):
        raise error
    assert caught.value is error


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_a_digest_is_that_of_the_bytes_together(parts: list[bytes]) -> None:
    digest = bytes_digest(memoryview(part) for part in parts)
    assert digest == hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


@given(st.binary(max_size=300))
def test_the_digest_of_a_file_is_sha256(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "file"
    path.write_bytes(data)
    assert file_digest(path) == hashlib.sha256(data).hexdigest()


@given(
    st.lists(
        st.tuples(st.sampled_from(["float64", "float32", "int64", "uint8"]), st.lists(st.integers(0, 4), max_size=3))
    )
)
def test_arrays_and_their_record_come_back(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a"
    rng = np.random.default_rng(0)
    arrays = {f"array {k}": np.asarray(100 * rng.random(shape)).astype(kind) for k, (kind, shape) in enumerate(kinds)}
    record = {"format": "x", "version": 1, "names": list(arrays)}
    write_tensors(path, {name: array.T for name, array in arrays.items()}, record)
    found, again = read_tensors(path, "x", 1)
    assert again == record
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array.T)
    load_file(path)  # any reader of the format


@pytest.mark.parametrize("error", [KeyboardInterrupt("x"), MPOError("x"), ZeroDivisionError("x")])
def test_other_errors_pass_through_a_file_beside(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with file_beside(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error), match=r"x$"):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
