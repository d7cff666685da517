"""The pieces of a self-contained HTML page: no scripts, no links to anything outside; for phones and the dark, too."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mpo_tn import plot


def numbers(values: Iterable[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, values))


def text(value: object) -> str:
    """Anything, safe to stand in a page."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the page is narrow; columns of numbers stand at the right."""
    return grouped_table(head, [("", list(rows))])


def grouped_table(head: Sequence[str], groups: Iterable[tuple[str, Sequence[Sequence[object]]]]) -> str:
    """A table whose rows stand below headings of their own, ``(heading, rows)``; one without a heading has none."""
    groups = list(groups)
    cells = [[str(cell) for cell in row] for _, rows in groups for row in rows]
    sides = [_is_numeric(row[k] for row in cells) for k in range(len(head))]
    css = [" class='n'" if numeric else "" for numeric in sides]

    def line(tag: str, row: Sequence[object]) -> str:
        inner = "".join(f"<{tag}{side}>{text(cell)}</{tag}>" for side, cell in zip(css, row, strict=True))
        return f"<tr>{inner}</tr>"

    bodies: list[str] = []
    for heading, rows in groups:
        above = f"<tr class='g'><th colspan='{len(head)}' scope='rowgroup'>{text(heading)}</th></tr>" if heading else ""
        bodies.append(f"<tbody>{above}{''.join(line('td', row) for row in rows)}</tbody>")
    header = f"<thead>{line('th', head)}</thead>" if any(head) else ""
    kind = "" if any(head) else " class='pairs'"
    # A box that scrolls has to be reachable without a mouse.
    return f"<div class='scroll' tabindex='0'><table{kind}>{header}{''.join(bodies)}</table></div>"


def folded(summary: str, *parts: str) -> str:
    """What most readers do not need: a line that opens."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def drawing(title: str, fill: Callable[[Any], Any], size: tuple[float, float] = (4.7, 3.3)) -> str:
    """A plot as SVG; ``fill`` draws on the axes it is given, which have their title by then."""

    def filled(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.set_title(title)
        fill(ax)

    return picture(title, filled, size)


def picture(title: str, fill: Callable[[Any], Any], size: tuple[float, float]) -> str:
    """A figure as SVG; ``fill`` makes the axes of the figure that it is given."""
    # The object interface: pyplot would keep figures alive and ask for a display.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot.style()):
        figure = Figure(figsize=size)
        fill(figure)
        return plot.svg(figure, title=title)


def figures(drawn: Iterable[str], css: str = "plots") -> str:
    """Plots side by side where there is room."""
    return f"<div class='{css}'>{''.join(f'<figure>{part}</figure>' for part in drawn)}</div>"


def page(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    light, dark = (_PALETTE.format(**vars(theme)) for theme in (plot.LIGHT, plot.DARK))
    sheet = f":root{{color-scheme:light dark;{light}}}@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    filled = _PAGE.replace("{title}", text(title)).replace("{sheet}", f"{sheet}\n{plot.dark_css()}")
    return filled.replace("{body}", "\n".join(body))


_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%| ± [\d.]+)?|inf|nan|undefined|-|")


def _is_numeric(cells: Iterable[str]) -> bool:
    cells = list(cells)
    return any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)


_PALETTE = "--paper:{paper};--ink:{ink};--muted:{muted};--line:{grid};"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - mpo-tn</title>
<style>
{sheet}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1000px;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
p, ul { max-width: 44rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
.headline { font-size: 1.15rem; line-height: 1.45; margin: .6rem 0 1.2rem; }
.lead, .note { color: var(--muted); } .note { font-size: .88rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem;
  font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--muted); font-weight: 600; vertical-align: bottom;
  white-space: normal; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
.pairs td + td { white-space: normal; min-width: 9rem; }
.g th { color: var(--muted); font-weight: 600; padding-top: .9rem; }
.n { text-align: right; }
details { margin: 1rem 0; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; }
.plots { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 33rem; } svg { display: block; width: 100%; height: auto; }
code { background: var(--line); padding: .1rem .3rem; border-radius: 3px; }
</style></head><body>
{body}
</body></html>
"""
