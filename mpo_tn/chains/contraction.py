"""The TensorNetwork graph of a chain, and contraction plans. The only module that knows the two libraries."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import array_api_compat
import opt_einsum

from mpo_tn.chains.balance import balanced
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import TOP, Scaled, has_values, placed, size_of, unit
from mpo_tn.exceptions import MPOError, count_text, list_text, shape_text, whole_number
from mpo_tn.linalg import Array, binary_exponent, dtype_name, full_precision, library, namespace

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}

_MOST_ENTRIES = 2**62
"""No array is larger."""

_FEW = 16
"""So many arrays of norm near 1 may be multiplied without a look at what comes between."""

_MOST_OPERANDS_FOR_SEARCH = 100
"""The time that opt_einsum takes grows with a power of 2.6."""

_MOST_OPERANDS_FOR_DP = 12
"""Dynamic programming looks at every connected part of the network, and a vector connects all subsets of the cores."""


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

    def contract(self, operands: Sequence[Array], xp: Any = None) -> Array:
        """Carry out the plan with plain pairwise ``tensordot``; the same bits every time.

        Args:
            operands: arrays of :attr:`shapes`, in that order.
            xp: what has ``tensordot(a, b, axes=)`` and ``permute_dims(a, axes)``; found from the operands if ``None``.
                Finding it is not traceable by ``torch.compile``.
        """
        xp = namespace(operands[0]) if xp is None else xp
        precision = full_precision(xp)
        live = list(operands)
        for step in self.steps:
            second, first = live.pop(step.second), live.pop(step.first)
            live.append(xp.tensordot(first, second, axes=step.axes, **precision))
        return xp.permute_dims(live[0], self.order)

    def contract_scaled(self, operands: Sequence[Array]) -> Scaled:
        """The same with a power of two taken out after every step, so that no intermediate leaves the range."""
        xp = namespace(operands[0])
        precision = full_precision(xp)
        live = [unit(operand) for operand in operands]
        for number, step in enumerate(self.steps, start=1):
            second, first = live.pop(step.second), live.pop(step.first)
            array = xp.tensordot(first.array, second.array, axes=step.axes, **precision)
            last = number == len(self.steps)
            live.append((Scaled if last else unit)(array, first.exponent + second.exponent))
        return Scaled(xp.permute_dims(live[0].array, self.order), live[0].exponent)

    def __repr__(self) -> str:
        return f"ContractionPlan({self})"

    def __str__(self) -> str:
        return (
            f"{len(self.steps)} pairwise steps, {self.flops:.3g} flops, largest intermediate "
            f"{self.largest_intermediate} entries, peak {self.peak_bytes / 2**20:.3g} MiB"
        )


def plan_for_chain(chain: Chain, batch: int | None = None, memory_limit: int | None = None) -> ContractionPlan:
    """The plan for the dense matrix of a chain, or for its product with ``batch`` columns; cached. See `MPO.plan`."""
    for name, value in (("batch", batch), ("memory_limit", memory_limit)):
        number = whole_number(value)
        if value is not None and (number is None or number < 1):
            raise MPOError(f"{name}={value!r} must be a positive integer")
    shapes = tuple(tuple(int(size) for size in core.shape) for core in chain.cores)
    return plan_for_shapes(shapes, _BYTES[dtype_name(chain.cores[0])], batch, memory_limit)


def to_nodes(chain: Chain) -> list[Any]:
    """Fresh TensorNetwork nodes, in order, connected along the bonds. See :meth:`mpo_tn.MPO.to_nodes`."""
    # Imported here because it takes longer to load than the rest of the package together.
    import tensornetwork

    backend = {"torch": "pytorch"}.get(library(chain.cores[0]), library(chain.cores[0]))
    axes = ["left", "out", "in", "right"]
    nodes = [
        tensornetwork.Node(core, name=f"T{k}", axis_names=axes, backend=backend) for k, core in enumerate(chain.cores)
    ]
    for node, following in itertools.pairwise(nodes):
        tensornetwork.connect(node["right"], following["left"])
    return nodes


def contract_matrix(cores: Sequence[Array], plan: ContractionPlan, xp: Any = None) -> Array:
    """The dense matrix (out, in) of cores for which ``plan`` was made. See :meth:`ContractionPlan.contract`."""
    rows, columns = math.prod([core.shape[1] for core in cores]), math.prod([core.shape[2] for core in cores])
    return _contracted(cores, plan, "the matrix", (rows, columns), xp)


def contract_application(cores: Sequence[Array], x: Array, plan: ContractionPlan, xp: Any = None) -> Array:
    """The product (out, batch) of the matrix of cores and ``x`` (in, batch), for which ``plan`` was made."""
    rows = math.prod([core.shape[1] for core in cores])
    return _contracted((*cores, x), plan, "the product", (rows, x.shape[1]), xp)


def _contracted(
    arrays: Sequence[Array], plan: ContractionPlan, what: str, shape: tuple[int, int], xp: Any = None
) -> Array:
    """The arrays contracted; with a namespace that was given as plain as that, without a look at their values."""
    plain, xp = xp is not None, namespace(arrays[0]) if xp is None else xp
    operands = [xp.reshape(array, part) for array, part in zip(arrays, plan.shapes, strict=True)]
    if plain:
        return xp.reshape(plan.contract(operands, xp), shape)
    if plan.peak_bytes > _memory() and str(array_api_compat.device(arrays[0])) == "cpu":
        raise MPOError(
            f"{what} is too large for this machine: at the worst moment {plan.peak_bytes / 2**30:.3g} GiB are needed, "
            f"and there are {_memory() / 2**30:.3g}"
        )
    if _stays_in_range(operands):
        return xp.reshape(plan.contract(operands, xp), shape)
    chain = [array for array in arrays if array.ndim == 4]
    tame, exponent = balanced(chain)
    parts = map(xp.reshape, (*tame, *arrays[len(chain) :]), plan.shapes)
    found = plan.contract_scaled(list(parts))
    return xp.reshape(placed(Scaled(found.array, found.exponent + exponent), what), shape)


def _stays_in_range(operands: Sequence[Array]) -> bool:
    """Whether no product of some of them can come near the ends of the range; True where there are no values to see."""
    if not all(map(has_values, operands)):
        return True
    if len(operands) > _FEW:
        return False
    return sum(abs(binary_exponent(size_of(part))) + 1 for part in operands) <= TOP[dtype_name(operands[0])] // 3


@cache
def _memory() -> float:
    """The bytes of this machine, where it tells."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


