"""Writes a folder and a file over earlier ones, killing the process at every event in turn, and looks at what is left.

Run by tests/storage/test_files.py in a process of its own: ``python -m helpers.kill_files FOLDER``. Prints what is
wrong and exits with 1, or prints how many kills there were.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from helpers.fuse import KILLED, Fuse, in_a_child
from mpo_tn.storage import files

NAMES = ("a.txt", "inner/b.txt")


def fill(folder: Path, content: str) -> None:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def holds(folder: Path, content: str) -> bool:
    """Whether it is all there and nothing else."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return found == dict.fromkeys(NAMES, content)


def wrapped(at: int | None) -> Fuse:
    fuse = Fuse(at)
    for owner, name in (
        (Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "chmod"), (Path, "mkdir"), (Path, "unlink"),
        (tempfile, "mkdtemp"), (tempfile, "mkstemp"), (shutil, "rmtree"), (os, "fdopen"), (os, "rmdir"),
    ):  # fmt: skip
        fuse.wrap(owner, name)
    return fuse


def a_folder(place: Path, at: int, *, earlier: bool) -> tuple[int, str]:
    """The exit code of writing over an earlier folder or none, and what is wrong afterwards."""
    out = place / "out"
    place.mkdir()
    if earlier:
        fill(out, "old")

    def write() -> None:
        wrapped(at)
        with files.written_beside(out) as temporary:
            fill(temporary, "new")

    code = in_a_child(write)
    if out.exists():
        whole = holds(out, "new") or (code == KILLED and earlier and holds(out, "old"))
        return code, "" if whole else f"neither old nor new: {[str(path) for path in out.rglob('*')]}"
    aside = [path for path in place.glob(".out.old.*/old") if holds(path, "old")]
    lost = code != KILLED or (earlier and not aside)
    return code, f"lost: {[str(path) for path in place.rglob('*')]}" if lost else ""


def a_file(place: Path, at: int) -> tuple[int, str]:
    path = place / "out"
    place.mkdir()
    path.write_text("old" * 1000)

    def write() -> None:
        wrapped(at)
        files.write_whole(path, b"new" * 1000)

    code = in_a_child(write)
    allowed = ("old", "new") if code == KILLED else ("new",)
    return code, "" if path.read_text() in {word * 1000 for word in allowed} else path.read_text()[:20]


def main(home: Path) -> int:
    kills = 0
    for kind, attempt in (
        ("over a folder", lambda place, at: a_folder(place, at, earlier=True)),
        ("a folder", lambda place, at: a_folder(place, at, earlier=False)),
        ("over a file", a_file),
    ):
        code, at = KILLED, 0
        while code == KILLED:
            code, wrong = attempt(home / f"{kind} {at}", at)
            if wrong or code not in (0, KILLED):
                print(f"{kind}, killed at event {at}: {code} {wrong}")
                return 1
            at += 1
        kills += at - 1
    print(f"{kills} kills")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
