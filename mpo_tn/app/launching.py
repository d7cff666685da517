"""A command that torchrun or accelerate launch has started several times: one group, one process of which speaks."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import typer

from mpo_tn.exceptions import MPOError

_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
"""What launchers tell a process about the others."""

_SHARED = ("heal",)
"""The commands that several processes share."""


@contextmanager
def launched() -> Generator[bool]:
    """In a process group of torch.distributed if this is one of several processes; says whether it is the first.

    What all of them know to be wrong only the first one says.

    Raises:
        MPOError: the others cannot be reached.
    """
    told = _told()
    if told is None:
        yield True
        return
    from torch import distributed

    from mpo_tn.torch.models.ranks import is_known, rank

    try:
        distributed.init_process_group()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MPOError(
            f"process {told[0]} of {told[1]} cannot reach the others at {told[2]}:{told[3]} ({reason}): start all of "
            "them with torchrun or accelerate launch"
        ) from error
    try:
        yield rank() == 0
    except MPOError as error:
        if rank() and is_known(error):
            raise typer.Exit(2) from error
        raise
    finally:
        distributed.destroy_process_group()


def refuse_several(command: str | None) -> None:
    """Refuse to do twice what several processes do not share; the first of them says it.

    Raises:
        MPOError: a launcher started this command several times.
    """
    told = _told()
    if told is None or command in _SHARED:
        return
    if told[0] != "0":
        raise typer.Exit(2)
    raise MPOError(
        f"this is one of {told[1]} processes, and {command} does not share its work among processes of a launcher: "
        "start it once, without torchrun or accelerate launch"
    )


def _told() -> list[str] | None:
    """What a launcher said; None if there is none, or it started one process."""
    told = [os.environ.get(name, "") for name in _TOLD]
    return told if all(told) and told[1].isdecimal() and int(told[1]) > 1 else None


def own_device(name: str) -> str:
    """Of several devices of a kind that of this process, going by its number on this machine."""
    local = os.environ.get("LOCAL_RANK", "")
    return f"{name}:{local}" if local.isdecimal() and name not in ("cpu", "mps") and ":" not in name else name
