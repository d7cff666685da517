"""What of a model's matrices is in cores, and of every other what it is, how much of them it holds, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpo_tn.planning.patterns import folded, without_numbers

ROWS = 20
"""So many lines are shown at most."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is like a matrix: of two axes or more, of which two are longer than 1.

    >>> is_matrix((4, 8)), is_matrix((2, 4, 8)), is_matrix((1, 8)), is_matrix((8,))
    (True, True, False, False)
    """
    return len(shape) >= 2 and sum(size > 1 for size in shape) >= 2


@dataclass(frozen=True)
class DenseMatrix:
    """A parameter like a matrix that stays dense: its name, its shape and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DenseRow:
    """Matrices that differ only in the numbers in their names; ``pattern`` has a star where they do."""

    pattern: str
    matrices: tuple[DenseMatrix, ...]

    @property
    def numbers(self) -> int:
        """How many all of them hold."""
        return sum(matrix.numbers for matrix in self.matrices)


@dataclass(frozen=True)
class Coverage:
    """How much of the parameters that are like matrices is in cores, and which are not. Tied ones count once.

    Args:
        covered: how many numbers the matrices had that are in cores.
        dense: the others, in the order of the model.

    >>> found = Coverage(300, (DenseMatrix("layers.0.w", (10, 6), "a"), DenseMatrix("layers.1.w", (10, 4), "a")))
    >>> print(found), found.rows()[0].pattern
    covers 75.0 % of the matrix parameters
    (None, 'layers.0.w')
    """

    covered: int
    dense: tuple[DenseMatrix, ...]

    @property
    def total(self) -> int:
        """How many numbers all matrices had."""
        return self.covered + sum(matrix.numbers for matrix in self.dense)

    @property
    def share(self) -> float:
        """Of them, what is covered; 1 where there is no matrix."""
        return self.covered / self.total if self.total else 1.0

    def rows(self) -> list[DenseRow]:
        """The dense ones, those taken together that differ only in the numbers in their names; the largest first."""
        found: dict[tuple[Any, ...], list[DenseMatrix]] = {}
        for matrix in self.dense:
            found.setdefault((without_numbers(matrix.name), matrix.shape, matrix.reason), []).append(matrix)
        rows = [DenseRow(folded([each.name for each in own]), tuple(own)) for own in found.values()]
        return sorted(rows, key=lambda row: -row.numbers)

    def percent(self, numbers: int) -> str:
        """A part of all matrices in per cent; never 100 of what is less, nor 0 of what is more."""
        exact = 100 * numbers / self.total if self.total else 100.0
        rounded = f"{exact:.1f}"
        if rounded == "100.0" and numbers < self.total:
            return "99.9"
        return "< 0.1" if rounded == "0.0" and numbers else rounded

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "covered": self.covered,
            "total": self.total,
            "share": self.share,
            "dense": [
                {"name": each.name, "shape": list(each.shape), "parameters": each.numbers, "reason": each.reason}
                for each in self.dense
            ],
        }

    def __str__(self) -> str:
        return f"covers {self.percent(self.covered)} % of the matrix parameters"
