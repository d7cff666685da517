"""float16 and bfloat16: computed in double precision, stored as given, no canonical form claimed."""

import numpy as np
import pytest
from helpers.chains import dense, fewer, fro, host, legs, make, slack, to_backend
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, Sites, Truncation

WHICH = ("float16 numpy", "float16 torch", "bfloat16 torch", "float16 jax", "bfloat16 jax")
HALVES = st.sampled_from(WHICH)


def half(kind, sites, seed, which, scale=1.0):
    dtype, library = which.split()
    return to_backend(make(kind, sites, False, seed) * scale, library, dtype), dtype


@pytest.mark.guarantee("full-bonds")
@pytest.mark.slow
@fewer
@given(legs(), st.integers(0, 2**32 - 1), HALVES, st.sampled_from((1.0, 1e-2, 30.0)))
def test_full_bonds(sites, seed, which, scale):
    w, dtype = half("gaussian", sites, seed, which, scale)
    mpo, report = MPO.from_matrix(w, sites)
    assert mpo.bonds == sites.full_bonds
    assert all(core.dtype == w.dtype and type(core) is type(w) for core in mpo.cores)
    assert mpo.to_matrix().dtype == w.dtype
    assert mpo.canonical_interval == (0, len(sites) - 1)
    assert any(f"computed in float64, stored as {dtype}" in note for note in report.notes)
    assert report.error == 0.0
    assert fro(host(w) - dense(mpo.cores)) <= slack(dtype, host(w).size, fro(host(w)))


@pytest.mark.guarantee("exact-error")
@given(legs(min_sites=2), st.integers(0, 2**32 - 1), HALVES, st.integers(1, 4))
def test_error_of_a_sweep_up_to_storage(sites, seed, which, bond):
    w, dtype = half("decaying", sites, seed, which)
    mpo, report = MPO.from_matrix(w, sites, Truncation(max_bond=bond))
    tolerance = slack(dtype, host(w).size, fro(host(w)))
    assert abs(fro(host(w) - dense(mpo.cores)) - report.error) <= tolerance
    # Even in storage precision the norm is computed in double precision.
    assert abs(mpo.norm() - fro(dense(mpo.cores))) <= slack("float64", host(w).size, mpo.norm())
    small, again = mpo.compress(Truncation(max_bond=1))
    assert small.dtype == w.dtype
    assert small.canonical_interval == (0, len(sites) - 1)
    assert abs(fro(dense(mpo.cores) - dense(small.cores)) - again.error) <= tolerance
    moved = mpo.canonicalize(0)
    assert moved.dtype == w.dtype
    assert moved.center is None
    assert fro(dense(mpo.cores) - dense(moved.cores)) <= tolerance


@pytest.mark.parametrize("which", WHICH)
def test_norm_is_shared_out_evenly(which):
    """A norm beyond 65504 in one core would be infinite in float16."""
    sites = Sites((8, 8), (8, 8))
    w, _ = half("gaussian", sites, 0, which, 1.0)
    w = w * 0 + 60000
    mpo, _ = MPO.from_matrix(w, sites, Truncation(max_bond=1))
    sizes = [fro(host(core)) for core in mpo.cores]
    assert max(sizes) <= 2 * 2 * min(sizes)
    small, _ = mpo.compress(Truncation(max_bond=1))
    assert all(np.isfinite(host(core)).all() for chain in (mpo, small, mpo.canonicalize(1)) for core in chain.cores)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("n", [2, 5])
def test_the_floor_covers_what_storage_and_arithmetic_add(dtype, n):
    """In double precision the arithmetic is the larger part; the floor used to leave it out."""
    matrix = np.random.default_rng(0).standard_normal((192, 192)).astype(dtype)
    mpo, report = MPO.from_matrix(matrix, Sites.balanced(192, 192, n))
    rebuilt = MPO([core.astype(np.float64) for core in mpo.cores]).to_matrix()
    assert np.linalg.norm(rebuilt - matrix.astype(np.float64)) <= report.floor
