"""JSON with one thing wrong in it, and folders as a kill leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpo_tn.storage import places

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


def put_aside(folder: Path) -> None:
    """As a process leaves a folder that is killed between the two renames of a replacement, where it takes two."""
    folder.rename(places._old_beside(folder))
