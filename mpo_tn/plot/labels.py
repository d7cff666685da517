"""Names beside what they name, where they hide the least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Label:
    """A text, and the points in data coordinates that it may stand beside, the best one first.

    ``own`` says which of the lines it names, by its place among them.
    """

    text: str
    at: Sequence[tuple[float, float]]
    colour: str
    own: int


def line_ends(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Where the name of a line may stand: its last point, its first, any other."""
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]
    return list(dict.fromkeys([points[-1], points[0], *points[1:-1]])) if points else []


def reference_spots(across: tuple[float, float], value: float, *, log: bool = False) -> list[tuple[float, float]]:
    """Where the name of a horizontal line may stand: at its right end, at its left, or between."""
    left, right = np.log(across) if log else across
    places = [left + share * (right - left) for share in (1.0, 0.0, 0.5, 0.75, 0.25)]
    return [(float(np.exp(place) if log else place), value) for place in places]


# Offsets in points, and the sides of the text that are there.
_SIDES = (
    (7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top"),
    (6, 5, "left", "bottom"), (6, -5, "left", "top"), (-6, 5, "right", "bottom"), (-6, -5, "right", "top"),
    (0, 18, "center", "bottom"), (0, -18, "center", "top"), (9, 15, "left", "bottom"), (9, -15, "left", "top"),
    (0, 32, "center", "bottom"), (16, 0, "left", "center"), (12, 28, "left", "bottom"),
)  # fmt: skip


# Pixels: a name that is nearer to another line may be taken for its name.
_APART = 16.0


def place_labels(ax: Any, labels: Iterable[Label], lines: Iterable[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Write the labels, one after the other, each where little is below it, and no line nearer than its own.

    Args:
        ax: axes whose limits are final.
        labels: what to write.
        lines: what is drawn, as ``(x, y)`` in data coordinates; a point is a line of one.
    """
    # Where things are on the paper is known once the layout is.
    ax.figure.canvas.figure.draw_without_rendering()
    spots = [_spots(ax, *line) for line in lines]
    busy, owner = np.concatenate(spots), np.repeat(np.arange(len(spots)), [len(part) for part in spots])
    frame = ax.get_window_extent()
    taken: list[Any] = []
    for label in (label for label in labels if label.at):
        text = ax.annotate(label.text, (0, 0), (0, 0), textcoords="offset points", color=label.colour, zorder=5)
        text.set_fontsize(9)
        text.set_in_layout(False)
        own, foreign = busy[owner == label.own], busy[owner != label.own]
        best: tuple[float, Any, Any] | None = None
        for far, at in enumerate(label.at):
            for odd, side in enumerate(_SIDES):
                _move(text, at, side)
                box = text.get_window_extent()
                cost = _cost(box, own, foreign, taken, frame) + 0.15 * odd + 0.4 * far
                if best is None or cost < best[0]:
                    best = cost, at, side
        assert best is not None
        _move(text, *best[1:])
        taken.append(text.get_window_extent())


def _move(text: Any, at: tuple[float, float], side: tuple[int, int, str, str]) -> None:
    text.xy = at
    text.set_position(side[:2])
    text.set_horizontalalignment(side[2])
    text.set_verticalalignment(side[3])


def _spots(ax: Any, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Points close together along a line, in pixels; those at its corners count more."""
    corners = ax.transData.transform(np.column_stack([x, y]))
    along = [np.linspace(a, b, max(2, int(np.linalg.norm(b - a) / 4))) for a, b in pairwise(corners)]
    return np.concatenate([*along, np.repeat(corners, 4, axis=0)])


def _cost(box: Any, own: np.ndarray, foreign: np.ndarray, taken: Sequence[Any], frame: Any) -> float:
    to_own, to_others = _distances(box, own), _distances(box, foreign)
    below = int((to_own < 1.5).sum() + (to_others < 1.5).sum())
    nearest, other = float(to_own.min(initial=np.inf)), float(to_others.min(initial=np.inf))
    mistaken = 0.4 * max(0.0, _APART - other) + max(0.0, nearest + 3 - other)
    hidden = sum(
        max(0.0, min(box.x1, there.x1) + 3 - max(box.x0, there.x0))
        * max(0.0, min(box.y1, there.y1) + 1 - max(box.y0, there.y0))
        for there in taken
    )
    outside = max(0.0, frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
    return below + mistaken + 3 * hidden + 20 * outside


def _distances(box: Any, spots: np.ndarray) -> np.ndarray:
    """From the edge of a box to points, 0 for those inside."""
    return np.hypot(*np.maximum(np.maximum((box.x0, box.y0) - spots, spots - (box.x1, box.y1)), 0.0).T)
