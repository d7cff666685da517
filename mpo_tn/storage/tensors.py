"""Files of tensors: what can go wrong with them in one kind of error each, and digests of what was written.

Weights are written and read by whoever knows them (``safetensors.torch``, ``save_pretrained``); arrays that go with a
record of what they are, in one file, by :func:`write_tensors` and :func:`read_tensors`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import file_beside

_RECORD = "record"
"""The one metadata entry: safetensors does not keep the order of several, and equal data shall give equal bytes."""


@contextlib.contextmanager
def as_os_error() -> Generator[None]:
    """Around writing, inside of :func:`~mpo_tn.storage.files.written_beside`: a full disk is an ``OSError`` there.

    Raises:
        OSError: safetensors, which has an error of its own for it, could not write.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def as_damaged(folder: Path, way_out: str) -> Generator[None]:
    """Around reading a folder that we wrote: whatever does not fit is damage, and one error names the folder.

    Args:
        folder: that is read.
        way_out: what to do about it; the end of the message.

    Raises:
        MPOError: a file that cannot be read, is no safetensors or JSON, or has other entries than it should. One that
            is raised inside passes as it is.
    """
    try:
        yield
    except MPOError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MPOError(
            f"{folder} cannot be read, it is damaged ({type(error).__name__}: {error}): {way_out}"
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(parts: Iterable[bytes | memoryview]) -> str:
    """BLAKE2b of 16 bytes over the parts one after another, in hexadecimal.

    >>> bytes_digest([b"ab", b"c"]) == bytes_digest([b"abc"])
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Write arrays and a record that JSON can hold to one safetensors file, whole or not at all; no copy is made.

    Args:
        path: of the file.
        arrays: by name; contiguous, of a plain dtype.
        record: with ``format`` and ``version``. A digest of everything goes along.

    Raises:
        MPOError: the file cannot be written.
    """
    held = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    text = json.dumps({**record, "digest": _digest_of(held, record)}, sort_keys=True, separators=(",", ":"))
    # The arrays stay alive in their dictionary while their addresses are read.
    specs = {
        name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, array in held.items()
    }
    with file_beside(path) as temporary, as_os_error():
        serialize_file(specs, temporary, metadata={_RECORD: text})


def read_tensors(path: Path, form: str, version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record that :func:`write_tensors` wrote.

    Args:
        path: of the file.
        form: the ``format`` it must have.
        version: the newest that can be read.

    Raises:
        MPOError: no such file, no such format, a newer version, or any bit is not what was written.
    """
    if not path.is_file():
        raise MPOError(f"{path} is no file: name one that holds {form}")
    with as_damaged(path, "write it again"):
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(_RECORD)
            record = json.loads(text) if text is not None else {}
            if not isinstance(record, dict) or record.get("format") != form:
                raise MPOError(f"{path} does not hold {form}: name another file")
            if record["version"] > version:
                raise MPOError(
                    f"{path} was written in version {record['version']!r} and this one reads up to {version}: upgrade "
                    "mpo-tn"
                )
            arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = record.pop("digest")
        if _digest_of(arrays, record) != expected:
            raise ValueError("it does not hold what was written")
    return arrays, record


def _digest_of(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    parts: list[bytes | memoryview] = [json.dumps(record, sort_keys=True, separators=(",", ":")).encode()]
    for name, array in sorted(arrays.items()):
        parts += [f"{name} {array.dtype.str} {array.shape}".encode(), array.reshape(-1).view(np.uint8).data]
    return bytes_digest(parts)
