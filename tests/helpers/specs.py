"""Structures of layers, without torch."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from mpo_tn import Sites
from mpo_tn.planning.spec import ModuleSpec


@st.composite
def specs(draw: st.DrawFn, *, longest: int = 5, largest: int = 4) -> ModuleSpec:
    """A linear layer of up to five sites, with legs of 1, any bonds, and rows and columns cropped."""
    n = draw(st.integers(1, longest))
    legs = st.lists(st.integers(1, largest), min_size=n, max_size=n)
    sites = Sites(tuple(draw(legs)), tuple(draw(legs)))
    bonds = tuple(draw(st.integers(1, full + 1)) for full in sites.full_bonds)
    rows, columns = sites.shape
    return ModuleSpec(
        "linear", sites, bonds, draw(st.integers(1, rows)), draw(st.integers(1, columns)), bias=draw(st.booleans())
    )


def spec_of(
    out: tuple[int, ...], in_: tuple[int, ...], cap: int, size: tuple[int, int] | None = None, **options: Any
) -> ModuleSpec:
    sites = Sites(out, in_)
    return ModuleSpec(
        options.pop("kind", "linear"), sites, sites.capped_bonds(cap), *(size or sites.shape),
        **{"bias": options.get("kind") != "embedding", **options},
    )  # fmt: skip


# 6 x 12 and 48 x 36, both cropped; the first prefers the matrix, the second at one token the chain.
SMALL = spec_of((2, 3), (3, 4), 2, (5, 11))
LARGER = spec_of((3, 4, 4), (4, 3, 3), 3, (47, 35))
