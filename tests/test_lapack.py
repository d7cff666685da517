"""Small matrices by LAPACK are factorised as by NumPy."""

import numpy as np
import pytest
from helpers.chains import slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import lapack


@st.composite
def matrices(draw):
    m, k, rank = (draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    factors = [rng.standard_normal(shape) for shape in ((m, rank), (rank, k))]
    if draw(st.booleans()):
        factors = [factor + 1j * rng.standard_normal(factor.shape) for factor in factors]
    matrix = factors[0] @ factors[1] * draw(st.sampled_from((0.0, 1e-150, 1.0, 1e150)))
    return matrix if draw(st.booleans()) else np.asfortranarray(matrix)


def near(first, second, size):
    return np.linalg.norm(first - second) <= slack("float64", 81, 1.0) * size


@given(matrices())
def test_factors_of_small_matrices(matrix):
    size, before = np.linalg.norm(matrix / (abs(matrix).max() or 1.0)) * abs(matrix).max(), matrix.copy()
    rank = min(matrix.shape)
    assert lapack.takes(matrix)
    q, r = lapack.small_qr(matrix)
    assert q.shape == (matrix.shape[0], rank)
    assert near(q.conj().T @ q, np.eye(rank), 1.0)
    assert near(q @ r, matrix, size)
    assert np.array_equal(r, np.triu(r))
    assert np.array_equal(r, lapack.small_triangle(matrix))
    u, values, vh = lapack.small_svd(matrix)
    assert near((u * values) @ vh, matrix, size)
    assert all(near(part.conj().T @ part, np.eye(rank), 1.0) for part in (u, vh.conj().T))
    assert np.all(values[:-1] >= values[1:])
    scaled = matrix / (size or 1.0)
    gram = scaled @ scaled.conj().T
    found, vectors = lapack.small_eigh(gram)
    assert near((vectors * found) @ vectors.conj().T, gram, 1.0)
    assert np.all(found[:-1] <= found[1:])
    assert np.array_equal(matrix, before)


def test_what_is_not_taken():
    assert not lapack.takes(np.ones((64, 33)))
    assert not lapack.takes(np.ones((2, 2), dtype="float32"))
    assert not lapack.is_small(np.ones((64, 33)))
    assert lapack.is_small(np.ones((64, 32), dtype="float32"))


def test_what_has_no_factors_is_refused():
    for factorise in (lapack.small_svd, lapack.small_eigh):
        with pytest.raises(np.linalg.LinAlgError):
            factorise(np.full((3, 3), np.nan))
