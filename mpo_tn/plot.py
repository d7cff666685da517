"""Pictures of spectra and of error against size. Every function draws into Matplotlib axes and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpo_tn.linalg import tails


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
