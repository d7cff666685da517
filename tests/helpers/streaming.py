"""Sharded folders of tiny models, and what a streamed run of them leaves."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.tiny_models import tiny
from mpo_tn.torch import MPOConfig

CONFIG = MPOConfig(sites=3, keep=0.5)
SHARD = 20_000
"""Bytes of the files of a result: tiny models make several."""


def source_in(folder: Path, family: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of shards with what else a model folder has."""
    path = folder / "source"
    tiny(family, tied=tied).to(dtype).save_pretrained(path, max_shard_size="20kB")
    (path / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every byte of a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
