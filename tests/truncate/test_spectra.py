"""Spectra against NumPy's SVD of the unfoldings, entropies between their limits, bounds for any bonds, floors."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import (
    EPS,
    HALF_EPS,
    C,
    fro,
    host,
    legs,
    make,
    problems,
    random_chain,
    slack,
    tail_norms,
    to_backend,
    unfoldings,
)  # fmt: skip
from hypothesis import assume, given
from hypothesis import strategies as st

from mpo_tn import MPO, ErrorBounds, MPOError, Sites, Spectra, Truncation
from mpo_tn.linalg import library
from mpo_tn.truncate.spectra import entropy, error_bounds, float_floor, unfolding_spectra

ENTROPY_ROUNDING = 1e-12
BONDS = st.lists(st.integers(1, 9), min_size=5, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


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


@pytest.mark.guarantee("what-if")
@given(problems(), BONDS)
def test_what_if_is_what_svds_of_the_unfoldings_say(problem, bonds):
    bonds = tuple(bonds[: len(problem.sites) - 1])
    spectra = unfolding_spectra(problem.matrix, problem.sites)
    found = spectra.what_if(bonds)
    eps_k = tail_norms(problem.host, problem.sites, bonds)
    assert isinstance(found, ErrorBounds)
    assert abs(found.lower - max(eps_k, default=0.0)) <= problem.slack
    assert abs(found.upper - math.hypot(*eps_k)) <= problem.slack
    assert found == error_bounds(list(spectra), bonds)
    assert all(spectra.tail(k, bond) <= found.lower for k, bond in enumerate(bonds))
    if len(bonds):
        assert abs(spectra.norm - problem.norm) <= problem.slack


@pytest.mark.guarantee("what-if")
@given(problems(min_sites=2), BONDS)
def test_what_if_holds_for_the_sweep_that_follows(problem, bonds):
    spectra = unfolding_spectra(problem.matrix, problem.sites)
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=tuple(bonds[: len(spectra)])))
    found = spectra.what_if(mpo.bonds)
    assert found.lower - problem.slack <= report.error <= found.upper + problem.slack
    # Rounding apart: sqrt(sum of n - 1 squares) over their largest.
    assert 1.0 <= found.optimality <= math.sqrt(len(problem.sites) - 1) * (1 + 1e-12)


@pytest.mark.guarantee("what-if", "inequalities")
@given(problems(min_sites=2), BONDS, SEEDS)
def test_the_lower_bound_holds_for_every_chain_with_these_bonds(problem, bonds, seed):
    assume(problem.norm > 0)
    spectra = unfolding_spectra(problem.matrix, problem.sites)
    some = random_chain(problem.sites, bonds[0], seed)
    fitted, report = MPO([like_matrix(core, problem) for core in some.cores]).fit(problem.matrix, sweeps=1)
    lower = spectra.what_if(fitted.bonds).lower
    assert lower <= report.error + problem.slack
    if lower > problem.slack:
        ratio = spectra.optimality(report.error, fitted.bonds)
        assert ratio == report.error / lower
        assert ratio >= 1 - problem.slack / lower


def like_matrix(core, problem):
    return to_backend(host(core), library(problem.matrix), problem.dtype)


@given(problems(min_sites=2), BONDS)
def test_wider_bonds_never_have_a_larger_bound(problem, bonds):
    spectra = unfolding_spectra(problem.matrix, problem.sites)
    bonds = bonds[: len(spectra)]
    narrow = spectra.what_if(bonds)
    for k in range(len(bonds)):
        wider = spectra.what_if([bond + (j == k) for j, bond in enumerate(bonds)])
        assert wider.lower <= narrow.lower
        assert wider.upper <= narrow.upper


def test_optimality_at_the_ends():
    spectra = Spectra([np.array([4.0, 3.0])], Sites((2, 2), (1, 1)))
    assert spectra.optimality(6.0, [1]) == 2.0
    assert spectra.optimality(0.0, [2]) == 1.0
    assert spectra.optimality(1.0, [2]) == math.inf
    assert spectra.what_if([2]).optimality == 1.0
    assert spectra.what_if([np.int64(1)]) == (3.0, 3.0)


def test_spectra_are_a_sequence():
    spectra = MPO.from_matrix(np.eye(8), Sites.balanced(8, 8, n=3))[0].spectra()
    assert isinstance(spectra, Spectra)
    assert len(spectra) == len(list(spectra)) == 2
    assert spectra[-1] is spectra[1]
    assert len(spectra[:1]) == 1
    assert repr(spectra).startswith("Spectra([[2.828427, 0.0")
    single = MPO.from_matrix(np.eye(2), Sites((2,), (2,)))[0].spectra()
    assert single.what_if([]) == (0.0, 0.0)
    assert single.norm == 0.0


@pytest.mark.parametrize(
    ("bonds", "message"),
    [
        ([1], "bonds=(1,) has 1 entries and there are 2 spectra"),
        ([1, 0], "bonds=(1, 0): a bond must be a whole number"),
        ([-1, 1], "bonds=(-1, 1): a bond must be"),
        ([1.0, 1], "bonds=(1.0, 1): a bond must be"),
        (["a", 1], "bonds=('a', 1): a bond must be"),
    ],
)
def test_what_if_refuses(bonds, message):
    spectra = Spectra([np.ones(2), np.ones(2)], Sites((2, 2, 2), (1, 1, 1)))
    with pytest.raises(MPOError, match=re.escape(message)):
        spectra.what_if(bonds)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, -1.0], [math.nan], [math.inf], [[1.0]]])
def test_spectra_refuse_what_is_none(values):
    with pytest.raises(MPOError, match="spectrum 0 is not a list of descending, finite numbers"):
        Spectra([np.array(values)], Sites((2, 2), (2, 2)))


def test_spectra_refuse_another_number_of_bonds():
    with pytest.raises(MPOError, match="1 spectra for 3 sites: there are 2 inner bonds"):
        Spectra([np.ones(2)], Sites((2, 2, 2), (2, 2, 2)))


@pytest.mark.parametrize(("name", "value"), [*EPS.items(), *HALF_EPS.items()])
def test_floor_of_every_dtype(name, value):
    value += 16 * EPS["float64"]  # the arithmetic
    assert float_floor(name, 9, 2.0) == 6.0 * value
    assert float_floor(getattr(torch, name), 9, 2.0) == 6.0 * value
    if hasattr(np, name):
        assert float_floor(getattr(np, name), 9, 2.0) == float_floor(np.dtype(name), 9, 2.0) == 6.0 * value


@pytest.mark.parametrize("dtype", ["int8", torch.int64, np.int32, "nonsense", None])
def test_floor_refuses_other_dtypes(dtype):
    with pytest.raises(MPOError, match="is not one of float16, bfloat16, float32"):
        float_floor(dtype, 2, 1.0)


@given(problems(), st.sampled_from(("float16", "float32", "float64", "complex64", "complex128")))
def test_reports_use_the_floor(problem, dtype):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=2))
    assert report.floor == float_floor(problem.dtype, len(mpo), report.norm)
    assert mpo.fit(problem.matrix, sweeps=0)[1].floor == pytest.approx(report.floor, rel=1e-12)
