"""Fits in a metric: no sweep is worse than the one before, one core is the best there is, and errors are exact."""

import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, host, legs, random_chain
from helpers.moments import random_metric, scale, weighted
from hypothesis import given
from hypothesis import strategies as st

import mpo_tn.fit.local_problem as local_problem
from mpo_tn import MPO, LowRankFits, Metric, MPOError, Sites, Truncation
from mpo_tn.fit.local_problem import LocalProblem, column_moment, expand, project

BONDS = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 10)
KINDS = st.sampled_from(("plain", "plain", "anchored", "two-sided"))
SINGULAR = st.booleans()


@pytest.fixture
def iterative(monkeypatch):
    """No normal matrix is ever formed."""
    monkeypatch.setattr(local_problem, "_DIRECT", 0)


def problem(sites, bond, seed, kind, singular):
    out, in_ = sites.shape
    metric = random_metric((out, in_), seed, kind, rank=max(in_ // 2, 1) if singular else None)
    w = np.random.default_rng(seed).standard_normal((out, in_))
    start = random_chain(sites, bond, seed + 1)
    return w, metric, start.canonicalize(0)


def never_worse(sites, bond, seed, kind, singular):
    w, metric, start = problem(sites, bond, seed, kind, singular)
    target = np.asarray(metric.target(w))
    size = np.linalg.norm(target) + np.linalg.norm(dense(start.cores))
    # 16 for 4: a step is projected on frames, solved for and added, each of which rounds.
    tolerance = 16 * EPS["float64"] * math.sqrt(w.size) * scale(metric, size)
    errors = [weighted(metric, target - dense(start.cores))]

    def watch(_sweep, _site, now):
        errors.append(weighted(metric, target - dense(now.cores)))

    fitted, report = start.fit(w, metric=metric, sweeps=3, tol=0.0, callback=watch)
    assert all(after <= before + tolerance for before, after in itertools.pairwise(errors))
    assert all(after <= before + tolerance for before, after in itertools.pairwise(report.errors))
    assert abs(report.error - weighted(metric, target - dense(fitted.cores))) <= tolerance
    assert abs(report.norm - weighted(metric, target)) <= tolerance
    assert report.metric == metric.name
    assert fitted.sites == start.sites
    assert fitted.dtype == start.dtype


@pytest.mark.guarantee("metric-fit")
@given(legs(max_size=400), BONDS, SEEDS, KINDS, SINGULAR)
def test_no_step_increases_the_error(sites, bond, seed, kind, singular):
    never_worse(sites, bond, seed, kind, singular)


@pytest.mark.guarantee("metric-fit")
@pytest.mark.usefixtures("iterative")
def test_no_step_of_conjugate_gradients_does_either():
    cases = itertools.product(((2, 3, 2), (4, 1, 3)), ((3, 2, 2), (1, 5, 2)), (1, 3), ("plain", "two-sided"), (0, 1))
    for seed, (out, in_, bond, kind, singular) in enumerate(cases):
        never_worse(Sites(out, in_), bond, seed, kind, bool(singular))


def best_error(w, metric, chain, k):
    """The least weighted error over core k: least squares with the matrix of the linear map, whitened."""
    frame = []
    for entry in range(math.prod(chain.cores[k].shape)):
        basis = np.zeros(chain.cores[k].shape)
        basis.flat[entry] = 1.0
        frame.append(dense([*chain.cores[:k], basis, *chain.cores[k + 1 :]]))
    left = np.eye(len(w)) if metric.outer is None else np.asarray(metric.outer_root).T
    right = np.asarray(metric.root)
    columns = np.stack([(left @ part @ right).reshape(-1) for part in frame], axis=1)
    wanted = (left @ np.asarray(metric.target(w)) @ right).reshape(-1)
    best = np.linalg.lstsq(columns, wanted, rcond=1e-12)[0]
    return float(np.linalg.norm(wanted - columns @ best))


def refit_is_best(sites, bond, seed, kind, singular):
    w, metric, start = problem(sites, bond, seed, kind, singular)
    k = seed % len(sites)
    new, report = start.refit(k, w, metric=metric)
    assert all(a is b for j, (a, b) in enumerate(zip(new.cores, start.cores, strict=True)) if j != k)
    assert report.error <= best_error(w, metric, start, k) + 1e-6 * (report.norm + report.errors[0])
    assert report.error == pytest.approx(metric.error(w, new), abs=1e-12 * report.norm)


@pytest.mark.guarantee("metric-refit")
@given(legs(max_size=250), BONDS, SEEDS, KINDS, SINGULAR)
def test_refit_is_the_least_squares_core(sites, bond, seed, kind, singular):
    refit_is_best(sites, bond, seed, kind, singular)


@pytest.mark.guarantee("metric-refit")
@pytest.mark.usefixtures("iterative")
def test_refit_is_the_least_squares_core_by_conjugate_gradients():
    for seed in range(24):
        refit_is_best(Sites((2, 3, 2), (3, 2, 3)), 1 + seed % 4, seed, "plain", seed % 3 == 0)


@given(st.integers(1, 8), st.integers(1, 8), SEEDS, st.sampled_from(("plain", "anchored")))
def test_stationary_points_of_a_low_rank_chain_are_the_closed_form(out, in_, seed, kind):
    metric = random_metric((out, in_), seed, kind)
    w = np.random.default_rng(seed).standard_normal((out, in_))
    rank = 1 + seed % min(out, in_)
    start, _ = MPO.from_matrix(w, Sites.low_rank(out, in_), Truncation(max_bond=rank))
    _, report = start.fit(w, metric=metric, sweeps=20, tol=0.0)
    least = LowRankFits(w, metric).error(rank)
    assert least - 1e-12 * report.norm <= report.error
    best, _ = MPO.low_rank_fit(w, rank, metric)
    _, again = best.fit(w, metric=metric, sweeps=2, tol=0.0)
    assert again.error == pytest.approx(least, abs=1e-10 * report.norm)


def test_it_beats_the_truncation_by_far():
    sites = Sites((4, 6, 4), (4, 8, 4))
    w = np.random.default_rng(0).standard_normal(sites.shape)
    metric = random_metric(sites.shape, 0, spread=2.0)
    start, _ = MPO.from_matrix(w, sites, Truncation(max_bond=8))
    fitted, report = start.fit(w, metric=metric, sweeps=2)
    assert fitted.bonds == start.bonds
    assert report.error < 0.7 * report.errors[0]


@given(legs(min_sites=2, max_size=300), BONDS, SEEDS)
def test_frames_and_columns_are_those_of_the_definition(sites, bond, seed):
    """The adjoint of what makes a matrix of a core, the normal matrix, and the moment that its columns see."""
    chain = random_chain(sites, bond, seed)
    k = seed % len(sites)
    left, right = frame_left(chain.cores[:k]), frame_right(chain.cores[k + 1 :])
    rng = np.random.default_rng(seed)
    core, matrix = chain.cores[k], rng.standard_normal(sites.shape)
    made = expand(core, left, right)
    np.testing.assert_allclose(made, dense(chain.cores), atol=1e-12 * np.linalg.norm(made))
    seen = project(matrix, left, right)
    assert np.vdot(made, matrix) == pytest.approx(np.vdot(core, seen), abs=1e-11 * np.linalg.norm(made) * matrix.size)
    second = np.asarray(random_metric(sites.shape, seed).second)
    whole = LocalProblem(left, right, second, None, single=False)
    a, _, in_, b = core.shape
    size = a * in_ * b
    normal = whole._normal(a, in_, b).reshape(size, size)
    whole._reduce()
    reduced = whole._normal(a, in_, b).reshape(size, size)
    rows = core.transpose(1, 0, 2, 3).reshape(-1, size)
    expected = (made @ second * made).sum()
    for found in (normal, reduced):
        assert (rows @ found * rows).sum() == pytest.approx(expected, rel=1e-9)
    columns = column_moment(left, right, second)
    traced = np.einsum("aibajc->ibjc", normal.reshape(a, in_, b, a, in_, b)).reshape(in_ * b, in_ * b)
    np.testing.assert_allclose(columns, traced, atol=1e-10 * np.linalg.norm(traced))


def frame_left(cores):
    found = np.ones((1, 1, 1))
    for core in cores:
        found = np.einsum("oia,apjb->opijb", found, core)
        found = found.reshape(found.shape[0] * found.shape[1], -1, core.shape[3])
    return found


def frame_right(cores):
    found = np.ones((1, 1, 1))
    for core in reversed(cores):
        found = np.einsum("aojb,bpi->aopji", core, found)
        found = found.reshape(core.shape[0], found.shape[1] * found.shape[2], -1)
    return found


def test_any_library_gives_the_same():
    sites = Sites((2, 3, 2), (3, 2, 2))
    w, metric, start = problem(sites, 2, 0, "plain", False)
    expected, report = start.fit(w, metric=metric, sweeps=2)
    for library in (torch.from_numpy, jnp.asarray):
        again = MPO([library(core) for core in start.cores])
        fitted, other = again.fit(library(w), metric=metric, sweeps=2)
        assert type(fitted.cores[0]) is type(library(w))
        np.testing.assert_allclose(dense(fitted.cores), dense(expected.cores), atol=1e-8)
        assert other.error == pytest.approx(report.error, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_counts_its_own_rounding(dtype):
    sites = Sites((2, 3, 2), (3, 2, 2))
    w, metric, start = problem(sites, 2, 0, "plain", False)
    narrow = MPO([torch.from_numpy(core.copy()).to(dtype) for core in start.cores])
    target = torch.from_numpy(w).to(dtype)
    fitted, report = narrow.fit(target, metric=metric, sweeps=2)
    assert fitted.dtype == dtype
    assert report.error == pytest.approx(weighted(metric, host(target) - dense(fitted.cores)), rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "two-sided"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_fit_depends_on_the_scale_of_the_metric(kind, dtype):
    sites = Sites((2, 3, 2), (3, 2, 2))
    w, metric, start = problem(sites, 2, 0, kind, False)
    w, start = w.astype(dtype), MPO([core.astype(dtype) for core in start.cores])
    expected, report = start.fit(w, metric=metric, sweeps=2)
    for power in (-300, 300):
        factor = 2.0**power
        outer = None if metric.outer is None else metric.outer * factor
        fitted, other = start.fit(w, metric=Metric(metric.second * factor, outer=outer), sweeps=2)
        np.testing.assert_allclose(
            dense(fitted.cores), dense(expected.cores), atol=1e-4 if dtype == "float32" else 1e-9
        )
        assert other.rel_error == pytest.approx(report.rel_error, rel=1e-4)


def test_the_report_says_so():
    w, metric, start = problem(Sites((2, 2), (2, 3)), 2, 0, "plain", False)
    assert "% of the norm in the metric: activation) after" in str(start.fit(w, metric=metric)[1])
    assert "metric" not in str(start.fit(w)[1])
    assert start.fit(w)[1].metric == "frobenius"


def test_a_target_of_zeros():
    w, metric, start = problem(Sites((2, 2), (2, 3)), 2, 0, "plain", False)
    _, report = start.fit(0 * w, metric=metric, sweeps=3)
    assert report.norm == 0.0
    assert report.error <= 1e-12 * report.errors[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, m, c: c.fit(w, metric=m, sites=2), "sites=2 with a metric"),
        (lambda w, m, c: c.fit(c, metric=m), "needs its matrix: pass target.to_matrix()"),
        (lambda w, m, c: c.fit(w[:, :3], metric=m), "the target is (4, 3) and the MPO (4, 6)"),
        (lambda w, m, c: c.fit(w, metric=random_metric((4, 5), 0)), "second is (in, in)"),
        (lambda w, m, c: c.refit(5, w, metric=m), "k=5 is not a site"),
        (lambda w, m, c: MPO([core * 1j for core in c.cores]).fit(w * 1j, metric=m), "a metric is for real matrices"),
    ],
)
def test_bad_input(call, message):
    w, metric, start = problem(Sites((2, 2), (2, 3)), 2, 0, "plain", False)
    with pytest.raises(MPOError, match=re.escape(message)):
        call(w, metric, start)
