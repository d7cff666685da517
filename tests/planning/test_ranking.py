"""Which bond is cut next: against plain recomputation of the bound after every cut."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from helpers.gauges import gauged
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Spectra
from mpo_tn.planning.ranking import Ranking, choose_cuts, saved_parameters
from mpo_tn.planning.spec import ModuleSpec


def naive_ranking(spectra: dict[str, Spectra], specs: dict[str, ModuleSpec], score: str, least: int) -> list[Any]:
    rows = []
    for position, (name, spec) in enumerate(specs.items()):
        for k, bond in enumerate(spec.bonds):
            if bond <= least:
                continue
            smaller = [b - (j == k) for j, b in enumerate(spec.bonds)]
            now, then = spectra[name].what_if(spec.bonds).upper, spectra[name].what_if(smaller).upper
            total = sum(float(value) ** 2 for value in spectra[name][0])
            value = (then**2 - now**2) / total
            if score == "error_per_parameter":
                value /= spec.num_parameters - spec.sites.num_parameters(smaller)
            rows.append((value, position, k, name, bond))
    return sorted(rows)


def structures(chains: list[list[np.ndarray]]) -> tuple[dict[str, ModuleSpec], dict[str, Spectra]]:
    """Specifications and spectra of chains, by their position."""
    specs, spectra = {}, {}
    for position, cores in enumerate(chains):
        mpo = MPO(tuple(cores))
        specs[str(position)] = ModuleSpec("linear", mpo.sites, mpo.bonds, *mpo.shape)
        spectra[str(position)] = mpo.spectra()
    return specs, spectra


def full(*shapes: tuple[int, int]) -> tuple[dict[str, ModuleSpec], dict[str, Spectra]]:
    """The same of Gaussian matrices on three sites, at full bonds."""
    rng = np.random.default_rng(0)
    chains = [
        MPO.from_matrix(rng.standard_normal(shape), Sites.balanced(*shape, n=3), method="svd")[0] for shape in shapes
    ]
    return structures([list(chain.cores) for chain in chains])


@given(st.lists(gauged(), min_size=1, max_size=3), st.sampled_from(["error", "error_per_parameter"]), st.integers(1, 2))
def test_the_ranking_is_the_raise_of_the_squared_bound(chains: list[list[np.ndarray]], score: str, least: int) -> None:
    specs, spectra = structures(chains)
    ranking = Ranking(spectra, specs, score=score, minimum_bond=least)
    while True:
        expected, got = naive_ranking(spectra, specs, score, least), ranking.ranked()
        assert {(cut.unit, cut.bond, cut.before, cut.after) for cut in got} == {
            (name, k, bond, bond - 1) for _, _, k, name, bond in expected
        }
        best = ranking.best()
        if best is None:
            assert not expected
            break
        assert best == got[0]
        assert [cut.score for cut in got] == sorted(cut.score for cut in got)
        by_place = {(name, k): value for value, _, k, name, _ in expected}
        assert all(cut.score == pytest.approx(by_place[cut.unit, cut.bond], rel=1e-6, abs=1e-13) for cut in got)
        ranking.take(best)
        spec = specs[best.unit]
        bonds = tuple(best.after if k == best.bond else bond for k, bond in enumerate(spec.bonds))
        specs[best.unit] = copy.copy(ranking.specs[best.unit])
        assert specs[best.unit].bonds == bonds
        assert saved_parameters(spec, best.bond) == spec.num_parameters - spec.sites.num_parameters(bonds)


def test_scores_by_a_function_and_ties() -> None:
    specs, spectra = full((16, 16), (16, 16))
    seen: list[Any] = []

    def score(name: str, k: int, values: np.ndarray, new: int, spec: ModuleSpec) -> float:
        seen.append((name, k, new))
        assert len(values) >= new
        assert spec.bonds[k] == new + 1
        return -float(new)

    ranking = Ranking(spectra, specs, score=score)
    assert len(seen) == 4
    assert ranking.best().before == max(max(spec.bonds) for spec in specs.values())
    ties = Ranking(spectra, specs, score=lambda *_: 0.0)
    assert [(cut.unit, cut.bond) for cut in ties.ranked()] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    with pytest.raises(MPOError, match="bond 0 of 0 is NaN"):
        Ranking(spectra, specs, score=lambda *_: math.nan)
    for bad in ("loss", None, 3):
        with pytest.raises(MPOError, match="error_per_parameter"):
            Ranking(spectra, specs, score=bad)  # type: ignore[arg-type]


def test_choosing_sees_the_bonds_that_earlier_choices_leave() -> None:
    specs, spectra = full((16, 12), (8, 16))
    chosen = choose_cuts(specs, spectra, 10**6, score="error_per_parameter")
    assert {(cut.unit, cut.bond): cut.after for cut in chosen} == {
        (name, k): 1 for name, spec in specs.items() for k in range(len(spec.bonds))
    }
    assert choose_cuts(specs, spectra, 5, keep=2.0) == []
