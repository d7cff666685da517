"""The picture of value against size: what was given is drawn, named and marked."""

from __future__ import annotations

import itertools
import math

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from mpo_tn import MPOError, plot
from mpo_tn.plot import Point

ROWS = [
    Point("int8", 23.0, 0.0003), Point("int4", 11.9, 0.078), Point("low-rank", 11.9, 0.71),
    Point("low-rank", 23.0, 0.245), Point("mpo", 23.1, 0.5), Point("mpo", 11.8, 0.9),
    Point("planned", 11.9, 0.012, error=0.004), Point("healed", 6.2, 0.11),
]  # fmt: skip
DENSE = Point("dense", 90.9, 0.0)


@pytest.fixture
def ax():
    with mpl.rc_context(plot.style()):
        yield Figure().add_subplot()


def test_lines_run_from_small_to_large_and_have_names(ax) -> None:
    assert plot.frontier(ROWS, ylabel="D", dense=DENSE, floor={"all weights zero": 1.72}, log="y", ax=ax) is ax
    by_name = {container.get_label(): container[0] for container in ax.containers}
    assert list(by_name) == ["planned and healed", "MPO, 5 sites", "int4", "low rank (SVD)", "planned", "int8"]
    assert list(by_name["low rank (SVD)"].get_xdata()) == [11.9, 23.0]
    assert list(by_name["low rank (SVD)"].get_ydata()) == [0.71, 0.245]
    said = {text.get_text() for text in ax.texts}
    assert said == {*by_name, "all weights zero", "dense, 90.9 MB"}
    assert ax.get_xlabel() == "size of the weights, MB"
    assert ax.get_ylabel() == "D (log scale)"
    left, right = ax.get_xlim()
    assert left == 0
    assert right > DENSE.size


def test_names_do_not_lie_on_one_another(ax) -> None:
    plot.frontier(ROWS, ylabel="D", dense=DENSE, floor={"all weights zero": 1.72}, log="y", ax=ax)
    ax.figure.draw_without_rendering()
    frame = ax.get_window_extent()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(not one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_the_dense_model_is_a_line_at_its_value_where_there_is_one(ax) -> None:
    scores = [Point("int8", 23.0, 86.6), Point("low-rank", 23.0, 82.0, each=(80.0, 84.0))]
    plot.frontier(scores, ylabel="Spearman", dense=Point("dense", 90.9, 86.7), zero="", ax=ax)
    levels = [list(line.get_ydata()) for line in ax.lines]
    assert [86.7, 86.7] in levels
    assert [80.0, 84.0] in levels
    low, _ = ax.get_ylim()
    assert 70 < low < 80
    assert ax.get_ylabel() == f"Spearman (axis from {low:.3g})"
    assert "axis from" in ax.get_xlabel()


def test_bits_per_weight(ax) -> None:
    plot.frontier([Point("int4", 4.1, 0.07)], ylabel="D", unit="bits per weight", ax=ax)
    assert ax.get_xlabel() == "bits per weight"
    assert ax.get_ylim()[0] == 0


def test_a_legend_instead_of_names(ax) -> None:
    plot.frontier(ROWS, ylabel="D", dense=DENSE, labels=False, ax=ax)
    assert [text.get_text() for text in ax.texts] == ["dense, 90.9 MB"]
    assert len(ax.get_legend_handles_labels()[1]) == 6


@pytest.mark.parametrize(
    ("rows", "log", "says"),
    [
        ([], "", "nothing to draw"),
        ([Point("int8", 23.0, math.nan)], "", "int8"),
        ([Point("int8", math.inf, 1.0)], "", "cannot be drawn"),
        ([Point("int8", 23.0, 0.0)], "y", "0 cannot stand on a logarithmic y axis"),
        ([Point("int8", -1.0, 1.0)], "x", "-1 cannot stand on a logarithmic x axis"),
    ],
)
def test_what_cannot_be_drawn_is_refused(ax, rows: list[Point], log: str, says: str) -> None:
    with pytest.raises(MPOError, match=says):
        plot.frontier(rows, ylabel="D", log=log, ax=ax)


def test_equal_values_are_drawn(ax) -> None:
    """Limits of no extent would raise a warning, which is an error here."""
    plot.frontier([Point("int8", 5.0, 1.0), Point("int8", 5.0, 1.0)], ylabel="D", log="xy", ax=ax)
    assert np.all(np.isfinite(ax.get_xlim()))
