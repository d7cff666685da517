"""What benchmarks that keep rows are called with, and how their pictures are written. It sets no thread counts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from mpo_tn import plot
from mpo_tn.storage.files import write_whole


def save(figure: Any, file: Path, title: str) -> None:
    """Write a figure as its name says: .svg, with a title for those who cannot see it, or .png."""
    if file.suffix == ".svg":
        write_whole(file, plot.svg(figure, title=title, alone=True).encode())
    else:
        figure.savefig(file, dpi=150)


class Commands:
    """``run DATA_DIR RESULTS``, whose options are added to :attr:`run`, ``table RESULTS`` and ``plot RESULTS FILE``."""

    def __init__(self, description: str | None) -> None:
        self._parser = argparse.ArgumentParser(description=description)
        self._commands = self._parser.add_subparsers(dest="command", required=True)
        self.run = self._commands.add_parser("run")
        self.run.add_argument("data_dir", type=Path)
        self.run.add_argument("results", type=Path)

    def asked(
        self, tables: Callable[[Path], str], picture: Callable[[Path, Path], None] | None = None
    ) -> argparse.Namespace | None:
        """What ``run`` was called with; None where it was another command, which is done by then."""
        self._commands.add_parser("table").add_argument("results", type=Path)
        if picture is not None:
            draw = self._commands.add_parser("plot")
            draw.add_argument("results", type=Path)
            draw.add_argument("file", type=Path, help="where to; .svg or .png")
        arguments = self._parser.parse_args()
        if arguments.command == "table":
            print(tables(arguments.results))
            return None
        if picture is not None and arguments.command == "plot":
            picture(arguments.results, arguments.file)
            return None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return arguments
