"""Files of one MPO with anything wrong in them: refused in one way, or the MPO that was saved."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.hostile_bytes import counts_text, rewritten
from hypothesis import given, settings

from mpo_tn import MPO, MPOError, Sites


@pytest.mark.slow
def test_they_are_refused_or_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    mpo = MPO.random(Sites((2, 3, 2), (3, 2, 2)), 4, seed=0)
    mpo.save(tmp_path / "good")
    good, path = (tmp_path / "good").read_bytes(), tmp_path / "bad"

    @settings(max_examples=settings().max_examples * 3)
    @given(rewritten(good))
    def load(data: bytes) -> None:
        path.unlink(missing_ok=True)  # rather than written over, for arrays may still lie in it
        path.write_bytes(data)
        what = "crash"
        try:
            loaded = MPO.load(path)
            same = all(np.array_equal(a, b) for a, b in zip(loaded.cores, mpo.cores, strict=True))
            what = "equal" if same and loaded.center == mpo.center else "different"
        except MPOError:
            what = "refused"
        finally:
            counts[what] += 1
        assert what != "different", json.dumps(list(data))

    try:
        load()
    finally:
        with capsys.disabled():
            print("\n" + counts_text("MPO.load", counts))
