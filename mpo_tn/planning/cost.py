"""What the forward modes of an MPO linear layer cost, and which one a layer in mode ``"auto"`` takes.

The formula: an operation takes ``flops / flop rate + bytes / bandwidth + a fixed time``, a route takes the sum over its
operations. Flops count multiplications and additions; bytes count every operand and result of every operation once.
Both are affine in the number of tokens, so the choice is a list of token counts at which it changes. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mpo_tn.exceptions import MPOError

MODES = ("auto", "chain", "rebuild", "cached")

Shape = tuple[int, int, int, int]
Tree = Any
"""A core's position, or a pair of trees: in which order neighbours are merged."""

_SEARCHED_TOKENS = tuple(4**k for k in range(9))


@dataclass(frozen=True)
class Machine:
    """The constants of the cost formula.

    Attributes:
        flop_rate: flops a second of a large matrix product.
        bandwidth: bytes a second that operands and results come and go.
        seconds_per_op: the fixed time of one tensor operation.
    """

    flop_rate: float
    bandwidth: float
    seconds_per_op: float


# One core of an AMD EPYC (Zen 5) under torch 2.13. A matrix product of 2048 x 768 x 3072 in float32 runs at 1.0e11
# flops a second, a copy that misses the caches at 1e10 bytes read and as many written, an operation on 4 x 4 takes
# 3 us. With two threads rate and bandwidth double together, which moves no choice between large products.
_CPU = {
    2: Machine(1e11, 2e10, 4e-6),
    4: Machine(1e11, 2e10, 4e-6),
    8: Machine(5e10, 2e10, 4e-6),
}
# An H100: data sheet rates of dense products (bfloat16, float32, float64) at 60 %, bandwidth at 75 %, launches of 6 us.
_ACCELERATOR = {
    2: Machine(6e14, 2.5e12, 6e-6),
    4: Machine(4e13, 2.5e12, 6e-6),
    8: Machine(4e13, 2.5e12, 6e-6),
}


def machine(device_type: str = "cpu", itemsize: int = 4) -> Machine:
    """The constants for ``"cpu"`` or any accelerator, and numbers of so many bytes."""
    return (_CPU if device_type == "cpu" else _ACCELERATOR)[min(max(itemsize, 2), 8)]


@dataclass(frozen=True)
class Cost:
    """Flops, numbers moved (operands and results) and operations: a fixed part and a part per token.

    >>> cost = Cost(flops=10, flops_per_token=2, moved=5, moved_per_token=3, ops=1)
    >>> cost.total_flops(100), cost.total_bytes(100, itemsize=4)
    (210, 1220)
    """

    flops: int = 0
    flops_per_token: int = 0
    moved: int = 0
    moved_per_token: int = 0
    ops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.flops_per_token + other.flops_per_token,
            self.moved + other.moved,
            self.moved_per_token + other.moved_per_token,
            self.ops + other.ops,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(
            times * self.flops,
            times * self.flops_per_token,
            times * self.moved,
            times * self.moved_per_token,
            times * self.ops,
        )

    def total_flops(self, tokens: int) -> int:
        """Flops for so many tokens."""
        return self.flops + tokens * self.flops_per_token

    def total_bytes(self, tokens: int, itemsize: int = 4) -> int:
        """Bytes moved for so many tokens."""
        return itemsize * (self.moved + tokens * self.moved_per_token)

    def seconds(self, tokens: int, device_type: str = "cpu", itemsize: int = 4) -> float:
        """The time that the formula predicts."""
        on = machine(device_type, itemsize)
        return (
            self.total_flops(tokens) / on.flop_rate
            + self.total_bytes(tokens, itemsize) / on.bandwidth
            + self.ops * on.seconds_per_op
        )


@dataclass(frozen=True)
class Route:
    """One way to compute ``y = x W^T``.

    Attributes:
        mode: ``"chain"``, ``"rebuild"`` or ``"cached"`` (which stands for the dense layer too).
        segments: the trees of cores that are merged first; a chain applies them to ``x`` one after another, rebuild has
            a single one, the matrix.
        from_last: whether a chain starts with its last segment.
        forward: the cost of the forward pass.
        training: the cost of forward and backward with gradients for ``x`` and all cores, recomputation included.
        state_per_token: the most numbers a token has at any time between ``x`` and ``y``.
    """

    mode: str
    segments: tuple[Tree, ...]
    from_last: bool
    forward: Cost
    training: Cost
    state_per_token: int = 0


@dataclass(frozen=True)
class Choices:
    """Which route is cheapest from how many tokens on; ``starts[0]`` is 0."""

    starts: tuple[int, ...]
    routes: tuple[Route, ...]

    def at(self, tokens: int) -> Route:
        """The route for so many tokens."""
        best = self.routes[0]
        for start, route in zip(self.starts, self.routes, strict=True):
            if tokens >= start:
                best = route
        return best


