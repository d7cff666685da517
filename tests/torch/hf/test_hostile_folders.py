"""Folders with anything wrong in config.json or in the weights: refused in one way, or the right model."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.hostile import Folder, fate, folders, hostile
from helpers.hostile_bytes import counts_text
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def saved() -> list[Folder]:
    return folders()


@pytest.mark.guarantee("config-lies")
@pytest.mark.slow
def test_they_are_refused_or_the_right_model(saved: list[Folder], capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()

    @settings(max_examples=settings().max_examples * 5 // 4)
    @given(st.sampled_from(range(len(saved))), st.data())
    def load(which: int, data: st.DataObject) -> None:
        folder = saved[which]
        files = data.draw(hostile(folder))
        for name, loader in folder.loaders().items():
            what, why = fate(folder, files, loader, own=name == "load_model")
            counts[what] += 1
            assert what in ("refused", "equal"), f"{folder.family} by {name}: {what} {why}"

    try:
        load()
    finally:
        with capsys.disabled():
            print("\n" + counts_text("folders, each by both loaders", counts))
