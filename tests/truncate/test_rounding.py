"""Rounding a chain: exact error, idempotence, scale, and that nothing given is changed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.chains import EPS, HALF_EPS, C, dense, fro, host, legs, problems, random_chain, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, Sites, Truncation
from mpo_tn.truncate import sweep
from mpo_tn.truncate.spectra import unfolding_spectra

CAPS = st.integers(1, 8)
METHODS = ("auto", "svd", "gram", "krylov", "randomized")


@pytest.mark.guarantee("exact-rounding")
@given(problems(), CAPS)
def test_error_of_compress_is_the_frobenius_distance(problem, cap):
    exact, _ = MPO.from_matrix(problem.matrix, problem.sites)
    small, report = exact.compress(Truncation(max_bond=cap))
    assert abs(fro(dense(exact.cores) - dense(small.cores)) - report.error) <= problem.slack
    assert abs(math.hypot(*(bond.discarded_norm for bond in report.bonds)) - report.error) <= problem.slack
    assert report.exact
    assert 0 <= report.lower_bound <= report.error <= report.bound
    assert small.center == problem.sites.center
    assert all(bond <= cap for bond in small.bonds)


@pytest.mark.guarantee("exact-rounding")
@given(legs(), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from(tuple(EPS)), CAPS)
def test_error_of_compress_for_a_chain_of_any_form(sites, bond, seed, dtype, cap):
    chain = random_chain(sites, bond, seed, dtype)
    small, report = chain.compress(Truncation(max_bond=cap))
    gauge = math.prod(fro(host(core)) for core in chain.cores)
    tolerance = slack(dtype, math.prod(sites.shape), gauge)
    assert abs(fro(dense(chain.cores) - dense(small.cores)) - report.error) <= tolerance
    assert abs(report.norm - fro(dense(chain.cores))) <= tolerance
    assert any("canonical form first" in note for note in report.notes) == (chain.center is None)


@pytest.mark.guarantee("inequalities")
@given(problems(), CAPS)
def test_error_of_compress_obeys_the_a_priori_bounds(problem, cap):
    exact, _ = MPO.from_matrix(problem.matrix, problem.sites)
    small, report = exact.compress(Truncation(max_bond=cap))
    kept = [bond.kept for bond in report.bonds]
    eps_k = [fro(values[r:]) for values, r in zip(exact.spectra(), kept, strict=True)]
    for bond, tail in zip(report.bonds, eps_k, strict=True):
        assert bond.discarded_norm <= tail + problem.slack
    assert max(eps_k, default=0.0) <= report.error + problem.slack
    assert report.error <= math.hypot(*eps_k) + problem.slack
    assert all(a <= b for a, b in zip(small.bonds, kept, strict=True))


@given(problems(), CAPS)
def test_compress_is_idempotent(problem, cap):
    once, _ = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=cap))
    for _ in range(2):
        twice, report = once.compress(Truncation(max_bond=cap))
        assert report.error <= problem.slack
        assert fro(dense(twice.cores) - dense(once.cores)) <= 2 * problem.slack
        assert all(a <= b for a, b in zip(twice.bonds, once.bonds, strict=True))
        once = twice


@given(problems())
def test_compress_without_a_cap_cuts_nothing(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    same, report = mpo.compress(Truncation())
    assert same.bonds == mpo.bonds
    assert report.error == 0.0
    assert fro(dense(same.cores) - problem.host) <= 2 * problem.slack


@pytest.mark.guarantee("tolerance")
@given(problems(), st.floats(1e-6, 0.9))
def test_compress_meets_a_tolerance(problem, rel_error):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    small, report = mpo.compress(Truncation(rel_error=rel_error, strict=True))
    assert report.error <= rel_error * report.norm * (1 + 1e-12)
    assert fro(problem.host - dense(small.cores)) <= rel_error * problem.norm + 2 * problem.slack


@pytest.mark.guarantee("power-of-two")
@given(problems(scaled=False), CAPS, st.integers(-60, 60))
def test_scaling_by_a_power_of_two_scales_everything_exactly(problem, cap, power):
    factor = 2.0**power
    plain, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=cap))
    scaled, scaled_report = MPO.from_matrix(problem.matrix * factor, problem.sites, Truncation(max_bond=cap))
    assert scaled_report.error == report.error * factor
    assert scaled_report.norm == report.norm * factor
    for k, (a, b) in enumerate(zip(plain.cores, scaled.cores, strict=True)):
        # Exact but for entries that leave the normal range.
        tiny = float(np.finfo(problem.dtype).smallest_normal)
        assert np.abs(host(a) * (factor if k == plain.center else 1.0) - host(b)).max() <= tiny * max(1.0, factor)
    small, small_report = plain.compress(Truncation(max_bond=1))
    scaled_small, scaled_small_report = scaled.compress(Truncation(max_bond=1))
    denormal = tiny * max(1.0, factor) * math.prod(plain.shape)
    assert abs(scaled_small_report.error - small_report.error * factor) <= denormal
    difference = host(small.to_matrix()) * factor - host(scaled_small.to_matrix())
    assert np.abs(difference).max() <= denormal


def scaled_report(report, factor):
    """What a report is of a matrix that is ``factor`` times as large."""
    bonds = tuple(
        replace(
            bond, discarded_norm=bond.discarded_norm * factor, tail=None if bond.tail is None else bond.tail * factor
        )
        for bond in report.bonds
    )
    lengths = {name: getattr(report, name) for name in ("error", "norm", "bound", "lower_bound", "floor")}
    scaled = {name: None if value is None else value * factor for name, value in lengths.items()}
    return replace(report, bonds=bonds, **scaled)


@pytest.mark.guarantee("power-of-two")
@given(problems(scaled=False), st.none() | CAPS, st.floats(1e-4, 0.9), st.integers(-40, 40), st.sampled_from(METHODS))
def test_all_that_is_reported_scales_exactly(problem, cap, rel_error, power, method):
    """By every method, with caps, tolerances and bounds."""
    factor = 2.0**power
    truncation = Truncation(max_bond=cap, rel_error=rel_error)
    (plain, report), (scaled, again) = (
        MPO.from_matrix(problem.matrix * f, problem.sites, truncation, spectra=True, method=method)
        for f in (1.0, factor)
    )
    assert scaled_report(report, factor) == again
    assert scaled.bonds == plain.bonds


@pytest.mark.guarantee("power-of-two")
@pytest.mark.parametrize("method", ["auto", "krylov"])
@pytest.mark.parametrize("power", [20, -20, 70])
def test_large_single_precision_matrices_scale_exactly(power, method):
    """Multiplied in single precision at both norms, which lie within 1e-25 to 1e25."""
    w = np.random.default_rng(0).standard_normal((256, 512)).astype("float32")
    sites = Sites((4, 4, 4, 4), (8, 4, 4, 4))
    (plain, report), (scaled, again) = (
        MPO.from_matrix(w * np.float32(2.0**p), sites, Truncation(max_bond=40), method=method) for p in (0, power)
    )
    assert scaled_report(report, 2.0**power) == again
    for k, (a, b) in enumerate(zip(plain.cores, scaled.cores, strict=True)):
        assert np.array_equal(a * np.float32(2.0**power) if k == plain.center else a, b)


@pytest.mark.guarantee("power-of-two")
@pytest.mark.parametrize("power", [-2, 1, 4])
@pytest.mark.parametrize("dtype", list(HALF_EPS))
def test_half_precision_scales_exactly(dtype, power):
    """The norm is shared out among the cores, so it is their product that scales."""
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 16))).to(getattr(torch, dtype))
    (plain, report), (scaled, again) = (
        MPO.from_matrix(w * 2.0**p, Sites.balanced(16, 16, n=3), Truncation(max_bond=3)) for p in (0, power)
    )
    assert scaled_report(report, 2.0**power) == again
    assert np.array_equal(dense(plain.cores) * 2.0**power, dense(scaled.cores))


@pytest.mark.guarantee("power-of-two")
@pytest.mark.parametrize("power", [1, -3, 57, -300])
@pytest.mark.parametrize("dtype", list(EPS))
def test_a_multiple_by_a_power_of_two_is_factorised_from_the_same_bits(dtype, power, monkeypatch):
    # Scaling is exact whatever LAPACK does, because it is handed the same numbers: its own digits for A and for 2 A
    # differ on some processors (an Intel Xeon was one).
    if "32" in dtype or dtype == "complex64":
        power = max(power, -60)
    seen = []
    plain_factor = sweep.factor
    monkeypatch.setattr(
        sweep,
        "factor",
        lambda group, *args, **kw: seen.append(host(group)) or plain_factor(group, *args, **kw),
    )
    w = np.random.default_rng(0).standard_normal((12, 20)).astype(dtype)
    for matrix in (w, w * w.dtype.type(2.0**power)):
        MPO.from_matrix(matrix, Sites.balanced(12, 20, n=4), Truncation(max_bond=2))
    half = len(seen) // 2
    assert half > 0
    assert len(seen) == 2 * half
    assert all(np.array_equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.guarantee("power-of-two")
@given(problems(scaled=False), st.integers(-60, 60))
def test_spectra_scale_exactly_by_a_power_of_two(problem, power):
    plain = unfolding_spectra(problem.matrix, problem.sites)
    scaled = unfolding_spectra(problem.matrix * 2.0**power, problem.sites)
    assert all(np.array_equal(a * 2.0**power, b) for a, b in zip(plain, scaled, strict=True))


@given(problems(kinds=("gaussian", "decaying")), st.floats(1e-3, 0.9), st.floats(1e-3, 1e3))
def test_scaling_by_any_number_scales_the_error(problem, rel_error, factor):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(rel_error=rel_error))
    scaled, scaled_report = MPO.from_matrix(problem.matrix * factor, problem.sites, Truncation(rel_error=rel_error))
    # A bond changes only where a tail equals the budget to rounding.
    if scaled.bonds == mpo.bonds:
        assert abs(scaled_report.error - factor * report.error) <= factor * problem.slack
    assert scaled_report.error <= rel_error * scaled_report.norm * (1 + 1e-12)


@given(problems(), CAPS)
def test_arguments_are_left_alone(problem, cap):
    before = host(problem.matrix)
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=cap), spectra=True)
    assert np.array_equal(before, host(problem.matrix))
    cores = [host(core) for core in mpo.cores]
    mpo.compress(Truncation(max_bond=1))
    mpo.canonicalize(len(mpo) - 1)
    mpo.spectra()
    mpo.norm()
    matrix = mpo.to_matrix()
    matrix *= 0
    assert all(np.array_equal(a, host(b)) for a, b in zip(cores, mpo.cores, strict=True))


@pytest.mark.parametrize("dtype", list(EPS))
def test_one_cap_per_bond(dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 16)).astype(dtype)
    mpo, report = MPO.from_matrix(w, Sites.balanced(16, 16, n=4), Truncation(max_bond=(3, 5, 2)))
    assert mpo.bonds == (3, 5, 2)
    small, again = mpo.compress(Truncation(max_bond=(2, 4, 1)))
    assert tuple(bond.kept for bond in again.bonds) == (2, 4, 1)
    assert fro(host(w) - dense(small.cores)) <= report.error + again.error + C * EPS[dtype] * 16 * fro(w)
