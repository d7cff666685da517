"""Writing leaves the old or the new, never half of it, whatever fails and whenever the process is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT, TESTS

from mpo_tn import MPO, MPOError
from mpo_tn.storage import files
from mpo_tn.storage.files import check_target, checked_file, write_whole, written_beside


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


@pytest.mark.guarantee("umask-untouched")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_new_files_and_the_umask_is_left_alone(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)  # another thread may be making files
            with written_beside(tmp_path / "out") as temporary:
                (temporary / "inner").mkdir()
                (temporary / "inner" / "a").write_text("x")
                (temporary / "inner" / "a").chmod(0o600)
            write_whole(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*"), tmp_path / "file"]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


def test_what_was_private_stays_private(earlier: Path, tmp_path: Path) -> None:
    earlier.chmod(0o700)
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o600)
    with written_beside(earlier) as temporary:
        (temporary / "a").write_text("new")
    write_whole(tmp_path / "file", b"new")
    assert earlier.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.guarantee("old-or-new", "file-old-or-new")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    whole = files.flush

    def flush(path: Path) -> None:
        assert not (tmp_path / "out").exists()
        flushed.append(path.name)
        whole(path)

    monkeypatch.setattr(files, "flush", flush)
    with written_beside(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("x")
    assert {"inner", "a", temporary.name} == set(flushed)


NAMES = ["x" * 255, "ä" * 127, "[bold]x", ":smile:", "a b\nc", "%s{0}", "-rf", ".hidden", "*"]


@pytest.mark.guarantee("old-or-new", "file-old-or-new", "leftovers-cleared")
@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_a_folder_may_have_will_do(name: str, tmp_path: Path) -> None:
    for content in ("old", "new"):
        with written_beside(tmp_path / name) as temporary:
            (temporary / "a").write_text(content)
    assert contents(tmp_path) == {name: "/", f"{name}/a": "new"}
    (tmp_path / "folder").mkdir()
    for content in (b"old", b"new"):
        write_whole(tmp_path / "folder" / name, content)
    assert contents(tmp_path / "folder") == {name: "new"}


@pytest.mark.guarantee("old-or-new")
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays(there: bool, earlier: Path, tmp_path: Path) -> None:
    target = earlier if there else tmp_path / "elsewhere" / "fresh"
    (tmp_path / "link").symlink_to(target)
    with written_beside(tmp_path / "link") as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(target) == {"a": "new"}
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in (tmp_path / "circle", Path("/")):
        with pytest.raises(MPOError, match="could not be written"), written_beside(path):
            pass


def test_devices_and_pipes_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(MPOError, match="something is there that is no file"):
            write_whole(path, b"x")
        with pytest.raises(MPOError, match="no file but a pipe, a socket or a device"):
            checked_file(path, "a plan")
        with pytest.raises(MPOError, match="no file but a pipe"):
            MPO.load(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(MPOError, match="has 21,474,836,480 bytes, and a plan is read whole, up to 1,000"):
        checked_file(tmp_path / "sparse", "a plan", 1000)
    with pytest.raises(MPOError, match="damaged or no safetensors file"):
        MPO.load(tmp_path / "sparse")


@pytest.mark.guarantee("bounded-messages")
def test_messages_are_bounded_whatever_they_are_made_of() -> None:
    for text in ("x" * 10**6, "é" * 10**5, "\ud800" * 10**4, "line\n" * 10**5):
        said = str(MPOError(f"{text} is wrong: name another"))
        assert len(said.encode(errors="surrogatepass")) <= 2000
        assert said.endswith("is wrong: name another")
    assert str(MPOError("as it is")) == "as it is"


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