@lru_cache(maxsize=1024)
def dense_route(out_features: int, in_features: int) -> Route:
    """A plain linear layer, or one in mode ``"cached"`` whose matrix is there."""
    product = _product(0, out_features, in_features, tokens=1)
    return Route("cached", (), False, product, product * 3)


@lru_cache(maxsize=1024)
def rebuild_route(shapes: tuple[Shape, ...], out_features: int, in_features: int) -> Route:
    """Merge all cores to the matrix, then one matrix product; the backward pass merges them again.

    >>> route = rebuild_route(((1, 4, 4, 8), (8, 4, 4, 1)), 16, 16)
    >>> route.segments, route.forward.flops, route.forward.flops_per_token
    (((0, 1),), 4096, 512)
    """
    tree, merging = _merged(shapes)[0, len(shapes) - 1]
    product = _product(0, out_features, in_features, tokens=1)
    # Backward: merge again, then one product of the size of each merge for either of its operands.
    return Route("rebuild", (tree,), False, merging + product, merging * 4 + product * 3)


@lru_cache(maxsize=1024)
def chain_routes(shapes: tuple[Shape, ...]) -> tuple[Route, ...]:
    """The sweeps over the cores, from either end, that are cheapest for some number of tokens.

    Neighbours may be merged before they meet ``x``: small outer cores cost less together.
    """
    found = {
        (route.segments, route.from_last): route
        for tokens in _SEARCHED_TOKENS
        for route in (_best_sweep(shapes, tokens, from_last=True), _best_sweep(shapes, tokens, from_last=False))
    }
    return tuple(found.values())


@lru_cache(maxsize=4096)
def choices(
    shapes: tuple[Shape, ...],
    out_features: int,
    in_features: int,
    mode: str = "auto",
    *,
    training: bool = False,
    device_type: str = "cpu",
    itemsize: int = 4,
) -> Choices:
    """What a layer of these cores takes in a mode, by number of tokens.

    Args:
        shapes: of the cores.
        out_features: the rows of the matrix after cropping.
        in_features: its columns.
        mode: ``"auto"`` compares chain and rebuild; ``"chain"`` and ``"rebuild"`` take the cheapest of their kind.
        training: count the backward pass, with everything that it recomputes.
        device_type: ``"cpu"`` or any other.
        itemsize: bytes a number.

    In mode ``"auto"`` a chain counts only where what it holds between ``x`` and ``y`` is no more than ``x`` and ``y``
    themselves, or the matrix.

    Raises:
        MPOError: an unknown mode.

    >>> low_rank = ((1, 768, 1, 16), (16, 1, 768, 1))
    >>> choices(low_rank, 768, 768).at(4096).mode
    'chain'
    """
    checked_mode(mode)
    if mode == "cached":
        return Choices((0,), (dense_route(out_features, in_features),))
    rebuild = rebuild_route(shapes, out_features, in_features)
    if mode == "rebuild":
        return Choices((0,), (rebuild,))
    candidates = [
        (route, _most_tokens(route, out_features, in_features) if mode == "auto" else math.inf)
        for route in chain_routes(shapes)
    ]
    if mode == "auto":
        candidates.append((rebuild, math.inf))
    # Every route is a straight line over the tokens: between two crossings the order does not change.
    lines: list[tuple[Route, float, float, float]] = []
    for route, limit in candidates:
        cost = route.training if training else route.forward
        fixed = cost.seconds(0, device_type, itemsize)
        lines.append((route, limit, fixed, cost.seconds(1, device_type, itemsize) - fixed))
    crossings = {0, 1, *(int(limit) + 1 for limit in (line[1] for line in lines) if limit < math.inf)}
    for _, _, fixed, slope in lines:
        for _, _, other_fixed, other_slope in lines:
            if slope > other_slope and other_fixed >= fixed:
                crossing = int((other_fixed - fixed) / (slope - other_slope))
                crossings.update((crossing, crossing + 1))
    starts: list[int] = []
    routes: list[Route] = []
    for tokens in sorted(crossings):
        best = min((line for line in lines if tokens <= line[1]), key=lambda line: line[2] + tokens * line[3])[0]
        if not routes or best is not routes[-1]:
            starts.append(tokens)
            routes.append(best)
    return Choices(tuple(starts), tuple(routes))


@dataclass(frozen=True)
class Prediction:
    """What a layer in mode ``"auto"`` takes for a number of tokens, and its flops over those of the dense layer."""

    tokens: int
    mode: str
    relative_flops: float


def predictions(
    shapes: tuple[Shape, ...], out_features: int, in_features: int, tokens: Sequence[int] = (1, 128, 2048)
) -> tuple[Prediction, ...]:
    """What a linear layer of these cores takes in a forward pass on the CPU in float32.

    >>> [(p.mode, round(p.relative_flops, 2)) for p in predictions(((1, 768, 1, 16), (16, 1, 768, 1)), 768, 768)]
    [('chain', 0.04), ('chain', 0.04), ('chain', 0.04)]
    """
    dense = dense_route(out_features, in_features).forward
    table = choices(shapes, out_features, in_features)
    return tuple(
        Prediction(count, route.mode, route.forward.total_flops(count) / dense.total_flops(count))
        for count, route in ((count, table.at(count)) for count in tokens)
    )


