"""Checkpoints of any size: a folder of safetensors files read tensor by tensor, and written shard by shard.

Nothing is mapped: a file that shrinks under a mapping kills the process (SIGBUS), under a read it is an error.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.tensors import as_os_error, bytes_digest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "U16": ("uint16", 2), "U32": ("uint32", 4), "U64": ("uint64", 8), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
_SAMPLED = 64
"""So many entries of a tensor, evenly spread, tell a checkpoint from another."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes ``start`` to ``stop`` of a file of ``size`` bytes, changed last at ``changed``.

    ``dtype`` is a name such as torch has, ``float32`` or ``bfloat16``.
    """

    key: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    size: int
    changed: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.stop - self.start

    @property
    def keys(self) -> tuple[str, ...]:
        """What the checkpoint calls it; one, where a tensor in pieces has several."""
        return (self.key,)

    @property
    def itemsize(self) -> int:
        """Bytes of one entry."""
        return next(size for name, size in _DTYPES.values() if name == self.dtype)

    def read(self) -> np.ndarray:
        """The bytes, uint8 (nbytes,), in memory of their own.

        Raises:
            MPOError: the file is gone, shorter than it was, or was changed since it was first looked at.
        """
        buffer = np.empty(self.nbytes, np.uint8)
        view, done = buffer.data, 0
        with self._open() as file:
            self._check(os.fstat(file.fileno()))
            while done < self.nbytes:
                got = os.preadv(file.fileno(), [view[done:]], self.start + done)
                if got == 0:
                    raise self._other(f"it ends at byte {self.start + done}")
                done += got
            self._check(os.fstat(file.fileno()))
        return buffer

    def raw(self) -> RawTensor:
        """The tensor, as :meth:`read` gives it.

        Raises:
            MPOError: as :meth:`read`.
        """
        return RawTensor(self.dtype, self.shape, self.read())

    def sample(self, count: int) -> np.ndarray:
        """Every n-th entry from the first on, ``n = max(1, entries // count)``, as bytes (so many, itemsize).

        Raises:
            MPOError: as :meth:`read`.
        """
        width = self.itemsize
        step = max(1, self.nbytes // width // count)
        if step == 1:
            return self.read().reshape(-1, width)
        return self.entries(range(0, self.nbytes // width, step))

    def entries(self, places: Sequence[int]) -> np.ndarray:
        """Entries by their flat places, as bytes (so many, itemsize).

        Raises:
            MPOError: as :meth:`read`.
        """
        width = self.itemsize
        with self._open() as file:
            self._check(os.fstat(file.fileno()))
            found = b"".join(os.pread(file.fileno(), width, self.start + place * width) for place in places)
        if len(found) != len(places) * width:
            raise self._other("it is too short")
        return np.frombuffer(bytearray(found), np.uint8).reshape(-1, width)

    def _open(self) -> Any:
        try:
            return Path(self.file).open("rb", buffering=0)
        except OSError as error:
            raise MPOError(
                f"{self.file} cannot be read here ({error.strerror}), and {self.key} is in it: every process that "
                "works on a checkpoint has to see its folder under the same path"
            ) from error

    def _check(self, found: os.stat_result) -> None:
        if (found.st_size, found.st_mtime_ns) != (self.size, self.changed):
            grown = found.st_size != self.size
            raise self._other(f"it had {self.size} bytes and has {found.st_size}" if grown else "it was written to")

    def _other(self, why: str) -> MPOError:
        return MPOError(
            f"{self.file} was changed while it was read ({why}; {self.key} is in it): let nothing write to the "
            "checkpoint, and start again"
        )


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by key, in the order of the files."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """A digest of names, shapes, dtypes and evenly spread entries of every tensor, and of the configuration.

        Cost: 64 entries a tensor are read; a change between them is not seen.
        """
        parts: list[bytes | memoryview] = [(self.folder / "config.json").read_bytes()]
        for key, tensor in sorted(self.tensors.items()):
            parts.append(f"{key} {tensor.dtype} {tensor.shape}".encode())
            parts.append(tensor.sample(_SAMPLED).tobytes())
        return bytes_digest(parts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a folder of safetensors files, one file or shards with an index; no tensor is read.

    Raises:
        MPOError: no such files, an index that names a shard or a tensor that is not there, one key in two shards, a
            file that is damaged or ends too early.
    """
    if (folder / WEIGHTS).is_file():
        return Checkpoint(folder, _headers([folder / WEIGHTS]))
    if not (folder / INDEX).is_file():
        raise MPOError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: a checkpoint is read tensor by tensor from safetensors "
            f"files; "
            "write them with AutoModel.from_pretrained(...).save_pretrained(...)"
        )
    placed = _weight_map(folder / INDEX)
    names = sorted({*placed.values()})
    missing = [name for name in names if not _is_file(folder / name)]
    if missing:
        raise MPOError(
            f"{folder / INDEX} names {', '.join(missing[:3])}, and there {'is' if len(missing) == 1 else 'are'} no "
            f"such file{'' if len(missing) == 1 else 's'}: fetch the checkpoint again"
        )
    tensors = _headers([folder / name for name in names])
    for key, name in placed.items():
        if key not in tensors or Path(tensors[key].file).name != Path(name).name:
            raise MPOError(f"{folder / INDEX} says that {key} is in {name}, and it is not: fetch the checkpoint again")
    return Checkpoint(folder, tensors)


