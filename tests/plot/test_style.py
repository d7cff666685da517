"""The style of all figures: seen by everybody, and the same on dark paper."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from mpo_tn import plot

# Machado, Oliveira and Fernandes 2009, severity 1, in linear sRGB.
EYES = {
    "most": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    part = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    x = TO_XYZ @ light / (0.9505, 1.0, 1.089)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [plot.LIGHT, plot.DARK], ids=["light", "dark"])
def test_colours_are_read_and_told_apart_by_everybody(theme: plot.Theme) -> None:
    assert contrast(theme.ink, theme.paper) > 7
    assert contrast(theme.muted, theme.paper) > 4.5
    assert all(contrast(colour, theme.paper) > 3 for colour in theme.colours)
    assert all(contrast(colour, theme.paper) > 4.5 for colour in theme.texts)
    assert len(set(theme.all)) == len(theme.all)
    for eyes in EYES.values():
        seen = [lab(np.clip(eyes @ linear(colour), 0, 1)) for colour in theme.colours]
        # A difference of 2 can just be seen (CIE 1976).
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


def drawn(alone: bool) -> str:
    with mpl.rc_context(plot.style()):
        figure = Figure()
        rows = [plot.Point("int8", 23.0, 0.01), plot.Point("low-rank", 23.0, 0.2), plot.Point("low-rank", 12.0, 0.7)]
        plot.frontier(rows, ylabel="D", floor={"nothing": 1.7}, ax=figure.add_subplot())
        return plot.svg(figure, title="a <b>", alone=alone)


def test_every_colour_of_a_figure_has_a_dark_one() -> None:
    found = set(re.findall(r"(?:fill|stroke): (#\w+)", drawn(alone=False)))
    assert {plot.LIGHT.paper, plot.LIGHT.ink, plot.LIGHT.grid, plot.LIGHT.colours[0]} <= found
    # The copies of a marker that <use> makes are below no svg, so that no rule may ask for one.
    assert "svg" not in plot.dark_css()
    for colour in found:
        assert f'fill: {colour}"]{{fill:#' in plot.dark_css()


def test_a_figure_is_text_and_the_same_every_time() -> None:
    inside, alone = drawn(alone=False), drawn(alone=True)
    assert inside.startswith('<svg role="img" aria-label="a &lt;b>"')
    assert ">low rank (SVD)</text>" in inside
    assert inside == drawn(alone=False)
    assert plot.dark_css() not in inside
    root = ElementTree.fromstring(alone)
    assert plot.dark_css() in "".join(root.itertext())
    assert "DejaVu Sans" in inside
    assert "system-ui" in inside


def test_new_axes_are_in_the_style_and_leave_the_settings_alone() -> None:
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    ax = plot.spectra({"a": np.ones(3)})
    assert ax.lines[0].get_color() == plot.LIGHT.colours[0]
    assert mpl.colors.to_hex(ax.get_facecolor()) == plot.LIGHT.paper
    pyplot.close(ax.figure)
    assert dict(mpl.rcParams) == before
    with mpl.rc_context(plot.style(dark=True)):
        ax = plot.spectra({"a": np.ones(3)})
    assert ax.lines[0].get_color() == plot.DARK.colours[0]
    pyplot.close(ax.figure)


def test_names_are_understood_and_looks_differ() -> None:
    names = [found.name for found in plot.LOOKS.values()]
    assert len(set(names)) == len(names)
    assert not any("_" in name for name in names)
    assert all(0 <= found.colour < len(plot.LIGHT.colours) == len(plot.DARK.colours) for found in plot.LOOKS.values())
    compared = [plot.LOOKS[name] for name in ("int8", "int4", "low-rank", "mpo", "planned", "healed")]
    assert len({(found.colour, found.marker, found.open) for found in compared}) == len(compared)
