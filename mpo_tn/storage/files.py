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

    Guarantee (old-or-new): ``folder`` is the earlier one, untouched, or the new one, complete, and never half of it. If
    the block raises, or the disk is full, it is the earlier one, and nothing is left beside it (folders above it that
    had to be made stay).
    The swap of two folders takes two renames. Between them there is nothing under the name, and the earlier folder lies
    whole in ``.<name>.old.*/old`` beside it: there it stays if the process is killed at that moment, or if the second
    rename fails. A process killed elsewhere may leave a hidden folder, too.

    Raises:
        MPOError: the disk is full or may not be written to.
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
    """Write a file beside ``path`` and rename it to it. See :func:`file_beside`.

    Raises:
        MPOError: the folder does not exist, the disk is full or may not be written to.
    """
    with file_beside(path) as temporary, temporary.open("wb") as file:
        file.write(data)


@contextlib.contextmanager
def file_beside(path: Path) -> Generator[Path]:
    """A temporary file beside ``path``, renamed to it when the block ends well. A link is followed.

    Guarantee (file-old-or-new): at any moment, also if the process is killed, there is either the old file or the new
    one, never half of it. If it raises, it is the old one, and nothing is left behind.

    Raises:
        MPOError: the folder does not exist, the disk is full or may not be written to.
    """
    temporary: Path | None = None
    try:
        target = path.resolve()
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null character
        if isinstance(error, MPOError):
            raise
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
