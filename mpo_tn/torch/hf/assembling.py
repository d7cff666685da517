"""The result of a streamed run: finished matrices and what stays dense, put into files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.storage.checkpoint import (
    RawTensor,
    StoredTensor,
    open_checkpoint,
    shard_names,
    write_index,
    write_shard,
)
from mpo_tn.storage.files import written_beside
from mpo_tn.torch.hf.folder import RECORD, copy_companions
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.hf.quantizer import sentinel_key
from mpo_tn.torch.models.stream_unit import UnitRecord, raw, read_unit, tensor_of

FORMAT = "mpo_tn.record"
VERSION = 1


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
    def of_unit(cls, path: Path, task: str, keys: Mapping[str, str], record: UnitRecord) -> Piece:
        """Tensors of a finished unit, under other keys."""

        def load() -> dict[str, RawTensor]:
            _, tensors = read_unit(path, task)
            return {key: tensors[own] for own, key in keys.items()}

        return cls({key: record.tensors[own][2] for own, key in keys.items()}, load)


def write_result(
    model: Any, source: Path, out: Path, pieces: list[Piece], modules: dict[str, ModuleSpec], decided: Plan,
    record: Mapping[str, Any], shard_bytes: int,
) -> None:  # fmt: skip
    """Write the folder whole or not at all: shards, index, configuration, record, and what else the source has.

    Raises:
        MPOError: the disk is full, or what is read was changed meanwhile.
    """
    sentinel = sentinel_key(modules)
    empty = RawTensor("float32", (0,), np.empty(0, np.uint8))
    everything = [*pieces, Piece({sentinel: 0}, lambda: {sentinel: empty})]
    sizes: dict[str, int] = {}
    for piece in everything:
        for key, size in piece.sizes.items():
            if key in sizes:
                raise MPOError(f"{key} would be in the result twice: the checkpoint has a tensor of that name already")
            sizes[key] = size
    shards = shard_names(sizes, shard_bytes)
    digests: dict[str, str] = {}
    with written_beside(out) as temporary:
        copy_companions(source, temporary)
        _write_config(model, temporary, modules, decided)
        for name, keys in shards.items():
            wanted, held = set(keys), dict[str, RawTensor]()
            for piece in everything:
                if wanted.isdisjoint(piece.sizes):
                    continue
                held |= {key: tensor for key, tensor in piece.load().items() if key in wanted}
            digests |= {key: tensor.digest() for key, tensor in held.items()}
            write_shard(temporary / name, held)
        write_index(temporary, shards, sum(sizes.values()))
        config = (temporary / "config.json").read_text(encoding="utf-8")
        content = {
            "format": FORMAT, "version": VERSION, **record, "tensors": dict(sorted(digests.items())),
            "config": json.loads(config),
        }  # fmt: skip
        (temporary / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_config(model: Any, folder: Path, modules: dict[str, ModuleSpec], decided: Plan) -> None:
    """``config.json`` as ``save_pretrained`` writes it."""
    model.config.quantization_config = MPOQuantizationConfig(decided.config, modules)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """What :func:`write_result` wrote of how the folder was made.

    Raises:
        MPOError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["version"] > VERSION:
            raise ValueError(f"its format is {record['format']!r}, version {record['version']!r}")
        return {key: record[key] for key in ("run", "plan", "units", "tensors", "config")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise MPOError(f"{path} cannot be read ({error}): it tells how {folder} was made") from error


def altered_tensors(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What of the tensors of a folder is not what was written, a phrase each.

    Raises:
        MPOError: the files are damaged or missing.
    """
    there, wanted = open_checkpoint(folder).tensors, record["tensors"]
    found = [f"{key} is missing" for key in wanted if key not in there]
    found += [f"{key} is new" for key in there if key not in wanted]
    for key, digest in wanted.items():
        if key in there:
            stored = there[key]
            if RawTensor(stored.dtype, stored.shape, stored.read()).digest() != digest:
                found.append(f"{key} has other numbers")
    return found
