"""Every line of Python in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_there_is_one_example_for_each_user() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, example {number}", "exec"), names)
    assert "report" in names or "test_the_report_is_the_error" in names


def test_commands_exist() -> None:
    from mpo_tn.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^mpo-tn (\w+)", README, flags=re.MULTILINE)) <= known


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((Path(__file__).parent.parent / link).exists() for link in links)