@lru_cache(maxsize=512)
def plan_for_shapes(
    shapes: tuple[tuple[int, ...], ...], itemsize: int, batch: int | None = None, memory_limit: int | None = None
) -> ContractionPlan:
    """The plan for cores of these shapes, ``itemsize`` bytes an entry.

    ::

          out_1    out_2    out_3
            |        |        |
            T_1------T_2------T_3
            |        |        |
          in_1     in_2     in_3              without a batch the plan ends here: the dense matrix
            |        |        |
            +--------x--------+--- batch
    """
    n = len(shapes)
    rows, columns = (math.prod(shape[axis] for shape in shapes) for axis in (1, 2))
    entries = rows * columns if batch is None else max(rows, columns) * batch
    if entries > _MOST_ENTRIES:
        whole = f"the matrix of {n} sites" if batch is None else f"x, or its product with the matrix of {n} sites,"
        raise MPOError(
            f"{whole} has {count_text(entries)} entries, shape {shape_text((rows, columns))}: too large to be made; "
            "norm, inner, trace, compress and the others need no matrix"
        )
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
    if batch is None:
        return plan_network(terms, "".join(outs + ins), inner, itemsize, memory_limit=memory_limit)
    column = symbol(3 * n) if batch > 1 else ""
    x = tuple(shape[2] for shape in shapes if shape[2] > 1) + ((batch,) if batch > 1 else ())
    dense = math.prod(shape[1] * shape[2] for shape in shapes)
    return plan_network(
        [*terms, "".join(ins) + column],
        "".join(outs) + column,
        (*inner, x),
        itemsize,
        memory_limit=memory_limit,
        cap_without_last=dense,
        strict=batch == 1,
    )


