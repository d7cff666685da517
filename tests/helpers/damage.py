"""JSON with one thing wrong in it."""

from __future__ import annotations

import json
from typing import Any

MISSING = object()


def changed(values: Any, path: tuple[Any, ...], to: Any) -> Any:
    """The same JSON with another value at a place, or with nothing there."""
    copy = json.loads(json.dumps(values))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if to is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return copy
