"""How the program ends when it cannot go on: one sentence of bounded length on the error stream, and an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer
from typer import rich_utils

from mpo_tn.app.terminal import err
from mpo_tn.exceptions import MPOError, bounded_text

_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")
"""What torch says in a ``RuntimeError`` where Python would raise ``MemoryError``."""


@contextmanager
def failing_shortly() -> Generator[None]:
    """Around the program: a mistake, a full disk or memory that does not suffice is a sentence and exit code 2.

    Guarantee (no-traceback): what users, files and machines get wrong ends in one sentence. What is not known here is a
    mistake of this package, and its traceback is shown.
    """
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.showwarning = lambda message, category, *rest, **options: (
            _say(f"mpo-tn: note: {message}") if category is UserWarning else shown(message, category, *rest, **options)
        )
        try:
            yield
        except typer.Abort:
            sys.exit(1)
        except (MPOError, OSError) as error:
            _stop(bounded_text(str(error)))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not _is_memory(error):
                raise
            reason = bounded_text(str(error).strip().partition("\n")[0], 300) or "none is left"
            _stop(
                f"the memory does not suffice ({reason}): take a smaller model, fewer matrices at "
                "a time (--target), shorter or fewer texts, or a machine with more of it"
            )
        except Exception as error:
            if not hasattr(error, "format_message"):  # which those of the command line have, whoever made the class
                raise
            _show_usage(error)


def _show_usage(error: Any) -> None:
    error.message = bounded_text(error.message)
    rich_utils.rich_format_error(error)
    sys.exit(error.exit_code)


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)


def _stop(sentence: str) -> None:
    _say(f"mpo-tn: {sentence}", style="bold red")
    sys.exit(2)


def _say(sentence: str, **style: Any) -> None:
    err.print(sentence, soft_wrap=True, **style)
