"""Pictures of spectra and of error against size. Every function draws into Matplotlib axes and returns them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_tn.linalg import tails
from mpo_tn.truncate.spectra import entropy
from mpo_tn.truncation import Report


def spectra(values: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Singular values over the largest one against their position over the number of values, one line an entry.

    A line that stays high is a flat spectrum: it cannot be truncated cheaply.
    """
    ax = _axes(ax)
    for label, line in values.items():
        largest = line.max(initial=0.0) or 1.0
        ax.plot(np.arange(1, len(line) + 1) / len(line), line / largest, label=label)
    ax.set(xlabel="position / number of values", ylabel="singular value / largest", xlim=(0, 1), ylim=(0, 1.02))
    ax.legend(frameon=False)
    return ax


def discarded(values: Mapping[str, np.ndarray], ax: Any = None) -> Any:
    """Relative error of keeping a share of the singular values of one bond, one line an entry."""
    ax = _axes(ax)
    for label, line in values.items():
        tail = tails(line)
        ax.plot(np.arange(len(tail)) / len(line), tail / (tail[0] or 1.0), label=label)
    ax.set(xlabel="share of the values kept", ylabel="relative error", xlim=(0, 1), ylim=(0, 1.02))
    # The curves fill the diagonal whatever they are, so the legend goes below.
    ax.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def entropies(values: Mapping[str, Sequence[np.ndarray]], ax: Any = None) -> Any:
    """The entropy of every bond over its greatest possible value, one line per entry of ``label -> spectra``.

    A bond of a single value has nothing to share out and counts as 0.
    """
    ax = _axes(ax)
    for label, spectra_of_bonds in values.items():
        shares = [entropy(s) / math.log(len(s)) if len(s) > 1 else 0.0 for s in spectra_of_bonds]
        ax.plot(range(len(shares)), shares, marker="o", label=label)
    ax.set(xlabel="bond", ylabel="entropy / greatest possible", ylim=(0, 1.05))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    return ax


def error_curve(points: Mapping[str, Sequence[tuple[float, Report]]], ax: Any = None) -> Any:
    """Relative error against the kept ratio, one line per entry of ``label -> (kept ratio, report) pairs``.

    The band around a line is what its reports certify: the best MPO with the same bonds lies above its lower edge, and
    the upper edge was known before anything was cut (give ``spectra=True`` for both to be sharp). Reports without
    bounds have no band.
    """
    ax = _axes(ax)
    for label, pairs in points.items():
        kept = [share for share, _ in pairs]
        (line,) = ax.plot(kept, [report.rel_error for _, report in pairs], marker="o", label=label)
        certified = [(s, r) for s, r in pairs if r.norm > 0 and r.lower_bound is not None]
        lower, upper = ([getattr(r, end) / r.norm for _, r in certified] for end in ("lower_bound", "bound"))
        ax.fill_between([s for s, _ in certified], lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="kept ratio", ylabel="relative error", ylim=(0, None))
    ax.legend(frameon=False)
    return ax


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str, ax: Any = None
) -> Any:
    """One marked line per entry of ``label -> (x, y)``, for a measure against the kept ratio."""
    ax = _axes(ax)
    for label, (x, y) in lines.items():
        ax.plot(x, y, marker="o", label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
