"""The pieces of pages, and the page of the demo made of rows that another demo might measure."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from mpo_tn.app.demo_page import DemoResult, DemoRow, write_demo_report
from mpo_tn.app.fidelity import Fidelity
from mpo_tn.app.html import folded, grouped_table, page, table


def row(name: str, size: float, distance: float, neighbours: float) -> DemoRow:
    return DemoRow(name, size, size * 8 / 22.7, distance, Fidelity(0.9, 0.8, neighbours, 0.7), 1.0)


ROWS = [
    row("planned", 23.0, 0.002, 0.97), row("dense", 90.9, 0.0, 1.0), row("low-rank", 23.2, 0.3, 0.6),
    row("int8", 23.0, 0.0003, 0.98), row("healed", 11.8, 0.009, 0.93), row("int4", 11.9, 0.08, 0.85),
    row("mpo", 12.0, 0.9, 0.2), row("planned", 6.2, 0.3, 0.6),
]  # fmt: skip


def result(rows: list[DemoRow]) -> DemoResult:
    return DemoResult("a <model>", 20, {"python": "3"}, rows=rows, bytes_dense=100, bytes_saved=50, floor=1.7)


def test_rows_stand_by_size_and_the_closest_first() -> None:
    found = [(head, [part.name for part in rows]) for head, rows in result(ROWS).groups]
    assert found == [
        ("as it was", ["dense"]),
        ("about 23.2 MB", ["int8", "planned", "low-rank"]),
        ("about 12 MB", ["healed", "int4", "mpo"]),
        ("about 6.2 MB", ["planned"]),
    ]


def test_the_headline_says_where_integers_win() -> None:
    assert result(ROWS).headline() == (
        "Closest to the dense model of 90.9 MB: int8 at 23 MB; planned and healed at 11.8 MB. The smallest that keeps "
        "nine of ten nearest neighbours is planned and healed, 11.8 MB."
    )
    worse = [part for part in ROWS if part.fidelity.neighbours < 0.9]
    assert "None keeps nine of ten nearest neighbours; int4, 11.9 MB, keeps most, 85%." in result(worse).headline()
    assert result([ROWS[1]]).headline() == "Nothing was made smaller."


def test_the_page_has_its_parts_in_order(tmp_path: Path) -> None:
    write_demo_report(result(ROWS), tmp_path / "page.html")
    found = (tmp_path / "page.html").read_text(encoding="utf-8")
    places = [found.index(part) for part in ("<h1>", "class='headline'", "<svg", "<table", "<details")]
    assert places == sorted(places)
    assert "a &lt;model&gt;" in found
    assert 'name="viewport"' in found
    assert "prefers-color-scheme: dark" in found
    # Nothing is wider than the page of a phone: what has a least width is in a box that scrolls.
    assert not re.search(r"minmax\(\d+px", found)
    assert found.count("<table") == found.count("class='scroll'")
    assert "planned and healed</text>" in found
    assert "all these matrices zero</text>" in found


def test_a_distance_that_is_no_number_is_said_and_not_drawn(tmp_path: Path) -> None:
    rows = [*ROWS, row("int2", 6.1, math.inf, 0.0)]
    write_demo_report(result(rows), tmp_path / "page.html")
    found = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not drawn: int2." in found
    assert ">inf</td>" in found
    write_demo_report(result(rows[-1:]), tmp_path / "page.html")
    assert "<svg" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1", "1,234", "-0.5", "3.2e-05"], True),
        (["98.5%", "", "-"], True),
        (["82.0 ± 1.6", "undefined"], True),
        (["inf", "nan"], True),
        (["1", "two"], False),
        (["4, 8, 4"], False),
        (["384 x 384"], False),
        (["", ""], False),
    ],
)
def test_columns_of_numbers_stand_at_the_right(cells: list[str], right: bool) -> None:
    made = table(("name", "value"), [("a", cell) for cell in cells])
    assert made.count("<td class='n'>") == (len(cells) if right else 0)
    assert made.count("<th class='n'>") == int(right)


def test_pieces_are_escaped() -> None:
    assert "<b>" not in table(("<b>",), [("<b>",)])
    assert "<b>" not in grouped_table(("x",), [("<b>", [("1",)])])
    assert "<b>" not in folded("<b>")
    assert "<title>&lt;b&gt; - mpo-tn</title>" in page("<b>", ["x"])
