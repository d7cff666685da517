"""The operator norm: never above the largest singular value, and below the upper value as often as promised."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, fro, host, problems, random_chain, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, OperatorNorm, Sites, Truncation


def spectral(w):
    largest = np.abs(w).max(initial=0.0)
    return float(np.linalg.norm(w / largest, ord=2)) * largest if largest > 0 else 0.0


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


def test_thirty_steps_are_close_and_certified():
    w = np.random.default_rng(0).standard_normal((256, 256))
    mpo, report = MPO.from_matrix(w, Sites.balanced(256, 256, n=4), Truncation(max_bond=20))
    truth = spectral(w - dense(mpo.cores))
    found = mpo.operator_norm(w)
    assert 0.97 * truth <= found.lower <= truth
    assert truth <= found.upper <= 1.1 * truth
    assert found.upper < report.error / 5
    assert (found.steps, found.failure) == (30, 1e-6)
    assert mpo.operator_norm(w) == found
    assert mpo.operator_norm(w, seed=1) != found
    assert mpo.operator_norm(w, steps=8).upper == math.inf


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
        (lambda: MPO([np.full((1, 2, 2, 1), 1e300)] * 2).operator_norm(), "overflow double precision"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)), np.errstate(all="ignore"):
        call()
