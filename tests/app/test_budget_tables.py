"""What is said of a plan for a budget, told from its numbers."""

from __future__ import annotations

import pytest

from mpo_tn.app import terminal
from mpo_tn.app.budget_tables import in_words, print_budget_plan, print_comparison, row_names, verdict
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.entries import ACTIVATION, Alternative, LeftDense, UnitPlan
from mpo_tn.planning.plan import Plan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.torch.models.auto import LEFT_BY_PLAN

SIDE = 64


def integers(bits: int) -> ModuleSpec:
    return ModuleSpec("linear", Sites((SIDE,), (SIDE,)), (), SIDE, SIDE, bits=(bits,))


def pair(rank: int, *bits: int) -> ModuleSpec:
    return ModuleSpec("linear", Sites.low_rank(SIDE, SIDE), (rank,), SIDE, SIDE, bits=bits)


def made(specs: list[ModuleSpec], considered: list[Alternative]) -> Plan:
    units = tuple(
        UnitPlan((f"encoder.layer.{k}.attention.self.query",), spec, "float32", metric=ACTIVATION)
        for k, spec in enumerate(specs)
    )
    left = (LeftDense("pooler.dense", SIDE * SIDE, 4 * SIDE * SIDE, LEFT_BY_PLAN), LeftDense("norm", 64, 256, "a norm"))
    size = sum(unit.bytes for unit in units) + 4 * SIDE * SIDE
    first = Alternative(considered[0].name, size, considered[0].distance, considered[0].expected)
    return Plan("Model", MPOConfig(size="1MB"), units, left, (first, *considered[1:]))


UNIFORM = [
    Alternative("integers, bits chosen by matrix", 18_000, 0.02, 0.03),
    Alternative("integers, 4 bits", 16_000, 0.025, 0.02),
    Alternative("integers, 3 bits", 12_000, 0.08, 0.06),
    Alternative("low rank in 4 bits", 15_000, 0.1, 0.2),
    Alternative("low rank", 15_000, None, 0.9),
]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (integers(3), "3 bits"),
        (integers(16), "float16"),
        (pair(16, 3, 3), "rank 16 in 3 bits"),
        (pair(16), "rank 16"),
        (pair(16, 3, 4), "rank 16 in 3,4 bits"),
        (
            ModuleSpec("linear", Sites((4, 4, 4), (4, 4, 4)), (8, 8), SIDE, SIDE, bits=(4, 4, 4)),
            "3 sites, bonds 8,8, in 4 bits",
        ),
        (ModuleSpec("linear", Sites((SIDE,), (SIDE,)), (), SIDE, SIDE), "1 site"),
    ],
)
def test_a_structure_in_words(spec: ModuleSpec, words: str) -> None:
    assert in_words(spec) == words


def test_rows_of_one_pattern_say_which_numbers() -> None:
    decided = made([integers(3), integers(3), integers(4), integers(3), pair(16, 3, 3)], [Alternative("joint", 0)])
    assert row_names(decided.rows()) == [f"encoder.layer.{n}.attention.self.query" for n in ("0-1,3", "2", "4")]
    decided = made([integers(3), integers(3)], [Alternative("joint", 0)])
    assert row_names(decided.rows()) == ["encoder.layer.*.attention.self.query"]


def test_a_mixed_plan_won() -> None:
    decided = made([integers(4), integers(4), pair(16, 3, 3)], [Alternative("joint", 0, 0.01, 0.01), *UNIFORM])
    said = verdict(decided)
    assert said.startswith("Best is the joint plan: of the weights 50 % in integers, 25 % in low-rank pairs, 25 % left")
    assert "D 0.01 on text that was held back." in said
    assert "The best uniform integers, 4 bits (0.02 MB): 0.025, 2.5 times as much." in said
    assert "Integers alone, bits chosen by matrix (0.02 MB): 0.02, 2 times as much." in said
    assert "The best uniform low rank, in 4 bits (0.02 MB): 0.1, 10 times as much." in said


def test_where_integers_alone_are_best_it_is_said() -> None:
    """Also where the plan that was chosen freely turned out to be integers."""
    decided = made([integers(4), integers(3)], [Alternative("joint", 0, 0.02, 0.02), *UNIFORM[1:]])
    said = verdict(decided)
    assert said.startswith("Integers alone are best at this size: 4 bits in 1, 3 bits in 1; D 0.02 ")
    assert "The best uniform integers, 4 bits (0.02 MB): 0.025, 25% more." in said
    uniform = made([integers(4)] * 3, [UNIFORM[1], Alternative("joint", 0, 0.03, 0.01), *UNIFORM[2:]])
    said = verdict(uniform)
    assert said.startswith("Integers alone are best at this size: 4 bits for every matrix; D 0.025 ")
    assert "uniform integers" not in said


def test_without_text_or_without_a_rival() -> None:
    said = verdict(made([pair(8, 3, 3)], [Alternative("low rank in 3 bits", 0, None, 0.5)]))
    assert said.startswith("Best is low rank in 3 bits: ")
    assert "D 0.5 expected: there was no text to measure it on. No uniform integers fit the size." in said
    said = verdict(made([integers(3)], [Alternative("integers, 3 bits", 0, 0.0, 0.0)]))
    assert "D 0 on text" in said
    assert "No uniform low rank fits the size." in said


@pytest.mark.parametrize("width", [80, 140])
def test_the_tables_fit_and_count_all_matrices(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.out, "width", width)
    decided = made([integers(4), integers(4), pair(16, 3, 3)], [Alternative("joint", 0, 0.01, 5e-5), *UNIFORM])
    print_budget_plan(decided)
    print_comparison(decided)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    first = next(line for line in printed.splitlines() if line.startswith("joint *"))
    # MB of the model; bits of what was planned over its weights, those of the matrix left dense included.
    size = decided.considered[0].bytes
    assert first.split()[2:] == [f"{decided.bytes_after / 1e6:.2f}", f"{8 * size / (4 * SIDE**2):.2f}", "0.01", "5e-05"]
    assert decided.bytes_after == size + 256
    assert [line.split()[-2:] for line in printed.splitlines() if line.startswith("low rank  ")] == [["-", "0.9"]]
    for words in ("4 bits", "rank 16 in 3 bits", "left dense by the plan"):
        assert words in printed
