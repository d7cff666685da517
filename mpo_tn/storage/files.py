"""Writing that leaves either the old or the new, never half of it."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Generator
from pathlib import Path

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.places import claimed, delete, flush, flush_names, new_beside, put_in_place

_PATIENCE = 60.0
"""Seconds to wait for another writer of a file, which is written at once; of a folder none."""


def check_target(folder: Path, *, overwrite: bool, marker: str, keep: Path | None = None) -> None:
    """Refuse a folder that must not be written to, before any work is done.

    Args:
        folder: where the result will go.
        overwrite: replace what is there, if ``marker`` shows that it is one of ours.
        marker: a file that every such result has.
        keep: something that is being read and must survive.

    Raises:
        MPOError: it is a file, it is not empty and may not be replaced, or it holds what is being read.
    """
    try:
        there = folder.exists()
    except OSError as error:
        raise MPOError(f"{folder} cannot be looked at ({error.strerror}): name another folder") from error
    if there and not folder.is_dir():
        raise MPOError(f"{folder} is a file: name a folder that does not exist yet")
    if keep is not None and keep.exists() and keep.resolve().is_relative_to(folder.resolve()):
        raise MPOError(f"{folder} holds the input {keep}: name another folder")
    if not there or not any(folder.iterdir()):
        return
    if not overwrite:
        raise MPOError(f"{folder} exists and is not empty: name another folder, or pass --overwrite to replace it")
    if not (folder / marker).is_file():
        raise MPOError(
            f"{folder} is not empty and holds no {marker}, so it is not an earlier result and will not be replaced: "
            "name another folder, or empty it yourself"
        )


@contextlib.contextmanager
def written_beside(folder: Path) -> Generator[Path]:
    """A temporary folder beside ``folder``, put in its place when the block ends well and deleted when it does not.

    Guarantee (old-or-new): ``folder`` is the earlier one, untouched, or the new one, complete, and never half of it,
    also if the process is killed or the machine stops: files are on the disk before they get the name. If the block
    raises, or the disk is full, it is the earlier one, and nothing is left beside it. What a killed process leaves is
    deleted by the next one that writes there (:func:`~mpo_tn.storage.places.claimed`, which refuses a second writer).
    The earlier folder is exchanged for the new one in one step where the system can (Linux, on most file systems); else
    it takes two, and a process killed between them leaves nothing under the name until the folder is next read or
    written by this package, which brings the earlier one back.

    Guarantee (umask-untouched): the umask of the process, which its threads share, is not looked at by changing it.
    A link is followed: what it points to is replaced. Permissions are those of the earlier folder; without one, and for
    what is in it, those that the process gives new files.

    Raises:
        MPOError: the disk is full or may not be written to; another process is writing it.
    """
    try:
        with claimed(folder) as place:
            temporary = new_beside(place)
            temporary.mkdir()
            try:
                mode = temporary.stat().st_mode
                yield temporary
                _settle(temporary, mode)
                if place.is_dir():
                    temporary.chmod(stat.S_IMODE(place.stat().st_mode))
                put_in_place(temporary, place)
            finally:
                delete(temporary)
    except OSError as error:
        raise MPOError(
            f"{folder} could not be written ({error.strerror or error}); nothing was changed: free some space or name "
            "another folder"
        ) from error


def _settle(folder: Path, mode: int) -> None:
    """Permissions as the process gives them to new files, and everything on the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        # safetensors makes files for their owner alone.
        path.chmod(stat.S_IMODE(mode) if path.is_dir() else mode & 0o666)
        flush(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it to it. See :func:`file_beside`.

    Raises:
        MPOError: the folder does not exist, the disk is full or may not be written to.
    """
    with file_beside(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextlib.contextmanager
def file_beside(path: Path) -> Generator[Path]:
    """A temporary file beside ``path``, renamed to it when the block ends well. A link is followed.

    Guarantee (file-old-or-new): at any moment, also if the process is killed or the machine stops, there is either the
    old file or the new one, never half of it. If it raises, it is the old one, and nothing is left behind; what a
    killed process leaves is deleted by the next one that writes there. Of two writers the second waits, up to a minute.

    Permissions are those of the earlier file; without one those that the process gives new files.

    Raises:
        MPOError: the folder does not exist, the disk is full or may not be written to; something is there that is no
            file, a device for instance.
    """
    try:
        with claimed(path, wait=_PATIENCE, parents=False) as place:
            if place.exists() and not place.is_file():
                raise MPOError(f"{path} could not be written: something is there that is no file; name another")
            temporary = new_beside(place)
            try:
                temporary.touch(exist_ok=False)
                mode = (place if place.exists() else temporary).stat().st_mode
                yield temporary
                temporary.chmod(stat.S_IMODE(mode))
                flush(temporary)
                temporary.replace(place)
                flush_names(place.parent)
            finally:
                delete(temporary)
    except (OSError, ValueError) as error:
        if isinstance(error, MPOError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise MPOError(
            f"{path} could not be written ({reason}); nothing was changed: name another file in a folder that exists "
            "and has space"
        ) from error


def checked_file(path: Path, what: str, most: int | None = None) -> Path:
    """The same path, if a file is there that can be read to its end: no pipe or device, and not larger than it may be.

    Args:
        path: of the file; a link is followed.
        what: it should hold, for the message.
        most: bytes that it may have.

    Raises:
        MPOError: there is none, it is something else, or it is larger.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MPOError(f"{path} could not be read ({reason}): name a file that holds {what}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no file but a pipe, a socket or a device"
        raise MPOError(f"{path} could not be read, it is {kind}: name a file that holds {what}")
    if most is not None and found.st_size > most:
        raise MPOError(
            f"{path} has {found.st_size:,} bytes, and {what} is read whole, up to {most:,}: give less of it, or mend it"
        )
    return path
