"""Writes a folder and a file over earlier ones, killing the process at every event in turn, and looks at what is left.

Run by tests/storage/test_files.py in a process of its own: ``python -m helpers.kill_files FOLDER``. Prints what is
wrong and exits with 1, or prints how many kills there were.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from helpers.fuse import KILLED, Fuse, in_a_child
from mpo_tn.storage import files, places

NAMES = ("a.txt", "inner/b.txt")


def fill(folder: Path, content: str) -> None:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def holds(folder: Path, content: str) -> bool:
    """Whether it is all there and nothing else."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return found == dict.fromkeys(NAMES, content)


def wrapped(at: int | None, *, exchanged: bool = True) -> None:
    fuse = Fuse(at)
    if not exchanged:
        places.exchange = lambda *_: False
    for owner, name in (
        (Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "chmod"), (Path, "mkdir"), (Path, "unlink"),
        (Path, "touch"), (places, "exchange"), (places, "flush"), (files, "flush"), (files, "delete"),
        (places, "_is_at"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir"), (os, "close"),
    ):  # fmt: skip
        fuse.wrap(owner, name)


def a_folder(place: Path, at: int, *, earlier: bool, exchanged: bool) -> tuple[int, str]:
    """The exit code of writing over an earlier folder or none, and what is wrong then or after the next time."""
    out = place / "out"
    place.mkdir()
    if earlier:
        fill(out, "old")

    def write(content: str) -> None:
        with files.written_beside(out) as temporary:
            fill(temporary, content)

    def killed() -> None:
        wrapped(at, exchanged=exchanged)
        write("new")

    code = in_a_child(killed)
    if earlier and not exchanged and not out.exists():
        places.recover(out)
    if out.exists():
        whole = holds(out, "new") or (code == KILLED and earlier and holds(out, "old"))
        if not whole:
            return code, f"neither old nor new: {[str(path) for path in out.rglob('*')]}"
    elif code != KILLED or earlier:
        return code, f"lost: {[str(path) for path in place.rglob('*')]}"
    write("newer")
    left = sorted(path.name for path in place.iterdir())
    return code, "" if left == ["out"] and holds(out, "newer") else f"left behind: {left}"


def a_file(place: Path, at: int) -> tuple[int, str]:
    path = place / "out"
    place.mkdir()
    path.write_text("old" * 1000)

    def write() -> None:
        wrapped(at)
        files.write_whole(path, b"new" * 1000)

    code = in_a_child(write)
    allowed = ("old", "new") if code == KILLED else ("new",)
    if path.read_text() not in {word * 1000 for word in allowed}:
        return code, path.read_text()[:20]
    files.write_whole(path, b"newer")
    left = sorted(path.name for path in place.iterdir())
    return code, "" if left == ["out"] and path.read_text() == "newer" else f"left behind: {left}"


def main(home: Path) -> int:
    kills = 0
    for kind, attempt in (
        ("over a folder", lambda place, at: a_folder(place, at, earlier=True, exchanged=True)),
        ("over a folder in two steps", lambda place, at: a_folder(place, at, earlier=True, exchanged=False)),
        ("a folder", lambda place, at: a_folder(place, at, earlier=False, exchanged=True)),
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
