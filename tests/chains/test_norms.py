"""What a cast costs, exactly; the operator norm: never too high, and below its upper value as often as promised."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import EPS, C, dense, fro, host, legs, make, problems, random_chain, slack
from helpers.gauges import gauged
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, OperatorNorm, Sites, Truncation
from mpo_tn.chains.norms import cast_error_estimate
from mpo_tn.truncate.spectra import float_floor

SEEDS = st.integers(0, 2**32 - 1)


def spectral(w):
    largest = np.abs(w).max(initial=0.0)
    return float(np.linalg.norm(w / largest, ord=2)) * largest if largest > 0 else 0.0


@pytest.mark.guarantee("norm-from-above")
@given(problems(), st.integers(1, 4), st.integers(1, 8), st.integers(0, 9))
def test_error_of_a_truncation(problem, bond, steps, seed):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    found = mpo.operator_norm(problem.matrix, steps=steps, seed=seed)
    truth = spectral(problem.host - dense(mpo.cores))
    rounding = slack("float64", problem.host.size, problem.norm)
    assert isinstance(found, OperatorNorm)
    assert found.lower <= truth + rounding
    assert truth <= found.upper + rounding
    assert found.lower <= report.error + problem.slack
    assert 1 <= found.steps <= steps


@pytest.mark.guarantee("norm-from-below")
@given(problems(), st.integers(1, 6), st.integers(1, 12), st.integers(0, 9), st.booleans())
def test_never_above_the_norm(problem, bond, steps, seed, alone):
    """To the rounding that is promised, with no constant."""
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    found = mpo.operator_norm(None if alone else problem.matrix, steps=steps, seed=seed)
    w = dense(mpo.cores)
    truth = spectral(w if alone else w - problem.host)
    size = fro(w) + (0.0 if alone else problem.norm)
    assert found.lower <= truth + slack("float64", w.size, size) / C
    assert found.lower <= found.upper


@pytest.mark.guarantee("norm-from-below")
@given(gauged(dtypes=tuple(EPS)), st.integers(1, 12), st.integers(0, 9))
def test_never_above_the_norm_without_a_centre(cores, steps, seed):
    found = MPO(tuple(cores)).operator_norm(steps=steps, seed=seed)
    gauge = math.prod(fro(host(core)) for core in cores)
    w = dense(cores)
    assert found.lower <= spectral(w) + slack("float64", w.size, gauge) / C


@given(problems(dtypes=tuple(EPS)))
def test_exhausted_spaces_give_the_norm_itself(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    steps = problem.host.shape[1]
    if steps > 60:
        return
    found = mpo.operator_norm(steps=steps)
    truth = spectral(dense(mpo.cores))
    rounding = slack("float64", problem.host.size, problem.norm)
    assert abs(found.lower - truth) <= rounding
    assert found.upper == found.lower
    assert found.failure == 0.0


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 40), (40, 1)])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_wide_and_tall(shape, dtype):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype) if dtype != "float64" else None
    w = rng.standard_normal(shape) if w is None else w
    mpo = MPO([w.reshape(1, *shape, 1)])
    found = mpo.operator_norm()
    assert found.lower == pytest.approx(spectral(w), rel=1e-12)
    assert found.upper == found.lower
    assert found.steps <= 4


@pytest.mark.guarantee("norm-from-above")
def test_thirty_steps_are_close_and_certified():
    w = np.random.default_rng(0).standard_normal((256, 256))
    mpo, report = MPO.from_matrix(w, Sites.balanced(256, 256, n=4), Truncation(max_bond=20))
    truth = spectral(w - dense(mpo.cores))
    found = mpo.operator_norm(w)
    assert 0.97 * truth <= found.lower <= truth + slack("float64", w.size, 2 * fro(w))
    assert truth <= found.upper <= 1.1 * truth
    assert found.upper < report.error / 5
    assert (found.steps, found.failure) == (30, 1e-6)
    assert mpo.operator_norm(w) == found
    assert mpo.operator_norm(w, seed=1) != found
    assert mpo.operator_norm(w, steps=8).upper == math.inf


@pytest.mark.guarantee("norm-from-above")
def test_the_promised_failure_rate():
    """With a rate of 0.9 the bound may fail often; it must not fail more often than that, and it is finite soon."""
    w = np.diag(np.r_[1.0, np.full(199, 0.9)])
    mpo = MPO([w.reshape(1, 200, 200, 1)])
    found = [mpo.operator_norm(steps=4, failure=0.9, seed=seed) for seed in range(50)]
    assert sum(norm.upper < 1.0 for norm in found) <= 45
    assert all(norm.lower <= 1.0 + 1e-14 for norm in found)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", list(EPS))
def test_of_a_difference_of_chains_with_other_legs(dtype, library):
    a = random_chain(Sites((2, 3, 2), (3, 2, 2)), 3, 0, dtype, library)
    b = random_chain(Sites((4, 3), (2, 6)), 2, 1, dtype, library)
    found = a.operator_norm(b, steps=12)
    w = dense(a.cores) - dense(b.cores)
    assert abs(found.lower - spectral(w)) <= slack("float64", w.size, fro(host(a.to_matrix())) + fro(w)) * 10


def test_zero():
    assert MPO([np.zeros((1, 2, 3, 1))]).operator_norm() == OperatorNorm(0.0, 0.0, 0.0, 1)


MPO_ = random_chain(Sites((2, 2), (2, 3)), 2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: MPO_.operator_norm(np.ones((6, 4))),
            "of shape (4, 6), what to subtract is numpy float64 of shape (6, 4)",
        ),
        (lambda: MPO_.operator_norm(torch.ones(4, 6)), "what to subtract is torch float32 of shape (4, 6)"),
        (lambda: MPO_.operator_norm(np.full((4, 6), np.nan)), "24 entries that are NaN"),
        (lambda: MPO_.operator_norm("w"), "a str is not an array"),
        (lambda: MPO_.operator_norm(steps=0), "steps=0 must be a whole number of at least 1"),
        (lambda: MPO_.operator_norm(steps=2.0), "steps=2.0"),
        (lambda: MPO_.operator_norm(seed=-1), "seed=-1 must be a whole number of at least 0"),
        (lambda: MPO_.operator_norm(failure=0.0), "failure=0.0 is a probability"),
        (lambda: MPO_.operator_norm(failure=1), "failure=1 is a probability"),
        (lambda: MPO([core * np.nan for core in MPO_.cores]).operator_norm(), "core 0"),
        (lambda: MPO([np.full((1, 2, 2, 1), 1e300)] * 2).operator_norm(), "beyond the range of float64"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)), np.errstate(all="ignore"):
        call()


CASTS = [("float64", "float32"), ("float64", "float16"), ("float32", "float16"), ("complex128", "complex64")]


@pytest.mark.guarantee("cast-error")
@given(legs(max_size=800), st.integers(1, 5), SEEDS, st.sampled_from(CASTS), st.booleans())
def test_cast_error_is_the_distance_to_the_cast_chain(sites, bond, seed, dtypes, canonical):
    wide, narrow = dtypes
    chain = random_chain(sites, bond, seed, wide)
    chain = chain.canonicalize(0) if canonical else chain
    rounded = [host(core.astype(narrow)) for core in chain.cores]
    error = chain.cast_error(narrow)
    distance = fro(dense(chain.cores) - dense(rounded))
    # The oracle subtracts matrices of the size of the chain; what is tested differs by less.
    gauge = math.prod(fro(core) for core in chain.cores)
    assert abs(error - distance) <= slack("float64", math.prod(sites.shape), gauge)
    assert MPO([torch.from_numpy(core) for core in chain.cores]).cast_error(getattr(torch, narrow)) == pytest.approx(
        error, rel=1e-9, abs=slack("float64", 1, gauge) * 2.0**-10
    )


@pytest.mark.guarantee("cast-error")
@given(legs(max_size=800), st.integers(1, 4), SEEDS, st.sampled_from(tuple(EPS)))
def test_a_cast_that_changes_nothing_costs_nothing(sites, bond, seed, dtype):
    wide = "complex128" if dtype.startswith("complex") else "float64"
    chain = random_chain(sites, bond, seed, dtype)
    assert chain.cast_error(dtype) == 0.0
    assert chain.cast_error(wide) == 0.0


@pytest.mark.guarantee("cast-error")
def test_cast_error_far_below_the_floor_of_double_precision():
    cores = list(random_chain(Sites((2, 2, 2), (2, 2, 2)), 3, 0, "float32").cores)
    cores = [core.astype("float64") for core in cores]
    exact = [core.copy() for core in cores]
    cores[1][1, 0, 1, 2] = np.nextafter(cores[1][1, 0, 1, 2], 9.0)
    delta = np.zeros_like(cores[1])
    delta[1, 0, 1, 2] = cores[1][1, 0, 1, 2] - exact[1][1, 0, 1, 2]
    expected = fro(dense([exact[0], delta, exact[2]]))
    assert 0 < expected < 1e-14
    assert MPO(cores).cast_error("float32") == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("power", [-900, 900])
def test_cast_error_with_the_norm_spread_unevenly(power):
    cores = list(random_chain(Sites((2, 2), (2, 2)), 3, 0).cores)
    plain = MPO(cores).cast_error("float64")
    assert plain == MPO([cores[0] * 2.0**power, cores[1] * 2.0**-power]).cast_error("float64") == 0.0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_estimate_of_a_cast_for_weights_that_are_random(name, n):
    w = torch.from_numpy(make("gaussian", Sites((64,), (64,)), False, n))
    # Singular vectors on full bonds, too: identities would lose nothing in a cast.
    mpo, report = MPO.from_matrix(w, Sites.balanced(64, 64, n=n), Truncation(max_bond=24), method="svd")
    norm = mpo.norm()
    estimate = cast_error_estimate(name, n, norm)
    # Hundreds of independent roundings: their norm is within a fifth of what is expected.
    assert mpo.cast_error(name) == pytest.approx(estimate, rel=0.2)
    assert mpo.cast_error(name) < float_floor(name, n, norm)
    assert report.exact


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("int8", "dtype='int8' is not one of float16"),
        (0.5, "dtype=0.5 is not a dtype"),
        ("bfloat16", "has no bfloat16"),
        ("float16", "core 1 has entries of size 100000, beyond the range of"),
    ],
)
def test_cast_error_refuses(dtype, message):
    mpo = MPO([np.ones((1, 2, 2, 1)), np.full((1, 2, 2, 1), 1e5)])
    with pytest.raises(MPOError, match=re.escape(message)):
        mpo.cast_error(dtype)
    with pytest.raises(MPOError, match="complex cores cannot be cast to float32"):
        MPO([np.ones((1, 2, 2, 1)) * 1j]).cast_error("float32")
    with pytest.raises(MPOError, match="core 0 of shape"):
        MPO([np.full((1, 2, 2, 1), np.nan)]).cast_error("float32")


def test_the_constant_of_the_estimate():
    mantissas = np.exp2((np.arange(10**6) + 0.5) / 10**6)
    rms = math.sqrt(float((mantissas**-2.0).mean()) / 12)
    assert cast_error_estimate(1.0, 1, 1.0) == pytest.approx(rms, rel=1e-9)
    assert C == 4.0
