"""A sum of products of local operators as a chain of small bonds, without any factorisation.

At every bond a term is a pair: what stands to its left and what is still to come on its right. A bond needs one index
for each left part that is kept as it is, with all its right parts to be summed up later, or for each right part that
is, with all its left parts summed up by now; every term has to be in one of the two. The fewest that do are a smallest
vertex cover of the graph of left and right parts, which a largest matching gives (König's theorem; Ren, Li, Jiang and
Shuai, J. Chem. Phys. 153, 084118, 2020). Terms that have not begun yet share one index, those that have ended another.
"""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains.algebra import dtype_of
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, check_dtype, library, namespace, to_jax, to_numpy
from mpo_tn.sites import Sites, checked_sites

Suffix = tuple[tuple[int, int], ...]
"""What is still to come of a term: sites and the numbers of the operators there, sites rising."""

_START = 0
"""The index of a bond for all that has not begun yet, as long as there is any."""


@dataclass(frozen=True)
class _Term:
    coefficient: complex
    suffix: Suffix


def term_cores(sites: Sites, terms: Iterable[Any], dtype: Any, like: Any) -> list[Array]:
    """The cores of a sum of terms. See :meth:`mpo_tn.MPO.from_terms`."""
    sites = checked_sites(sites)
    operators = _Operators(sites)
    read = [_read(term, position, operators) for position, term in enumerate(terms)]
    if not read:
        raise MPOError("there are no terms to sum: give at least one (coefficient, {site: operator})")
    model = like.cores[0] if isinstance(like, Chain) else np.empty(0) if like is None else like
    natural = operators.natural_dtype(read) if like is None else model.dtype
    wanted = dtype_of(namespace(model), natural if dtype is None else dtype)
    blocks = _blocks(sites, read, operators)
    xp, device = namespace(model), array_api_compat.device(model)
    is_complex = any(np.imag(block).any() for block in blocks)
    name = (getattr(wanted, "__name__", None) or str(wanted)).rsplit(".", maxsplit=1)[-1]
    if is_complex and not name.startswith("complex"):
        raise MPOError(f"the terms are complex and cannot be summed in {name}: use dtype='complex128'")
    real = [block if name.startswith("complex") else np.ascontiguousarray(np.real(block)) for block in blocks]
    if library(model) == "jax":
        return [to_jax(block.astype(wanted), device) for block in real]
    return [xp.asarray(block, dtype=wanted, device=device) for block in real]


