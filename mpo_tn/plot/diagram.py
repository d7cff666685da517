"""The picture of a chain: its cores, the bonds between them, the legs above and below, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.plot.style import axes_for, theme_now
from mpo_tn.sites import Sites

_MOST = 16
"""The most sites that are drawn one by one; of a longer chain the ends are."""


def diagram(sites: Sites, bonds: Sequence[int], interval: tuple[int, int], ax: Any = None) -> Any:
    """Cores as circles whose area grows with their parameters, bonds as lines whose width grows with their size.

    ::

          2     3     2        out legs
          |     |     |
          >--4--o--4--<        arrows: isometries, pointing at the canonical interval
          |     |     |
          2     2     5        in legs

    Args:
        sites: the legs.
        bonds: the inner bonds.
        interval: the canonical interval; sites before it are left-isometric, those after it right-isometric.
        ax: where to; new axes without.

    Raises:
        MPOError: not one bond between every two sites.

    >>> import matplotlib; matplotlib.use("agg")
    >>> ax = diagram(Sites((2, 3, 2), (2, 2, 5)), (4, 4), (1, 1))
    >>> [text.get_text() for text in ax.texts][:4]
    ['2', '2', '4', '3']
    """
    n = len(sites)
    if len(bonds) != n - 1:
        raise MPOError(f"{len(bonds)} bonds for {n} sites: expected {n - 1}")
    shown = list(range(n)) if n <= _MOST else [*range(_MOST - 5), *range(n - 4, n)]
    places = {k: place + (place >= _MOST - 5 and n > _MOST) for place, k in enumerate(shown)}
    around = [1, *bonds, 1]
    sizes = [around[k] * out * in_ * around[k + 1] for k, (out, in_) in enumerate(sites)]
    widest, largest = max(bonds, default=1), max(sizes)
    with axes_for(ax) as ax:
        theme = theme_now()
        small = 7 if len(shown) > 8 else 9
        for k in shown:
            x, (out, in_) = places[k], list(sites)[k]
            for size, end, side in ((out, 0.62, "bottom"), (in_, -0.62, "top")):
                ax.plot([x, x], [0, end], color=theme.muted, lw=1.2, zorder=1, ls="-" if size > 1 else ":")
                ax.annotate(str(size), (x, end), ha="center", va=side, fontsize=small, color=theme.muted)
            if k < n - 1 and k + 1 in places:
                # A line twice as wide stands for a bond eight times as large: both ends of the scale stay visible.
                width = 1.0 + 5.0 * math.log2(1 + bonds[k]) / math.log2(1 + widest)
                ax.plot([x, x + 1], [0, 0], color=theme.colours[0], lw=width, zorder=2, solid_capstyle="butt")
                ax.annotate(
                    str(bonds[k]), (x + 0.5, 0.1), ha="center", va="bottom", fontsize=small, color=theme.texts[0]
                )
            low, high = interval
            marker = ">" if k < low else "<" if k > high else "o"
            area = 60 + 340 * math.sqrt(sizes[k] / largest)
            ax.scatter([x], [0], s=area, marker=marker, color=theme.colours[1], edgecolors=theme.paper, zorder=3)
        if n > _MOST:
            ax.annotate(
                f"{n - len(shown)}\nmore", (_MOST - 5, 0), ha="center", va="center", color=theme.muted, fontsize=small
            )
        ax.set(xlim=(-0.6, max(places.values()) + 0.6), ylim=(-1, 1), xticks=[], yticks=[])
        ax.set_title(f"{n} sites, {sum(sizes):,} parameters; out legs above, in legs below")
        ax.set_frame_on(False)
        ax.grid(visible=False)
    return ax
