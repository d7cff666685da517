"""Spectra against NumPy's SVD of the unfoldings; entropies between their limits."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import EPS, C, fro, legs, make, problems, random_chain, slack, tail_norms, unfoldings
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.truncate.spectra import entropy, error_bounds, unfolding_spectra

ENTROPY_ROUNDING = 1e-12


def svd(unfolding: np.ndarray) -> np.ndarray:
    return np.linalg.svd(unfolding, compute_uv=False)


@given(problems())
def test_spectra_of_the_matrix_and_of_its_chain(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    dense_spectra = unfolding_spectra(problem.matrix, problem.sites)
    for values, chain_values, m in zip(
        dense_spectra, mpo.spectra(), unfoldings(problem.host, problem.sites), strict=True
    ):
        assert isinstance(values, np.ndarray)
        assert values.dtype == chain_values.dtype == np.float64
        assert values.shape == chain_values.shape == (min(m.shape),)
        # A Gram matrix of 32 bit data resolves values down to sqrt(eps(float64)) only, below eps(float32).
        assert np.abs(values - svd(m)).max() <= problem.slack
        assert np.abs(chain_values - svd(m)).max() <= problem.slack
        assert (np.diff(values) <= 0).all()
        assert (values >= 0).all()


@given(legs(max_size=1500), st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from(tuple(EPS)))
def test_spectra_of_a_chain_of_any_form(sites, bond, seed, dtype):
    chain = random_chain(sites, bond, seed, dtype)
    w = chain.to_matrix().astype("complex128" if dtype.startswith("complex") else "float64")
    tolerance = slack(dtype, w.size, math.prod(fro(core) for core in chain.cores))
    for values, m in zip(chain.spectra(), unfoldings(w, sites), strict=True):
        assert len(values) <= min(bond, *m.shape)
        expected = svd(m)
        assert np.abs(values - expected[: len(values)]).max() <= tolerance
        assert fro(expected[len(values) :]) <= tolerance


@given(problems(), st.integers(1, 6))
def test_error_bounds(problem, bond):
    bonds = tuple(min(bond, full) for full in problem.sites.full_bonds)
    lower, upper = error_bounds(unfolding_spectra(problem.matrix, problem.sites), bonds)
    eps_k = tail_norms(problem.host, problem.sites, bonds)
    assert abs(lower - max(eps_k, default=0.0)) <= problem.slack
    assert abs(upper - math.hypot(*eps_k)) <= problem.slack
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bonds), spectra=True)
    assert mpo.bonds == bonds
    assert abs(report.lower_bound - lower) <= problem.slack
    assert abs(report.bound - upper) <= problem.slack


def test_error_bounds_of_bonds_beyond_the_spectrum_and_of_none():
    assert error_bounds([np.array([2.0, 1.0])], [9]) == (0.0, 0.0)
    assert error_bounds([], []) == (0.0, 0.0)


def test_error_bounds_need_one_bond_per_spectrum():
    with pytest.raises(MPOError, match=re.escape("bonds=(1, 2) has 2 entries and there are 1")):
        error_bounds([np.ones(2)], (1, 2))


@given(problems())
def test_entropies_lie_between_their_limits(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    entropies = mpo.entropies()
    assert len(entropies) == len(mpo) - 1
    for value, bond in zip(entropies, mpo.bonds, strict=True):
        assert 0.0 <= value <= math.log(bond) + ENTROPY_ROUNDING


@given(legs(min_sites=2), st.integers(0, 2**32 - 1))
def test_entropy_of_a_product_is_zero(sites, seed):
    w = make("rank_one", sites, False, seed)
    mpo, _ = MPO.from_matrix(w, sites)
    # s_2 <= slack gives at most d * x ln(1/x) with x = (slack / norm)^2, far below this.
    assert max(mpo.entropies()) <= ENTROPY_ROUNDING
    assert max(MPO.from_matrix(0 * w, sites)[0].entropies()) == 0.0


@pytest.mark.parametrize("bond", [1, 2, 3, 7])
def test_entropy_of_a_flat_spectrum_is_its_maximum(bond):
    assert abs(entropy(np.full(bond, 1e-200)) - math.log(bond)) <= ENTROPY_ROUNDING
    assert abs(entropy(np.append(np.full(bond, 1e200), 0.0)) - math.log(bond)) <= ENTROPY_ROUNDING
    swap = np.eye(bond * bond).reshape(bond, bond, bond, bond).transpose(0, 1, 3, 2).reshape(bond**2, bond**2)
    (value,) = MPO.from_matrix(swap, Sites((bond, bond), (bond, bond)))[0].entropies()
    assert abs(value - math.log(bond * bond)) <= ENTROPY_ROUNDING


def test_entropy_of_two_values():
    p = 0.36
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert abs(entropy(np.array([8.0, 6.0])) - expected) <= ENTROPY_ROUNDING


@pytest.mark.parametrize("array", [np.ones((4, 4)), torch.ones(4, 4)])
def test_unfolding_spectra_refuse_other_legs(array):
    with pytest.raises(MPOError, match=re.escape("multiply to (4, 6) and the matrix is (4, 4)")):
        unfolding_spectra(array, Sites((2, 2), (2, 3)))
    broken = array * 1.0
    broken[0, 0] = math.nan
    with pytest.raises(MPOError, match="1 entries that are NaN"):
        unfolding_spectra(broken, Sites((2, 2), (2, 2)))


def test_rounding_constant_is_the_documented_one():
    assert f"{C:g} * eps(dtype) * sqrt(size) * norm" in (MPO.from_matrix.__doc__ or "")
