"""Entries, rows, columns, grids and diagonals against the dense matrix, and of chains too long for one."""

import math

import numpy as np
import pytest
from helpers.chains import EPS, dense, fewer, fro, host, legs, random_chain, slack, to_backend
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites

LIBRARIES = st.sampled_from(("numpy", "torch", "jax"))


@st.composite
def chains(draw):
    """A chain, its matrix on the host, and how far an entry may be off."""
    dtype = draw(st.sampled_from(tuple(EPS)))
    chain = random_chain(
        draw(legs(max_size=300)), draw(st.integers(1, 3)), draw(st.integers(0, 99)), dtype, draw(LIBRARIES)
    )
    scale = math.prod(fro(host(core)) for core in chain.cores)
    return chain, dense(chain.cores), slack(dtype, math.prod(chain.shape), scale)


@pytest.mark.guarantee("entry")
@fewer
@given(chains(), st.data())
def test_index_as_of_a_matrix(found, data):
    a, w, off = found
    rows, columns = w.shape
    i, j = data.draw(st.integers(-rows, rows - 1)), data.draw(st.integers(-columns, columns - 1))
    many = data.draw(st.lists(st.integers(-rows, rows - 1), min_size=1, max_size=4))
    keys = [
        (i, j), i, (i, slice(None)), (slice(None), j), (many, j), (many, [j] * len(many)),
        (slice(0, 3), slice(1, None, 2)), (many, slice(None, None, -1)), (slice(0, 2), [[j], [j]]),
        (np.int64(i), np.array(j)), (np.array([many]), j),
        (slice(None), slice(None)), slice(1, 2), (slice(0, 0), 0),
    ]  # fmt: skip
    for key in keys:
        value = a[key]
        assert str(value.dtype) == str(a.dtype)
        assert host(value).shape == w[key].shape
        assert fro(host(value) - w[key]) <= off


@pytest.mark.guarantee("diagonal")
@fewer
@given(chains(), st.booleans())
def test_diagonal(found, square):
    a, w, off = found
    if square:
        a = a @ a.H
        w = dense(a.cores)
        off *= math.prod(fro(host(core)) for core in a.cores) + 1
    assert a.diagonal().shape == (min(a.shape),)
    assert fro(host(a.diagonal()) - np.diagonal(w)) <= off


@pytest.mark.guarantee("entry", "diagonal")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_long_chains(library):
    """Of 600 sites the matrix has 2**600 rows; what is carried is far out of the range of float32 on the way."""
    n = 600
    powers = [20 if k < n // 2 else -20 for k in range(n)]
    one = np.array([[1.0, 2.0], [3.0, 4.0]], "float32").reshape(1, 2, 2, 1) / 4
    a = MPO([to_backend(one * np.float32(2.0**power), library, "float32") for power in powers])
    row = 2**n - 1 - 2 ** (n - 3)  # 4/4 at every site, but for one 2/4
    assert float(a[row, -1]) == 0.5
    assert [float(value) for value in a[[row, -1], [-1, -1]]] == [0.5, 1.0]
    eye = MPO.identity(Sites((2,) * n, (2,) * n), like=a)
    assert float(eye[2**599, 2**599]) == 1.0
    assert [float(value) for value in eye[[1, -1], [1, -2]]] == [1.0, 0.0]
    with pytest.raises(MPOError, match="too large"):
        eye.diagonal()
    with pytest.raises(MPOError, match="range of float32"):
        MPO([core * 2.0 for core in eye.cores])[0, 0]


def test_numpy_sees_the_matrix_and_nobody_iterates():
    a = MPO.random(Sites((2, 2), (2, 3)), 2, seed=0)
    assert np.array_equal(np.asarray(a), a.to_matrix())
    assert np.asarray(a, dtype="complex64").dtype == "complex64"
    with pytest.raises(TypeError, match="not iterable"):
        iter(a)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ((4, 0), "no row 4: the matrix has 4"),
        ((0, -7), "no column -7: the matrix has 6"),
        ((0, 0, 0), "3 indices"),
        ("a", "'a' is no row"),
        ((1.5, 0), "1.5 is no row"),
        ((True, 0), "True is no row"),
        ((0, [True, False]), "is no column"),
        (([0, 1], [0, 1, 2]), r"shapes \(2,\) and \(3,\)"),
        ((None, 0), "None is no row"),
    ],
)
def test_bad_indices(key, message):
    with pytest.raises(MPOError, match=message):
        MPO.random(Sites((2, 2), (2, 3)), 2, seed=0)[key]


def test_too_many_entries():
    eye = MPO.identity(Sites((2,) * 40, (2,) * 40))
    with pytest.raises(MPOError, match="too many"):
        eye[: 2**30, 0:5]
