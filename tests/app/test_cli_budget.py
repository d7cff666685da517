"""mpo-tn plan and compress for a budget, on text; then eval, heal and finetune on what came."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.task_folders import sentence, write_decoder, write_encoder

from mpo_tn.app import cli
from mpo_tn.torch import Plan, calibrate
from mpo_tn.torch.hf.folder import load_model
from mpo_tn.torch.models.auto import LEFT_BY_PLAN

SIZES = {"encoder": "30KB", "decoder": "20KB"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("budget")
    source = random.Random(0)
    lines = [f"{sentence(source)} ." for _ in range(60)]
    (home / "own.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (home / "own.csv").write_text("kind,line\n" + "".join(f"a,{line}\n" for line in lines), encoding="utf-8")
    for name, write in (("encoder", write_encoder), ("decoder", write_decoder)):
        write(home / name)
    return home


def budget(home: Path, name: str = "encoder") -> tuple[str | Path, ...]:
    return "--size", SIZES[name], "--texts", home / "own.txt", "--max-length", "16"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_plan_then_compress(
    mpo_tn: Any, home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.out, "width", 80)
    file, limit = tmp_path / "plan.json", float(SIZES[name].removesuffix("KB")) * 1000
    code, printed, _ = mpo_tn("plan", home / name, *budget(home, name), "--out", file)
    assert code == 0
    words = " ".join(printed.split())
    decided = Plan.load(file)
    assert decided.bytes_after <= limit
    assert decided.config.target_modules == "all-matrices"
    assert decided.needs_calibration
    for alternative in decided.considered:
        assert alternative.name in words
    assert "What was compared" in words
    assert "Integers alone are best" in words or "Best is" in words
    assert f"--plan {file} --texts {home / 'own.txt'}" in words
    table = printed.partition("Stays as it is")[0]
    assert max(map(len, table.splitlines())) <= 80
    heads = [part for part in decided.left if "head" in part.reason]
    assert [part.name for part in heads] == ([] if name == "encoder" else ["lm_head"])

    code, _, said = mpo_tn("compress", home / name, tmp_path / "out", "--plan", file)
    assert code == 2
    assert "plan.json fits matrices to what their layers are given on text: give --texts FILE" in " ".join(said.split())
    assert not (tmp_path / "out").exists()
    texts = ("--texts", home / "own.txt", "--max-length", "16")
    code, printed, _ = mpo_tn("compress", home / name, tmp_path / "out", "--plan", file, *texts)
    assert code == 0
    assert "What was compared" not in printed
    assert "on text" in printed
    assert 0 < sum(p.numel() * p.element_size() for p in _tensors(load_model(tmp_path / "out"))) <= limit
    code, printed, _ = mpo_tn("compress", home / name, tmp_path / "at once", *budget(home, name), "--json")
    assert code == 0
    report = json.loads(printed)
    assert Plan.from_dict(report["plan"]).units == decided.units
    assert all(layer["metric"] != "frobenius" and layer["weighted_error"] < 1 for layer in report["layers"])


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *(b for n, b in model.named_buffers() if "cores" in n)]


@pytest.mark.slow
def test_a_table_a_seed_and_bits_per_weight(mpo_tn: Any, home: Path) -> None:
    asked = ("plan", home / "encoder", "--bits-per-weight", "5", "--max-length", "16", "--json", "--target", "query")
    table = ("--texts", home / "own.csv", "--text", "line")
    first, again = (mpo_tn(*asked, *table)[1] for _ in range(2))
    assert json.loads(first) == json.loads(again)
    values = json.loads(first)
    assert {unit["names"][0].rsplit(".", 1)[1] for unit in values["units"]} == {"query"}
    assert 8 * sum(unit["bytes"] for unit in values["units"]) <= 5 * 2 * 32 * 32
    some = json.loads(mpo_tn(*asked, *table, "--sample", "20", "--seed", "3")[1])
    assert some["considered"] != values["considered"]


@pytest.mark.slow
def test_what_came_can_be_measured_healed_and_tuned(mpo_tn: Any, home: Path, tmp_path: Path) -> None:
    out, healed = tmp_path / "out", tmp_path / "healed"
    assert mpo_tn("compress", home / "encoder", out, *budget(home))[0] == 0
    texts = ("--against", home / "encoder", "--texts", home / "own.txt", "--max-length", "16", "--json")
    code, printed, _ = mpo_tn("eval", out, *texts)
    assert code == 0
    dense, small = json.loads(printed)["rows"]
    assert small["bytes"] < dense["bytes"]
    assert 0 < small["distance"]["value"] < 1
    code, printed, _ = mpo_tn("heal", out, *texts, "--steps", "4", "--out", healed)
    assert code == 0
    report = json.loads(printed)
    assert report["after"] <= report["before"]
    assert mpo_tn("eval", healed, *texts)[0] == 0
    lines = (home / "own.txt").read_text().splitlines()
    (tmp_path / "task.csv").write_text("line,label\n" + "".join(f"{line},{k % 2}\n" for k, line in enumerate(lines)))
    code, _, said = mpo_tn(
        "finetune", healed, "--train-file", tmp_path / "task.csv", "--text", "line", "--label", "label",
        "--epochs", "1", "--out", tmp_path / "tuned", "--max-length", "16",
    )  # fmt: skip
    assert (code, said.strip()) == (0, "")


@pytest.mark.slow
def test_a_saved_calibration_in_place_of_texts(mpo_tn: Any, home: Path, tmp_path: Path) -> None:
    ids = torch.randint(5, 20, (8, 10), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = calibrate(load_model(home / "encoder"), [batch], target_modules="all-matrices", gradients=True)
    found.save(tmp_path / "own.safetensors")
    code, printed, _ = mpo_tn("plan", home / "encoder", "--size", "30KB", "--calibration", tmp_path / "own.safetensors")
    assert code == 0
    assert "expected: there was no text to measure it on" in " ".join(printed.split())


@pytest.mark.slow
def test_text_without_a_budget_fits_to_it(mpo_tn: Any, home: Path, tmp_path: Path) -> None:
    asked = ("--sites", "low-rank", "--keep", "0.4", "--texts", home / "own.txt", "--max-length", "16", "--json")
    code, printed, _ = mpo_tn("compress", home / "encoder", tmp_path / "out", *asked)
    assert code == 0
    layers = json.loads(printed)["layers"]
    assert all("activation" in layer["metric"] and layer["weighted_error"] > 0 for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [("--keep", "0.4"), ("--max-flops", "0.5")])
def test_numbers_or_flops_as_a_budget(mpo_tn: Any, home: Path, tmp_path: Path, asked: tuple[str, str]) -> None:
    given = (*asked, "--texts", home / "own.txt", "--max-length", "16", "--family", "dense", "--family", "low-rank")
    code, printed, _ = mpo_tn("plan", home / "encoder", *given, "--out", tmp_path / "plan.json")
    assert code == 0
    words = " ".join(printed.split())
    assert "What was compared" in words
    assert "integers" not in words.partition("Best is")[2]
    decided = Plan.load(tmp_path / "plan.json")
    dense = sum(part.parameters for part in decided.left if part.reason == LEFT_BY_PLAN)
    assert decided.matrix_after + dense <= float(asked[1]) * (decided.matrix_before + dense)
    assert not decided.has_bits
    code, printed, _ = mpo_tn("compress", home / "encoder", tmp_path / "out", *given, "--json")
    assert code == 0
    assert Plan.from_dict(json.loads(printed)["plan"]) == decided


MISTAKES = {
    "no text": (("--size", "30KB"), "give --texts FILE, some hundred texts"),
    "no such file": (("--size", "30KB", "--texts", "nowhere.txt"), "nowhere.txt"),
    "no such column": (("--size", "30KB", "--texts", "own.csv", "--text", "body"), "body"),
    "column and no file": (("--size", "30KB", "--text", "body"), "--text names a column"),
    "two sizes": (("--size", "30KB", "--keep", "0.5", "--texts", "own.txt"), "keep and size"),
    "size of words": (("--size", "small", "--texts", "own.txt"), "size='small' is not a size"),
    "sites": (("--size", "30KB", "--sites", "3", "--texts", "own.txt"), "--sites 3 with a budget"),
    "bits": (("--size", "30KB", "--bits", "4", "--texts", "own.txt"), "with a budget, for which bits are chosen"),
    "flops alone": (("--max-flops", "0.5"), "give --texts FILE, some hundred texts"),
    "flops of given legs": (("--max-flops", "0.5", "--sites", "3", "--texts", "own.txt"), "--sites 3 with a budget"),
    "all flops": (("--max-flops", "1", "--texts", "own.txt"), "give less than 1"),
    "nothing kept": (("--keep", "0.0001", "--texts", "own.txt"), "give at least keep="),
    "all kept": (("--keep", "1", "--texts", "own.txt"), "nothing has to be compressed"),
    "no family": (("--size", "30KB", "--family", "trees", "--texts", "own.txt"), "names 'trees'"),
    "tolerance on text": (("--tolerance", "0.1", "--texts", "own.txt"), "--tolerance is an error of the matrix"),
    "too small": (("--size", "1KB", "--texts", "own.txt"), "give at least"),
    "too large": (("--size", "1GB", "--texts", "own.txt"), "nothing has to be compressed"),
    "both": (("--size", "30KB", "--texts", "own.txt", "--calibration", "x"), "--texts and --calibration"),
    "no calibration": (("--size", "30KB", "--calibration", "nowhere.safetensors"), "nowhere.safetensors"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_mistake_is_one_sentence_and_code_2(
    mpo_tn: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(home)
    options, match = MISTAKES[name]
    target = (tmp_path / "out",) if command == "compress" else ()
    code, printed, error = mpo_tn(command, "./encoder", *target, *options)
    assert (code, printed) == (2, "")
    assert match in " ".join(error.split())
    assert error.strip().startswith("mpo-tn: ")
    assert not (tmp_path / "out").exists()
