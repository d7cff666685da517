"""What long work tells whoever waits for it: one shape of callback for the whole package."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with how much is done, how much there is in all, and what is being done: a name or a few words."""


def silent(_done: int, _total: int, _what: str) -> None:
    """Tell nobody."""


def doing(verb: str, progress: Progress) -> Progress:
    """The same, with ``verb`` said before each name.

    >>> doing("compressing", lambda done, total, what: print(done, total, what))(0, 13, "pooler.dense")
    0 13 compressing pooler.dense
    """
    return lambda done, total, what: progress(done, total, f"{verb} {what}")
