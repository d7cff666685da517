"""What things that are compared are called and look like, in every table and figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """A name that a stranger understands, which of the colours of the theme, a marker; ``open`` for a variant of it."""

    name: str
    colour: int
    marker: str = "o"
    open: bool = False


LOOKS: dict[str, Look] = {
    "dense": Look("dense", 5, "*"),
    "int8": Look("int8", 0),
    "int4": Look("int4", 0, open=True),
    "int2": Look("int2", 0, "v"),
    "rounding": Look("integers, rounded", 0),
    "gptq": Look("integers, error feedback", 5, "v"),
    "low-rank": Look("low rank (SVD)", 1, "s"),
    "whitened": Look("low rank, calibrated", 1, "s", open=True),
    "low-rank-bits": Look("low rank in 2 to 4 bits, calibrated", 4, "P"),
    "mpo": Look("MPO, 5 sites", 2, "D"),
    "planned": Look("planned", 3, "^", open=True),
    "refined": Look("planned, blocks refined", 3, "P"),
    "integers": Look("integers, fitted", 0, "v"),
    "healed": Look("planned and healed", 3, "^"),
    # Ways to tune.
    "full": Look("dense, all trained", 5, "*"),
    "lfa": Look("MPO, auxiliary trained", 2, "D", open=True),
    "lfa-cores": Look("MPO, all trained", 2, "D"),
    "lora": Look("LoRA", 4, "P"),
    "last-layers": Look("dense, last layers trained", 0, "v"),
    "squeeze": Look("squeezed, auxiliary trained", 3, "^", open=True),
    "squeeze-cores": Look("squeezed, all trained", 3, "^"),
    "one-shot": Look("cut at once, auxiliary trained", 2, "D", open=True),
}
"""Every look by the short name that options, files and code use."""

_BY_NAME = {found.name: found for found in LOOKS.values()}


def look(name: str) -> Look:
    """The look of a short name or of a shown one; a name that is new is shown as it is.

    >>> look("low-rank") == look("low rank (SVD)")
    True
    """
    return LOOKS.get(name) or _BY_NAME.get(name) or Look(name, 0)


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of every name; names that are new get one colour and marker after the other.

    >>> [found.colour for found in looks(["int8", "mine", "yours"]).values()]
    [0, 0, 1]
    """
    found: dict[str, Look] = {}
    new = 0
    for name in names:
        if name in found:
            continue
        found[name] = look(name)
        if name not in LOOKS and name not in _BY_NAME:
            found[name] = Look(name, new % 6, "osD^vP"[new % 6])
            new += 1
    return found
