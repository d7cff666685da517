"""A setting that a file does not name had the default of its time, whatever the default is today."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.task_folders import write_encoder, write_mrpc
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.tuning import Method, Settings, Squeezing, bonds_of, finetune, load_task, past_defaults, save_finetuned
from mpo_tn.tuning.checkpoints import finished_run
from mpo_tn.tuning.past_defaults import CHANGES, FORMAT_VERSION, checked_version, completed, defaults_of
from mpo_tn.tuning.result import read_result

HOW = Method("lfa", sites=3)
QUICK = Settings(max_steps=2, batch_size=12, max_length=24)
ADD = (
    "add a row at the end of CHANGES in mpo_tn/tuning/past_defaults.py: with a new default, or for a new setting with "
    "the value that describes runs from before there was a choice. Rows that are there stay as they are"
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("past")
    return write_encoder(root / "encoder"), load_task("MRPC", write_mrpc(root / "mrpc"))


# --- the table


def test_the_past_is_not_edited() -> None:
    """Every file that was ever written without a setting is read with these. Changed rows would misread them."""
    pinned: tuple[Any, ...] = (
        {
            "Method": {
                "name": "lfa", "target": "all-linear", "sites": 5, "keep": None, "policy": "auxiliary", "bonds": None,
                "train": [], "layers": 2, "rank": None, "lr": None, "tensor_lr": None, "weight_decay": 0.01,
            },
            "Settings": {
                "epochs": 3, "max_steps": None, "seed": 0, "batch_size": 32, "max_length": 128, "warmup": 0.06,
                "clip": 1.0, "bf16": False, "device": "cpu", "save_every": 200,
            },
            "Squeezing": {
                "delta": 1.0, "cuts_per_round": 50, "tune_steps": 10, "keep": None, "max_rounds": 100,
                "score": "error_per_parameter", "rate": 0.1, "final_epochs": 0, "gap_on": "dev",
            },
        },
        {},
    )  # fmt: skip
    assert CHANGES[: len(pinned)] == pinned, "rows of the past were edited: put them back, and " + ADD
    assert len(CHANGES) == len(pinned) == FORMAT_VERSION + 1, "pin the new row here, too"


@pytest.mark.parametrize("kind", [Method, Settings, Squeezing])
def test_the_newest_row_is_today(kind: Any) -> None:
    newest = defaults_of(FORMAT_VERSION)[kind.__name__]
    today = {field.name: json.loads(json.dumps(field.default)) for field in fields(kind)}
    assert all(field.default is not dataclasses.MISSING for field in fields(kind))
    missing = sorted(today.keys() - newest.keys())
    assert not missing, f"{kind.__name__}.{missing[0]} is in no version of the files: {ADD}"
    for name, value in newest.items():
        assert today.get(name, "no setting any more") == value, f"the default of {kind.__name__}.{name} changed: {ADD}"


rows = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)), min_size=1, max_size=5)


@given(rows)
def test_a_version_is_the_last_word_up_to_it_or_else_the_first_after_it(values: list[dict[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past_defaults, "CHANGES", tuple({"Settings": row} for row in values))
        for version in range(len(values)):
            found = defaults_of(version)["Settings"]
            assert set(found) == {name for row in values for name in row}
            for name, value in found.items():
                until = [row[name] for row in values[: version + 1] if name in row]
                later = [row[name] for row in values[version + 1 :] if name in row]
                assert value == (until[-1] if until else later[0])


@given(
    st.dictionaries(st.sampled_from([f.name for f in fields(Settings)]), st.integers(1, 9)),
    st.none() | st.dictionaries(st.sampled_from([f.name for f in fields(Squeezing)]), st.integers(1, 9)),
    st.integers(0, FORMAT_VERSION),
)
def test_what_a_file_says_stays(said: dict[str, Any], squeezing: dict[str, Any] | None, version: int) -> None:
    whole = completed({**said, "squeezing": squeezing}, version)
    assert {key: whole[key] for key in said} == said
    assert "name" not in whole
    if squeezing is None:
        assert whole["squeezing"] is None
    else:
        assert whole["squeezing"] == {**defaults_of(version)["Squeezing"], **squeezing}


# --- files


def change_default(patch: pytest.MonkeyPatch, kind: Any, name: str, value: Any) -> None:
    """As if the source said so: ``kind()`` has it from now on."""
    names = [field.name for field in fields(kind)]
    defaults = list(kind.__init__.__defaults__)
    defaults[names.index(name)] = value
    patch.setattr(kind.__init__, "__defaults__", tuple(defaults))
    patch.setattr(kind, name, value)


def make_old(folder: Path, *lost: str) -> None:
    """Make a checkpoint one of version 0 that does not know some settings."""
    path = folder / "checkpoint" / "state.json"
    values = json.loads(path.read_text())
    assert values["extra"].pop("format_version") == FORMAT_VERSION
    settings = json.loads(values["extra"]["settings"])
    for name in lost:
        settings.get("squeezing", {}).pop(name) if name not in settings else settings.pop(name)
    values["extra"]["settings"] = json.dumps(settings)
    path.write_text(json.dumps(values))


def test_an_old_checkpoint_has_the_defaults_of_its_time(
    places: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(*places, HOW, QUICK, folder=tmp_path)
    make_old(tmp_path, "warmup", "policy")
    change_default(monkeypatch, Settings, "warmup", 0.25)
    change_default(monkeypatch, Method, "policy", "central")
    new = Settings(max_steps=2, batch_size=12, max_length=24)
    assert (new.warmup, Method("lfa").policy) == (0.25, "central")
    with pytest.raises(MPOError, match=r"another run: warmup was 0\.06 and is 0\.25"):
        finetune(*places, Method("lfa", sites=3, policy="auxiliary"), new, folder=tmp_path, resume=True)
    with pytest.raises(MPOError, match="another run: policy was 'auxiliary' and is 'central'"):
        finetune(*places, Method("lfa", sites=3), QUICK, folder=tmp_path, resume=True)
    result, _ = finetune(*places, HOW, QUICK, folder=tmp_path, resume=True)
    assert result.notes["resumed at step"] == 2


def test_an_old_squeezing_and_an_old_result_have_them_too(
    places: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, settings = Method("squeeze", sites=3), dataclasses.replace(QUICK, max_steps=None, epochs=0)
    old = Squeezing(200.0, 15, 1, max_rounds=1)
    result, _ = finetune(*places, how, settings, squeezing=old, folder=tmp_path / "run")
    make_old(tmp_path / "run", "rate", "gap_on")
    change_default(monkeypatch, Squeezing, "rate", 0.7)
    change_default(monkeypatch, Squeezing, "gap_on", "held-out")
    again, _ = finetune(*places, how, settings, squeezing=old, folder=tmp_path / "run", resume=True)
    assert again.squeezing == result.squeezing
    new = Squeezing(200.0, 15, 1, max_rounds=1, gap_on="dev")
    with pytest.raises(MPOError, match=r"squeezing was .*'rate': 0\.1, .* and is .*'rate': 0\.7"):
        finetune(*places, how, settings, squeezing=new, folder=tmp_path / "run", resume=True)

    class Nothing:
        def save_pretrained(self, _folder: Path) -> None: ...

    save_finetuned(tmp_path / "done", result, Nothing(), Nothing())
    path = tmp_path / "done" / "result.json"
    values = json.loads(path.read_text())
    assert values.pop("format_version") == FORMAT_VERSION
    del values["settings"]["squeezing"]["rate"], values["settings"]["clip"]
    path.write_text(json.dumps(values))
    read = read_result(tmp_path / "done")
    assert read.settings["squeezing"]["rate"] == 0.1
    assert read.settings["clip"] == 1.0
    assert finished_run(tmp_path / "done", *places, how, settings, old) == read
    with pytest.raises(MPOError, match="finished run of something else: squeezing was"):
        finished_run(tmp_path / "done", *places, how, settings, new)


def test_newer_files_are_refused(places: tuple[Path, Any], tmp_path: Path) -> None:
    finetune(*places, HOW, QUICK, folder=tmp_path)
    path = tmp_path / "checkpoint" / "state.json"
    values = json.loads(path.read_text())
    values["extra"]["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(values))
    newer = rf"has format_version {FORMAT_VERSION + 1}, and this version of mpo_tn reads up to {FORMAT_VERSION}"
    with pytest.raises(MPOError, match=f"state.json {newer}"):
        finetune(*places, HOW, QUICK, folder=tmp_path, resume=True)
    (tmp_path / "result.json").write_text(json.dumps({"format_version": FORMAT_VERSION + 1}))
    for read in (read_result, bonds_of):
        with pytest.raises(MPOError, match=f"result.json {newer}"):
            read(tmp_path)


@pytest.mark.parametrize("version", [-1, "1", 1.0, None, True])
def test_what_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(MPOError, match=r"result\.json is damaged: its format_version is"):
        checked_version({"format_version": version}, Path("result.json"))
    assert checked_version({}, Path("result.json")) == 0


def test_a_checkpoint_of_this_version_says_so(places: tuple[Path, Any], tmp_path: Path) -> None:
    result, _ = finetune(*places, HOW, QUICK, folder=tmp_path)
    values = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    assert values["extra"]["format_version"] == result.to_dict()["format_version"] == FORMAT_VERSION
