"""Sums of local terms against sums of Kronecker products, and the smallest bonds that hold them."""

import itertools
import math
import time

import numpy as np
import pytest
from helpers.chains import dense, fro, installed_backends, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites
from mpo_tn.chains.terms import smallest_cover

X, Z = np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, -1.0])
Y = np.array([[0.0, -1j], [1j, 0.0]])


def qubits(n):
    return Sites((2,) * n, (2,) * n)


def product(sites, factors):
    found = np.eye(1)
    for k, (out, in_) in enumerate(sites):
        found = np.kron(found, factors.get(k, np.eye(out, in_)))
    return found


@pytest.mark.guarantee("sum-of-terms")
@given(st.data())
def test_any_terms(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    legs = tuple(data.draw(st.lists(st.sampled_from((1, 2, 3)), min_size=1, max_size=4)))
    sites, dtype = Sites(legs, legs), data.draw(st.sampled_from(("float64", "complex128")))
    pool = [
        [
            rng.standard_normal((leg, leg)) + (1j * rng.standard_normal((leg, leg)) if dtype[0] == "c" else 0)
            for _ in range(2)
        ]
        for leg in legs
    ]
    terms = []
    for _ in range(data.draw(st.integers(1, 8))):
        chosen = data.draw(st.sets(st.integers(0, len(legs) - 1)))
        terms.append((float(rng.standard_normal()), {k: pool[k][rng.integers(2)] for k in chosen}))
    expected = sum(c * product(sites, factors) for c, factors in terms)
    scale = sum(abs(c) * math.prod(fro(f) for f in factors.values()) for c, factors in terms) * max(legs) ** len(legs)
    found = MPO.from_terms(sites, terms)
    assert fro(dense(found.cores) - expected) <= slack("float64", expected.size, scale)
    narrow = MPO.from_terms(sites, terms, dtype="complex64")
    assert fro(dense(narrow.cores) - expected) <= slack("complex64", expected.size, scale)


@pytest.mark.guarantee("smallest-bonds")
def test_bonds_of_known_models():
    n = 8
    ising = [(-1.0, {k: Z, k + 1: Z}) for k in range(n - 1)] + [(-0.5, {k: X}) for k in range(n)]
    heisenberg = [{k: p, k + 1: p} for k in range(n - 1) for p in (X, Y, Z)]
    rng = np.random.default_rng(0)
    everyone = [(rng.standard_normal(), {i: Z, j: Z}) for i, j in itertools.combinations(range(n), 2)]
    assert MPO.from_terms(qubits(n), ising).bonds == (3,) * (n - 1)
    assert max(MPO.from_terms(qubits(n), heisenberg).bonds) == 5
    assert MPO.from_terms(qubits(n), everyone).bonds == (2, 4, 5, 6, 5, 4, 2)
    assert MPO.from_terms(qubits(n), [(2.0, {3: X})]).bonds == (1,) * (n - 1)
    assert MPO.from_terms(qubits(n), [{0: X}, (-1.0, {0: X})]).bonds == (1,) * (n - 1)


@pytest.mark.guarantee("smallest-bonds")
@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_cover_is_smallest(edges):
    lefts, rights = smallest_cover(sorted(edges))
    assert all(left in lefts or right in rights for left, right in edges)
    ends = [("l", k) for k in range(5)] + [("r", k) for k in range(5)]
    size = len(lefts) + len(rights)
    smaller = itertools.combinations(ends, size - 1) if size else ()
    assert not any(all(("l", a) in c or ("r", b) in c for a, b in edges) for c in map(set, smaller))


def test_long_and_fast():
    n, start = 2000, time.perf_counter()
    terms = [(-1.0, {k: Z, k + 1: Z}) for k in range(n - 1)] + [(1.0, {0: X, n - 1: X})]
    found = MPO.from_terms(qubits(n), terms)
    assert max(found.bonds) == 4
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("library", installed_backends())
def test_like(library):
    model = MPO.identity(qubits(2), dtype="float32")
    if library != "numpy":
        from helpers.chains import random_chain

        model = random_chain(qubits(2), 1, 0, "float32", library)
    found = MPO.from_terms(qubits(3), [{0: Z, 2: X}], like=model)
    assert found.dtype == model.dtype
    assert type(found.cores[0]) is type(model.cores[0])
    assert np.array_equal(dense(found.cores), product(qubits(3), {0: Z, 2: X}))


def test_dtype_follows_the_operators():
    small = Z.astype("float32")
    for term, dtype in (((1, {0: small}), "float32"), ((1j, {0: small}), "complex64"), ({0: Y}, "complex128")):
        assert MPO.from_terms(qubits(2), [term]).dtype == dtype
    assert MPO.from_terms(qubits(2), [{0: [[1, 0], [0, 2]]}]).dtype == "float64"


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "no terms"),
        ([{3: Z}], "term 0: 3 is not a site: there are sites 0 to 2"),
        ([{0: Z}, (1.0, {-1: Z})], "term 1: -1 is not a site"),
        ([{"a": Z}], "'a' is not a site"),
        ([{0: np.eye(3)}], r"shape \(3, 3\) does not fit the legs \(2, 2\) of site 0"),
        ([("x", {0: Z})], "'x' is no number"),
        ([(math.nan, {0: Z})], "nan is not finite"),
        ([{0: np.full((2, 2), math.inf)}], "NaN or infinite"),
        ([(1.0, Z)], "is not {site: operator}"),
        ([{0: "Z"}], "a str is not an array"),
    ],
)
def test_bad_terms(terms, message):
    with np.errstate(invalid="ignore"), pytest.raises(MPOError, match=message):
        MPO.from_terms(qubits(3), terms)


def test_bad_dtypes_and_legs():
    with pytest.raises(MPOError, match="complex and cannot be summed in float64"):
        MPO.from_terms(qubits(2), [{0: Y}], dtype="float64")
    with pytest.raises(MPOError, match=r"site 1 has legs \(out, in\) = \(2, 3\) and there is no identity"):
        MPO.from_terms(Sites((2, 2), (2, 3)), [{0: Z}])
