"""What a contraction plan costs, found in another way; small plans of models."""

import math

from mpo_tn import Sites
from mpo_tn.chains.contraction import ContractionPlan
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.spec import ModuleSpec


def simulate(plan: ContractionPlan) -> tuple[int, int, int]:
    """(flops, largest intermediate, peak entries), by walking the path with sets of indices and a heap of arrays."""
    inputs, output = plan.equation.split("->")
    terms = inputs.split(",")
    size = {}
    for term, shape in zip(terms, plan.shapes, strict=True):
        size.update(zip(term, shape, strict=True))

    def volume(indices):
        return math.prod(size[index] for index in indices)

    operands = sum(volume(term) for term in terms)
    live = [(frozenset(term), False) for term in terms]
    flops, sizes, heap = 0, [volume(output)], 0
    peaks = [operands]
    for pair in (pair for pair in plan.path if len(pair) == 2):
        chosen = [live[position] for position in pair]
        live = [operand for position, operand in enumerate(live) if position not in pair]
        (a, _), (b, _) = chosen
        multiplications = volume(a | b)
        flops += multiplications * (2 if a & b else 1)
        result = a ^ b
        sizes.append(volume(result))
        heap += volume(result)
        peaks.append(operands + heap)
        heap -= sum(volume(indices) for indices, is_intermediate in chosen if is_intermediate)
        live.append((result, True))
    peaks.append(operands + heap + volume(output))
    return flops, max(sizes), max(peaks)


def unit_of(name: str, bond: int) -> UnitPlan:
    """An 8 x 8 matrix on three sites."""
    return UnitPlan((name,), ModuleSpec("linear", Sites((2, 2, 2), (2, 2, 2)), (min(bond, 4),) * 2, 8, 8), "float32")
