"""Streams a tiny model on two workers of Dask, kills one of them, and compares the result with a run in one process.

Run by tests/torch/hf/test_stream.py in a process of its own: ``python -m helpers.dask_stream FOLDER``. Prints what is
wrong and exits with 1.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

from distributed import Client, LocalCluster

from helpers.streaming import CONFIG, SHARD, contents, source_in
from mpo_tn import MPOError
from mpo_tn.app.cluster import dask_executor
from mpo_tn.torch.hf.stream import compress_folder


def main(home: Path) -> int:
    source = source_in(home)
    compress_folder(source, home / "one", CONFIG, shard_bytes=SHARD)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            pids = list(client.run(os.getpid).values())

        def kill(done: int, _total: int, what: str) -> None:
            if what.startswith("compressing") and done == 2 and pids:
                os.kill(pids.pop(), signal.SIGKILL)

        with dask_executor(cluster.scheduler_address, [source, home]) as executor:
            compress_folder(source, home / "dask", CONFIG, shard_bytes=SHARD, executor=executor, progress=kill)
        if contents(home / "dask") != contents(home / "one") or len(pids) != 1:
            print("the result is another one")
            return 1
        hidden = tempfile.mkdtemp(dir=home)
        Path(hidden).rmdir()
        try:
            with dask_executor(cluster.scheduler_address, [Path(hidden)]):
                print("a folder that no worker sees was not refused")
                return 1
        except MPOError as error:
            if "does not see" not in str(error):
                print(error)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