def checked_mode(mode: str) -> str:
    """The mode itself.

    Raises:
        MPOError: there is no such mode.
    """
    if mode not in MODES:
        raise MPOError(f"mode={mode!r} is unknown: use one of {', '.join(MODES)}")
    return mode


def _most_tokens(route: Route, out_features: int, in_features: int) -> float:
    """For how many tokens a chain holds no more than ``x`` and ``y`` or the matrix."""
    if route.state_per_token <= out_features + in_features:
        return math.inf
    return out_features * in_features // route.state_per_token


def _product(rows: int, inner: int, columns: int, *, tokens: int = 0) -> Cost:
    """A matrix product (rows, inner) x (inner, columns), ``tokens`` of the rows being counted per token."""
    return Cost(
        2 * rows * inner * columns,
        2 * tokens * inner * columns,
        rows * (inner + columns) + inner * columns,
        tokens * (inner + columns),
        1,
    )


@lru_cache(maxsize=1024)
def _merged(shapes: tuple[Shape, ...]) -> dict[tuple[int, int], tuple[Tree, Cost]]:
    """For every run of neighbours (first, last) the order of merging with the fewest flops."""
    best: dict[tuple[int, int], tuple[Tree, Cost]] = {(k, k): (k, Cost()) for k in range(len(shapes))}
    for length in range(1, len(shapes)):
        for first in range(len(shapes) - length):
            last = first + length
            options: list[tuple[int, int, Tree, Cost]] = []
            for cut in range(first, last):
                (left_tree, left), (right_tree, right) = best[first, cut], best[cut + 1, last]
                merge = _merge(shapes, first, cut, last)
                cost = left + right + merge
                options.append((cost.flops, merge.flops, (left_tree, right_tree), cost))
            # Of equals the one with the cheaper last merge, whose gradients no frozen core spares.
            _, _, tree, cost = min(options, key=lambda option: option[:2])
            best[first, last] = (tree, cost)
    return best


def _merge(shapes: Sequence[Shape], first: int, cut: int, last: int) -> Cost:
    rows = shapes[first][0] * _legs(shapes, first, cut)
    columns = shapes[last][3] * _legs(shapes, cut + 1, last)
    # Reading and writing the result once more puts its axes in order.
    return _product(rows, shapes[cut][3], columns) + Cost(moved=2 * rows * columns, ops=1)


def _best_sweep(shapes: tuple[Shape, ...], tokens: int, *, from_last: bool) -> Route:
    """The cheapest split into segments for so many tokens: a shortest path over the positions of the cuts."""
    n = len(shapes)
    merged = _merged(shapes)
    found: dict[int, tuple[float, tuple[Tree, ...], Cost, Cost, int]] = {0: (0.0, (), Cost(), Cost(), 0)}
    for end in range(1, n + 1):
        options: list[tuple[float, tuple[Tree, ...], Cost, Cost, int]] = []
        for start in range(1 if end == n > 1 else 0, end):  # all in one segment is the matrix, and no chain
            first, last = (n - end, n - 1 - start) if from_last else (start, end - 1)
            seconds, segments, forward, training, state = found[start]
            tree, merging = merged[first, last]
            step, held = _step(shapes, first, last, from_last=from_last)
            options.append(
                (
                    seconds + (merging + step).seconds(tokens),
                    (*segments, tree),
                    forward + merging + step,
                    # Backward: the same again, then one product of the same size for either operand.
                    training + (merging + step) * 4,
                    max(state, held),
                )
            )
        found[end] = min(options, key=lambda option: option[0])
    _, segments, forward, training, state = found[n]
    return Route("chain", segments, from_last, forward, training, state)


def _step(shapes: Sequence[Shape], first: int, last: int, *, from_last: bool) -> tuple[Cost, int]:
    """Applying the merged cores ``first`` to ``last`` to one token, and how many numbers it has then."""
    left, right = shapes[first][0], shapes[last][3]
    out = math.prod(shape[1] for shape in shapes[first : last + 1])
    in_ = math.prod(shape[2] for shape in shapes[first : last + 1])
    before, after = shapes[:first], shapes[last + 1 :]
    if from_last:  # what is left of x, what is there of y
        beside = math.prod(shape[2] for shape in before) * math.prod(shape[1] for shape in after)
        taken, given = in_ * right, left * out
    else:
        beside = math.prod(shape[1] for shape in before) * math.prod(shape[2] for shape in after)
        taken, given = left * in_, out * right
    # Putting what it takes and gives in order moves both once more.
    return _product(0, taken, given, tokens=beside) + Cost(moved_per_token=beside * (taken + given)), beside * given


def _legs(shapes: Sequence[Shape], first: int, last: int) -> int:
    return math.prod(shape[1] * shape[2] for shape in shapes[first : last + 1])
