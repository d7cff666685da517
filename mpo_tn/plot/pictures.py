"""Pictures of spectra, and of errors and scores as lines. Functions draw into Matplotlib axes and return them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_tn.linalg import tails
from mpo_tn.plot.labels import Label, line_ends, place_labels, reference_spots
from mpo_tn.plot.looks import Look, looks
from mpo_tn.plot.style import axes_for, theme_now
from mpo_tn.truncate.spectra import entropy
from mpo_tn.truncation import Report


def spectra(values: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Singular values over the largest one against their position over the number of values, one line an entry.

    A line that stays high is a flat spectrum: it cannot be truncated cheaply.
    """
    with axes_for(ax) as ax:
        for label, line in values.items():
            largest = line.max(initial=0.0) or 1.0
            ax.plot(np.arange(1, len(line) + 1) / len(line), line / largest, label=label)
        ax.set(xlabel="position / number of values", ylabel="singular value / largest", xlim=(0, 1), ylim=(0, 1.02))
        ax.legend()
    return ax


def discarded(values: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Relative error of keeping a share of the singular values of one bond, one line an entry."""
    with axes_for(ax) as ax:
        for label, line in values.items():
            tail = tails(line)
            ax.plot(np.arange(len(tail)) / len(line), tail / (tail[0] or 1.0), label=label)
        ax.set(xlabel="share of the values kept", ylabel="relative error", xlim=(0, 1), ylim=(0, 1.02))
        # The curves fill the diagonal whatever they are, so the legend goes below.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def entropies(values: Mapping[str, Sequence[np.ndarray]], ax: Any = None) -> Any:
    """The entropy of every bond over its greatest possible value, one line per entry of ``label -> spectra``.

    A bond of a single value has nothing to share out and counts as 0.
    """
    with axes_for(ax) as ax:
        for label, spectra_of_bonds in values.items():
            shares = [entropy(s) / math.log(len(s)) if len(s) > 1 else 0.0 for s in spectra_of_bonds]
            ax.plot(range(len(shares)), shares, marker="o", label=label)
        ax.set(xlabel="bond", ylabel="entropy / greatest possible", ylim=(0, 1.05))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return ax


def error_curve(points: Mapping[str, Sequence[tuple[float, Report]]], ax: Any = None) -> Any:
    """Relative error against the kept ratio, one line per entry of ``label -> (kept ratio, report) pairs``.

    The band around a line is what its reports certify: the best MPO with the same bonds lies above its lower edge, and
    the upper edge was known before anything was cut (give ``spectra=True`` for both to be sharp). Reports without
    bounds have no band.
    """
    with axes_for(ax) as ax:
        shapes = looks(points)
        for label, pairs in points.items():
            kept = [share for share, _ in pairs]
            line = _line(ax, kept, [report.rel_error for _, report in pairs], shapes[label])
            certified = [(s, r) for s, r in pairs if r.norm > 0 and r.lower_bound is not None]
            lower, upper = ([getattr(r, end) / r.norm for _, r in certified] for end in ("lower_bound", "bound"))
            ax.fill_between([s for s, _ in certified], lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set(xlabel="kept ratio", ylabel="relative error", ylim=(0, None))
        ax.legend()
    return ax


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    references: Mapping[str, float] | None = None,
    ylim: tuple[float | None, float | None] = (None, None),
    ax: Any = None,
) -> Any:
    """One marked line per entry of ``label -> (x, y)``, with its name beside it; a single line needs none.

    Args:
        lines: a label that is in :data:`~mpo_tn.plot.LOOKS`, short or shown, has the look and the name from there.
        xlabel: below the horizontal axis.
        ylabel: beside the vertical one; where it begins is added if that is not zero.
        references: values that the lines are read against, drawn dotted.
        ylim: the ends of the vertical axis; None where the data says.
        ax: where to; new axes without.
    """
    references = dict(references or {})
    with axes_for(ax) as ax:
        theme, shapes = theme_now(), looks(lines)
        for label, (x, y) in lines.items():
            _line(ax, x, y, shapes[label])
        for value in references.values():
            ax.axhline(value, color=theme.muted, lw=1.2, ls=":", zorder=1)
        ax.set(xlabel=xlabel, ylabel=ylabel, ylim=ylim)
        marked_axes(ax, "y")
        across = ax.get_xlim()
        drawn: list[tuple[Sequence[float], Sequence[float]]] = []
        labels: list[Label] = []
        for label, (x, y) in lines.items():
            if len(x):
                drawn.append((x, y))
                labels.append(
                    Label(shapes[label].name, line_ends(x, y), theme.texts[shapes[label].colour], len(labels))
                )
        if len(lines) == 1:
            labels = []
        for text, value in references.items():
            drawn.append((across, (value, value)))
            labels.append(Label(text, reference_spots(across, value), theme.muted, len(drawn) - 1))
        place_labels(ax, labels, drawn)
    return ax


def marked_axes(ax: Any, which: str = "xy") -> Any:
    """Say in the labels of the axes which are logarithmic, and where one begins that does not begin at zero."""
    for axis in (getattr(ax, f"{letter}axis") for letter in which):
        low = min(axis.get_view_interval())
        said = "log scale" if axis.get_scale() == "log" else f"axis from {low:.3g}" if low > 0 else ""
        if said and said not in axis.get_label_text():
            axis.set_label_text(f"{axis.get_label_text()} ({said})")
    return ax


def _line(ax: Any, x: Sequence[float], y: Sequence[float], shape: Look) -> Any:
    theme = theme_now()
    colour = theme.colours[shape.colour]
    face, dashes = (theme.paper, "--") if shape.open else (colour, "-")
    return ax.plot(x, y, marker=shape.marker, color=colour, mfc=face, ls=dashes, label=shape.name)[0]
