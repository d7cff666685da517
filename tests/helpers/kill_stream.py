"""Streams a tiny model, killed at every event in turn and begun again, and compares what comes with a run in one go.

Run by tests/torch/hf/test_stream.py and test_stream_text.py in a process of its own: ``python -m helpers.kill_stream
FOLDER EVERY``, of whose events every so many are tried; with a third argument ``text``, with matrices that are fitted
to text, or ``experts``, with ones that lie in pieces. Prints what is wrong and exits with 1, or prints how many kills
there were.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from helpers.calibrating import padded_batches
from helpers.fuse import KILLED, Fuse, in_a_child
from helpers.streaming import CONFIG, SHARD, contents, experts_in, source_in
from mpo_tn.torch import MPOConfig
from mpo_tn.torch.hf import assembling, stream_job
from mpo_tn.torch.hf.stream import compress_folder
from mpo_tn.torch.models import stream_folder, stream_unit, walk_files


def main(home: Path, every: int, kind: str) -> int:
    torch.set_num_threads(1)
    source, out = source_in(home) if kind != "experts" else experts_in(home, "mixtral"), home / "out"
    on_text = MPOConfig(sites="low-rank", bond=8, bits=4, group=16)

    def stream() -> None:
        if kind == "text":
            compress_folder(source, out, on_text, calibration=padded_batches(3), shard_bytes=SHARD)
        else:
            compress_folder(source, out, CONFIG, shard_bytes=SHARD)

    def killed(at: int | None) -> None:
        fuse = Fuse(at)
        for owner, name in (
            (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (Path, "write_text"),
            (tempfile, "mkdtemp"), (tempfile, "mkstemp"), (shutil, "rmtree"), (os, "preadv"),
            (assembling, "write_shard"), (stream_unit, "write_tensors"), (stream_folder, "write_whole"),
            (stream_job, "read_names"), (walk_files, "write_tensors"), (walk_files, "write_whole"),
        ):  # fmt: skip
            fuse.wrap(owner, name)
        stream()

    stream()
    wanted = contents(out)
    kills, at = 0, 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        code = in_a_child(lambda at=at: killed(at))
        if code not in (0, KILLED):
            print(f"killed at event {at}: exit code {code}")
            return 1
        if code == KILLED and in_a_child(stream) != 0:
            print(f"killed at event {at}, begun again: it failed")
            return 1
        if contents(out) != wanted:
            print(f"killed at event {at}, begun again: the result is another one")
            return 1
        if left := {path.name for path in home.iterdir()} - {"out", "source"}:
            print(f"killed at event {at}: {', '.join(sorted(left))} is still there")
            return 1
        if code == 0:
            break
        kills += 1
        at += every
    print(f"{kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), (*sys.argv[3:], "matrices")[0]))
