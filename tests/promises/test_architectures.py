"""Some of docs/architectures.md, on a dozen models, and that the page is what its rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import abilities, architecture_table
from helpers.abilities import CHEAP, COLUMNS, FULL, Case, NotForIt, cell
from helpers.architectures import MODELS
from helpers.paths import ROOT

RESULTS, PAGE = ROOT / "benchmarks/results/architectures.jsonl", ROOT / "docs/architectures.md"
DOZEN = (
    "roberta", "electra", "gptj", "opt", "phi 3", "olmoe", "mamba 2", "pegasus", "swin", "convnext", "wav2vec2", "clip",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.guarantee("reached-exact", "reload-bits", "dequantize", "none-in-silence")
@pytest.mark.parametrize("name", DOZEN)
def test_a_dozen_models(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    model = case.model(FULL)
    covers = case.report.coverage
    assert covers.share >= (
        0.95 if name != "wav2vec2" else 0.9
    )  # whose convolution has a norm of its weight of its own
    dense = {n for n, p in model.named_parameters() if ".cores." not in n and sum(size > 1 for size in p.shape) > 1}
    assert {each.name for each in covers.dense} == dense
    for column in CHEAP:
        found = cell(column, case)
        assert found[0] == "ok" or (column, found[0]) == ("ties", "n/a"), (column, found)


@pytest.mark.slow
@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("name", ["jamba", "falcon mamba"])
def test_models_that_compute_otherwise_when_they_are_quantized(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    abilities.half(case)
    model = case.kept
    assert model.config._is_quantized
    assert not hasattr(model.dequantize().config, "_is_quantized")


@pytest.mark.slow
@pytest.mark.guarantee("lora-on-cores")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_on_a_model_that_has_no_word_table_of_its_own(tmp_path: Path) -> None:
    abilities.lora(Case("clip", tmp_path))


def test_what_fails_is_told_from_what_there_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> None:
        raise ValueError("a reason\nin two lines") if not case.dense else NotForIt

    def fails_always(case: Case) -> None:
        raise ValueError(f"so it is with {case.dense}")

    monkeypatch.setitem(COLUMNS, "save", fails)
    monkeypatch.setitem(COLUMNS, "bf16", fails_always)
    monkeypatch.setitem(COLUMNS, "exact", fails_always)
    case = Case("bert", tmp_path)
    assert cell("save", case) == ["fails", "ValueError: a reason"]
    assert cell("bf16", case) == ["n/a", "nor does the dense model: ValueError: so it is with True"]
    assert cell("exact", case) == ["fails", "ValueError: so it is with False"]


def test_the_page_is_what_the_rows_say() -> None:
    rows = architecture_table.read(RESULTS)
    assert set(rows) <= set(MODELS)
    assert len(rows) >= 70
    assert all(list(row["cells"]) == list(COLUMNS) for row in rows.values())
    assert list(architecture_table.LEGEND) == ["in cores", *COLUMNS]
    assert PAGE.read_text(encoding="utf-8") == architecture_table.page(RESULTS)
