"""The program, and a model folder for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.program import run
from helpers.tiny_models import tiny


@pytest.fixture
def mpo_tn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``mpo-tn`` with these arguments: the exit code, and what was printed on either stream."""
    return partial(run, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as transformers saves it. Not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny("bert").save_pretrained(folder)
    return folder
