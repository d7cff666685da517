"""No traceback for what users, files and machines get wrong, and nothing that a name could do to what is printed."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import typer
from helpers.program import run

from mpo_tn import MPOError
from mpo_tn.app import cli, terminal
from mpo_tn.torch.hf import folder as folders
from mpo_tn.torch.models.devices import usable_device


@pytest.mark.guarantee("no-traceback")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory does not suffice (none is left)"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "8 b",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "20.00 GiB"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MPOError("x" * 10**5), "bytes ...]"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(
    mpo_tn, error: Exception, said: str, dense_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(folders, "load_model", fail)
    code, printed, stderr = mpo_tn("inspect", dense_folder)
    assert (code, printed) == (2, "")
    assert stderr.startswith("mpo-tn: ")
    assert said in stderr
    assert len(stderr.encode()) < 2100
    assert len(stderr.splitlines()) == 1


@pytest.mark.guarantee("no-traceback")
def test_a_mistake_of_ours_is_not_hidden(mpo_tn, dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(folders, "load_model", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("inspect", dense_folder, monkeypatch=monkeypatch, capsys=None)  # type: ignore[arg-type]


@pytest.mark.guarantee("no-traceback")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compress DENSE OUT --sites 100000", "sites=100000: no matrix has so many factors"),
        ("compress DENSE OUT --device nonsense", "device 'nonsense' cannot be used here"),
        ("compress DENSE OUT --device meta", "it holds no numbers"),
        ("inspect DENSE --device cuda:77", "device 'cuda:77' cannot be used here"),
        ("plan DENSE --keep " + "9" * 10**5, "keep="),
        ("inspect " + "y" * 10**5, "bytes ...]"),
        ("compress DENSE OUT --bits " + "z" * 10**5, "Invalid value"),
        ("compress DENSE " + "x" * 300, "File name too long"),
    ],
)
def test_no_argument_gives_a_traceback_or_pages(
    mpo_tn, arguments: str, said: str, dense_folder: Path, tmp_path: Path
) -> None:
    words = [{"DENSE": str(dense_folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in arguments.split()]
    code, _, stderr = mpo_tn(*words)
    assert code == 2
    assert said in " ".join(stderr.split())
    assert len(stderr.encode()) < 6000
    assert list(tmp_path.iterdir()) == []


def test_names_are_printed_as_they_are(
    mpo_tn, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[bold]x", ":smile:", "x" * 255):
        code, printed, stderr = mpo_tn("compress", dense_folder, name, "--bond", "2", "--sites", "3")
        assert (code, stderr) == (0, "")
        assert f"Saved in {name}. " in printed
        assert [path.name for path in tmp_path.iterdir()] == [name]
        code, _, stderr = mpo_tn("compress", dense_folder, name, "--bond", "2", "--sites", "3")
        assert code == 2
        assert stderr.startswith(f"mpo-tn: {name} exists")
        shutil.rmtree(tmp_path / name)


@pytest.mark.filterwarnings("default:keep=")  # no error here: the program prints it
def test_keep_above_one_and_a_tolerance_that_helps_nothing_are_said(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    code, _, stderr = mpo_tn("compress", dense_folder, tmp_path / "a", "--keep", "1.5", "--sites", "3")
    assert code == 0
    assert stderr.startswith("mpo-tn: note: keep=1.5 lets cores take more room")
    code, printed, _ = mpo_tn("compress", dense_folder, tmp_path / "b", "--tolerance", "0.01", "--sites", "3")
    assert code == 0
    assert "Nothing was compressed" in printed
    assert "at tolerance=0.01 its cores would take" in " ".join(printed.split())
    small, plain = (place / "model.safetensors" for place in (tmp_path / "b", dense_folder))
    assert small.stat().st_size == plain.stat().st_size


def test_a_device_that_is_there_is_taken(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    assert usable_device("cpu") == torch.device("cpu")
    for arguments in (
        ("inspect", dense_folder),
        ("compress", dense_folder, tmp_path / "a", "--bond", "2", "--sites", "3"),
    ):
        assert mpo_tn(*arguments, "--device", "cpu")[0] == 0


def test_without_a_terminal_long_work_says_where_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "EVERY", 0.2)
    for quiet in (False, True):
        with terminal.working(quiet) as progress:
            progress(3, 12, "compressing [bold]x")
            time.sleep(0.7)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) >= 2
        assert all(
            re.fullmatch(r"mpo-tn: (starting|compressing \[bold\]x, 3 of 12), after \d+ s", line) for line in lines
        )
    monkeypatch.setattr(terminal, "EVERY", 30.0)
    with terminal.working(False) as progress:
        progress(0, 1, "x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["finetune", "squeeze", "compress", "plan", "heal", "eval"])
def test_long_helps_are_in_groups(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    panels: dict[str | None, int] = {}
    for parameter in command.params:
        panel = getattr(parameter, "rich_help_panel", None)
        panels[panel] = panels.get(panel, 0) + 1
    assert len(panels) >= (2 if name == "eval" else 3)
    assert max(panels.values()) <= 12
