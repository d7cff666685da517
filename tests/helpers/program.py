"""The program, run as a user does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpo_tn.app import cli


def run(*args: str | Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The exit code, and what was printed on either stream."""
    monkeypatch.setattr(sys, "argv", ["mpo-tn", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err
