"""The result of a streamed run: finished matrices and what stays dense, put into files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import (
    RawTensor,
    StoredTensor,
    header_digest,
    open_checkpoint,
    shard_names,
    write_index,
    write_shard,
)
from mpo_tn.storage.files import written_beside
from mpo_tn.storage.tensors import bytes_digest, file_digest
from mpo_tn.torch.hf.card import write_card
from mpo_tn.torch.hf.companions import STREAM_RECORD, copy_companions
from mpo_tn.torch.hf.sentinel import guard
from mpo_tn.torch.models.stream_unit import UnitRecord, raw, read_unit, tensor_of

FORMAT = "mpo_tn.record"
VERSION = 1
RECORD_NOTE = "mpo_tn.record"
"""In the header of every file of weights: the name of the record, which cannot be taken away unnoticed."""


@dataclass(frozen=True)
class Piece:
    """Tensors of the result that come from one place: their sizes in bytes by key, and how to get them."""

    sizes: Mapping[str, int]
    load: Callable[[], dict[str, RawTensor]]

    @classmethod
    def of_source(cls, stored: StoredTensor, dtype: torch.dtype) -> Piece:
        """A tensor as it is in the source, cast to the dtype of the model if it is floating point."""
        own = getattr(torch, stored.dtype)
        size = stored.nbytes
        if own.is_floating_point:
            size = size // own.itemsize * dtype.itemsize
        return cls({stored.key: size}, lambda: {stored.key: raw(tensor_of(stored, dtype))})

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Piece:
        """Tensors that are at hand."""
        held = {key: raw(tensor) for key, tensor in tensors.items()}
        return cls({key: tensor.data.nbytes for key, tensor in held.items()}, lambda: held)

    @classmethod
    def of_unit(cls, path: Path, task: str, keys: Mapping[str, str], record: UnitRecord) -> Piece:
        """Tensors of a finished unit, under other keys."""

        def load() -> dict[str, RawTensor]:
            _, tensors = read_unit(path, task)
            return {key: tensors[own] for own, key in keys.items()}

        return cls({key: record.tensors[own][2] for own, key in keys.items()}, load)


def write_result(
    model: Any, source: Path, out: Path, pieces: list[Piece], record: Mapping[str, Any], shard_bytes: int
) -> None:
    """Write the folder whole or not at all: shards, index, configuration, card, record, and what else the source has.

    Args:
        model: with empty MPO modules in their places, and what transformers saves it by.
        source: the dense folder.
        out: the compressed one.
        pieces: all tensors of it.
        record: of how it was made.
        shard_bytes: of the files of the result.

    Raises:
        MPOError: the disk is full, or what is read was changed meanwhile.
    """
    sizes: dict[str, int] = {}
    for piece in pieces:
        for key, size in piece.sizes.items():
            if key in sizes:
                raise MPOError(f"{key} would be in the result twice: the checkpoint has a tensor of that name already")
            sizes[key] = size
    shards = shard_names(sizes, shard_bytes)
    digests: dict[str, str] = {}
    with written_beside(out) as temporary:
        copy_companions(source, temporary)
        _write_config(model, temporary)
        if hasattr(model, "hf_quantizer"):  # not if every matrix stayed dense
            write_card(model, temporary)
        for name, keys in shards.items():
            wanted, held = set(keys), dict[str, RawTensor]()
            for piece in pieces:
                if wanted.isdisjoint(piece.sizes):
                    continue
                held |= {key: tensor for key, tensor in piece.load().items() if key in wanted}
            digests |= {key: tensor.digest() for key, tensor in held.items()}
            write_shard(temporary / name, held, {RECORD_NOTE: STREAM_RECORD})
        write_index(temporary, shards, sum(sizes.values()))
        content: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, **record, "tensors": dict(sorted(digests.items())),
            "files": file_digests(temporary),
        }  # fmt: skip
        content["digest"] = _digest_of(content)
        (temporary / STREAM_RECORD).write_text(_text_of(content), encoding="utf-8")


def _write_config(model: Any, folder: Path) -> None:
    """``config.json`` as ``save_pretrained`` writes it."""
    if hasattr(model, "hf_quantizer"):
        guard(model.config)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)


def file_digests(folder: Path) -> dict[str, str]:
    """Digests of all files of a model folder but the record, by path inside of it; of weights of their headers "
    "alone.
    """
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: header_digest(path) if path.suffix == ".safetensors" else file_digest(path)
        for name, path in paths.items()
        if name != STREAM_RECORD
    }


def _digest_of(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "digest"}
    return bytes_digest([json.dumps(content, sort_keys=True).encode()])


def _text_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def read_record(folder: Path) -> dict[str, Any]:
    """What :func:`write_result` wrote of how the folder was made.

    Raises:
        MPOError: there is none, it is damaged, or was altered.
    """
    path = folder / STREAM_RECORD
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        if record["format"] != FORMAT or record["version"] > VERSION:
            raise ValueError(f"its format is {record['format']!r}, version {record['version']!r}")
        if record["digest"] != _digest_of(record) or text != _text_of(record):
            raise ValueError("it was altered")
        return {key: record[key] for key in ("run", "plan", "units", "tensors", "files")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise MPOError(f"{path} cannot be read ({error}): it tells how {folder} was made") from error


def altered(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What of a folder is not what was written, a phrase each. Cost: every byte is read, one tensor at a time.

    Raises:
        MPOError: the weights are damaged or missing.
    """
    found = _compared(record["files"], file_digests(folder))
    there, wanted = open_checkpoint(folder).tensors, record["tensors"]
    return found + _compared(
        wanted,
        {key: digest_of(there[key]) for key in there if key in wanted}
        | dict.fromkeys((key for key in there if key not in wanted), ""),
    )


def digest_of(stored: StoredTensor) -> str:
    """Of a tensor where it lies."""
    return RawTensor(stored.dtype, stored.shape, stored.read()).digest()


def _compared(wanted: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    found = [f"{key} is missing" for key in wanted if key not in there]
    found += [f"{key} was not there when the folder was written" for key in there if key not in wanted]
    return found + [f"{key} was altered" for key in wanted if key in there and there[key] != wanted[key]]
