"""Factorisations: what they return, and what they do when a library fails."""

import math

import numpy as np
import pytest
import torch
from helpers.chains import EPS, HALF_EPS, C, fro, host, make, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, Sites, linalg

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (4, 30), (30, 4)]
WIDE = ["float64", "complex128"]


def matrix(shape, dtype, library, seed=0):
    w = make("gaussian", Sites.low_rank(*shape), dtype.startswith("complex"), seed).astype(dtype)
    return torch.from_numpy(w) if library == "torch" else w


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gram", [False, True])
def test_left_factor(library, dtype, shape, gram):
    w = matrix(shape, dtype, library)
    factor = linalg.left_factor(w, gram=gram)
    u, expected = host(factor.u), np.linalg.svd(host(w), compute_uv=False)
    # A Gram matrix halves the digits; for data of 32 bits that is none too many.
    eps = 2.0**-26 if gram else 2.0**-52
    rounding = C * eps * math.sqrt(math.prod(shape)) * fro(host(w))
    assert u.shape == (shape[0], min(shape))
    assert np.linalg.norm(u.conj().T @ u - np.eye(min(shape))) <= slack("float64", u.size, 1.0)
    assert np.abs(factor.values - expected).max() <= rounding
    assert fro(u @ (u.conj().T @ host(w)) - host(w)) <= slack(
        "float64", w.size if library == "numpy" else w.numel(), 9.0
    )
    assert np.abs(np.linalg.norm(u.conj().T @ host(w), axis=1) - factor.values).max() <= rounding
    assert factor.note is None
    assert np.array_equal(linalg.singular_values(w, gram=False).shape, (min(shape),))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("graded", [0, -40, -320])
@pytest.mark.parametrize("shape", SHAPES)
def test_qr_is_finite_and_orthonormal_even_for_vanishing_columns(library, dtype, graded, shape):
    """torch's complex QR gives NaN where a column is near the smallest number there is."""
    for seed in range(20):
        w = matrix(shape, dtype, "numpy", seed) * np.logspace(0, graded, shape[1])
        q, r = map(host, linalg.qr(torch.from_numpy(w) if library == "torch" else w))
        assert fro(q @ r - w) <= slack("float64", w.size, fro(w))
        assert np.linalg.norm(q.conj().T @ q - np.eye(min(shape))) <= slack("float64", q.size, 1.0)
        assert np.array_equal(r, np.triu(r))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", WIDE)
def test_slow_and_sure_svd_takes_adjoints(library, dtype):
    w = matrix((4, 9), dtype, library)
    for m in (w, linalg.adjoint(w)):
        u, values = linalg._svd_left(m)
        assert type(u) is type(w)
        assert fro(values - np.linalg.svd(host(m), compute_uv=False)) <= slack("float64", 36, fro(values))
        assert fro(host(u) @ (host(u).conj().T @ host(m)) - host(m)) <= slack("float64", 36, fro(values))


@pytest.mark.parametrize("dtype", [*EPS, *HALF_EPS])
def test_names_and_precisions(dtype):
    tensor = torch.ones(2, 2, dtype=getattr(torch, dtype))
    assert linalg.dtype_name(tensor) == dtype
    assert linalg.eps(tensor) == torch.finfo(tensor.dtype).eps
    assert linalg.is_half(tensor) == (dtype in HALF_EPS)
    assert linalg.dtype_name(linalg.widen(tensor)) == ("complex128" if tensor.is_complex() else "float64")
    assert linalg.describe(tensor) == f"torch {dtype}"
    if dtype != "bfloat16":
        array = tensor.numpy()
        assert linalg.dtype_name(array) == dtype
        assert linalg.eps(array) == np.finfo(array.dtype).eps
        assert linalg.describe(array) == f"numpy {dtype}"


def test_namespace_of_something_else():
    with pytest.raises(MPOError, match="a dict is not an array"):
        linalg.namespace({})


@given(st.lists(st.floats(1e-290, 1e3) | st.just(0.0), max_size=40))
def test_tails(values):
    values = sorted(values, reverse=True)
    found = linalg.tails(np.array(values))
    assert found.shape == (len(values) + 1,)
    assert found[-1] == 0.0
    assert (np.diff(found) <= 0).all()
    for k in range(len(values)):
        expected = math.hypot(*values[k:])
        assert abs(found[k] - expected) <= C * 2.0**-52 * math.sqrt(len(values)) * expected


@pytest.mark.parametrize("dtype", [*EPS, *HALF_EPS])
@pytest.mark.parametrize("power", [-140, -20, 0, 20, 120])
def test_frobenius_norm(dtype, power):
    if dtype in ("float16", "bfloat16") and abs(power) > 14:
        power = int(math.copysign(12, power))
    tensor = torch.full((3, 5), 3.0 * 2.0**power).to(getattr(torch, dtype))
    assert linalg.frobenius_norm(tensor) == pytest.approx(math.sqrt(15) * 3 * 2.0**power, rel=1e-15)
    assert linalg.frobenius_norm(0 * tensor) == 0.0


@pytest.mark.parametrize("value", [5e-324, 1e-310, 1.0, 1.5, 2.0, 1.7e308])
def test_binary_exponent(value):
    exponent = linalg.binary_exponent(value)
    assert 2.0**exponent <= value
    assert value / 2 < 2.0**exponent
    assert linalg.binary_exponent(0.0) == 0
    scaled = linalg.times_power_of_two(np.array([value, value * 1j]), -exponent)
    assert 1 <= scaled[0].real < 2
    assert linalg.times_power_of_two(scaled, exponent)[0] == value
