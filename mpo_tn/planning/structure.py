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
    out: int, in_: int, sites: int | str | Sites, keep: float | None, bond: int | tuple[int, ...] | None
) -> tuple[Sites, tuple[int, ...]]:
    legs = legs_for(out, in_, sites)
    if keep is not None:
        return legs, legs.capped_bonds(legs.largest_cap(keep * out * in_))
    caps = Truncation(max_bond=bond).caps(len(legs) - 1)
    return legs, tuple(full if cap is None else min(cap, full) for cap, full in zip(caps, legs.full_bonds, strict=True))


def structure(kind: str, out: int, in_: int, config: MPOConfig) -> ModuleSpec:
    """What a matrix (out, in) becomes under a configuration: its legs, and its bonds at most.

    Args:
        kind: ``"linear"``, ``"conv1d"`` or ``"embedding"``.
        out: rows.
        in_: columns.
        config: of this module, see :meth:`~mpo_tn.planning.config.MPOConfig.for_module`. A tolerance leaves the bonds
            full: how far they are cut depends on the numbers.

    Raises:
        MPOError: legs that do not fit, a ratio that cannot be reached, bonds that are not one per bond.

    >>> spec = structure("linear", 768, 3072, MPOConfig(keep=0.1))
    >>> spec.bonds, round(spec.kept, 3)
    ((12, 77, 77, 16), 0.099)
    """
    legs, bonds = _legs_and_bonds(out, in_, config.sites, config.keep, config.bond)
    spec = ModuleSpec(kind, legs, bonds, out, in_)
    return spec if config.bits is None else replace(spec, bits=config.core_bits(spec), group=config.group)
