"""mpo-tn plan, and compress --plan, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import tiny

from mpo_tn.app import cli
from mpo_tn.torch import MPOConfig, Plan, plan
from mpo_tn.torch.hf.folder import empty_model, load_model


def test_plan_then_compress(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    file, before = tmp_path / "plan.json", {path: path.read_bytes() for path in dense_folder.iterdir()}
    code, printed, _ = mpo_tn("plan", dense_folder, "--keep", "0.6", "--sites", "3", "--out", file)
    assert code == 0
    decided = Plan.load(file)
    shown = " ".join(printed.split())
    assert "an embedding, which has to be named" in shown
    assert f"({decided.parameters_before} -> {decided.parameters_after}" in shown
    assert {path: path.read_bytes() for path in dense_folder.iterdir()} == before
    # The same as from the model with its weights.
    assert plan(load_model(dense_folder), decided.config) == decided

    code, printed, _ = mpo_tn("compress", dense_folder, tmp_path / "out", "--plan", file, "--json")
    assert code == 0
    report = json.loads(printed)
    assert report["parameters_after"] == decided.parameters_after
    assert [layer["bonds"] for layer in report["layers"]] == [list(unit.spec.bonds) for unit in decided.units]
    code, _, _ = mpo_tn("compress", dense_folder, tmp_path / "same", "--keep", "0.6", "--sites", "3")
    assert code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("width", [80, 140])
def test_bits_are_planned_compressed_and_shown(
    width: int, mpo_tn, dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.out, "width", width)
    options = ("--sites", "3", "--central-bits", "4", "--bits", "8", "--group", "16")
    file, out = tmp_path / "plan.json", tmp_path / "out"
    _, printed, _ = mpo_tn("plan", dense_folder, *options, "--out", file)
    decided = Plan.load(file)
    unit = decided.units[0]
    assert (unit.spec.bits, unit.spec.group) == ((8, 4, 8), 16)
    row = next(row for row in decided.rows() if unit in row.units)
    megabytes = sum(each.bytes for each in row.units) / 1e6
    for shown in ("bits", "bpw", "MB", "8,4,8", f"{unit.bits_per_weight:.2f}", f"{megabytes:.3g}"):
        assert shown in printed
    assert max(map(len, printed.partition("Stays as it is")[0].splitlines())) <= width
    assert f"{decided.bits_per_weight:.2f} bits per weight" in " ".join(printed.split())
    _, printed, _ = mpo_tn("compress", dense_folder, out, *options)
    assert "8,4,8" in printed
    _, printed, _ = mpo_tn("inspect", out)
    for shown in ("bits", "bpw", "8,4,8", f"{unit.bits_per_weight:.2f}"):
        assert shown in printed
    assert mpo_tn("compress", dense_folder, tmp_path / "same", "--plan", file)[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (out / name).read_bytes()
    _, printed, _ = mpo_tn("plan", dense_folder, "--sites", "1", "--bits", "4", "--json")
    assert {tuple(each["bits"]) for each in json.loads(printed)["units"]} == {(4,)}
    _, printed, _ = mpo_tn("plan", dense_folder, "--sites", "3", "--central-bits", "4", "--json")
    assert {tuple(each["bits"]) for each in json.loads(printed)["units"]} == {(None, 4, None)}
    code, _, said = mpo_tn("plan", dense_folder, "--bits", "9")
    assert code == 2
    assert "bits=9" in said


def test_a_folder_without_weights_or_class_has_a_plan(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    values = json.loads((dense_folder / "config.json").read_text())
    del values["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, printed, _ = mpo_tn("plan", tmp_path, "--bond", "3", "--json")
    assert code == 0
    assert json.loads(printed)["model"] == "BertModel"


def test_an_edited_plan(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    mpo_tn("plan", dense_folder, "--sites", "3", "--out", file)
    values: dict[str, Any] = json.loads(file.read_text())
    first = values["units"][0]
    first["bonds"] = [1] * len(first["bonds"])
    file.write_text(json.dumps(values))
    code, _, said = mpo_tn("compress", dense_folder, tmp_path / "out", "--plan", file)
    assert code == 2
    assert f'{first["names"][0]}: "parameters" is {first["parameters"]}' in said
    assert not (tmp_path / "out").exists()
    del first["parameters"], first["bytes"]
    file.write_text(json.dumps(values))
    code, _, _ = mpo_tn("compress", dense_folder, tmp_path / "out", "--plan", file)
    assert code == 0
    assert load_model(tmp_path / "out").get_submodule(first["names"][0]).spec.bonds == tuple(first["bonds"])


def test_the_plan_of_a_tolerance_is_the_most_that_comes(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    options = ("--sites", "3", "--tolerance", "0.5")
    code, printed, _ = mpo_tn("plan", dense_folder, *options)
    assert code == 0
    assert "<=" in printed
    assert "at most" in printed
    most = json.loads(mpo_tn("plan", dense_folder, *options, "--json")[1])["units"]
    came = json.loads(mpo_tn("compress", dense_folder, tmp_path / "out", *options, "--json")[1])["layers"]
    for planned, layer in zip(most, came, strict=True):
        assert all(a <= b for a, b in zip(layer["bonds"], planned["bonds"], strict=True))
    assert sum(layer["parameters"] for layer in came) <= sum(planned["parameters"] for planned in most)


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits(width: int, mpo_tn, dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.out, "width", width)
    _, printed, _ = mpo_tn("plan", dense_folder, "--keep", "0.6")
    assert max(map(len, printed.splitlines())) <= width
    assert "attention.self.query" in printed
    assert "x 2" in printed


def test_mistakes_are_one_sentence(mpo_tn, dense_folder: Path, tmp_path: Path) -> None:
    small, file = tmp_path / "small", tmp_path / "plan.json"
    assert mpo_tn("compress", dense_folder, small, "--bond", "2", "--sites", "3")[0] == 0
    mpo_tn("plan", dense_folder, "--bond", "2", "--sites", "3", "--out", file)
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    for words, arguments in {
        "there is no model folder /nowhere": ("plan", "/nowhere"),
        "compressed or quantized already": ("plan", small),
        "holds MPO modules already": ("plan", small, "--tolerance", "0.1"),
        "leave the other options out": ("compress", dense_folder, tmp_path / "o", "--plan", file, "--keep", "0.5"),
        "none.json could not be read": ("compress", dense_folder, tmp_path / "o", "--plan", tmp_path / "none.json"),
        "does not fit this GPT2": ("compress", tmp_path / "gpt2", tmp_path / "o", "--plan", file),
        "could not be written": ("plan", dense_folder, "--out", tmp_path / "nowhere" / "plan.json"),
    }.items():
        code, printed, said = mpo_tn(*arguments)
        assert (code, printed) == (2, "")
        assert words in " ".join(said.split()), said
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("family", "dtype"), [("bert", torch.float16), ("t5", torch.float16), ("t5", torch.bfloat16)])
@pytest.mark.parametrize("stated", [True, False])
def test_the_dtypes_are_those_in_which_the_folder_is_loaded(
    family: str, dtype: torch.dtype, stated: bool, tmp_path: Path
) -> None:
    # T5 keeps some of its weights in float32 whatever is asked for.
    build = t5 if family == "t5" else lambda: tiny(family)
    build().to(dtype).save_pretrained(tmp_path / "dense")
    if not stated:
        file = tmp_path / "dense" / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        assert values.pop("dtype") == str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(values), encoding="utf-8")
    config = MPOConfig(sites=3, bond=2)
    assert plan(empty_model(tmp_path / "dense"), config) == plan(load_model(tmp_path / "dense"), config)


def t5() -> transformers.T5ForConditionalGeneration:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
