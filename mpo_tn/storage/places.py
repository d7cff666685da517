"""What lies beside a file or folder while it is written: the lock of its one writer, and what a killed one has left.

All of it has names of one form, made from the name of what is written (:func:`name_beside`):
``.<begin of the name>.<digest>.lock``, ``.new.*`` for what may be deleted at any time, and ``.old`` for an earlier
folder that has to come back if nothing is in its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

from mpo_tn.exceptions import MPOError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nobody is refused, and nothing is cleared away
    fcntl = None

_LONGEST_NAME = 255
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}
"""How systems and file systems say that they have no such call for what it was asked of."""

_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

_held: dict[Path, int] = {}
"""What this process writes now, and the thread that does."""


def name_beside(target: Path, ending: str) -> str:
    """The name of something that belongs to a file or folder and lies beside it, never longer than names may be.

    >>> name_beside(Path("runs/out"), ".healing")
    'out.healing'
    >>> len(name_beside(Path("x" * 255), ".healing"))
    79
    """
    name = os.fsencode(target.name)
    if len(name) + len(ending) <= _LONGEST_NAME:
        return f"{target.name}{ending}"
    return f"{_shortened(name)}{ending}"


def _shortened(name: bytes) -> str:
    """The begin of a name that is valid text, and a digest of all of it."""
    begin = name[:60].decode(errors="ignore")
    return f"{begin}.{hashlib.blake2b(name, digest_size=5).hexdigest()}"


def _stem(place: Path) -> str:
    return f".{_shortened(os.fsencode(place.name))}"


def new_beside(place: Path) -> Path:
    """A path beside it that nobody else has, for what will take its place."""
    return place.with_name(f"{_stem(place)}.new.{secrets.token_hex(4)}")


def _old_beside(place: Path) -> Path:
    return place.with_name(f"{_stem(place)}.old")


def followed(target: Path) -> Path:
    """Where it is, links followed: what is written takes the place of what a link points to, and the link stays.

    Raises:
        MPOError: a circle of links, a null character, no name at all.
    """
    try:
        place = target.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MPOError(f"{target} could not be written ({reason}): name another") from error
    if not place.name:
        raise MPOError(f"{target} could not be written: it has no name of its own; name something inside it")
    return place


@contextlib.contextmanager
def claimed(target: Path, *, wait: float = 0.0, parents: bool = True) -> Generator[Path]:
    """Be the one writer of a file or folder while the block runs; yields where it is, links followed.

    Guarantee (one-writer): of two processes, or threads, that claim the same place, under whatever names, one is
    refused. Within a thread a claim may be made again. What a dead process held is free: the lock is one of the
    kernel's (``flock``), and ends with the process.
    Guarantee (leftovers-cleared): what a killed writer has left beside it is gone once it is claimed, and an earlier
    folder that had been set aside and not been replaced is back under its name.
    Where the file system has no such locks nobody is refused and nothing cleared away.

    Args:
        target: that will be written; it need not exist.
        wait: seconds to wait for another writer.
        parents: make the folders above it, and delete them afterwards if nothing was put there.

    Raises:
        MPOError: another process or thread is writing it, or nothing can be written beside it.
    """
    place = followed(target)
    if _held.get(place) == threading.get_ident():
        yield place
        return
    lock = place.with_name(f"{_stem(place)}.lock")
    with contextlib.ExitStack() as afterwards:
        try:
            missing = [folder for folder in place.parents if parents and not folder.exists()]
            for folder in reversed(missing):  # the uppermost is the last that is looked at
                afterwards.callback(_delete_empty, folder)
            if missing:
                place.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(lock, target, wait)
            if handle is not None:
                afterwards.callback(_unlocked, lock, handle)
                _clear(place)
        except OSError as error:
            raise MPOError(
                f"{target} could not be written ({error.strerror or error}); nothing was changed: name another place "
                "that exists and may be written to"
            ) from error
        _held[place] = threading.get_ident()
        afterwards.callback(_held.pop, place)
        yield place


def claimed_if(target: str | Path | None) -> contextlib.AbstractContextManager[Path | None]:
    """The same of a folder that may not be asked for; then it does nothing."""
    return contextlib.nullcontext() if target is None else claimed(Path(target))


def recover(target: Path) -> None:
    """Bring back a folder that was set aside by a process that was killed before it put another in its place.

    Raises:
        MPOError: that process is still at it.
    """
    if os.path.lexists(target):
        return
    with contextlib.suppress(OSError):
        if _old_beside(followed(target)).is_dir():
            with claimed(target):
                return


def _delete_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _unlocked(lock: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        lock.unlink(missing_ok=True)
    os.close(handle)


def _locked(lock: Path, target: Path, wait: float) -> int | None:
    """The open and locked file, or None where there are no locks."""
    if fcntl is None:
        return None
    end = time.monotonic() + wait
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, lock):
                with contextlib.suppress(OSError):  # said for information only: a full disk shall not leave the file
                    os.truncate(handle, 0)
                    os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                if error.errno in _CANNOT:
                    lock.unlink(missing_ok=True)
                    return None
                raise
            if time.monotonic() >= end:
                holder = os.pread(handle, 20, 0).decode(errors="replace")
                os.close(handle)
                who = f"another process, number {holder}" if holder.isdigit() else "another process"
                raise MPOError(f"{target} is being written by {who}: wait until it is done, or name another") from None
            time.sleep(0.02)
        os.close(handle)  # held by another, or deleted by whoever had it: look again


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _clear(place: Path) -> None:
    """Delete what a killed writer left, or put it back; only for who holds the lock."""
    old, begin = _old_beside(place), f"{_stem(place)}.new."
    if old.is_dir():
        if os.path.lexists(place):
            old.rename(new_beside(place))
        else:
            old.rename(place)
            flush_names(place.parent)
    for entry in list(os.scandir(place.parent)):
        if entry.name.startswith(begin):
            delete(Path(entry.path))


def clear_leftovers(folder: Path, begin: str) -> None:
    """Delete what killed writers left in a folder beside what has a name that begins so; what is in use stays.

    Only what nothing will claim again needs it, such as states that have a new name each time.

    Raises:
        OSError: the folder cannot be looked into.
    """
    form = re.compile(rf"(\.{re.escape(begin)}.*\.[0-9a-f]{{10}})\.(lock|new\.[0-9a-f]{{8}}|old)")
    stems = {found[1] for entry in os.scandir(folder) if (found := form.fullmatch(entry.name))}
    for stem in stems:
        lock = folder / f"{stem}.lock"
        with contextlib.suppress(MPOError):
            handle = _locked(lock, folder, 0.0)
            if handle is None:
                continue
            try:
                for entry in list(os.scandir(folder)):
                    if entry.name.startswith((f"{stem}.new.", f"{stem}.old")):
                        delete(Path(entry.path))
            finally:
                _unlocked(lock, handle)


def delete(path: Path) -> None:
    """Delete a file or a folder, as far as it can be deleted."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def put_in_place(new: Path, place: Path) -> None:
    """Give a whole folder the name of another, which is gone afterwards, or as it was if it raises.

    On Linux the two are exchanged in one step. Where that is not to be had it takes two, and between them there is
    nothing under the name: whoever claims it next brings the earlier folder back.

    Raises:
        OSError: it cannot be done.
    """
    if not place.is_dir():
        new.rename(place)
    elif not exchange(new, place):
        old = _old_beside(place)
        place.rename(old)
        try:
            new.rename(place)
        except OSError:
            old.rename(place)
            raise
        flush_names(place.parent)
        old.rename(new)  # whose name says that it may be deleted
    flush_names(place.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False if the system or the file system cannot.

    Raises:
        OSError: one of them is not there, or may not be moved.
    """
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_FROM_HERE, os.fsencode(one), _FROM_HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number))


def flush_names(folder: Path) -> None:
    """The same of the names in a folder, after one was changed: it cannot be taken back, so nothing is raised."""
    with contextlib.suppress(OSError):
        flush(folder)


def flush(path: Path) -> None:
    """Wait until a file, or the list of what is in a folder, is on the disk.

    Raises:
        OSError: it could not be written.
    """
    if os.name == "nt":  # cannot open folders, and keeps their lists itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(handle)
