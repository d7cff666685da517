"""What is lost, or scored, against the size of the model: the picture that compression is about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.plot.labels import Label, line_ends, place_labels, reference_spots
from mpo_tn.plot.looks import Look, look, looks
from mpo_tn.plot.pictures import marked_axes
from mpo_tn.plot.style import axes_for, theme_now


@dataclass(frozen=True)
class Point:
    """One model. Points of one name are one line.

    Attributes:
        name: short or shown, see :data:`~mpo_tn.plot.LOOKS`.
        size: in the unit of the axis.
        value: what is compared.
        error: the standard error of ``value``, drawn as a bar.
        each: what ``value`` is the mean of, such as one score a seed, drawn as dashes.
    """

    name: str
    size: float
    value: float
    error: float | None = None
    each: tuple[float, ...] = ()


def frontier(
    rows: Iterable[Point],
    *,
    ylabel: str,
    unit: str = "MB",
    dense: Point | None = None,
    floor: Mapping[str, float] | None = None,
    log: str = "",
    zero: str = "xy",
    labels: bool = True,
    ax: Any = None,
) -> Any:
    """Value against size, one line a name, with the names beside the lines; returns the axes.

    Args:
        rows: what is compared, in any order.
        ylabel: what ``value`` is, and which way is better.
        unit: of ``size``, which grows to the right: ``"MB"`` of the weights, or ``"bits per weight"``.
        dense: the model before anything was done to it: a line at its value, or at its size where its value is zero
            on a logarithmic axis.
        floor: lines at values that say nothing: ``{"a constant answer": 68.4}`` or ``{"all weights zero": 1.72}``.
        log: ``"x"``, ``"y"`` or ``"xy"``: the logarithmic axes; their labels say so.
        zero: the axes that begin at zero. The label of one that does not says where it begins.
        labels: write the names of the rows beside their lines. Without, they are left to a legend.
        ax: where to; new axes without.

    Raises:
        MPOError: nothing to draw, a value that is no number, or one that is not positive on a logarithmic axis.

    >>> import matplotlib; matplotlib.use("agg")
    >>> rows = [Point("int8", 23.0, 0.0003), Point("int4", 11.9, 0.08), Point("low-rank", 12.0, 0.4)]
    >>> ax = frontier(rows, ylabel="D", dense=Point("dense", 90.9, 0.0), floor={"all weights zero": 1.72}, log="y")
    >>> ax.get_ylabel()
    'D (log scale)'
    """
    rows, floor = list(rows), dict(floor or {})
    _check(rows, dense, floor, log)
    series: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row.size):
        series.setdefault(look(row.name).name, []).append(row)
    with axes_for(ax) as ax:
        _scales(ax, log)
        drawn, named = [], []
        for name, shape in looks(series).items():
            points = series[name]
            _draw(ax, shape, points)
            drawn.append(([p.size for p in points], [p.value for p in points]))
            if labels:
                named.append(Label(name, line_ends(*drawn[-1]), theme_now().texts[shape.colour], len(drawn) - 1))
        _limits(ax, rows, dense, floor, log, zero)
        ax.set(xlabel="size of the weights, MB" if unit == "MB" else unit, ylabel=ylabel)
        marked_axes(ax)
        for text, (x, y) in _references(ax, dense, unit, floor, log).items():
            drawn.append((x, y))
            spots = reference_spots(x, y[0], log="x" in log) if y[0] == y[1] else [(x[1], y[1]), (x[0], y[0])]
            named.append(Label(text, spots, theme_now().muted, len(drawn) - 1))
        place_labels(ax, named, drawn)
    return ax


def _check(rows: list[Point], dense: Point | None, floor: dict[str, float], log: str) -> None:
    if not rows:
        raise MPOError("there is nothing to draw: give at least one Point")
    for point in [*rows, *([dense] if dense else [])]:
        if not (math.isfinite(point.size) and math.isfinite(point.value)):
            raise MPOError(f"{point} cannot be drawn: leave it out, or say beside the figure what it is")
    low_x, low_y = min(point.size for point in rows), min([*(point.value for point in rows), *floor.values()])
    for axis, low in (("x", low_x), ("y", low_y)):
        if axis in log and low <= 0:
            raise MPOError(f"{low:g} cannot stand on a logarithmic {axis} axis: leave it out, or {axis!r} out of log=")


def _scales(ax: Any, log: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in log:
        getattr(ax, f"set_{axis}scale")("log")
        ticks = getattr(ax, f"{axis}axis")
        ticks.set_major_locator(LogLocator(subs=(1.0, 3.0) if axis == "y" else (1.0, 2.0, 5.0)))
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter(NullFormatter())


def _draw(ax: Any, shape: Look, points: list[Point]) -> None:
    theme = theme_now()
    colour = theme.colours[shape.colour]
    ax.errorbar(
        [p.size for p in points], [p.value for p in points], [p.error or 0.0 for p in points],
        label=shape.name, color=colour, marker=shape.marker, ls="--" if shape.open else "-", zorder=3,
        mfc=theme.paper if shape.open else colour, mec=colour, mew=1.3, elinewidth=1.1, capsize=0, clip_on=False,
    )  # fmt: skip
    for p in points:
        ax.plot([p.size] * len(p.each), p.each, "_", color=colour, ms=9, alpha=0.6, zorder=2)


def _limits(ax: Any, rows: list[Point], dense: Point | None, floor: dict[str, float], log: str, zero: str) -> None:
    """Room for every point and label; from zero where that was asked for."""
    sizes = [point.size for point in [*rows, *([dense] if dense else [])]]
    ends = [end for p in rows for end in (p.value - (p.error or 0.0), p.value + (p.error or 0.0), *p.each)]
    values = [*ends, *floor.values(), *([dense.value] if dense else [])]
    for axis, found in (("x", sizes), ("y", values)):
        low, high = min(found), max(found)
        if axis in log:
            low = min(value for value in found if value > 0)
            limits = low / (high / low) ** 0.08 / 1.05, high * (high / low) ** 0.08 * 1.05
        else:
            begin = 0.0 if axis in zero and low >= 0 else low - 0.08 * ((high - low) or 1.0)
            limits = begin, high + 0.08 * ((high - begin) or 1.0)
        getattr(ax, f"set_{axis}lim")(*limits)


Span = tuple[tuple[float, float], tuple[float, float]]


def _references(ax: Any, dense: Point | None, unit: str, floor: dict[str, float], log: str) -> dict[str, Span]:
    """Draw the lines that other points are read against; their names, and where they run."""
    theme, lines = theme_now(), {}
    across, up = ax.get_xlim(), ax.get_ylim()
    for name, value in floor.items():
        ax.axhline(value, color=theme.muted, lw=1.2, ls=":", zorder=1)
        lines[name] = across, (value, value)
    if dense is not None:
        text = f"{look(dense.name).name}, {dense.size:.3g} {unit}"
        if "y" in log and dense.value <= 0:
            ax.axvline(dense.size, color=theme.muted, lw=1.2, zorder=1)
            lines[text] = (dense.size, dense.size), up
        else:
            ax.axhline(dense.value, color=theme.muted, lw=1.2, zorder=1)
            ax.plot([dense.size], [dense.value], marker="*", ms=10, color=theme.muted, ls="", zorder=3, clip_on=False)
            lines[text] = across, (dense.value, dense.value)
    return lines
