"""What one matrix costs to compress: seconds, memory, bytes; to order work by, and to say before it is begun."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpo_tn.planning.entries import ACTIVATION, UnitPlan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.truncate.leading import singular_work
from mpo_tn.truncate.quantize import SWEEPS


@dataclass(frozen=True)
class Effort:
    """The cost of one unit in one thread.

    Attributes:
        seconds: on a machine such as the law was measured on; of others the proportions hold.
        memory: the most that is held at a time, bytes.
        bytes_read: of the dense weight, and of the moments it is fitted by.
        bytes_written: of its cores.
    """

    seconds: float
    memory: int
    bytes_read: int
    bytes_written: int


def effort_of(planned: UnitPlan, itemsize: int) -> Effort:
    """What a unit costs, its weight being read in numbers of ``itemsize`` bytes. Cost: none, it looks at sizes.

    Seconds are amounts of work, see :func:`work_of`, at the rates of :data:`RATES`; memory is the matrix as stored
    and what :func:`held_of` counts, in the bytes of :data:`BYTES`. Both were fitted to measurements by
    ``benchmarks/scale.py``.
    """
    spec = planned.spec
    entries = spec.out_features * spec.in_features
    seconds = sum(RATES[name] * amount for name, amount in work_of(planned).items())
    memory = entries * itemsize + sum(BYTES[name] * amount for name, amount in held_of(planned).items())
    moments = 8 * spec.in_features**2 if planned.metric == ACTIVATION else 0
    return Effort(seconds, int(memory), entries * itemsize + moments, planned.bytes)


RATES: Mapping[str, float] = {
    "unit": 0.00659, "entry": 5.36e-08, "product": 6.98e-12, "cube": 1.86e-10, "rounded": 1.24e-07,
    "double": 2.82e-11, "feedback": 2.49e-11, "column": 7.75e-05, "sweep": 3.73e-09,
}  # fmt: skip
"""Seconds for each amount of work."""

BYTES: Mapping[str, float] = {
    "unit": 2.4e+06, "cut": 18, "cut square": 11.8, "rounded": 19.5, "fitted": 48.7, "fitted moment": 30,
    "swept": 147, "swept moment": 23.6, "coded": 55.6, "coded moment": 50.1,
}  # fmt: skip
"""Bytes for each number that is held."""


def work_of(planned: UnitPlan) -> dict[str, float]:
    """How much there is to do, by kind of work.

    - ``unit``: one; ``entry``: numbers of the matrix, read, cast and summed.
    - ``product``: flops of products of what is left of the matrix with bases, ``2 rows columns side`` a bond; ``cube``:
      eigen-decompositions, ``side**3``. ``side`` is the smaller side of an unfolding, of what is left of the matrix
      once outer bonds are cut. Where the first eigenvectors are found without the others, the products and the smaller
      eigenproblems of that, :func:`mpo_tn.truncate.leading.singular_work`.
    - ``rounded``: numbers that are rounded to the nearest integer at the best scale.
    - in the metric of a layer, ``double``: flops of products with moments in double precision, beside which their
      Cholesky decomposition is little; ``sweep``: ``2 out in**2`` for chains that are fitted by sweeps; ``feedback``:
      flops of rounding with error feedback, and ``column`` the columns that are taken one after another for it.
    """
    spec = planned.spec
    rows, columns = spec.sites.shape
    entries = float(spec.out_features * spec.in_features)
    coded = [
        (left * out, in_ * right)
        for (left, out, in_, right), bits in zip(spec.core_shapes, spec.core_bits, strict=True)
        if bits not in (None, 16)
    ]
    work: dict[str, float] = {"unit": 1.0, "entry": entries}
    if len(spec.sites) > 1:
        # What auto may do, see mpo_tn.truncate.basis.factor.
        capped = planned.metric != ACTIVATION and planned.tolerance is None and planned.itemsize <= 4
        work["product"], work["cube"] = _flops(spec, capped)
    if planned.metric != ACTIVATION:
        work["rounded"] = float(sum(map(math.prod, coded)))
        return work
    with_moment = 2 * entries * columns
    work["double"] = 2 * with_moment
    work["feedback"] = sum(2 * (1 + SWEEPS) * m * n**2 + n**3 / 3 for m, n in coded)
    work["column"] = float(sum((1 + SWEEPS) * n for _, n in coded))
    if spec.sites.is_low_rank:
        bond, side = spec.bonds[0], min(rows, columns)
        work["product"] = 0.0
        work["double"] += with_moment + 2 * entries * side + 6 * entries * bond
    elif len(spec.sites) > 1:
        work["sweep"] = with_moment
    return work


def held_of(planned: UnitPlan) -> dict[str, float]:
    """How many numbers are held beside the matrix as it is stored, by what is done to it.

    - ``unit``: one. ``cut``: of a matrix whose singular vectors are sought, and ``cut square`` of the Gram matrix of
      its widest side.
    - ``rounded``: of one that is rounded to the nearest integers.
    - in the metric of a layer, ``fitted``, ``swept`` and ``coded``: of a matrix that becomes low rank, a chain, or
      integers, and ``moment`` after that: ``in**2``, of what it is given.
    """
    spec = planned.spec
    entries = float(spec.out_features * spec.in_features)
    if planned.metric == ACTIVATION:
        how = "fitted" if spec.sites.is_low_rank else "coded" if len(spec.sites) == 1 else "swept"
        return {"unit": 1.0, how: entries, f"{how} moment": float(spec.in_features) ** 2}
    if len(spec.sites) == 1:
        return {"unit": 1.0, "rounded": entries}
    return {"unit": 1.0, "cut": entries, "cut square": float(_widest(spec)) ** 2}


def _flops(spec: ModuleSpec, capped: bool) -> tuple[float, float]:
    """Flops of products and sides cubed, over all bonds; ``capped`` says that the first singular vectors may do."""
    products = cubes = 0.0
    for rest, side, bond in _bonds(spec):
        more, cubed = singular_work(side, bond) if capped else (0.0, float(side) ** 3)
        products += 2 * rest * side + 2 * rest * bond + more
        cubes += cubed
    return products, cubes


def _widest(spec: ModuleSpec) -> int:
    """The widest side that is decomposed."""
    return max((side for _, side, _ in _bonds(spec)), default=1)


def _bonds(spec: ModuleSpec) -> list[tuple[float, int, int]]:
    """For every bond, both ends peeled inward, the numbers that are left, the side that is decomposed, and the bond."""
    rows, columns = spec.sites.shape
    sites, bonds = list(spec.sites), spec.bonds
    left, right, rest = 1, 1, float(rows * columns)
    low, high = 0, len(sites) - 1
    found: list[tuple[float, int, int]] = []
    while low < high:
        outer, inner = left * math.prod(sites[low]), right * math.prod(sites[high])
        if outer <= inner:
            side, bond = outer, bonds[low]
            low, left = low + 1, bond
        else:
            side, bond = inner, bonds[high - 1]
            high, right = high - 1, bond
        other = rest / side
        found.append((rest, int(min(side, other)), bond))
        rest = other * bond
    return found
