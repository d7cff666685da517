"""Files of tensors: what can go wrong with them in one kind of error each, and digests of what was written.

The files themselves are written and read by whoever knows the tensors (``safetensors.torch``, ``save_pretrained``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable
from pathlib import Path

from safetensors import SafetensorError

from mpo_tn.exceptions import MPOError


@contextlib.contextmanager
def as_os_error() -> Generator[None]:
    """Around writing, inside of :func:`~mpo_tn.storage.files.written_beside`: a full disk is an ``OSError`` there.

    Raises:
        OSError: safetensors, which has an error of its own for it, could not write.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def as_damaged(folder: Path, way_out: str) -> Generator[None]:
    """Around reading a folder that we wrote: whatever does not fit is damage, and one error names the folder.

    Args:
        folder: that is read.
        way_out: what to do about it; the end of the message.

    Raises:
        MPOError: a file that cannot be read, is no safetensors or JSON, or has other entries than it should. One that
            is raised inside passes as it is.
    """
    try:
        yield
    except MPOError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MPOError(
            f"{folder} cannot be read, it is damaged ({type(error).__name__}: {error}): {way_out}"
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(parts: Iterable[bytes | memoryview]) -> str:
    """BLAKE2b of 16 bytes over the parts one after another, in hexadecimal.

    >>> bytes_digest([b"ab", b"c"]) == bytes_digest([b"abc"])
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
