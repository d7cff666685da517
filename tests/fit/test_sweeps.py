"""Variational fits: the error falls at every step, is the Frobenius distance, and ends no worse than where it began."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import EPS, C, dense, fro, host, legs, make, problems, random_chain, slack, unfoldings
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, FitReport, MPOError, Sites, Truncation
from mpo_tn.linalg import library
from mpo_tn.testing import to_backend

BONDS = st.integers(1, 4)
WIDTHS = st.sampled_from((1, 2))
SEEDS = st.integers(0, 2**32 - 1)


def same_kind(array, like):
    return to_backend(array, library(like), str(array.dtype))


@pytest.mark.guarantee("fit-from-truncation")
@given(problems(), BONDS, WIDTHS)
def test_fit_of_a_truncation_is_no_worse_and_its_error_is_the_distance(problem, bond, width):
    start, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    max_bond = bond if width == 2 else None
    fitted, fit = start.fit(problem.matrix, sites=width, sweeps=3, max_bond=max_bond)
    assert isinstance(fitted, MPO)
    assert isinstance(fit, FitReport)
    assert abs(fit.norm - problem.norm) <= problem.slack
    # The start lost its rounding to the storage dtype, and so does the result.
    assert fit.error <= report.error + 2 * problem.slack
    assert abs(fit.error - fro(problem.host - dense(fitted.cores))) <= problem.slack
    assert abs(fit.errors[0] - report.error) <= problem.slack
    assert abs(fit.errors[-1] - fit.error) <= problem.slack
    assert fitted.dtype == start.dtype
    assert fitted.sites == start.sites
    assert fitted.bonds == fit.bonds
    assert all(b <= bond for b in fit.bonds)
    assert fitted.center == start.sites.center
    assert fit.sweeps <= 3


@pytest.mark.guarantee("fit-never-worse")
@given(legs(max_size=800), BONDS, BONDS, WIDTHS, SEEDS, st.sampled_from(("float64", "complex128")), st.booleans())
def test_no_step_increases_the_error(sites, bond, target_bond, width, seed, dtype, as_chain):
    chain = random_chain(sites, target_bond, seed, dtype)
    w = dense(chain.cores) if as_chain else make("gaussian", sites, dtype.startswith("complex"), seed)
    start = random_chain(sites, bond, seed + 1, dtype)
    gauge = math.prod(fro(core) for core in chain.cores) if as_chain else 0.0
    # Every error is known to C * eps * sqrt(size) of what was subtracted, and the first one of the start as well.
    tolerance = slack(dtype, w.size, fro(w) + fro(dense(start.cores)) + gauge)
    errors = []

    def watch(sweep, site, now):
        assert 0 <= site <= len(sites) - min(width, len(sites))
        assert sweep == len(errors) // max(2 * (len(sites) - min(width, len(sites))) + 1, 1)
        errors.append(fro(w - dense(now.cores)))

    # Two sites at a time may narrow a bond that is wider than the cap: the start is rounded before the first step.
    cap = bond if width == 2 else None
    _, report = start.fit(chain if as_chain else w, sites=width, sweeps=3, tol=0.0, max_bond=cap, callback=watch)
    for before, after in zip([report.errors[0], *errors], errors, strict=False):
        assert after <= before + tolerance
    assert abs(errors[-1] - report.errors[-1]) <= tolerance
    assert all(b <= a + tolerance for a, b in zip(report.errors, report.errors[1:], strict=False))


@pytest.mark.guarantee("fit-never-worse")
@given(legs(max_size=600), BONDS, WIDTHS, SEEDS, st.sampled_from(("float32", "complex64")))
def test_no_step_of_single_precision_increases_the_error_either(sites, bond, width, seed, dtype):
    """Steps are taken in double precision; what two sites drop is below eps of the dtype times the norm."""
    w = make("gaussian", sites, dtype.startswith("complex"), seed).astype(dtype)
    start = random_chain(sites, bond, seed + 1, dtype).canonicalize(0)
    norm = fro(host(w))
    tolerance = slack("float64", w.size, norm + start.norm()) + (EPS[dtype] * norm if width == 2 else 0.0)
    errors = [fro(host(w) - dense(start.cores))]

    def watch(_sweep, _site, now):
        errors.append(fro(host(w) - dense(now.cores)))

    _, report = start.fit(w, sites=width, sweeps=2, tol=0.0, callback=watch)
    for seen in (errors, report.errors):
        assert all(after <= before + tolerance for before, after in itertools.pairwise(seen))


@given(legs(max_size=600), BONDS, BONDS, WIDTHS, SEEDS, st.sampled_from(tuple(EPS)))
def test_chain_and_dense_targets_agree(sites, bond, target_bond, width, seed, dtype):
    chain = random_chain(sites, target_bond, seed, dtype).canonicalize(0)
    w = dense(chain.cores)
    start = random_chain(sites, bond, seed + 1, dtype).canonicalize(0)
    a, from_chain = start.fit(chain, sites=width, sweeps=1, tol=0.0)
    b, from_dense = start.fit(chain.to_matrix(), sites=width, sweeps=1, tol=0.0)
    tolerance = slack(dtype, w.size, fro(w) + fro(dense(start.cores)))
    assert abs(from_chain.norm - fro(w)) <= tolerance
    assert abs(from_chain.error - fro(w - dense(a.cores))) <= tolerance
    assert abs(from_dense.error - fro(w - dense(b.cores))) <= 2 * tolerance
    assert abs(from_chain.errors[0] - from_dense.errors[0]) <= 2 * tolerance


@given(legs(min_sites=2, max_size=800), BONDS, SEEDS, st.sampled_from(("float64", "complex64")), st.booleans())
def test_two_sites_find_the_bonds_of_the_target(sites, bond, seed, dtype, as_torch):
    # A bond grows by the legs beside it, and not at all past a site without any.
    sites = Sites(tuple(max(2, out) for out in sites.out[:4]), sites.in_[:4])
    w = dense(random_chain(sites, bond, seed, dtype).cores).astype(dtype)
    like = torch.ones(1) if as_torch else w
    start = MPO([same_kind(host(core).astype(dtype), like) for core in random_chain(sites, 1, seed + 1, dtype).cores])
    fitted, report = start.fit(same_kind(w, like), sites=2, sweeps=6)
    ranks = [np.linalg.matrix_rank(m, tol=1e-4 * fro(host(w))) for m in unfoldings(host(w), sites)]
    assert all(b >= r for b, r in zip(fitted.bonds, ranks, strict=True))
    assert report.error <= 2 * slack(dtype, w.size, fro(host(w))) * math.sqrt(len(sites))
    assert report.converged


def test_two_sites_cap_and_round_a_start_that_is_wider():
    w = np.random.default_rng(0).standard_normal((16, 16))
    wide, _ = MPO.from_matrix(w, Sites.balanced(16, 16, n=4))
    rounded, cut = wide.compress(Truncation(max_bond=3))
    fitted, report = wide.fit(w, sites=2, max_bond=3)
    assert rounded.bonds == fitted.bonds == (3, 3, 3)
    assert report.errors[0] == pytest.approx(cut.error, rel=1e-12)
    assert report.error < cut.error


def test_bonds_shrink_where_nothing_is_left():
    sites = Sites((4, 4, 4), (4, 4, 4))
    target = random_chain(sites, 2, 0)
    fitted, report = random_chain(sites, 7, 1).fit(target, sites=2)
    assert fitted.bonds == (2, 2)
    assert report.error <= slack("float64", 4096, report.norm)


@given(legs(max_size=600), BONDS, SEEDS, st.sampled_from(("float64", "complex128")))
def test_a_chain_that_has_the_target_stays(sites, bond, seed, dtype):
    chain = random_chain(sites, bond, seed, dtype).canonicalize(0)
    fitted, report = chain.fit(chain)
    tolerance = slack(dtype, math.prod(sites.shape), report.norm)
    assert report.error <= tolerance
    assert fro(dense(chain.cores) - dense(fitted.cores)) <= 2 * tolerance
    assert report.converged


@pytest.mark.parametrize("width", [1, 2])
def test_stationary_points_of_a_low_rank_chain_are_the_truncated_svd(width):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((12, 9)) @ np.diag(2.0 ** -np.arange(9.0))
    start = random_chain(Sites.low_rank(12, 9), 3, 0)
    max_bond = 3 if width == 2 else None
    _, report = start.fit(w, sites=width, sweeps=100, tol=0.0, max_bond=max_bond)
    assert report.error == pytest.approx(math.hypot(*np.linalg.svd(w, compute_uv=False)[3:]), rel=1e-10)


@pytest.mark.guarantee("best-core")
@given(problems(kinds=("gaussian", "decaying", "rank_deficient", "one_entry")), BONDS, SEEDS)
def test_refit_is_the_least_squares_core(problem, bond, seed):
    dtype, n = problem.dtype, len(problem.sites)
    k = seed % n
    chain = random_chain(problem.sites, bond, seed, dtype)
    chain = MPO([same_kind(host(core).astype(dtype), problem.matrix) for core in chain.cores])
    unit = problem.norm or 1.0
    w = problem.host / unit
    new, report = chain.refit(k, same_kind(w.astype(dtype), problem.matrix))
    assert all(a is b for j, (a, b) in enumerate(zip(new.cores, chain.cores, strict=True)) if j != k)
    # The oracle: the matrix of the linear map from the core to the dense matrix, one column per entry, and lstsq.
    shape = tuple(chain.cores[k].shape)
    columns = []
    for entry in range(math.prod(shape)):
        basis = np.zeros(shape).reshape(-1)
        basis[entry] = 1.0
        columns.append(dense([*chain.cores[:k], basis.reshape(shape), *chain.cores[k + 1 :]]).reshape(-1))
    frame = np.stack(columns, axis=1)
    rounded = host(w.astype(dtype)).reshape(-1)
    best = np.linalg.lstsq(frame, rounded, rcond=max(frame.shape) * EPS[dtype])[0]
    least = float(np.linalg.norm(rounded - frame @ best))
    values = np.linalg.svd(frame, compute_uv=False)
    kept = values[values > max(frame.shape) * EPS[dtype] * values[0]]
    condition = values[0] / kept[-1]
    tolerance = slack(dtype, w.size, 1.0) * condition
    assert report.errors[1] <= least + tolerance
    assert abs(report.error - fro(rounded.reshape(w.shape) - dense(new.cores))) <= tolerance
    if condition < 1e3:
        assert fro(host(new.cores[k]).reshape(-1) - best) <= tolerance * condition / values[0]


def test_refit_of_dependent_neighbours_takes_the_least_norm():
    rng = np.random.default_rng(1)
    left = rng.standard_normal((1, 3, 2, 1))
    chain = MPO([np.concatenate([left, left], axis=3), np.ones((2, 2, 2, 2)), np.zeros((2, 2, 3, 1))])
    zero, report = chain.refit(1, rng.standard_normal((12, 12)))
    assert fro(host(zero.cores[1])) == 0.0
    assert report.error == pytest.approx(report.norm)
    chain = MPO([*chain.cores[:2], rng.standard_normal((2, 2, 3, 1))])
    new, report = chain.refit(1, rng.standard_normal((12, 12)))
    assert report.error < report.norm
    np.testing.assert_allclose(new.cores[1][0], new.cores[1][1], atol=1e-13)


@given(problems(scaled=False), BONDS, st.integers(0, 5))
def test_refit_at_the_centre_keeps_the_centre_and_elsewhere_says_so(problem, bond, site):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    k = site % len(mpo)
    new, again = mpo.refit(k, problem.matrix)
    assert new.canonical_interval == (min(k, mpo.center), max(k, mpo.center))
    if k == mpo.center:
        assert again.errors[1] <= report.error + problem.slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_its_own_rounding(dtype):
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    start, _ = MPO.from_matrix(w, Sites.balanced(8, 8, n=3), Truncation(max_bond=2))
    fitted, report = start.fit(w)
    assert fitted.dtype == dtype
    assert report.error == pytest.approx(fro(host(w) - dense(fitted.cores)), rel=1e-12)
    assert report.error <= report.errors[-1] + C * report.floor


def test_report_reads_well():
    w = np.random.default_rng(0).standard_normal((8, 8))
    start, _ = MPO.from_matrix(w, Sites.balanced(8, 8, n=3), Truncation(max_bond=2))
    fitted, report = start.fit(w, sweeps=0)
    assert (report.sweeps, report.converged, fitted.bonds) == (0, False, (2, 2))
    assert report.rel_error == report.error / report.norm
    assert "after 0 sweeps, not converged" in str(report)
    assert start.fit(0 * w, sweeps=1)[1].rel_error == 0.0


def test_the_same_call_gives_the_same_bits():
    w = np.random.default_rng(0).standard_normal((16, 16))
    start = random_chain(Sites.balanced(16, 16, n=4), 3, 0)
    results = [start.fit(w, sites=2, max_bond=4)[0].cores for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


W = np.ones((4, 6))
CHAIN = random_chain(Sites((2, 2), (2, 3)), 2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CHAIN.fit(W.T), "the target is (6, 4) and the MPO (4, 6)"),
        (lambda: CHAIN.fit(random_chain(Sites((2, 2), (3, 2)), 2, 0)), "the target has legs Sites(out=(2, 2), in_=(3"),
        (lambda: CHAIN.fit(W.astype("float32")), "the target is numpy float32 and the MPO numpy float64"),
        (lambda: CHAIN.fit(torch.from_numpy(W)), "the target is torch float64 and the MPO numpy float64"),
        (lambda: CHAIN.fit(W * np.nan), "24 entries that are NaN"),
        (lambda: CHAIN.fit(MPO([core * np.inf for core in CHAIN.cores])), "core 0"),
        (lambda: CHAIN.fit(np.full((4, 6), 1e308)), "overflows double precision"),
        (lambda: CHAIN.fit([[1.0]]), "a list is not an array"),
        (lambda: CHAIN.fit(W, sites=3), "sites=3 must be 1 or 2"),
        (lambda: CHAIN.fit(W, sites=True), "sites=True must be 1 or 2"),
        (lambda: CHAIN.fit(W, sweeps=-1), "sweeps=-1"),
        (lambda: CHAIN.fit(W, sweeps=1.5), "sweeps=1.5"),
        (lambda: CHAIN.fit(W, tol=1.0), "tol=1.0"),
        (lambda: CHAIN.fit(W, tol="x"), "tol='x'"),
        (lambda: CHAIN.fit(W, tol=math.nan), "tol=nan"),
        (lambda: CHAIN.fit(W, max_bond=2), "max_bond=2 with sites=1"),
        (lambda: CHAIN.fit(W, sites=2, max_bond=0), "max_bond=0"),
        (lambda: CHAIN.refit(2, W), "k=2 is not a site: the chain has sites 0 to 1"),
        (lambda: CHAIN.refit(-1, W), "k=-1 is not a site"),
        (lambda: CHAIN.refit(0.5, W), "k=0.5 is not a site"),
        (lambda: CHAIN.refit(0, W.T), "the target is (6, 4)"),
        (lambda: MPO([c.astype("float32") * 1e-30 for c in CHAIN.cores]).refit(0, W.astype("float32") * 1e30),
         "beyond the range of float32"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        call()
