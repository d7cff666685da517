"""What a matrix becomes: its legs and bonds under a configuration. The one answer to that question."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.legs import legs_for
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.truncation import Truncation


@lru_cache(maxsize=4096)
def _legs_and_bonds(
    out: int, in_: int, sites: int | str | Sites, keep: float | None, bond: int | tuple[int, ...] | None, blocks: int
) -> tuple[Sites, tuple[int, ...]]:
    legs = (
        legs_for(out, in_, sites) if blocks == 1 or not isinstance(sites, int) else _in_blocks(out, in_, sites, blocks)
    )
    if keep is not None:
        return legs, legs.capped_bonds(legs.largest_cap(keep * out * in_))
    caps = Truncation(max_bond=bond).caps(len(legs) - 1)
    return legs, tuple(full if cap is None else min(cap, full) for cap, full in zip(caps, legs.full_bonds, strict=True))


def _in_blocks(out: int, in_: int, n: int, blocks: int) -> Sites:
    """Legs of which the first one of the rows counts the blocks, so that one block is there without the others."""
    inner = legs_for(out // blocks, in_, n)
    if inner.shape[0] != out // blocks:  # between blocks there is no room for padding
        inner = Sites(Sites.balanced(out // blocks, 1, n).out, inner.in_)
    return Sites((blocks * inner.out[0], *inner.out[1:]), inner.in_)


def structure(kind: str, out: int, in_: int, config: MPOConfig, blocks: int = 1) -> ModuleSpec:
    """What a matrix (out, in) becomes under a configuration: its legs, and its bonds at most.

    Args:
        kind: ``"linear"``, ``"conv1d"``, ``"embedding"`` or ``"parameter"``.
        out: rows.
        in_: columns.
        config: of this module, see :meth:`~mpo_tn.planning.config.MPOConfig.for_module`. A tolerance leaves the bonds
            full: how far they are cut depends on the numbers.
        blocks: how many matrices are one above the other, as the experts of a layer are. Where legs are found and not
            given, the first leg of the rows then counts them, and all share what is to the right of it.

    Raises:
        MPOError: legs that do not fit, a ratio that cannot be reached, bonds that are not one per bond.

    >>> spec = structure("linear", 768, 3072, MPOConfig(keep=0.1))
    >>> spec.bonds, round(spec.kept, 3)
    ((12, 77, 77, 16), 0.099)
    >>> structure("parameter", 60 * 48, 32, MPOConfig(sites=3), blocks=60).sites.out
    (180, 4, 4)
    """
    legs, bonds = _legs_and_bonds(out, in_, config.sites, config.keep, config.bond, blocks)
    spec = ModuleSpec(kind, legs, bonds, out, in_)
    return spec if config.bits is None else replace(spec, bits=config.core_bits(spec), group=config.group)
