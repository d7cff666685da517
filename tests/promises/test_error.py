"""The error of one truncating sweep is exact and near the best; of two sweeps it is a bound."""

import math

import numpy as np
import pytest
from helpers.chains import EPS, C, Problem, dense, fro, host, legs, make, problems, random_chain, slack, tail_norms
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, Sites, Truncation

CAPS = st.one_of(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=5, max_size=5))


def truncation_for(problem: Problem, caps: int | list[int]) -> Truncation:
    return Truncation(max_bond=tuple(caps[: len(problem.sites) - 1]) if isinstance(caps, list) else caps)


@pytest.mark.guarantee("exact-error")
@given(problems(), CAPS, st.booleans())
def test_error_of_one_sweep_is_the_frobenius_distance(problem, caps, with_spectra):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps), spectra=with_spectra)
    distance = fro(problem.host - dense(mpo.cores))
    assert abs(report.error - distance) <= problem.slack
    assert abs(report.norm - problem.norm) <= C * 2.0**-52 * math.sqrt(problem.host.size) * problem.norm
    assert report.exact
    assert report.tolerance_met
    assert report.floor == pytest.approx(
        (EPS[problem.dtype] + 16 * 2**-52) * math.sqrt(len(mpo)) * report.norm, rel=1e-12
    )


@pytest.mark.guarantee("exact-error")
@given(problems(), CAPS, st.booleans())
def test_squared_discarded_norms_add_up(problem, caps, with_spectra):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps), spectra=with_spectra)
    unit = report.norm or 1.0
    squares = sum((bond.discarded_norm / unit) ** 2 for bond in report.bonds)
    assert abs((report.error / unit) ** 2 - squares) <= C * 2.0**-52 * squares
    assert tuple(bond.kept for bond in report.bonds) == mpo.bonds
    assert all(1 <= bond.kept <= bond.available for bond in report.bonds)
    assert all(bond.discarded_norm == 0 for bond in report.bonds if bond.kept == bond.available)


@pytest.mark.guarantee("near-best", "inequalities")
@given(problems(min_sites=2), CAPS)
def test_chain_of_inequalities(problem, caps):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps), spectra=True)
    eps_k = tail_norms(problem.host, problem.sites, mpo.bonds)
    slack = problem.slack
    cut = [bond.discarded_norm for bond in report.bonds]
    for bond, e, tail in zip(report.bonds, cut, eps_k, strict=True):
        assert abs(bond.tail - tail) <= slack
        assert e <= tail + slack
    assert max(cut) <= max(eps_k) + slack
    assert max(eps_k) <= report.error + slack
    assert report.error <= math.hypot(*eps_k) + slack
    assert math.hypot(*eps_k) <= math.sqrt(len(mpo) - 1) * report.lower_bound + slack
    assert abs(report.lower_bound - max(eps_k)) <= slack
    assert abs(report.bound - math.hypot(*eps_k)) <= slack


@pytest.mark.guarantee("bounds-in-order")
@given(problems(), CAPS, st.booleans())
def test_reported_bounds_enclose_the_error_without_slack(problem, caps, with_spectra):
    _, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps), spectra=with_spectra)
    assert 0 <= report.lower_bound <= report.error <= report.bound
    assert report.optimality >= 1


@given(problems(), CAPS)
def test_bounds_without_spectra(problem, caps):
    _, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps))
    assert report.lower_bound == max((bond.discarded_norm for bond in report.bonds), default=0.0)
    assert report.bound == report.error
    assert all(bond.tail is None for bond in report.bonds)
    certified = 1.0 if report.error == 0 else report.error / report.lower_bound
    assert report.optimality == certified
    assert report.rel_error == (report.error / report.norm if report.norm else 0.0)


