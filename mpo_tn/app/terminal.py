"""What the commands share: the two streams, the progress bar, tables, and the reading of options."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES
from mpo_tn.progress import Progress

# Names of files and modules are printed as they are: no [markup], no :emoji:.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

EVERY = 30.0
"""Seconds between two lines on long work where there is no terminal for a bar."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Device = Annotated[str, typer.Option(help="cpu, or for instance cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of the same kind.")]


@contextmanager
def working(quiet: bool, *, speaks: bool = True) -> Generator[Progress]:
    """A progress bar on the error stream, or without a terminal a line every half minute; nothing but that meanwhile.

    ``quiet`` shows no bar; lines are written all the same, unless another process ``speaks``.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    hidden = quiet or not err.is_terminal or not speaks
    with (
        _lines(err.is_terminal or not speaks) as told,
        Bar(*columns, console=err, transient=True, disable=hidden) as bar,
    ):
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, what: str) -> None:
            told[:] = [done, total, what]
            width = max(20, err.width - 50)
            shown = what if len(what) <= width else f"{what[: width - 3]}..."
            bar.update(task, description=shown, completed=done, total=total)
            if done < total:
                bar.tasks[0].finished_time = None  # one task stands for many: its clock goes on

        # Loading torch and transformers takes seconds; the bar is up by then, and their own bars would tear it.
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        yield progress


@contextmanager
def _lines(is_terminal: bool) -> Generator[list[Any]]:
    """Says every half minute what it was told last, from a thread of its own: one step may take longer than that."""
    told: list[Any] = [0, 0, "starting"]
    ended, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(EVERY):
            done, total, what = told
            count = f", {done} of {total}" if total > 1 else ""
            err.print(f"mpo-tn: {what}{count}, after {time.monotonic() - began:.0f} s", soft_wrap=True)

    speaker = threading.Thread(target=say, daemon=True)
    if not is_terminal:
        speaker.start()
    try:
        yield told
    finally:
        ended.set()
        if speaker.ident is not None:
            speaker.join()


def sites_of(text: str) -> int | str:
    """What ``--sites`` means: a number or ``"low-rank"``.

    Raises:
        MPOError: neither.
    """
    if text == "low-rank":
        return text
    try:
        return int(text)
    except ValueError:
        raise MPOError(f'--sites {text!r} is neither a number nor "low-rank"') from None


def targets_of(given: list[str] | None, default: str = ALL_LINEAR) -> str | tuple[str, ...]:
    """What the values of ``--target`` mean; without one all linear layers, or what else is said to be the default."""
    if given and len(given) == 1 and given[0] in (ALL_LINEAR, ALL_MATRICES):
        return given[0]
    return tuple(given) if given else default


def bits_of(bits: int | None, central: int | None) -> int | dict[str, int | None] | None:
    """What ``--bits`` and ``--central-bits`` mean: the first is of all cores, the second of the central one instead."""
    return bits if central is None else {"central": central, "auxiliary": bits}


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on the output stream."""
    # Straight to the stream: rich would wrap long lines and colour brackets.
    sys.stdout.write(json.dumps(document, indent=2, default=float) + "\n")


def new_table(*columns: tuple[str, str], gap: int = 2) -> Table:
    """An empty table of (name, side) columns, ``gap`` blanks apart."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    return table


def is_wide() -> bool:
    """Whether the terminal has room for tables side by side."""
    return out.width >= 120
