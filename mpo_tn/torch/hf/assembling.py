"""The result of a streamed run: finished matrices and what stays dense, put into files that transformers reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import RawTensor, StoredTensor, shard_names, write_index, write_shard
from mpo_tn.storage.files import written_beside
from mpo_tn.torch.hf.card import write_card
from mpo_tn.torch.hf.companions import copy_companions
from mpo_tn.torch.hf.record import NAME as RECORD_NAME
from mpo_tn.torch.hf.record import RECORD_NOTE, record_run
from mpo_tn.torch.hf.sentinel import guard
from mpo_tn.torch.models.stream_unit import UnitRecord, raw, read_unit, tensor_of


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
    checksums: dict[str, dict[str, str]] = {}
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
            checksums[name] = {key: tensor.checksum() for key, tensor in held.items()}
            write_shard(temporary / name, held, {RECORD_NOTE: RECORD_NAME})
        write_index(temporary, shards, sum(sizes.values()))
        record_run(temporary, record, digests, checksums)


def _write_config(model: Any, folder: Path) -> None:
    """``config.json`` as ``save_pretrained`` writes it."""
    if hasattr(model, "hf_quantizer"):
        guard(model.config)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)
