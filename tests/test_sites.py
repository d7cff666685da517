"""Legs: products, full bonds, parameter counts, and the largest cap that fits."""

import math

import numpy as np
import pytest
from helpers.chains import legs, random_chain
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 8))
def test_balanced_multiplies_exactly_and_rises_towards_the_middle(out, in_, n):
    sites = Sites.balanced(out, in_, n=n)
    assert len(sites) == n
    assert sites.shape == (out, in_)
    for side in (sites.out, sites.in_):
        if (n, out, in_) not in {(5, *shape) for shape in PAPER}:
            peak = side.index(max(side))
            assert list(side[:peak]) == sorted(side[:peak])
            assert list(side[peak:]) == sorted(side[peak:], reverse=True)
            assert max(side) in side[(n - 1) // 2 : n // 2 + 1]


PAPER = {
    (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4)),
    (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4)),
    (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)),
    (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2)),
}


@pytest.mark.parametrize("shape", list(PAPER))
def test_legs_of_the_paper(shape):
    sites = Sites.balanced(*shape)
    assert (sites.out, sites.in_) == PAPER[shape]
    assert sites.shape == shape
    assert Sites.balanced(*shape, n=4).shape == shape


@pytest.mark.parametrize(("size", "expected"), [(384, (2, 4, 6, 4, 2)), (1536, (2, 4, 24, 4, 2))])
def test_balanced_by_design(size, expected):
    assert Sites.balanced(size, size).out == expected


@pytest.mark.parametrize("prime", [2, 7, 257, 30011])
def test_prime_side_goes_to_the_middle(prime):
    assert Sites.balanced(prime, prime) == Sites((1, 1, prime, 1, 1), (1, 1, prime, 1, 1))


@given(legs(max_size=600))
def test_full_bonds_are_the_ranks_of_a_generic_matrix(sites):
    w = np.random.default_rng(0).standard_normal(sites.shape)
    mpo, _ = MPO.from_matrix(w, sites)
    for k, (bond, values) in enumerate(zip(sites.full_bonds, mpo.spectra(), strict=True), start=1):
        assert bond == min(math.prod(sites.sizes[:k]), math.prod(sites.sizes[k:])) == len(values)
        # A Gaussian matrix has no tiny singular value but by accident.
        assert values[-1] > 1e-9 * values[0]
    assert sites.sizes == tuple(a * b for a, b in sites)


@given(legs(), st.integers(1, 9))
def test_num_parameters_counts_the_cores(sites, bond):
    chain = random_chain(sites, bond, 0)
    assert sites.num_parameters(chain.bonds) == chain.num_parameters == sum(core.size for core in chain.cores)


@given(legs(), st.integers(1, 5000))
def test_largest_cap_is_the_largest_that_fits(sites, budget):
    least = sites.num_parameters(sites.capped_bonds(1))
    if least > budget:
        with pytest.raises(MPOError, match=str(least)):
            sites.largest_cap(budget)
        return
    cap = sites.largest_cap(budget)
    assert sites.num_parameters(sites.capped_bonds(cap)) <= budget
    widest = max(sites.full_bonds, default=1)
    assert cap == widest or (cap < widest and sites.num_parameters(sites.capped_bonds(cap + 1)) > budget)


@pytest.mark.parametrize(
    ("out", "in_", "center"),
    [
        ((2,), (2,), 0),
        ((2, 3), (1, 1), 1),
        ((3, 2), (1, 1), 0),
        ((2, 2), (1, 1), 1),
        ((9, 1, 1), (1, 1, 1), 1),
        ((1, 3, 2, 1), (1, 1, 1, 1), 1),
        ((1, 2, 3, 1), (1, 1, 1, 1), 2),
        ((1,) * 5, (1,) * 5, 2),
    ],
)
def test_center(out, in_, center):
    assert Sites(out, in_).center == center


def test_low_rank_and_numpy_integers():
    assert Sites.low_rank(6, 8) == Sites((6, 1), (1, 8))
    assert Sites.low_rank(6, 8).full_bonds == (6,)
    sites = Sites(np.array([2, 3]), [np.int64(4), 5])
    assert sites == Sites((2, 3), (4, 5))
    assert all(type(leg) is int for pair in sites for leg in pair)
    assert hash(sites) == hash(Sites((2, 3), (4, 5)))


@given(legs(), st.integers(1, 40))
def test_largest_cap_may_spend_the_whole_budget(sites, cap):
    budget = sites.num_parameters(sites.capped_bonds(cap))
    assert sites.num_parameters(sites.capped_bonds(sites.largest_cap(budget))) == budget
