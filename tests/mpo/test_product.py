"""Products compressed while they are formed: errors against the dense product, of every method, dtype and library."""

import math

import numpy as np
import pytest
from helpers.chains import EPS, dense, fro, host, legs, random_chain, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation, matmul

METHODS = ("direct", "zipup", "fit")
A = MPO.random(Sites((2, 3, 2, 2), (3, 2, 2, 1)), 3, seed=0)


@st.composite
def factors(draw, max_size=300):
    first = draw(legs(max_size=max_size))
    outer = tuple(draw(st.sampled_from((1, 2, 3))) for _ in first.in_)
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(st.sampled_from(("numpy", "torch", "jax")))
    a = random_chain(first, draw(st.integers(1, 3)), draw(st.integers(0, 99)), dtype, library)
    b = random_chain(Sites(first.in_, outer), draw(st.integers(1, 3)), draw(st.integers(0, 99)), dtype, library)
    return a, b, dtype


@pytest.mark.guarantee("product-error", "product-fit")
@given(
    factors(),
    st.sampled_from((Truncation(max_bond=1), Truncation(max_bond=2), Truncation(rel_error=0.3), Truncation())),
)
def test_errors_are_those_of_the_dense_product(found, truncation):
    a, b, dtype = found
    w = dense(a.cores) @ dense(b.cores)
    gauge = math.prod(fro(host(core)) for chain in (a, b) for core in chain.cores)
    off = slack(dtype, w.size, gauge)
    errors = {}
    for method in METHODS:
        product, report = matmul(a, b, truncation, method)
        assert product.sites == Sites(a.sites.out, b.sites.in_)
        assert str(product.dtype) == str(a.dtype)
        assert tuple(bond.kept for bond in report.bonds) == product.bonds or method == "direct"
        true = fro(dense(product.cores) - w)
        assert true <= report.error * (1 + 1e-9) + off
        if report.exact:
            assert abs(true - report.error) <= 1e-9 * true + off
        assert abs(report.norm - fro(w)) <= off + 1e-9 * fro(w)
        if truncation.has_tolerance and report.tolerance_met:
            assert report.error <= 0.3 * report.norm * (1 + 1e-9)
        if truncation.max_bond is not None:
            assert max(product.bonds, default=1) <= truncation.max_bond
        errors[method] = report.error
    assert errors["fit"] <= errors["zipup"] * (1 + 1e-9) + off


def test_zip_up_comes_close_to_the_direct_cut():
    sites = Sites((2,) * 10, (2,) * 10)
    a, b = (MPO.random(sites, 6, seed=seed) for seed in (0, 1))
    errors = {method: matmul(a, b, Truncation(max_bond=6), method)[1] for method in METHODS}
    assert all(report.exact for report in errors.values())
    assert errors["zipup"].error <= 1.01 * errors["direct"].error
    assert errors["fit"].error <= errors["zipup"].error


def test_quimb_agrees():

    sites = Sites((2,) * 6, (2,) * 6)
    a, b = (MPO.random(sites, 3, seed=seed) for seed in (0, 1))
    theirs = a.to_quimb().apply(b.to_quimb(), compress=True, max_bond=4)
    product, report = matmul(a, b, Truncation(max_bond=4), "zipup")
    error = np.linalg.norm(np.asarray(theirs.to_dense()) - a.to_matrix() @ b.to_matrix())
    assert report.error <= 1.02 * error
    assert product.bonds == (4,) * 5


@pytest.mark.guarantee("product-error")
@pytest.mark.parametrize("method", ["zipup", "fit"])
def test_long_chains(method):
    """A thousand sites: the norm of the product is 1 by design, what is carried is not."""
    n = 1000
    sites = Sites((2,) * n, (2,) * n)
    a = MPO.random(sites, 2, seed=0).normalized()
    b = MPO.identity(sites) / 1.0
    b = MPO([core * (4.0 if k % 2 else 0.25) for k, core in enumerate(b.cores)])
    product, report = matmul(a, b, Truncation(max_bond=1), method)
    assert report.norm == pytest.approx(1.0, rel=1e-9)
    assert (a - product).norm() == pytest.approx(report.error, rel=1e-9)
    full, exact = matmul(a, b, Truncation(), method)
    assert exact.error == 0
    assert full.distance(a) < 1e-12


def test_what_rounding_hides_is_an_upper_bound():
    """Directions that are cut weigh 1e-9 of what is carried: what they lose is not told to ten digits."""
    sites = Sites((2, 2, 2), (2, 2, 2))
    a = MPO.random(sites, 4, seed=0)
    b = MPO.random(sites, 4, seed=1)
    w = a.to_matrix() @ b.to_matrix()
    for tolerance in (1e-3, 1e-6, 1e-9, 1e-12):
        for method in ("zipup", "fit"):
            product, report = matmul(a, b, Truncation(rel_error=tolerance), method)
            assert np.linalg.norm(product.to_matrix() - w) <= report.error + 1e-13 * report.norm
            assert report.exact or (report.bound == report.error and "upper bound" in report.notes[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matmul(A, A, Truncation(max_bond=2), "zipup"), r"site 0 has legs .*\(24, 12\) and \(24, 12\)"),
        (lambda: matmul(A, A, Truncation(max_bond=2)), r"site 0 has legs .*\(24, 12\) and \(24, 12\)"),
        (lambda: matmul(A, A.T, Truncation(max_bond=2), "zip"), "method='zip' is not one of direct, zipup, fit"),
        (lambda: matmul(A, A.T, Truncation(max_parameters=200), "fit"), "max_parameters=200 needs the spectra"),
        (lambda: matmul(A, A.T, 4), "is not a Truncation"),
        (lambda: matmul(A, np.eye(12), Truncation(), "fit"), "is not an MPO"),
        (lambda: matmul(A, A.T.astype("float32"), Truncation(), "zipup"), "numpy float64 and numpy float32"),
        (lambda: matmul(A, A.T, Truncation(rel_error=1e-17), "zipup"), "below the machine precision"),
        (lambda: matmul(A, A.T, Truncation(max_bond=1, rel_error=1e-3, strict=True), "zipup"), "max_bond=1 leaves"),
        (lambda: matmul(A, A.T, Truncation(max_bond=(1, 2)), "fit"), "lists 2 bonds"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=message):
        call()
