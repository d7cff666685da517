"""Bounds for any bonds from spectra alone, the certificate, the floors, and what a cast costs."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.chains import EPS, HALF_EPS, C, dense, fro, host, legs, make, problems, random_chain, slack, tail_norms
from hypothesis import assume, given
from hypothesis import strategies as st

from mpo_tn import MPO, ErrorBounds, MPOError, Sites, Spectra, Truncation
from mpo_tn.chains.norms import cast_error_estimate
from mpo_tn.linalg import library
from mpo_tn.testing import to_backend
from mpo_tn.truncate.spectra import error_bounds, float_floor, unfolding_spectra

BONDS = st.lists(st.integers(1, 9), min_size=5, max_size=5)
SEEDS = st.integers(0, 2**32 - 1)


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


@given(problems(min_sites=2), BONDS)
def test_what_if_holds_for_the_sweep_that_follows(problem, bonds):
    spectra = unfolding_spectra(problem.matrix, problem.sites)
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=tuple(bonds[: len(spectra)])))
    found = spectra.what_if(mpo.bonds)
    assert found.lower - problem.slack <= report.error <= found.upper + problem.slack
    # Rounding apart: sqrt(sum of n - 1 squares) over their largest.
    assert 1.0 <= found.optimality <= math.sqrt(len(problem.sites) - 1) * (1 + 1e-12)


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


CASTS = [("float64", "float32"), ("float64", "float16"), ("float32", "float16"), ("complex128", "complex64")]


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


@given(legs(max_size=800), st.integers(1, 4), SEEDS, st.sampled_from(tuple(EPS)))
def test_a_cast_that_changes_nothing_costs_nothing(sites, bond, seed, dtype):
    wide = "complex128" if dtype.startswith("complex") else "float64"
    chain = random_chain(sites, bond, seed, dtype)
    assert chain.cast_error(dtype) == 0.0
    assert chain.cast_error(wide) == 0.0


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
