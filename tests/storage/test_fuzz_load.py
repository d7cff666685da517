"""Damaged and lying files, some here and thousands in ``make soak``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import fuzz_load


@pytest.mark.guarantee("damage-noticed", "bounded-messages")
def test_no_file_crashes_hangs_or_loads_as_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = fuzz_load.main(tmp_path, 150, 1)
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.startswith("150 inputs: ")
    assert said.endswith("0 crashes, 0 hangs, 0 silently different\n")
    assert int(said.split()[2]) > 100, said
