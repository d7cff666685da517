"""One writer a place, under whatever name; what killed ones leave is cleared; nothing of it in the way of others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.damage import put_aside
from helpers.paths import ROOT

from mpo_tn import MPOError
from mpo_tn.storage import places
from mpo_tn.storage.files import write_whole, written_beside
from mpo_tn.storage.places import claimed, clear_leftovers, name_beside, recover

HOLD = (
    "import sys, time; from pathlib import Path; from mpo_tn.storage.files import written_beside\n"
    "with written_beside(Path(sys.argv[1])) as temporary:\n"
    "    (temporary / 'half').write_text('x'); print('held', flush=True); time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path: Path):
    """A process that writes ``out`` and does not come to an end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.guarantee("one-writer", "leftovers-cleared")
def test_a_second_writer_is_refused_until_the_first_is_dead(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("out", "link", "../" + tmp_path.name + "/out"):
        with pytest.raises(MPOError, match=f"is being written by another process, number {holder.pid}: wait"):  # noqa: SIM117
            with written_beside(tmp_path / name):
                pass
    with claimed(tmp_path / "another"):
        pass
    assert len(list(tmp_path.iterdir())) == 3  # the link, the lock and the temporary folder
    holder.kill()
    holder.wait()
    with written_beside(tmp_path / "out") as temporary:
        (temporary / "a").write_text("mine")
    (tmp_path / "link").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "mine"


@pytest.mark.guarantee("one-writer")
def test_threads_are_told_apart_and_a_claim_may_be_made_again(tmp_path: Path) -> None:
    said: list[str] = []

    def write() -> None:
        try:
            with written_beside(tmp_path / "out"):
                pass
        except MPOError as error:
            said.append(str(error))

    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        with written_beside(tmp_path / "out") as temporary:
            (temporary / "a").write_text("x")
    assert len(said) == 1
    assert "is being written by another process" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.guarantee("one-writer")
def test_writers_of_a_file_wait_for_each_other(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "file", b"%d" % k * 10**5)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(set((tmp_path / "file").read_bytes())) == 1


@pytest.mark.guarantee("leftovers-cleared")
def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with written_beside(out) as temporary:
        (temporary / "a").write_text("old")
    put_aside(out)
    recover(out)
    assert (out / "a").read_text() == "old"
    put_aside(out)
    with claimed(out):
        assert (out / "a").read_text() == "old"
    recover(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.guarantee("leftovers-cleared")
def test_folders_above_that_were_made_for_nothing_go_again(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_what_is_in_use_stay(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    held = set(tmp_path.iterdir())
    places.new_beside(tmp_path / "outside").mkdir()
    clear_leftovers(tmp_path, "out")
    assert set(tmp_path.iterdir()) == held


def test_without_locks_and_without_exchange_it_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "fcntl", None)
    monkeypatch.setattr(places, "exchange", lambda *_: False)
    for content in ("old", "new"):
        with written_beside(tmp_path / "out") as temporary:
            (temporary / "a").write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]
    assert (tmp_path / "out" / "a").read_text() == "new"


def test_names_beside_are_never_too_long(tmp_path: Path) -> None:
    names = {name_beside(tmp_path / name, ".healing") for name in ("x" * 255, "x" * 254 + "y", "ä" * 127, "out")}
    assert len(names) == 4
    for name in names:
        (tmp_path / name).mkdir()
