"""One style for every figure: colours that the colour-blind tell apart, on light paper and on dark."""

from __future__ import annotations

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """The colours of one paper. ``colours`` are for what is compared; the rest is for what stands around it."""

    paper: str
    ink: str
    muted: str
    grid: str
    colours: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The colours for names beside lines, half way to the ink: contrast above 4.5."""
        return tuple(_between(colour, self.ink) for colour in self.colours)

    @property
    def all(self) -> tuple[str, ...]:
        """Every colour that a figure may have, in one order for all themes."""
        return (self.paper, self.ink, self.muted, self.grid, *self.colours, *self.texts)


def _between(one: str, other: str) -> str:
    halves = ((int(one[k : k + 2], 16) + int(other[k : k + 2], 16)) // 2 for k in (1, 3, 5))
    return "#" + "".join(f"{half:02x}" for half in halves)


# Found by a search for six hues far apart for every kind of colour blindness, with a contrast to the paper above 3.
LIGHT = Theme(
    "#ffffff", "#1c2330", "#566079", "#e3e7ee",
    ("#1746a2", "#a83a12", "#d64fae", "#009e6c", "#b08500", "#7f2fe6"),
)  # fmt: skip
DARK = Theme(
    "#14181f", "#e8ebf2", "#a5afc4", "#2c3442",
    ("#55a8f0", "#d0763a", "#e35fa8", "#5cf5bd", "#f0d545", "#9a6bff"),
)  # fmt: skip


def style(dark: bool = False) -> dict[Any, Any]:
    """Matplotlib's settings for the figures of this library: ``pyplot.rcParams.update(plot.style())``.

    Args:
        dark: light lines on dark paper.
    """
    from matplotlib.rcsetup import cycler

    theme = DARK if dark else LIGHT
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": theme.paper,
        "axes.grid": True,
        "axes.labelcolor": theme.ink,
        "axes.labelsize": 9.5,
        "axes.prop_cycle": cycler(color=theme.colours),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "figure.edgecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "figure.figsize": (5.2, 3.5),
        "font.family": ["sans-serif"],
        "font.sans-serif": ["DejaVu Sans"],  # comes with Matplotlib: the same figure on every machine
        "font.size": 9.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "image.cmap": "viridis",
        "legend.edgecolor": theme.grid,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "lines.linewidth": 1.7,
        "lines.markersize": 5.5,
        "savefig.facecolor": "auto",
        "svg.fonttype": "none",
        "svg.hashsalt": "mpo-tn",  # the same figure gives the same file
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "xtick.labelsize": 9,
        "ytick.color": theme.muted,
        "ytick.labelsize": 9,
    }


def theme_now() -> Theme:
    """The theme of the settings that are in force; the light one where they are not of this library."""
    from matplotlib import rcParams

    return DARK if rcParams["axes.facecolor"] == DARK.paper else LIGHT


@contextmanager
def axes_for(ax: Any) -> Generator[Any]:
    """The axes that were given, or new ones, in this style even where it was not asked for."""
    if ax is not None:
        yield ax
        return
    from matplotlib import pyplot

    with pyplot.rc_context(style(dark=theme_now() is DARK)):
        yield pyplot.subplots()[1]


def svg(figure: Any, *, title: str = "", alone: bool = False) -> str:
    """A figure as SVG that turns dark where the reader's screen is.

    Its text is text, in the reader's own font. Viewers that know no style sheets show the light colours.

    Args:
        figure: a Matplotlib figure in the light style.
        title: what it shows, for those who cannot see it.
        alone: as the content of a file, with its own style sheet; else to stand in a page that has :func:`dark_css`.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    head, body = drawn[: drawn.index("<svg")], drawn[drawn.index("<svg") :]
    body = body.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    # Names of groups: nothing refers to them, and two figures of a page would share them.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    named = f'<svg role="img" aria-label="{_attribute(title)}"' if title else '<svg role="img"'
    body = named + body.removeprefix("<svg")
    return head + body.replace("<defs>", f"<defs><style>{dark_css()}</style>", 1) if alone else body


def dark_css() -> str:
    """The rules that turn figures in the light style dark, for the style sheet of a page."""
    pairs = zip(LIGHT.all, DARK.all, strict=True)
    # By what Matplotlib writes, not by variables: a colour stays a colour where nobody reads the rules. Without "svg"
    # before it, which the copies that <use> makes of a marker are not below.
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}' for light, dark in pairs for what in _PAINTS
    )
    return f"@media screen and (prefers-color-scheme: dark){{{rules}}}"


_PAINTS = ("fill", "stroke")


def _attribute(words: str) -> str:
    return words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
