"""The pieces of a self-contained HTML page: no scripts, no links to anything outside."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def numbers(values: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, values))


def text(value: object) -> str:
    """Anything, safe to stand in a page."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the page is narrow."""
    header = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>"


def drawing(title: str, fill: Callable[[Any], Any], size: tuple[float, float] = (5.2, 3.6)) -> str:
    """A plot as SVG; ``fill`` draws on the axes it is given."""
    # The object interface: pyplot would keep figures alive and ask for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    fill(ax)
    ax.set_title(title, loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def svg(figure: Any) -> str:
    """A figure as SVG without the lines that make it a file of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def figures(drawn: Iterable[str], css: str = "plots") -> str:
    """Plots side by side where there is room."""
    return f"<div class='{css}'>{''.join(f'<figure>{part}</figure>' for part in drawn)}</div>"


def page(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return _PAGE.replace("{title}", text(title)).replace("{body}", "\n".join(body))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - mpo-tn</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 1080px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.lead { color: #55607a; } .note { color: #55607a; font-size: .88rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #1c2330; }
th, td { padding: .3rem .9rem .3rem 0; white-space: nowrap; } td { border-bottom: 1px solid #e3e7ef; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .5rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } code { background: #f1f3f8; padding: .1rem .3rem; }
</style></head><body>
{body}
</body></html>
"""
