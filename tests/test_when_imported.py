"""Something done once a module is imported, however it is imported, and imports that are none of its business."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from mpo_tn.when_imported import when_imported


def test_now_later_and_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mpo_tn_test_later", "mpo_tn_test_other", "mpo_tn_test_failing"):
        (tmp_path / f"{name}.py").write_text("VALUE = 3\n" if "failing" not in name else "raise ValueError(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    said: list[str] = []
    before = list(sys.meta_path)
    when_imported("json", lambda: said.append("now"))
    when_imported("mpo_tn_test_later", lambda: said.append(str(sys.modules["mpo_tn_test_later"].VALUE)))
    when_imported("mpo_tn_test_later", lambda: said.append("second"))
    when_imported("mpo_tn_test_missing", lambda: said.append("missing"))
    when_imported("mpo_tn_test_failing", lambda: said.append("failing"))
    assert said == ["now"]
    importlib.import_module("mpo_tn_test_other")
    assert said == ["now"]
    for _ in range(2):  # transformers looks so whether PEFT is there
        assert importlib.util.find_spec("mpo_tn_test_later") is not None
    assert said == ["now"]
    importlib.import_module("mpo_tn_test_later")
    assert sorted(said) == ["3", "now", "second"]
    importlib.reload(sys.modules["mpo_tn_test_later"])
    assert len(said) == 3
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mpo_tn_test_missing")
    with pytest.raises(ValueError, match="3"):
        importlib.import_module("mpo_tn_test_failing")
    assert len(said) == 3
    assert set(before) <= set(sys.meta_path)
    for name in ("mpo_tn_test_later", "mpo_tn_test_other"):
        monkeypatch.delitem(sys.modules, name)
