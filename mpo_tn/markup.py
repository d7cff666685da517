"""Tables for notebooks: short whatever they are about, and plain enough for every theme."""

from __future__ import annotations

import html
from collections.abc import Sequence

_HEAD, _TAIL = 12, 4
"""The rows at the beginning and at the end of a long table that are shown."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> str:
    """A table as HTML, of a long one the first rows and the last, with lines of text below it.

    >>> table("squares", ["n", "n * n"], [(n, n * n) for n in range(100)]).count("<tr>")
    18
    """
    lines = [_row("th", head)]
    hidden = len(rows) - _HEAD - _TAIL
    if hidden <= 1:
        lines += [_row("td", row) for row in rows]
    else:
        lines += [_row("td", row) for row in rows[:_HEAD]]
        lines.append(f"<tr><td colspan='{len(head)}' style='text-align:center'>&#8230; {hidden} more &#8230;</td></tr>")
        lines += [_row("td", row) for row in rows[len(rows) - _TAIL :]]
    below = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    body = f"<table>{''.join(lines)}</table>" if rows else ""
    return f"<div><strong>{html.escape(caption)}</strong>{body}{below}</div>"


def _row(tag: str, cells: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
