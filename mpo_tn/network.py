"""The TensorNetwork graph of a chain, and contraction plans. The only module that knows the two libraries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import opt_einsum

from mpo_tn.chain import Chain
from mpo_tn.linalg import Array, dtype_name, namespace

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}


def to_nodes(chain: Chain) -> list[Any]:
    """Fresh TensorNetwork nodes, in order, connected along the bonds. See :meth:`mpo_tn.MPO.to_nodes`."""
    # Imported here because it takes longer to load than the rest of the package together.
    import tensornetwork

    backend = "numpy" if namespace(chain.cores[0]).__name__.endswith("numpy") else "pytorch"
    axes = ["left", "out", "in", "right"]
    nodes = [
        tensornetwork.Node(core, name=f"T{k}", axis_names=axes, backend=backend) for k, core in enumerate(chain.cores)
    ]
    for node, following in itertools.pairwise(nodes):
        tensornetwork.connect(node["right"], following["left"])
    return nodes


@dataclass(frozen=True)
class Step:
    """One pairwise contraction: operands at two positions of the list, the axes that meet; the result goes last."""

    first: int
    second: int
    axes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ContractionPlan:
    """The order in which a network is contracted, and what that costs.

    Attributes:
        equation: the contraction in einsum notation.
        shapes: the shapes of the operands it was planned for.
        path: opt_einsum's pairwise path.
        flops: multiplications and additions together.
        largest_intermediate: entries of the largest intermediate or result.
        peak_entries: entries alive at the worst moment, operands and result included.
        itemsize: bytes an entry.
    """

    equation: str
    shapes: tuple[tuple[int, ...], ...]
    path: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    order: tuple[int, ...]
    flops: int
    largest_intermediate: int
    peak_entries: int
    itemsize: int

    @property
    def peak_bytes(self) -> int:
        """Bytes alive at the worst moment, operands and result included."""
        return self.peak_entries * self.itemsize

    def contract(self, operands: Sequence[Array]) -> Array:
        """Carry out the plan with plain pairwise ``tensordot``; the same bits every time."""
        xp = namespace(operands[0])
        live = list(operands)
        for step in self.steps:
            second, first = live.pop(step.second), live.pop(step.first)
            live.append(xp.tensordot(first, second, axes=step.axes))
        return xp.permute_dims(live[0], self.order)

    def __str__(self) -> str:
        return (
            f"{len(self.steps)} pairwise steps, {self.flops:.3g} flops, largest intermediate "
            f"{self.largest_intermediate} entries, peak {self.peak_bytes / 2**20:.3g} MiB"
        )


def matrix_plan(chain: Chain) -> ContractionPlan:
    """The plan that contracts a chain to its dense matrix, cached."""
    return plan_for_shapes(tuple(tuple(core.shape) for core in chain.cores), _BYTES[dtype_name(chain.cores[0])])


def contract_matrix(cores: Sequence[Array], plan: ContractionPlan) -> Array:
    """The dense matrix (out, in) of cores for which ``plan`` was made."""
    xp = namespace(cores[0])
    operands = [xp.reshape(core, shape) for core, shape in zip(cores, plan.shapes, strict=True)]
    rows, columns = (math.prod(core.shape[axis] for core in cores) for axis in (1, 2))
    return xp.reshape(plan.contract(operands), (rows, columns))


@lru_cache(maxsize=512)
def plan_for_shapes(shapes: tuple[tuple[int, ...], ...], itemsize: int) -> ContractionPlan:
    """The plan that contracts cores of these shapes, ``itemsize`` bytes an entry, to their dense matrix."""
    n = len(shapes)
    symbol = opt_einsum.get_symbol
    # Outer bonds and legs of size 1 carry nothing: without them, long chains stay below the 64 axes of NumPy.
    outs = [symbol(k) if shape[1] > 1 else "" for k, shape in enumerate(shapes)]
    ins = [symbol(n + k) if shape[2] > 1 else "" for k, shape in enumerate(shapes)]
    bonds = ["", *(symbol(2 * n + k) for k in range(n - 1)), ""]
    terms = [f"{bonds[k]}{outs[k]}{ins[k]}{bonds[k + 1]}" for k in range(n)]
    inner = tuple(
        tuple(size for size, index in zip(shape, (bonds[k], outs[k], ins[k], bonds[k + 1]), strict=True) if index)
        for k, shape in enumerate(shapes)
    )
    return plan_network(terms, "".join(outs + ins), inner, itemsize)


def plan_network(
    terms: Sequence[str], output: str, shapes: tuple[tuple[int, ...], ...], itemsize: int
) -> ContractionPlan:
    """Plan a network in which every index joins two operands or appears in the output."""
    equation = f"{','.join(terms)}->{output}"
    sizes = dict(zip("".join(terms), itertools.chain.from_iterable(shapes), strict=True))
    path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="auto")

    def entries(term: str) -> int:
        return math.prod(sizes[index] for index in term)

    live = list(terms)
    steps: list[Step] = []
    flops, largest, alive = 0, 0, sum(entries(term) for term in terms)
    peak = alive
    given = len(terms)
    for pair in path:
        if len(pair) == 1:  # a single operand: nothing to contract
            continue
        first, second = sorted(pair)
        b, a = live.pop(second), live.pop(first)
        shared = [index for index in a if index in b]
        steps.append(Step(first, second, (tuple(a.index(i) for i in shared), tuple(b.index(i) for i in shared))))
        result = "".join(index for index in a + b if index not in shared)
        flops += (2 if shared else 1) * entries(result) * math.prod(sizes[index] for index in shared)
        largest = max(largest, entries(result))
        peak = max(peak, alive + entries(result))
        # Operands belong to the caller and stay alive; intermediates are freed once used.
        operands_left = sum(1 for position in (first, second) if position < given)
        freed = [term for position, term in ((first, a), (second, b)) if position >= given]
        given -= operands_left
        alive += entries(result) - sum(entries(term) for term in freed)
        live.append(result)
    order = tuple(live[0].index(index) for index in output)
    # The final transposition copies the result once.
    peak = max(peak, alive + entries(output))
    return ContractionPlan(
        equation=equation,
        shapes=shapes,
        path=tuple(tuple(pair) for pair in path),
        steps=tuple(steps),
        order=order,
        flops=flops,
        largest_intermediate=max(largest, entries(output)),
        peak_entries=peak,
        itemsize=itemsize,
    )