_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading files that are no safetensors, or no JSON, may raise."""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _weight_map(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(placed, dict) or not placed:
            raise ValueError("its weight_map places no tensor")
        wrong = [name for name in placed.values() if not _is_plain_name(name)]
        if wrong:
            raise ValueError(f"it places tensors in {wrong[0]!r}, which is no file of this folder")
        return dict(placed)
    except _UNREADABLE as error:
        raise MPOError(f"{path} is damaged ({_said(error)}): fetch the checkpoint again") from error


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and Path(name).name == name and name not in ("", ".", "..")


def _said(error: BaseException) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _headers(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for tensor in tensors_in(path):
            other = found.get(tensor.key)
            if other is not None:
                raise MPOError(
                    f"{tensor.key} is in {Path(other.file).name} and in {path.name} of {path.parent}: which of the two "
                    "is meant cannot be told; fetch the checkpoint again, or take one out"
                )
            found[tensor.key] = tensor
    return found


def tensors_in(path: Path) -> list[StoredTensor]:
    """The header of one safetensors file; no tensor is read.

    Raises:
        MPOError: it is damaged or ends too early.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= state.st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no table of tensors")
        header.pop("__metadata__", None)
        found: list[StoredTensor] = []
        base = 8 + length
        for key, entry in header.items():
            if not isinstance(entry, dict) or str(entry["dtype"]) not in _DTYPES:
                raise ValueError(f"{key} is of no dtype that is known")
            dtype, width = _DTYPES[entry["dtype"]]
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
                raise ValueError(f"the sizes of {key} are no whole numbers")
            if stop - start != width * math.prod(shape):
                raise ValueError(f"{key} does not take the room that its shape needs")
            found.append(
                StoredTensor(
                    key, str(path.absolute()), dtype, shape, base + start, base + stop, state.st_size, state.st_mtime_ns
                )
            )
        end = base
        for tensor in sorted(found, key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end:
                raise ValueError(f"{tensor.key} does not start where the tensor before it ends")
            end = tensor.stop
        if end != state.st_size:
            what = "it is truncated" if end > state.st_size else "something was appended"
            raise ValueError(f"it has {state.st_size} bytes and its tensors end at byte {end}: {what}")
    except _UNREADABLE as error:
        raise MPOError(f"{path} is damaged ({_said(error)}): fetch the checkpoint again") from error
    return found


def header_digest(path: Path) -> str:
    """Of all that a safetensors file holds beside its tensors, so far as it is there."""
    with path.open("rb") as file:
        length = file.read(8)
        return bytes_digest([length, file.read(min(int.from_bytes(length, "little"), path.stat().st_size))])


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes: ``data`` is uint8, contiguous; ``dtype`` as torch names it."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def digest(self) -> str:
        """Of shape, dtype and bytes, in hexadecimal."""
        return bytes_digest([f"{self.dtype} {self.shape}".encode(), self.data.data])

    def checksum(self) -> str:
        """CRC-32 of the bytes, in hexadecimal: several times cheaper, and sure to tell a change within 32 bits."""
        return f"{zlib.crc32(self.data.data):08x}"


def shard_names(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """Which tensor goes into which file: filled in order up to ``most`` bytes, a larger tensor has one of its own.

    >>> shard_names({"a": 3, "b": 2, "c": 9}, 5)
    {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    shards: list[list[str]] = [[]]
    room = most
    for key, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(key)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{k:05d}-of-{len(shards):05d}.safetensors": keys for k, keys in enumerate(shards, 1)}


def write_shard(path: Path, tensors: Mapping[str, RawTensor], notes: Mapping[str, str] | None = None) -> None:
    """Write tensors to one safetensors file such as transformers reads, and notes in its header; no copy is made.

    Raises:
        OSError: it cannot be written.
    """
    specs = {
        key: TensorSpec(
            dtype=tensor.dtype, shape=tensor.shape, data_ptr=tensor.data.ctypes.data, data_len=tensor.data.nbytes
        )
        for key, tensor in tensors.items()
    }
    written = {"format": "pt", **(notes or {})}
    with as_os_error():
        serialize_file(specs, path, metadata=written)
    if notes:
        _put_in_order(path, written)


def _put_in_order(path: Path, notes: Mapping[str, str]) -> None:
    """Notes come out of a hash table of safetensors, in another order every time."""
    begin, text = b'{"__metadata__":', json.dumps(notes, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        head = file.read(8 + len(begin) + len(text))
        if not head[8:].startswith(begin) or sorted(head[8 + len(begin) :]) != sorted(text):
            raise OSError(f"{path} has an unknown header")
        file.seek(8 + len(begin))
        file.write(text)


def notes_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file has beside tensors; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            return dict(json.loads(file.read(length))["__metadata__"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of shards, if there are several."""
    if list(shards) == [WEIGHTS]:
        return
    placed = {key: name for name, keys in shards.items() for key in keys}
    content = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
