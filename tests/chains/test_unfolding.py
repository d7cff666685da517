"""A matrix in the order of the sites, and back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn.chains.unfolding import interleave


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_interleave(out, random):
    in_ = [random.randint(1, 4) for _ in out]
    rows, columns = math.prod(out), math.prod(in_)
    w = np.arange(float(rows * columns)).reshape(rows, columns)
    found = interleave(w, tuple(out), tuple(in_)).reshape(
        [size for pair in zip(out, in_, strict=True) for size in pair]
    )
    for digits in np.ndindex(*found.shape):
        row, column = np.ravel_multi_index(digits[::2], out), np.ravel_multi_index(digits[1::2], in_)
        assert found[digits] == w[row, column]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", ">f4"])
@pytest.mark.parametrize("last", [1, 2, 3, 4, 6, 8])
def test_interleaving_moves_every_entry_to_its_place(dtype, last):
    out, in_ = (2, 3, 2), (3, 2, last)
    w = np.arange(12 * 6 * last).reshape(12, 6 * last).astype(dtype)
    expected = w.reshape(*out, *in_).transpose(0, 3, 1, 4, 2, 5).ravel()
    for matrix in (w, np.asfortranarray(w), w[::-1], w[:, ::-1]):
        moved = interleave(matrix, out, in_)
        plain = np.ascontiguousarray(matrix).reshape(*out, *in_).transpose(0, 3, 1, 4, 2, 5).ravel()
        assert moved.dtype == w.dtype
        assert np.array_equal(moved, plain)
    assert np.array_equal(interleave(w, out, in_), expected)
