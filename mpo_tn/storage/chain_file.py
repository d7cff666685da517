"""One chain in one safetensors file. docs/format.md describes it; no pickle is read or written."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array, check_loaded, dtype_name, is_traced, library, to_jax
from mpo_tn.storage.files import checked_file, write_whole

FORMAT = "mpo_tn.MPO"
VERSION = 1
_KEY = "mpo"
"""The one metadata entry: safetensors does not keep the order of several, and equal chains shall give equal bytes."""

# Of each dtype of cores: what safetensors calls what is stored, on reading and on writing, and NumPy's name for it.
# Complex numbers are stored as pairs because safetensors has no complex128; NumPy alone has no bfloat16.
_STORED = {
    "float16": ("F16", "float16", "<f2"),
    "bfloat16": ("BF16", "bfloat16", "<u2"),
    "float32": ("F32", "float32", "<f4"),
    "float64": ("F64", "float64", "<f8"),
    "complex64": ("F32", "float32", "<f4"),
    "complex128": ("F64", "float64", "<f8"),
}
_LONGEST_HEADER = 100_000_000  # of safetensors
_FRAMEWORKS = ("numpy", "torch", "jax")


def save(chain: Chain, path: str | os.PathLike[str]) -> None:
    """Write a chain to a file. See :meth:`mpo_tn.MPO.save`."""
    target = _checked_path(path)
    dtype = dtype_name(chain.cores[0])
    arrays = [_raw(core, k) for k, core in enumerate(chain.cores)]
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "out": chain.sites.out,
        "in": chain.sites.in_,
        "bonds": chain.bonds,
        "canonical_interval": chain.canonical_interval,
    }
    record["sha256"] = _digest(record, [array.tobytes() for array in arrays])
    # The arrays stay alive in their list while their addresses are read.
    specs = {
        f"cores.{k}": TensorSpec(
            dtype=_STORED[dtype][1], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for k, array in enumerate(arrays)
    }
    write_whole(target, serialize(specs, metadata={_KEY: _json(record)}))


def load(path: str | os.PathLike[str], framework: str) -> tuple[tuple[Array, ...], tuple[int, int]]:
    """The cores and the canonical interval in a file. See :meth:`mpo_tn.MPO.load`."""
    if framework not in _FRAMEWORKS:
        raise MPOError(f"framework={framework!r} is not known: it is one of {', '.join(_FRAMEWORKS)}")
    source = _checked_path(path)
    try:
        with checked_file(source, "what MPO.save wrote").open("rb") as file:
            begin, header = _header(source, file)
            data = begin + file.read()
    except MPOError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise MPOError(f"{source} could not be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        tensors = dict(deserialize(data))
    except (SafetensorError, ValueError) as error:
        raise _no_safetensors(source, error) from error
    record = _checked_record(source, (header.get("__metadata__") or {}).get(_KEY))
    dtype: str = record["dtype"]
    shapes = _shapes(record)
    names = [f"cores.{k}" for k in range(len(shapes))]
    if set(tensors) != set(names):
        raise _damaged(source, f"it has the tensors {', '.join(sorted(tensors))} and should have {', '.join(names)}")
    for name, shape in zip(names, shapes, strict=True):
        found = (tensors[name]["dtype"], tuple(tensors[name]["shape"]))
        expected = (_STORED[dtype][0], (*shape, 2) if dtype.startswith("complex") else shape)
        if found != expected:
            raise _damaged(
                source, f"{name} is {found[0]} of shape {found[1]} and should be {expected[0]} {expected[1]}"
            )
    contents = [tensors[name]["data"] for name in names]
    if _digest(record, contents) != record.get("sha256"):
        raise _damaged(source, "its checksum does not match what it holds")
    low, high = record["canonical_interval"]
    try:
        cores = tuple(_core(raw, dtype, shape, framework) for raw, shape in zip(contents, shapes, strict=True))
    except MPOError as error:
        raise MPOError(f"{source} holds {dtype} cores: {error}") from error
    return cores, (low, high)


def _header(source: Path, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The begin of a file, up to its tensors, and what it says of them, before anything large is read."""
    size = os.fstat(file.fileno()).st_size
    begin = file.read(8)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise _no_safetensors(source, "its header does not fit into it")
    begin += file.read(length)
    try:
        header = json.loads(begin[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if max(ends, default=0) != size - 8 - length:
            raise _no_safetensors(source, f"it has {size:,} bytes, and its header speaks of another number")
        text = (header.get("__metadata__") or {}).get(_KEY)
    except MPOError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _no_safetensors(source, error) from error
    if not isinstance(text, str | None):
        raise _damaged(source, "its metadata is no text")
    return begin, header


def _checked_path(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise MPOError(f"path={path!r} is not a path: pass the name of a file") from None


def _raw(core: Array, k: int) -> np.ndarray:
    """The entries as a contiguous little-endian host array, a trailing axis of 2 for complex ones."""
    if is_traced(core):
        raise MPOError(f"core {k} is being traced by JAX and has no values: save outside the traced function")
    if library(core) == "torch":
        check_loaded(core, f"core {k}")
        core = core.detach().cpu().resolve_conj().resolve_neg().contiguous()
        core = (core.view(importlib.import_module("torch").uint16) if dtype_name(core) == "bfloat16" else core).numpy()
    array: Any = np.ascontiguousarray(core)
    if dtype_name(array) == "bfloat16":
        array = array.view("u2")
    elif dtype_name(array).startswith("complex"):
        array = array.view(array.real.dtype).reshape(*array.shape, 2)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _core(raw: bytearray, dtype: str, shape: tuple[int, ...], framework: str) -> Array:
    """The array of a framework whose entries are these bytes."""
    array = np.frombuffer(raw, dtype=_STORED[dtype][2])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if framework == "torch":
        torch = _import("torch")
        tensor = torch.from_numpy(array.view("i2") if dtype == "bfloat16" else array)
        return tensor.view(getattr(torch, dtype)).reshape(shape)
    if dtype == "bfloat16":
        array = array.view(_import("ml_dtypes").bfloat16)
    elif dtype.startswith("complex"):
        array = array.view(dtype)
    array = array.reshape(shape)
    if framework == "jax":
        _import("jax")
        return to_jax(array)
    return array


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MPOError(f"reading them as asked needs {module}, which is not installed") from None


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def _digest(record: dict[str, Any], contents: Sequence[bytes | bytearray]) -> str:
    """The checksum of everything in the file, itself excepted."""
    found = hashlib.sha256(_json({key: value for key, value in record.items() if key != "sha256"}).encode())
    for content in contents:
        found.update(content)
    return found.hexdigest()


def _damaged(source: Path, reason: str) -> MPOError:
    return MPOError(f"{source} is damaged: {reason}")


def _no_safetensors(source: Path, reason: object) -> MPOError:
    return MPOError(f"{source} is damaged or no safetensors file: {reason}")


def _checked_record(source: Path, text: str | None) -> dict[str, Any]:
    """The metadata, with the types it must have."""
    if text is None:
        raise MPOError(
            f"{source} was not written by MPO.save: it is a safetensors file without the metadata entry {_KEY!r}; "
            "a compressed model is read with AutoModel.from_pretrained"
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(source, f"its metadata is no JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise MPOError(f"{source} was not written by MPO.save: its metadata does not name the format {FORMAT}")
    version = record.get("version")
    if not _is_whole(version) or version < 1:
        raise _damaged(source, f"version {version!r} is not a positive integer")
    if version > VERSION:
        raise MPOError(
            f"{source} has format version {version} and this release of mpo_tn reads up to {VERSION}: upgrade mpo_tn"
        )
    if record.get("dtype") not in list(_STORED):
        raise _damaged(source, f"dtype {record.get('dtype')!r} is not one of {', '.join(_STORED)}")
    lists = {key: record.get(key) for key in ("out", "in", "bonds", "canonical_interval")}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(_is_whole(number) for number in value):
            raise _damaged(source, f"{key} {value!r} is not a list of integers")
    n = len(record["out"])
    if not len(record["in"]) == len(record["bonds"]) + 1 == n:
        raise _damaged(source, f"legs {record['out']}, {record['in']} and bonds {record['bonds']} are of no one chain")
    if min(record["out"] + record["in"] + record["bonds"]) < 1:
        raise _damaged(source, f"legs {record['out']}, {record['in']} and bonds {record['bonds']} must be positive")
    interval = record["canonical_interval"]
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] < n:
        raise _damaged(source, f"canonical_interval {interval} is not a pair of sites from 0 to {n - 1}")
    return record


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shapes(record: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    ends = [1, *record["bonds"], 1]
    return [
        (ends[k], out, in_, ends[k + 1]) for k, (out, in_) in enumerate(zip(record["out"], record["in"], strict=True))
    ]
