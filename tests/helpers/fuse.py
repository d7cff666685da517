"""A process that is killed at a given event, for scripts that run in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

KILLED = 77


class Fuse:
    """Kills the process when event number ``at`` begins; never for None."""

    def __init__(self, at: int | None) -> None:
        self.at, self.events = at, 0

    def tick(self) -> None:
        if self.events == self.at:
            os._exit(KILLED)
        self.events += 1

    def wrap(self, owner: Any, name: str) -> None:
        """An event before every call of ``owner.name``."""
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return inner(*args, **kwargs)

        setattr(owner, name, call)


def in_a_child(act: Callable[[], object]) -> int:
    """The exit code of a forked process that does ``act``."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:  # whatever it was must not go on in the copy of the caller
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
