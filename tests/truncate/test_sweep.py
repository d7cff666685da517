"""A tolerance is one total budget, spent bond by bond."""

import math
import re

import numpy as np
import pytest
from helpers.chains import EPS, C, dense, fro, problems
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.linalg import tails

BUDGET_ROUNDING = 1e-12
REL_ERRORS = st.floats(1e-6, 0.9)


@pytest.mark.guarantee("tolerance")
@given(problems(), REL_ERRORS)
def test_relative_budget_is_met(problem, rel_error):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(rel_error=rel_error, strict=True))
    assert report.tolerance_met
    assert report.error <= rel_error * problem.norm * (1 + BUDGET_ROUNDING)
    assert fro(problem.host - dense(mpo.cores)) <= rel_error * problem.norm + problem.slack
    assert min(mpo.bonds, default=1) >= 1


@pytest.mark.guarantee("tolerance")
@given(problems(), REL_ERRORS)
def test_absolute_budget_is_met(problem, rel_error):
    allowed = rel_error * problem.norm or 1.0
    _, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(abs_error=allowed, strict=True))
    assert report.error <= allowed * (1 + BUDGET_ROUNDING)


@given(problems(kinds=("gaussian", "decaying")), REL_ERRORS, REL_ERRORS)
def test_smaller_of_two_budgets_holds(problem, rel_error, other):
    both = Truncation(rel_error=rel_error, abs_error=other * problem.norm)
    one = Truncation(rel_error=rel_error) if rel_error <= other else Truncation(abs_error=other * problem.norm)
    assert (
        MPO.from_matrix(problem.matrix, problem.sites, both)[0].bonds
        == MPO.from_matrix(problem.matrix, problem.sites, one)[0].bonds
    )


@given(problems(min_sites=2, kinds=("gaussian", "decaying"), dtypes=("float64", "complex128")), REL_ERRORS)
def test_every_bond_spends_its_share_and_no_more(problem, rel_error):
    """Replay the sweep of `compress`, left to right, from the spectra of the chains it passes through."""
    exact, _ = MPO.from_matrix(problem.matrix, problem.sites)
    small, report = exact.compress(Truncation(rel_error=rel_error))
    kept = tuple(bond.kept for bond in report.bonds)
    left = rel_error * report.norm
    wide = max(exact.bonds)
    for k, bond in enumerate(report.bonds):
        passed = exact.compress(Truncation(max_bond=(*kept[:k], *[wide] * (len(kept) - k))))[0] if k else exact
        tail = tails(passed.spectra()[k])
        share = left / math.sqrt(len(kept) - k)
        assert tail[bond.kept] <= share + problem.slack
        assert bond.kept == 1 or tail[bond.kept - 1] > share - problem.slack
        assert abs(tail[bond.kept] - bond.discarded_norm) <= problem.slack
        left = report.norm * math.sqrt(max((left / report.norm) ** 2 - (bond.discarded_norm / report.norm) ** 2, 0))
    assert all(bond <= full for bond, full in zip(small.bonds, kept, strict=True))


@given(problems(min_sites=2, kinds=("gaussian", "orthogonal", "ones")), st.floats(0.05, 0.9))
def test_two_site_bond_is_the_least_that_meets_the_budget(problem, rel_error):
    sites = Sites.low_rank(*problem.sites.shape)
    mpo, _ = MPO.from_matrix(problem.matrix, sites, Truncation(rel_error=rel_error))
    s = np.linalg.svd(problem.host, compute_uv=False)
    (bond,) = mpo.bonds
    allowed = rel_error * problem.norm
    assert fro(s[bond:]) <= allowed + problem.slack
    assert bond == 1 or fro(s[bond - 1 :]) > allowed - problem.slack


@pytest.mark.guarantee("tolerance")
@given(problems(min_sites=2), st.integers(1, 3), REL_ERRORS)
def test_a_cap_that_stops_the_budget_is_reported(problem, cap, rel_error):
    asked = Truncation(max_bond=cap, rel_error=rel_error)
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, asked)
    assert max(mpo.bonds) <= cap
    allowed = rel_error * report.norm
    assert report.tolerance_met == (report.error <= allowed * (1 + BUDGET_ROUNDING))
    strict = Truncation(max_bond=cap, rel_error=rel_error, strict=True)
    if report.tolerance_met:
        assert MPO.from_matrix(problem.matrix, problem.sites, strict)[1].error == report.error
    else:
        with pytest.raises(MPOError, match=re.escape(f"max_bond={cap} leaves an error of {report.error:.6g}")):
            MPO.from_matrix(problem.matrix, problem.sites, strict)


def test_missed_tolerance_of_compress():
    w = np.random.default_rng(0).standard_normal((16, 16))
    mpo, _ = MPO.from_matrix(w, Sites.balanced(16, 16, n=4))
    _, report = mpo.compress(Truncation(max_bond=2, rel_error=0.01))
    assert not report.tolerance_met
    with pytest.raises(MPOError, match="max_bond=2"):
        mpo.compress(Truncation(max_bond=2, rel_error=0.01, strict=True))


@pytest.mark.guarantee("tolerance")
@pytest.mark.parametrize("truncation", [Truncation(rel_error=0.5), Truncation(abs_error=0.5), Truncation(max_bond=1)])
@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_bonds_are_never_below_one(truncation, scale):
    mpo, report = MPO.from_matrix(np.full((8, 8), scale), Sites.balanced(8, 8, n=3), truncation)
    assert mpo.bonds == (1, 1)
    assert report.error <= C * EPS["float64"] * 8 * 8 * scale
    again, _ = mpo.compress(truncation)
    assert again.bonds == (1, 1)


@pytest.mark.parametrize("dtype", list(EPS))
def test_tolerance_below_machine_precision(dtype):
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(dtype)
    sites = Sites.balanced(4, 4, n=2)
    mpo, report = MPO.from_matrix(w, sites, Truncation(rel_error=EPS[dtype]))
    assert report.tolerance_met
    below = EPS[dtype] / 2
    for make in (lambda t: MPO.from_matrix(w, sites, t), mpo.compress):
        with pytest.raises(MPOError, match=f"{re.escape(repr(below))}.*{dtype}"):
            make(Truncation(rel_error=below))
        allowed = below * report.norm
        with pytest.raises(MPOError, match=f"{re.escape(repr(allowed))}.*{dtype}"):
            make(Truncation(abs_error=allowed))


@pytest.mark.parametrize("wide_first", [True, False])
def test_widest_bond_comes_last(wide_first):
    """The narrow bond is cut first and gets an equal share only; the wide one may use all that is left."""
    side = (3, 2, 2) if wide_first else (2, 2, 3)
    sites = Sites(side, side)
    wide, narrow = (0, 1) if wide_first else (1, 0)
    assert sites.full_bonds[wide] > sites.full_bonds[narrow]
    w = np.random.default_rng(2).standard_normal(sites.shape)
    beyond = 0
    for rel_error in np.linspace(0.05, 0.9, 60):
        _, report = MPO.from_matrix(w, sites, Truncation(rel_error=float(rel_error)))
        share = rel_error * report.norm / math.sqrt(2)
        assert report.bonds[narrow].discarded_norm <= share * (1 + BUDGET_ROUNDING)
        beyond += report.bonds[wide].discarded_norm > share
    assert beyond > 10
