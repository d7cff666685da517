"""What the program says of matrices that stay dense: their shares and why, folded and bounded, all of them in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.program import run

from mpo_tn.app.plan_tables import print_coverage, print_skipped
from mpo_tn.planning.coverage import ROWS, Coverage, DenseMatrix

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "dense"
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.guarantee("none-in-silence")
def test_plan_compress_and_inspect_say_what_they_cover(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mpo_tn(*args: str | Path) -> str:
        code, printed, said = run(*args, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, said
        return printed

    chosen = ("--target", "q_proj", "--keep", "0.7")
    for printed in (
        mpo_tn("plan", mixtral, *chosen),
        mpo_tn("compress", mixtral, tmp_path / "o", *chosen),
        mpo_tn("inspect", tmp_path / "o"),
        mpo_tn("inspect", mixtral, "--target", "q_proj"),
    ):
        flat = " ".join(printed.split())
        assert "Covers 4.2 % of the matrix parameters." in flat
        assert "model.layers.*.mlp.experts.gate_up_proj (2 of them), 4x96x32:" in flat
        assert "model.layers.*.mlp.gate.weight (2 of them), 4x32:" in flat
        assert "lm_head.weight, 61x32:" in flat
    found = json.loads(mpo_tn("inspect", tmp_path / "o", "--json"))["coverage"]
    assert found["total"] == found["covered"] + sum(each["parameters"] for each in found["dense"])
    assert {"model.layers.1.mlp.experts.down_proj", "model.embed_tokens.weight"} <= {e["name"] for e in found["dense"]}
    assert all(each["reason"] for each in found["dense"])
    assert json.loads(mpo_tn("plan", mixtral, *chosen, "--json"))["left"][0]["matrices"] == {"weight": [61, 32]}


def test_inspect_reads_patterns_as_compress_does(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, said in (
        (("--target", ".*q_proj"), "'re:.*q_proj'"),
        (("--target", "q_prj"), "did you mean q_proj"),
        (("--exclude", "q_prj"), "exclude_modules='q_prj'"),
    ):
        code, _, error = run("inspect", mixtral, *args, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert said in error


def test_long_lists_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    dense = tuple(DenseMatrix(f"[bold]{a}{b}", (k + 2, 2), "why") for a in letters for k, b in enumerate(letters))
    print_coverage(Coverage(10, dense))
    lines = capsys.readouterr().out.strip().splitlines()
    assert sum(line.startswith("- ") for line in lines) == ROWS + 1
    assert f"{len(dense) - ROWS} smaller ones, all of them with --json" in lines[-1]
    assert "[bold]" in lines[2]
    print_skipped({f"{a}{b}": "why" for a in letters for b in letters})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == ROWS + 1
    assert lines[-1].startswith(f"skipped {len(letters) ** 2 - ROWS} modules more")
    print_skipped({f"layers.{k}.norm": "a Norm" for k in range(50)})
    assert capsys.readouterr().out == "skipped layers.*.norm (50 modules): a Norm\n"
