"""PEFT's grammar of names by example: names, and which of them a pattern means."""

from __future__ import annotations

NAMES = ("attention", "attention.query", "attention.myquery", "attention.key", "query", "table", "norm")
GRAMMAR: tuple[tuple[str | list[str], list[str]], ...] = (
    (["query"], ["attention.query", "query"]),
    (["attention.query"], ["attention.query"]),
    (["attention.key", "table"], ["attention.key", "table"]),
    (r"query", ["query"]),
    (r".*query", ["attention.query", "attention.myquery", "query"]),
    (r"re:.*key", ["attention.key"]),
    (["re:.*key", "table"], ["attention.key", "table"]),
    (r"attention\.(query|key)", ["attention.query", "attention.key"]),
)
