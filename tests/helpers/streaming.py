"""Sharded folders of tiny models, and what a streamed run of them leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.architectures import tiny_model
from helpers.paths import ROOT, TESTS
from helpers.tiny_models import tiny
from mpo_tn.storage.checkpoint import open_checkpoint
from mpo_tn.torch import MPOConfig, Plan, compress
from mpo_tn.torch.hf.folder import load_model, save_model
from mpo_tn.torch.models.stream_unit import one_thread

CONFIG = MPOConfig(sites=3, keep=0.5)
SHARD = 20_000
"""Bytes of the files of a result: tiny models make several."""


def source_in(folder: Path, family: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """A folder of shards with what else a model folder has."""
    path = folder / "source"
    tiny(family, tied=tied).to(dtype).save_pretrained(path, max_shard_size="20kB")
    (path / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    return path


def experts_in(folder: Path, name: str) -> Path:
    """A folder of shards of a model with experts, which lie in other files than one another."""
    path = folder / "source"
    tiny_model(name).save_pretrained(path, max_shard_size="20kB")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every byte of a folder by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_memory(source: Path, out: Path, config: MPOConfig | Plan, **options: Any) -> dict[str, Any]:
    """What ``compress`` and ``save_pretrained`` make of a loaded model; gives the report."""
    with one_thread():
        model = load_model(source)
        report = compress(model, config, **options)
        save_model(model, source, out)
    return report.to_dict()


def same_tensors(one: Path, other: Path) -> None:
    """Two folders hold the same tensors, bit for bit."""
    a, b = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert a[key].read().tobytes() == b[key].read().tobytes(), key


SOAKING = os.environ.get("HYPOTHESIS_PROFILE") == "soak"


def kills_of_runs(home: Path, every: int, *what: str) -> int:
    """How many runs were killed, one before each so many-th event, and all went on to the same bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.kill_stream", home, str(every), *what], cwd=TESTS, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return int(done.stdout.split()[-2])
