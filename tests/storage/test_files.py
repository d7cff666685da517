"""Writing leaves the old or the new, never half of it, whatever fails and whenever the process is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT, TESTS

from mpo_tn import MPOError
from mpo_tn.storage import files
from mpo_tn.storage.files import check_target, write_whole, written_beside


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and every folder."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "/" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder that was written before."""
    with written_beside(tmp_path / "out") as temporary:
        (temporary / "a").write_text("old")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b").write_text("old")
    return tmp_path / "out"


@pytest.mark.guarantee("old-or-new")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_a_block_that_raises_changes_nothing(error: BaseException, there: bool, earlier: Path) -> None:
    folder = earlier if there else earlier.parent / "fresh"
    before = contents(earlier.parent)
    expected = MPOError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), written_beside(folder) as temporary:  # noqa: PT012
        (temporary / "a").write_text("half")
        raise error
    assert contents(earlier.parent) == before


@pytest.mark.guarantee("old-or-new")
@pytest.mark.parametrize("call", [(Path, "mkdir"), (os, "open"), (Path, "chmod"), (files, "flush")])
def test_what_fails_before_the_swap_changes_nothing(
    call: tuple[Any, str], earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(earlier.parent)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(*call, refuse)
        with pytest.raises(MPOError, match=r"could not be written \(Permission denied\); nothing was changed"):  # noqa: SIM117
            with written_beside(earlier) as temporary:
                (temporary / "a").write_text("new")
    assert contents(earlier.parent) == before


@pytest.mark.guarantee("old-or-new")
def test_a_folder_is_replaced_as_a_whole(earlier: Path) -> None:
    with written_beside(earlier) as temporary:
        (temporary / "c").write_text("new")
    assert contents(earlier.parent) == {"out": "/", "out/c": "new"}


@pytest.mark.guarantee("file-old-or-new")
@pytest.mark.parametrize("call", ["chmod", "replace"])
def test_a_file_that_cannot_be_replaced_stays(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_text("old")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        with pytest.raises(MPOError, match=r"could not be written \(Permission denied\); nothing was changed"):
            write_whole(path, b"new")
    assert contents(tmp_path) == {"out": "old"}
    write_whole(path, b"new")
    assert contents(tmp_path) == {"out": "new"}


@pytest.mark.guarantee("old-or-new", "file-old-or-new")
def test_killed_at_any_point_it_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    command = [sys.executable, "-m", "helpers.kill_files", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 30


def test_a_crash_that_is_not_ours_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_beside(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", overwrite=False, marker="config.json")
    with written_beside(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("{}")
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out").stat().st_mode & 0o055 == 0o055 & ~current_umask()


def current_umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_folder_that_may_not_be_replaced_is_refused(earlier: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    (tmp_path / "file").write_text("x")
    for options, message in [
        ({"folder": tmp_path / "file"}, "is a file"),
        ({"folder": earlier}, "is not empty"),
        ({"folder": earlier, "overwrite": True, "marker": "c"}, "holds no c"),
        ({"folder": earlier, "overwrite": True, "keep": earlier / "inner"}, "holds the input"),
    ]:
        with pytest.raises(MPOError, match=message):
            check_target(**{"overwrite": False, "marker": "a", **options})
    check_target(earlier, overwrite=True, marker="a")
    assert contents(tmp_path) == {**before, "file": "x"}
