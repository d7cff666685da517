"""mpo-tn compress --stream: a checkpoint of any size, matrix by matrix, here or on many machines."""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpo_tn.app.terminal import out
from mpo_tn.exceptions import MPOError
from mpo_tn.planning.sizes import size_of
from mpo_tn.progress import Progress

if TYPE_CHECKING:
    from mpo_tn.app.sampling import Sampling
    from mpo_tn.planning.config import MPOConfig
    from mpo_tn.torch import CompressionReport, Plan
    from mpo_tn.torch.hf.stream import DryRun

_PANEL = "Models of any size, on any number of workers"
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        rich_help_panel=_PANEL,
        help="Never load the model: one matrix in memory at a time, with --texts one block, and a run that was killed "
        "goes on where it was. By default with the options below, and for models of more than half of the memory that "
        "is free.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None, typer.Option(rich_help_panel=_PANEL, help="Stream, in so many processes of one thread each.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Stream, on the workers of this Dask scheduler: tcp://HOST:PORT. Folders are shared.",
    ),
]
ShardSize = Annotated[
    str | None, typer.Option(rich_help_panel=_PANEL, help="Stream, into files of this size (default: 2GB).")
]
Only = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        rich_help_panel=_PANEL,
        help="Say what streaming would read and write, how long and in how much memory.",
    ),
]


@dataclass(frozen=True)
class Streaming:
    """What was asked for of it."""

    stream: bool | None
    workers: int | None
    scheduler: str | None
    shard_size: str | None
    dry_run: bool

    def wanted(self, model: str, *, refine: bool, by_budget: bool) -> bool:
        """Whether to stream.

        Raises:
            MPOError: asked for together with what needs the whole model.
        """
        asked = self.workers is not None or self.scheduler is not None or self.shard_size is not None or self.dry_run
        if self.stream is False and asked:
            raise MPOError("--no-stream leaves nothing for --workers, --scheduler, --shard-size and --dry-run to do")
        if self.workers is not None and self.scheduler is not None:
            raise MPOError(
                "--workers are processes of this machine and --scheduler has workers of its own: leave one out"
            )
        wanted = bool(self.stream) or asked
        if wanted and refine:
            raise MPOError(
                "--refine trains blocks, which needs the whole model in memory, and streaming never loads it: leave "
                "one of them out"
            )
        if self.stream is None and not asked:
            return not refine and not by_budget and _is_large(Path(model))
        return wanted

    def run(
        self, model: str, folder: Path, config: MPOConfig | Plan, sampling: Sampling, *, anchored: bool | None,
        overwrite: bool, progress: Progress,
    ) -> CompressionReport | DryRun:  # fmt: skip
        """Do it, or say what it would take."""
        from mpo_tn.app.cluster import dask_executor
        from mpo_tn.torch.hf.folder import empty_model
        from mpo_tn.torch.hf.snapshot import local_folder
        from mpo_tn.torch.hf.stream import SHARD_BYTES, compress_folder, dry_run

        shard_bytes = SHARD_BYTES if self.shard_size is None else size_of(self.shard_size)
        workers = 1 if self.workers is None else self.workers
        source = local_folder(model)
        # Of the model only what it makes of text is asked for.
        calibration = sampling.of(empty_model(source) if sampling.is_given else None, str(source))
        if self.dry_run:
            return dry_run(
                source, folder, config, calibration=calibration, anchored=anchored, workers=workers,
                shard_bytes=shard_bytes,
            )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        lent = nullcontext[Executor | None](None)
        with lent if self.scheduler is None else dask_executor(self.scheduler, [source, folder.parent]) as executor:
            return compress_folder(
                model, folder, config, calibration=calibration, anchored=anchored, workers=workers,
                executor=executor, shard_bytes=shard_bytes, overwrite=overwrite, progress=progress,
            )  # fmt: skip


def _is_large(folder: Path) -> bool:
    """Whether safetensors files take more than half of the memory that is free."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return False
    return size > free / 2


def print_dry_run(found: DryRun) -> None:
    """What a run would do, a line each."""
    seconds = f"{found.seconds:.0f} s" if found.seconds < 120 else f"{found.seconds / 60:.0f} min"
    meanwhile = f"meanwhile    {found.bytes_meanwhile / 1e6:,.1f} MB of moments and hidden states, at most\n"
    out.print(
        f"{found.units} matrices, {found.done} of them done\n"
        f"to read      {found.bytes_read / 1e6:,.1f} MB\n"
        f"to write     {found.bytes_written / 1e6:,.1f} MB, and so much space is needed\n"
        f"{meanwhile if found.bytes_meanwhile else ''}"
        f"time         about {seconds}{', and running the model on text' if found.bytes_meanwhile else ''}\n"
        f"memory       about {(found.memory + 300e6) / 1e6:,.0f} MB a process",
        highlight=False,
    )
