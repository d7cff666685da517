"""Showing: tables in notebooks, and pictures."""

from __future__ import annotations

from typing import Any

from mpo_tn import markup, plot
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import count_text
from mpo_tn.linalg import describe


class Showing(Chain):
    """What notebooks show of an MPO."""

    def _repr_html_(self) -> str:
        """A table of the sites, short however many there are."""
        sites, around = list(self.sites), (1, *self.bonds, 1)
        low, high = self.canonical_interval

        def form(k: int) -> str:
            if low == high == k:
                return "centre"
            return "left-isometric" if k < low else "right-isometric" if k > high else "any"

        rows = [(k, *sites[k], around[k], around[k + 1], form(k)) for k in range(len(self))]
        size = " x ".join(map(count_text, self.shape))
        caption = f"MPO of {size}: {len(self)} sites, {self.num_parameters:,} parameters, {describe(self.cores[0])}"
        centre = f"centre at site {low}" if low == high else f"canonical interval: sites {low} to {high}"
        return markup.table(caption, ("site", "out", "in", "bond left", "bond right", "form"), rows, (centre,))

    def plot(self, ax: Any = None) -> Any:
        """Draw the chain in Matplotlib: cores, bonds, legs and their sizes; returns the axes.

        Cores are arrows where they are isometries, pointing at the canonical interval; of a chain of more than 16 sites
        the ends are drawn. Spectra and entropies are drawn by :mod:`mpo_tn.plot`.

        Args:
            ax: where to; new axes without.

        >>> import matplotlib; matplotlib.use("agg")
        >>> from mpo_tn import MPO, Sites
        >>> MPO.random(Sites((2,) * 4, (2,) * 4), 3, seed=0).plot().get_title(loc="left")
        '4 sites, 96 parameters; out legs above, in legs below'
        """
        return plot.diagram(self.sites, self.bonds, self.canonical_interval, ax)
