"""Writing that leaves either the old or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from mpo_tn.exceptions import MPOError


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
    if folder.exists() and not folder.is_dir():
        raise MPOError(f"{folder} is a file: name a folder that does not exist yet")
    if keep is not None and keep.exists() and keep.resolve().is_relative_to(folder.resolve()):
        raise MPOError(f"{folder} holds the input {keep}: name another folder")
    if not folder.exists() or not any(folder.iterdir()):
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
    """A temporary folder beside ``folder``, renamed to it when the block ends well and deleted when it does not.

    An earlier ``folder`` is removed only after the new one is complete.

    Raises:
        MPOError: the disk is full or may not be written to; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:  # safetensors makes files that their owner alone can read
            if not path.is_symlink():
                path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / "old")
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise MPOError(
            f"{folder} could not be written ({error.strerror or error}); nothing was changed: free some space or name "
            "another folder"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside ``path`` and rename it to it, so that there is either the old or the new, never half of it.

    A link is followed. An earlier file is replaced.

    Raises:
        MPOError: the folder does not exist, the disk is full or may not be written to; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        target = path.resolve()
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null character
        reason = getattr(error, "strerror", None) or error
        raise MPOError(
            f"{path} could not be written ({reason}); nothing was changed: name another file in a folder that exists "
            "and has space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The permissions new files would lack; ``mkdtemp`` gives fewer than a user expects of an ordinary folder."""
    current = os.umask(0)
    os.umask(current)
    return current