class _Operators:
    """Every operator once, by site and number; 0 is the identity."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.known: list[dict[bytes, int]] = [{} for _ in sites.out]
        self.matrices: list[list[np.ndarray]] = [[] for _ in sites.out]
        self.kinds: set[str] = set()

    def number(self, site: int, operator: Any, place: str) -> int:
        """The number of an operator at a site."""
        if isinstance(operator, (list, tuple)):
            operator = np.asarray(operator, dtype=None)
        namespace(operator)
        matrix = to_numpy(operator)
        if matrix.dtype.kind in "iub":
            matrix = matrix.astype("float64")
        check_dtype(matrix, f"{place}: an operator")
        self.kinds.add(matrix.dtype.name)
        legs = self.sites.out[site], self.sites.in_[site]
        if matrix.shape != legs:
            raise MPOError(f"{place}: the operator of shape {matrix.shape} does not fit the legs {legs} of site {site}")
        if not np.isfinite(matrix).all():
            raise MPOError(f"{place}: the operator at site {site} has entries that are NaN or infinite")
        if legs[0] == legs[1] and np.array_equal(matrix, np.eye(legs[0])):
            return 0
        wide = matrix.astype("complex128") + 0.0  # no negative zeros: equal operators have equal bytes
        if wide.tobytes() not in self.known[site]:
            self.known[site][wide.tobytes()] = len(self.matrices[site]) + 1
            self.matrices[site].append(wide)
        return self.known[site][wide.tobytes()]

    def matrix(self, site: int, number: int) -> np.ndarray:
        """The operator of a number."""
        out, in_ = self.sites.out[site], self.sites.in_[site]
        if number == 0 and out != in_:
            raise MPOError(
                f"site {site} has legs (out, in) = {(out, in_)} and there is no identity: every term "
                "needs an operator there"
            )
        return np.eye(out, dtype="complex128") if number == 0 else self.matrices[site][number - 1]

    def natural_dtype(self, terms: list[_Term]) -> str:
        """Double precision, single if all operators are in it; complex if anything is."""
        single = bool(self.kinds) and all(
            kind in ("float16", "bfloat16", "float32", "complex64") for kind in self.kinds
        )
        is_complex = any(kind.startswith("complex") for kind in self.kinds)
        is_complex = is_complex or any(term.coefficient.imag != 0 for term in terms)
        return ("complex64" if single else "complex128") if is_complex else ("float32" if single else "float64")


def _read(term: Any, position: int, operators: _Operators) -> _Term:
    """A term as it was given, its coefficient first or left out."""
    place = f"term {position}"
    coefficient: Any = 1.0
    factors: Any = term
    if isinstance(term, (tuple, list)) and len(term) == 2:
        coefficient, factors = term
    if hasattr(coefficient, "item") and getattr(coefficient, "ndim", 1) == 0:
        coefficient = coefficient.item()
    if isinstance(coefficient, bool) or not isinstance(coefficient, numbers.Complex):
        raise MPOError(f"{place}: the coefficient {coefficient!r} is no number")
    if not isinstance(factors, Mapping):
        raise MPOError(
            f"{place}: {factors!r} is not {{site: operator}}, with the coefficient before it if there is one"
        )
    number = complex(coefficient)
    if not np.isfinite(number):
        raise MPOError(f"{place}: the coefficient {coefficient!r} is not finite")
    found: dict[int, int] = {}
    for given, operator in factors.items():
        site = whole_number(given)
        if site is None or not 0 <= site < len(operators.sites):
            raise MPOError(f"{place}: {given!r} is not a site: there are sites 0 to {len(operators.sites) - 1}")
        found[site] = operators.number(site, operator, place)
    return _Term(number, tuple(sorted((site, number) for site, number in found.items() if number)))


def _blocks(sites: Sites, terms: list[_Term], operators: _Operators) -> list[np.ndarray]:
    """The cores in complex double precision, from the first site to the last."""
    beginning: dict[int, list[_Term]] = {}
    for term in terms:
        # What is nothing but a number begins, and ends, at the first site.
        beginning.setdefault(term.suffix[0][0] if term.suffix else 0, []).append(term)
    table: dict[tuple[int, Suffix], complex] = {}
    width, blocks = 1, list[np.ndarray]()
    for k in range(len(sites)):
        edges: dict[tuple[tuple[int, int], Suffix], complex] = {}
        rows = [*table.items(), *(((_START, term.suffix), term.coefficient) for term in beginning.get(k, []))]
        for (index, suffix), coefficient in rows:
            here = suffix[0][1] if suffix and suffix[0][0] == k else 0
            key = (index, here), suffix[1:] if here else suffix
            edges[key] = edges.get(key, 0.0) + coefficient
        cut = _Cut({edge: value for edge, value in edges.items() if value}, waits=max(beginning) > k)
        block = np.zeros((width, sites.out[k], sites.in_[k], cut.width), "complex128")
        for (index, number), target, coefficient in cut.moves:
            block[index, :, :, target] += coefficient * operators.matrix(k, number)
        blocks.append(block)
        table, width = cut.table, cut.width
    return blocks


class _Cut:
    """The bond after a site: how indices before it go over to those of it, and what is carried on.

    Args:
        edges: the coefficient of every pair of a left part, (index before the site, operator), and a right part.
        waits: some terms have not begun.
    """

    def __init__(self, edges: dict[tuple[tuple[int, int], Suffix], complex], *, waits: bool) -> None:
        self.names: dict[Hashable, int] = {}
        self.moves: list[tuple[tuple[int, int], int, complex]] = []
        self.table: dict[tuple[int, Suffix], complex] = {}
        if waits:
            self.names["start"] = _START
            self.moves.append(((_START, 0), _START, 1.0))
        lefts, _ = smallest_cover([edge for edge in edges if edge[1]])
        for (left, right), coefficient in edges.items():
            if right and left in lefts:
                index, new = self._index(("left", left))
                if new:
                    self.moves.append((left, index, 1.0))
                self.table[index, right] = coefficient
            else:
                index, _ = self._index(("right", right))
                self.moves.append((left, index, coefficient))
                self.table[index, right] = 1.0

    @property
    def width(self) -> int:
        """The size of the bond; of nothing at all, which is the zero matrix, 1."""
        return max(len(self.names), 1)

    def _index(self, name: Hashable) -> tuple[int, bool]:
        new = name not in self.names
        return self.names.setdefault(name, len(self.names)), new


def smallest_cover(edges: list[tuple[Any, Any]]) -> tuple[set[Any], set[Any]]:
    """The fewest left and right ends that touch every edge of a bipartite graph.

    >>> smallest_cover([("a", 1), ("a", 2), ("b", 2), ("c", 2)])
    ({'a'}, {2})
    """
    neighbours: dict[Any, list[Any]] = {}
    for left, right in edges:
        neighbours.setdefault(left, []).append(right)
    matched: dict[Any, Any] = {}  # right -> left
    partner: dict[Any, Any] = {}  # left -> right
    for left in neighbours:
        _augment(left, neighbours, matched, partner)
    # König: everything that alternating paths reach from the left ends without a partner.
    reached_left = {left for left in neighbours if left not in partner}
    reached_right: set[Any] = set()
    open_ends = list(reached_left)
    while open_ends:
        for right in neighbours[open_ends.pop()]:
            if right not in reached_right:
                reached_right.add(right)
                if matched[right] not in reached_left:
                    reached_left.add(matched[right])
                    open_ends.append(matched[right])
    return set(neighbours) - reached_left, reached_right


def _augment(start: Any, neighbours: dict[Any, list[Any]], matched: dict[Any, Any], partner: dict[Any, Any]) -> None:
    """Give one more left end a partner, if a path of alternating edges leads to a right end without one."""
    came_from: dict[Any, Any] = {}
    open_ends = [start]
    for left in open_ends:
        for right in neighbours[left]:
            if right in came_from:
                continue
            came_from[right] = left
            if right in matched:
                open_ends.append(matched[right])
                continue
            while True:
                left = came_from[right]
                before = partner.get(left)
                matched[right], partner[left] = left, right
                if left == start:
                    return
                right = before