def plan_network(
    terms: Sequence[str],
    output: str,
    shapes: tuple[tuple[int, ...], ...],
    itemsize: int,
    *,
    memory_limit: int | None = None,
    cap_without_last: int | None = None,
    strict: bool = True,
) -> ContractionPlan:
    """Plan a network in which every index joins two operands or appears in the output.

    Args:
        terms: the indices of every operand.
        output: the indices of the result.
        shapes: the shape of every operand.
        itemsize: bytes an entry.
        memory_limit: peak bytes allowed, operands and result included.
        cap_without_last: what is contracted without the last operand stays below so many entries ...
        strict: ... always; otherwise unless more of them save flops or memory and cost more of neither.

    Of opt_einsum's paths and two plain sweeps, that with the fewest flops among those allowed.

    Raises:
        MPOError: no path found stays within ``memory_limit``.
    """
    plain = memory_limit is None and cap_without_last is None
    optimizers: list[Any] = ["auto"] if len(terms) <= _MOST_OPERANDS_FOR_SEARCH else []
    if not plain and len(terms) <= _MOST_OPERANDS_FOR_DP:
        optimizers += [opt_einsum.DynamicProgramming(minimize=goal) for goal in ("flops", "size")]
    equation = f"{','.join(terms)}->{output}"
    paths: list[Any] = [opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=o)[0] for o in optimizers]
    if not optimizers:
        paths = _plain_paths(len(terms), last_apart=cap_without_last is not None)
    if not plain and len(terms) > 1:
        # The last operand takes in the others one by one, from the last or from the first.
        steps = range(len(terms) - 1, 0, -1)
        paths += [[(k - 1, k) for k in steps], [(0, k) for k in steps]]
    # With a limit of its own opt_einsum would join many operands at once, which tensordot cannot: hence no limit there.
    found = [_lowered(terms, output, shapes, itemsize, path) for path in paths if all(len(pair) <= 2 for pair in path)]
    allowed = [plan for plan, apart in found if cap_without_last is None or apart < cap_without_last]
    if not strict:
        peak = min(allowed, key=_cost).peak_entries
        allowed += [plan for plan, _ in found if plan.peak_entries <= peak]
    if memory_limit is not None:
        need = min(plan.peak_bytes for plan in allowed)
        if need > memory_limit:
            raise MPOError(
                f"memory_limit={memory_limit} bytes cannot be met: contracting {len(terms)} arrays of shapes "
                f"{list_text(shapes)} needs {need} bytes, operands and result included: allow more, use fewer columns "
                "at a time, or smaller bonds"
            )
        allowed = [plan for plan in allowed if plan.peak_bytes <= memory_limit]
    return min(allowed, key=_cost)


def _plain_paths(count: int, *, last_apart: bool) -> list[list[tuple[int, int]]]:
    """A chain of many operands from either end, and by halves, which is best where most sites have no legs.

    ``last_apart``: the last operand is no core, and comes last.
    """
    n = count - last_apart
    pairs: list[tuple[int, int]] = []

    def joined(low: int, high: int) -> int:
        if high - low == 1:
            return low
        middle = (low + high) // 2
        pairs.append((joined(low, middle), joined(middle, high)))
        return count + len(pairs) - 1

    joined(0, n)
    forward = [(count + k - 2 if k > 1 else 0, k) for k in range(1, n)]
    backward = [(n - 1 - k, count + k - 2 if k > 1 else n - 1) for k in range(1, n)]
    end = [(count + n - 2, n)] if last_apart else []
    found: list[list[tuple[int, int]]] = []
    for tree in (pairs, forward, backward):
        live, path = list(range(count)), list[tuple[int, int]]()
        for number, pair in enumerate([*tree, *end]):
            first, second = sorted(map(live.index, pair))
            path.append((first, second))
            del live[second], live[first]
            live.append(count + number)
        found.append(path)
    return found


def _cost(plan: ContractionPlan) -> tuple[int, int]:
    return plan.flops, plan.peak_entries


def _lowered(
    terms: Sequence[str], output: str, shapes: tuple[tuple[int, ...], ...], itemsize: int, path: Sequence[Any]
) -> tuple[ContractionPlan, int]:
    """The plan that follows a pairwise path, and its largest intermediate in which the last operand has no part."""
    sizes = dict(zip("".join(terms), itertools.chain.from_iterable(shapes), strict=True))

    def entries(term: str) -> int:
        return math.prod(sizes[index] for index in term)

    live = list(terms)
    has_last = [False] * (len(terms) - 1) + [True]
    steps: list[Step] = []
    flops, largest, apart, alive = 0, 0, 0, sum(entries(term) for term in terms)
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
        has_last.append(any([has_last.pop(second), has_last.pop(first)]))
        apart = apart if has_last[-1] else max(apart, entries(result))
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
    plan = ContractionPlan(
        equation=f"{','.join(terms)}->{output}",
        shapes=shapes,
        path=tuple(tuple(pair) for pair in path),
        steps=tuple(steps),
        order=order,
        flops=flops,
        largest_intermediate=max(largest, entries(output)),
        peak_entries=peak,
        itemsize=itemsize,
    )
    return plan, apart
