"""Canonical form: isometries, centre, interval, gauge freedom, norm. Bounds are C * eps * sqrt(size) * norm."""

import math

import numpy as np
import pytest
import torch
from helpers.chains import dense, fro, host, legs, mpos, problems, random_chain, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, Sites, Truncation
from mpo_tn.testing import assert_canonical

CHAINS = mpos(forms=("none",))


def name(mpo: MPO) -> str:
    return str(mpo.dtype).rsplit(".", maxsplit=1)[-1]


def slack_of(mpo: MPO) -> float:
    """Rounding of a chain that was not canonical is relative to the product of its cores, not to its matrix."""
    gauge = math.prod(fro(host(core)) for core in mpo.cores) if mpo.center is None else mpo.norm()
    return slack(name(mpo), math.prod(mpo.shape), gauge)


@given(problems(), st.integers(1, 6))
def test_from_matrix_is_canonical_at_its_centre(problem, bond):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    center = problem.sites.center
    assert mpo.center == center
    assert_canonical(mpo, center)


@pytest.mark.guarantee("canonical")
@given(CHAINS, st.data())
def test_canonicalize(chain, data):
    center = data.draw(st.integers(0, len(chain) - 1))
    moved = chain.canonicalize(center)
    assert moved.center == center
    assert_canonical(moved, center)
    assert fro(dense(moved.cores) - dense(chain.cores)) <= slack_of(chain)
    sizes = chain.sites.sizes
    for k, bond in enumerate(moved.bonds):
        reachable = math.prod(sizes[: k + 1]) if k < center else math.prod(sizes[k + 1 :])
        assert bond <= min(chain.bonds[k], reachable)


@pytest.mark.guarantee("canonical")
@given(CHAINS, st.data())
def test_canonicalize_again_moves_only_what_lies_between(chain, data):
    first, second = (data.draw(st.integers(0, len(chain) - 1)) for _ in range(2))
    once = chain.canonicalize(first)
    twice = once.canonicalize(second)
    assert twice.center == second
    assert_canonical(twice)
    low, high = sorted((first, second))
    for k, (a, b) in enumerate(zip(once.cores, twice.cores, strict=True)):
        if not low <= k <= high:
            assert np.array_equal(host(a), host(b))
    assert fro(dense(once.cores) - dense(twice.cores)) <= slack_of(once)
    assert all(
        np.array_equal(host(a), host(b)) for a, b in zip(once.cores, once.canonicalize(first).cores, strict=True)
    )


@pytest.mark.guarantee("canonical")
@given(CHAINS, st.data())
def test_partial_interval_is_trusted_and_completed(chain, data):
    center = data.draw(st.integers(0, len(chain) - 1))
    low, high = data.draw(st.integers(0, center)), data.draw(st.integers(center, len(chain) - 1))
    cores = list(chain.canonicalize(center).cores)
    for k in range(low, high + 1):
        cores[k] = cores[k] * 3
    partial = MPO(tuple(cores), (low, high))
    assert partial.canonical_interval == (low, high)
    assert partial.center == (low if low == high else None)
    assert_canonical(partial)
    target = data.draw(st.integers(0, len(chain) - 1))
    moved = partial.canonicalize(target)
    assert_canonical(moved)
    assert fro(dense(moved.cores) - dense(cores)) <= slack_of(MPO(tuple(cores)))
    assert abs(partial.norm() - fro(dense(cores))) <= slack_of(MPO(tuple(cores)))


def test_new_chain_claims_nothing():
    chain = random_chain(Sites((2, 2, 2), (2, 2, 2)), 2, 0)
    assert chain.canonical_interval == (0, 2)
    assert chain.center is None


@given(CHAINS)
def test_norm(chain):
    assert abs(chain.norm() - fro(dense(chain.cores))) <= slack_of(chain)


@given(problems())
def test_norm_of_a_decomposition(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    assert abs(mpo.norm() - problem.norm) <= problem.slack
    assert abs(MPO(mpo.cores).norm() - problem.norm) <= problem.slack


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_norm_is_in_double_precision_without_a_centre(dtype):
    chain = MPO(
        tuple(torch.tensor(host(core)).to(dtype) for core in random_chain(Sites((3,) * 3, (5,) * 3), 4, 0).cores)
    )
    assert chain.center is None
    exact = fro(dense(chain.cores))
    assert abs(chain.norm() - exact) <= slack("float64", 15**3, exact)


@given(legs(min_sites=2, max_size=1500), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_gauge_invariance(sites, bond, seed, kept):
    """Inserting X X^-1 on every bond changes nothing that a user can see."""
    chain = random_chain(sites, bond, seed)
    rng = np.random.default_rng(seed)
    cores = list(chain.cores)
    for k in range(len(cores) - 1):
        q, _ = np.linalg.qr(rng.standard_normal((bond, bond)))
        gauge = q * rng.uniform(0.5, 2.0, bond)
        cores[k] = np.tensordot(cores[k], gauge, axes=1)
        cores[k + 1] = np.tensordot(np.linalg.inv(gauge), cores[k + 1], axes=1)
    other = MPO(tuple(cores))
    tolerance = slack_of(chain) * 2 ** len(cores)
    assert fro(dense(other.cores) - dense(chain.cores)) <= tolerance
    assert abs(other.norm() - chain.norm()) <= tolerance
    for a, b in zip(chain.spectra(), other.spectra(), strict=True):
        assert fro(a - b) <= tolerance
    (small, report), (other_small, other_report) = (c.compress(Truncation(max_bond=kept)) for c in (chain, other))
    assert small.bonds == other_small.bonds
    # Gaussian cores have no exact ties, but near ties amplify rounding in what is cut, by the relative gap.
    gaps = [(s[kept - 1] - s[kept]) / s[0] for s in chain.spectra() if len(s) > kept]
    assert abs(report.error - other_report.error) <= tolerance / min([1.0, *gaps])


@given(problems(), st.integers(1, 5))
def test_library_dtype_and_device_are_preserved(problem, bond):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=bond))
    small, _ = mpo.compress(Truncation(max_bond=1))
    for chain in (mpo, small, mpo.canonicalize(0), MPO(mpo.cores).canonicalize(len(mpo) - 1)):
        assert chain.shape == problem.sites.shape
        assert chain.sites == problem.sites
        assert chain.dtype == problem.matrix.dtype
        assert chain.num_parameters == problem.sites.num_parameters(chain.bonds)
        for array in (*chain.cores, chain.to_matrix()):
            assert type(array) is type(problem.matrix)
            assert array.dtype == problem.matrix.dtype
            assert array.device == problem.matrix.device