@pytest.mark.guarantee("near-best")
@given(legs(min_sites=2), st.integers(1, 4), st.integers(0, 2**32 - 1), st.floats(1e-6, 1.0))
def test_error_is_quasi_optimal_against_a_planted_chain(sites, bond, seed, strength):
    planted = random_chain(sites, bond, seed)
    noise = strength * make("gaussian", sites, False, seed + 1)
    w = dense(planted.cores) + noise
    _, report = MPO.from_matrix(w, sites, Truncation(max_bond=bond), spectra=True)
    rounding = slack("float64", w.size, fro(w))
    assert report.error <= math.sqrt(len(sites) - 1) * fro(noise) + rounding
    assert report.lower_bound <= fro(noise) + rounding


@given(problems(kinds=("gaussian", "decaying")), st.integers(1, 6))
def test_two_site_chain_is_the_truncated_svd(problem, bond):
    sites = Sites.low_rank(*problem.sites.shape)
    mpo, report = MPO.from_matrix(problem.matrix, sites, Truncation(max_bond=bond))
    u, s, vh = np.linalg.svd(problem.host, full_matrices=False)
    assert abs(report.error - fro(s[bond:])) <= problem.slack
    gap = (s[bond - 1] - s[bond]) / s[0] if bond < len(s) else 1.0
    if gap > 1e-2:
        best = (u[:, :bond] * s[:bond]) @ vh[:bond]
        assert fro(best - dense(mpo.cores)) <= 2 * problem.slack / gap


@pytest.mark.guarantee("two-sweeps")
@given(problems(), CAPS, CAPS)
def test_two_sweeps_obey_the_triangle_inequality_only(problem, caps, caps_after):
    first, report = MPO.from_matrix(problem.matrix, problem.sites, truncation_for(problem, caps))
    second, later = first.compress(truncation_for(problem, caps_after))
    total = later.after(report)
    assert fro(problem.host - dense(second.cores)) <= total.error + 2 * problem.slack
    assert total.error == report.error + later.error
    if report.error > 0 and later.error > 0:
        assert total.bound == total.error
        assert total.lower_bound == 0.0
    else:  # one sweep did it all, so what it certified still holds
        one = later if report.error == 0 else report
        assert (total.lower_bound, total.bound) == (one.lower_bound, one.bound)
    assert total.norm == report.norm
    assert total.floor == report.floor + later.floor
    assert total.exact == (report.error == 0 or later.error == 0)
    assert total.bonds == later.bonds
    assert total.notes == report.notes + later.notes


def test_two_truncating_sweeps_are_not_exact():
    w = np.random.default_rng(3).standard_normal((16, 16))
    first, report = MPO.from_matrix(w, Sites.balanced(16, 16, n=4), Truncation(max_bond=5))
    _, later = first.compress(Truncation(max_bond=2))
    total = later.after(report)
    assert not total.exact
    assert "<=" in str(total)
    assert "=" in str(report)
    assert "<=" not in str(report)
    missed = first.compress(Truncation(max_bond=1, rel_error=1e-3))[1]
    assert not missed.after(report).tolerance_met
    assert not report.after(missed).tolerance_met
    assert "NOT met" in str(missed)


@pytest.mark.guarantee("full-bonds")
@given(problems())
def test_full_bonds_are_exact(problem):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites)
    assert mpo.bonds == problem.sites.full_bonds
    assert report.error == 0.0
    assert fro(problem.host - dense(mpo.cores)) <= problem.slack
    # Contracting in the storage dtype rounds once more.
    assert fro(problem.host - host(mpo.to_matrix())) <= 2 * problem.slack


@given(problems(), st.integers(1, 64))
def test_wide_caps_cut_nothing(problem, extra):
    widest = max(problem.sites.full_bonds, default=1)
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=widest + extra))
    assert mpo.bonds == problem.sites.full_bonds
    assert report.error == 0.0


@given(problems(kinds=("rank_one", "rank_deficient")))
def test_planted_bonds_lose_nothing(problem):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=2))
    assert report.error <= problem.slack
    assert fro(problem.host - dense(mpo.cores)) <= 2 * problem.slack
