"""Which bond to cut next, from spectra alone: no core is read, no matrix built."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.truncate.spectra import Spectra

Score = str | Callable[[str, int, np.ndarray, int, ModuleSpec], float]
"""``"error"``, ``"error_per_parameter"``, or ``f(unit, bond index, its spectrum, new bond, spec now) -> float``."""


@dataclass(frozen=True)
class RankedCut:
    """Bond ``bond`` of ``unit`` from ``before`` to ``after``; the lower the score, the sooner it is cut."""

    unit: str
    bond: int
    before: int
    after: int
    score: float

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"unit": self.unit, "bond": self.bond, "from": self.before, "to": self.after, "score": self.score}


class Ranking:
    """The next best cuts, from spectra alone: no core is read, no matrix built.

    Args:
        spectra: of every unit, see :func:`mpo_tn.torch.bond_spectra`.
        specs: of every unit; the bonds from which to cut.
        score: ``"error"``: by how much the cut raises the squared bound on the error, relative to the squared norm of
            the matrix as it is, ``s_d**2 / |W|**2`` from d to d - 1 (the corrected Eq. 3 and 4 of Liu, Gao et al., ACL
            2021, of which one term changes). ``"error_per_parameter"``: the same for each parameter that goes. Or a
            callable, see :data:`Score`.
        minimum_bond: no bond is cut below this.

    Ties go to the unit and the bond that come first. Cost: a heap of one entry a bond; a cut touches three of them.

    Raises:
        MPOError: an unknown score, or a callable that gives something else than a number.
    """

    def __init__(
        self,
        spectra: Mapping[str, Spectra],
        specs: Mapping[str, ModuleSpec],
        *,
        score: Score = "error",
        minimum_bond: int = 1,
    ) -> None:
        self.spectra, self.specs = spectra, dict(specs)
        self.score, self.minimum_bond = checked_score(score), minimum_bond
        self._order = {name: position for position, name in enumerate(self.specs)}
        self._heap: list[tuple[float, int, int, int, str]] = []
        self._version: dict[tuple[str, int], int] = {}
        self._squared_norms = {name: part.norm**2 for name, part in spectra.items()}
        for name, spec in self.specs.items():
            for k in range(len(spec.bonds)):
                self._push(name, k)

    def best(self) -> RankedCut | None:
        """The cut of least score, or None if there is nothing left to cut."""
        while self._heap:
            score, _, k, version, name = self._heap[0]
            if self._version[name, k] == version:
                bond = self.specs[name].bonds[k]
                return RankedCut(name, k, bond, bond - 1, score)
            heapq.heappop(self._heap)
        return None

    def take(self, cut: RankedCut) -> None:
        """Count ``cut`` as done. Its spectra stay those of before, as the bound is additive over cuts."""
        spec = self.specs[cut.unit]
        bonds = [cut.after if k == cut.bond else bond for k, bond in enumerate(spec.bonds)]
        self.specs[cut.unit] = replace(spec, bonds=tuple(bonds))
        # What a cut saves depends on the bonds beside it.
        for k in range(max(cut.bond - 1, 0), min(cut.bond + 2, len(bonds))):
            self._push(cut.unit, k)

    def ranked(self) -> list[RankedCut]:
        """One cut for every bond that can be cut, the best first."""
        live = sorted(entry for entry in self._heap if self._version[entry[4], entry[2]] == entry[3])
        bonds = [(name, k, self.specs[name].bonds[k], score) for score, _, k, _, name in live]
        return [RankedCut(name, k, bond, bond - 1, score) for name, k, bond, score in bonds]

    def _push(self, name: str, k: int) -> None:
        version = self._version[name, k] = self._version.get((name, k), 0) + 1
        spec = self.specs[name]
        if spec.bonds[k] > self.minimum_bond:
            heapq.heappush(self._heap, (self._score(name, k, spec), self._order[name], k, version, name))

    def _score(self, name: str, k: int, spec: ModuleSpec) -> float:
        bond = spec.bonds[k]
        values = self.spectra[name][k]
        if not isinstance(self.score, str):
            score = float(self.score(name, k, values, bond - 1, spec))
            if math.isnan(score):
                raise MPOError(f"the score of bond {k} of {name} is NaN: return a number, the least is cut first")
            return score
        squared = self._squared_norms[name]
        score = float(values[bond - 1]) ** 2 / squared if bond <= len(values) and squared > 0 else 0.0
        return score if self.score == "error" else score / saved_parameters(spec, k)


def checked_score(score: Score) -> Score:
    """The score, if it is one.

    Raises:
        MPOError: it is not.
    """
    if score in ("error", "error_per_parameter") or callable(score):
        return score
    raise MPOError(f'score={score!r} must be "error", "error_per_parameter" or a function that returns a number')


def saved_parameters(spec: ModuleSpec, k: int) -> int:
    """How many parameters go with one unit of bond k: ``d_{k-1} p_k + p_{k+1} d_{k+1}``."""
    around = (1, *spec.bonds, 1)
    sizes = spec.sites.sizes
    return around[k] * sizes[k] + sizes[k + 1] * around[k + 2]


def choose_cuts(
    specs: Mapping[str, ModuleSpec], spectra: Mapping[str, Spectra], count: int, *, score: Score = "error",
    minimum_bond: int = 1, keep: float | None = None,
) -> list[RankedCut]:  # fmt: skip
    """The next ``count`` cuts by one, the best first, those of one bond taken together; fewer where ``keep`` is met.

    One after another, each seeing the bonds that the ones before leave, from spectra alone.
    """
    dense = sum(spec.out_features * spec.in_features for spec in specs.values())
    ranking = Ranking(spectra, specs, score=score, minimum_bond=minimum_bond)
    chosen: dict[tuple[str, int], RankedCut] = {}
    for _ in range(count):
        kept = sum(spec.num_parameters for spec in ranking.specs.values()) / dense
        cut = ranking.best()
        if cut is None or (keep is not None and kept <= keep):
            break
        ranking.take(cut)
        first = chosen.get((cut.unit, cut.bond))
        if first is not None:
            cut = replace(cut, before=first.before, score=first.score + cut.score)
        chosen[cut.unit, cut.bond] = cut
    return list(chosen.values())
