"""Bonds for a budget of parameters, chosen from tails alone."""

from __future__ import annotations

from collections.abc import Sequence

from mpo_tn.exceptions import MPOError, list_text
from mpo_tn.sites import Sites


def bonds_within(
    squares: Sequence[Sequence[float]], sites: Sites, widest: Sequence[int], max_parameters: int
) -> tuple[int, ...]:
    """Bonds of at most ``max_parameters`` numbers whose ``sum_k squares[k][d_k]`` is small.

    Two greedy searches, one that lowers the widest bonds by least loss per parameter and one that raises bonds of 1 by
    most gain per parameter, each followed by exchanges until none helps; the better result counts. The tails are
    convex in each bond, but the count ``sum_k d_{k-1} p_k d_k`` couples neighbours, so neither search is always best.

    Args:
        squares: ``squares[k][d]`` is the squared error of cutting bond k to d; one entry for every d up to the
            length of the spectrum, descending.
        sites: the legs.
        widest: the largest bond allowed, one per bond.
        max_parameters: the budget.

    Raises:
        MPOError: even bonds of 1 hold more.
    """
    search = _Search(squares, sites, widest, max_parameters)
    least = sites.num_parameters([1] * len(widest))
    if least > max_parameters:
        raise MPOError(
            f"max_parameters={max_parameters} cannot be met: with legs out={list_text(sites.out)}, "
            f"in_={list_text(sites.in_)} the least possible count is {least}, at bonds of 1; allow at least that many "
            "or use other legs"
        )
    lowered, raised = search.lower(list(widest)), search.improve([1] * len(widest))
    return min((tuple(lowered), tuple(raised)), key=search.loss)


class _Search:
    def __init__(
        self, squares: Sequence[Sequence[float]], sites: Sites, widest: Sequence[int], max_parameters: int
    ) -> None:
        self.squares, self.sizes, self.widest, self.allowed = squares, sites.sizes, list(widest), max_parameters
        self.count = sites.num_parameters

    def loss(self, bonds: Sequence[int]) -> float:
        return sum(values[bond] for values, bond in zip(self.squares, bonds, strict=True))

    def weight(self, bonds: list[int], k: int) -> int:
        """How many parameters one unit of bond k holds: ``d_{k-1} p_k + p_{k+1} d_{k+1}``."""
        left = bonds[k - 1] if k > 0 else 1
        right = bonds[k + 1] if k + 1 < len(bonds) else 1
        return left * self.sizes[k] + self.sizes[k + 1] * right

    def lower(self, bonds: list[int]) -> list[int]:
        """Give up what is lost most cheaply until the budget is met, then improve."""
        excess = self.count(bonds) - self.allowed
        while excess > 0:
            weights = [self.weight(bonds, k) for k in range(len(bonds))]
            k = min(
                (k for k, bond in enumerate(bonds) if bond > 1),
                key=lambda k: (self.squares[k][bonds[k] - 1] - self.squares[k][bonds[k]]) / weights[k],
            )
            bonds[k] -= 1
            excess -= weights[k]
        return self.improve(bonds)

    def improve(self, bonds: list[int]) -> list[int]:
        """Raise and exchange while the loss falls. Every step lowers it, so this ends."""
        while True:
            self.fill(bonds)
            better = self.exchange(bonds)
            if better is None:
                return bonds
            bonds = better

    def fill(self, bonds: list[int], spared: int | None = None) -> None:
        """Raise bonds other than ``spared`` by one, the most gain per parameter first, while the budget allows."""
        left = self.allowed - self.count(bonds)
        while True:
            best, gain_per_parameter = -1, 0.0
            for k, bond in enumerate(bonds):
                weight = self.weight(bonds, k)
                if k != spared and bond < self.widest[k] and weight <= left:
                    gain = (self.squares[k][bond] - self.squares[k][bond + 1]) / weight
                    if gain > gain_per_parameter:
                        best, gain_per_parameter = k, gain
            if best < 0:
                return
            left -= self.weight(bonds, best)
            bonds[best] += 1

    def exchange(self, bonds: list[int]) -> list[int] | None:
        """The best of all pairs "raise one bond by one, lower another as far as that needs, fill up", or None."""
        best, least = None, self.loss(bonds)
        for up in range(len(bonds)):
            for down in range(len(bonds)):
                trial = list(bonds)
                if down != up and bonds[up] < self.widest[up]:
                    trial[up] += 1
                    excess = self.count(trial) - self.allowed
                    if excess > 0:
                        trial[down] -= -(-excess // self.weight(trial, down))
                elif down == up:
                    trial[down] -= 1
                if trial[down] < 1:
                    continue
                self.fill(trial, spared=down)
                if self.loss(trial) < least:
                    best, least = trial, self.loss(trial)
        return best
