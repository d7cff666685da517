"""What one matrix costs to compress: seconds, memory, bytes; to order work by, and to say before it is begun."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_tn.planning.entries import ACTIVATION, UnitPlan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.truncate.leading import singular_work


@dataclass(frozen=True)
class Effort:
    """The cost of one unit in one thread.

    Attributes:
        seconds: on a machine such as the law was measured on; of others the proportions hold.
        memory: the most that is held at a time, bytes.
        bytes_read: of the dense weight.
        bytes_written: of its cores.
    """

    seconds: float
    memory: int
    bytes_read: int
    bytes_written: int


def effort_of(planned: UnitPlan, itemsize: int) -> Effort:
    """What a unit costs, its weight being read in numbers of ``itemsize`` bytes. Cost: none, it looks at sizes.

    Two laws: products of the matrix with bases, ``2 rows columns side`` flops a bond, and eigen-decompositions of
    ``side`` squared Gram matrices, ``side`` cubed. ``side`` is the smaller side of an unfolding, of what is left of the
    matrix once outer bonds are cut. Where a bond is found without all eigenvectors of its Gram matrix, as
    :func:`mpo_tn.truncate.basis.factor` decides, the products and the smaller eigenproblems of that are counted.
    """
    spec = planned.spec
    entries = spec.out_features * spec.in_features
    capped = planned.metric != ACTIVATION and planned.tolerance is None and planned.itemsize <= 4
    products, cubes, widest = _flops(spec, capped)
    if planned.metric == ACTIVATION:  # the metric is factorised as well, and sweeps follow
        products, cubes = 3 * products + 2 * entries * spec.in_features, 2 * cubes + spec.in_features**3
        widest = max(widest, spec.in_features)
    seconds = _EACH + entries * _ENTRY + products * _PRODUCT + cubes * _CUBE
    seconds += sum(entries for bits in spec.core_bits if bits not in (None, 16)) * _ROUNDED
    # The matrix as stored, once wider, a Gram matrix with its eigenvectors and the room LAPACK works in.
    memory = entries * (itemsize + 8) + 8 * 4 * widest**2
    return Effort(seconds, memory, entries * itemsize, planned.bytes)


_EACH, _ENTRY, _PRODUCT, _CUBE, _ROUNDED = 5e-3, 2e-8, 2e-11, 4e-10, 1e-7


def _flops(spec: ModuleSpec, capped: bool) -> tuple[float, float, int]:
    """Flops of products, sides cubed, and the widest side, over all bonds, both ends peeled inward.

    ``capped``: the first singular vectors alone may be sought.
    """
    rows, columns = spec.sites.shape
    left, right = 1, 1
    rest = float(rows * columns)
    products, cubes, widest = 0.0, 0.0, 1
    low, high = 0, len(spec.sites) - 1
    sites, bonds = list(spec.sites), spec.bonds
    while low < high:
        outer, inner = left * sites[low][0] * sites[low][1], right * sites[high][0] * sites[high][1]
        if outer <= inner:
            side, bond = outer, bonds[low]
            low, left = low + 1, bond
        else:
            side, bond = inner, bonds[high - 1]
            high, right = high - 1, bond
        other = rest / side
        side = int(min(side, other))
        more, cubed = singular_work(side, bond) if capped else (0.0, float(side) ** 3)
        products += 2 * rest * side + 2 * rest * bond + more
        cubes += cubed
        widest = max(widest, side)
        rest = other * bond
    return products, cubes, widest
