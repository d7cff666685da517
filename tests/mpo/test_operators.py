"""Powers, sums that begin at 0, and the products that SciPy's solvers ask for."""

import numpy as np
import pytest
import scipy.sparse.linalg
from helpers.chains import dense, random_chain
from scipy.sparse.linalg import aslinearoperator

from mpo_tn import MPO, MPOError, Sites

SITES = Sites((2, 3), (3, 2))


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_powers_and_sums(library):
    a = random_chain(SITES, 2, 0, "float64", library)
    square = a @ a.T
    w = dense(square.cores)
    for power in range(5):
        assert np.allclose(dense((square**power).cores), np.linalg.matrix_power(w, power), rtol=1e-12, atol=1e-9)
    assert np.allclose(dense(sum([a, a, a]).cores), 3 * dense(a.cores), rtol=0, atol=1e-12)
    assert (0 + a) is a


@pytest.mark.parametrize("power", [-1, 0.5, "2", None, True])
def test_bad_powers(power):
    with pytest.raises(MPOError, match="only whole numbers"):
        MPO.identity(Sites((2,), (2,))) ** power


def test_bad_bases_and_sums():
    with pytest.raises(MPOError, match="site 0 has legs"):
        MPO.random(SITES, 2, seed=0) ** 2
    for other in (1, 0.5, False):
        with pytest.raises(TypeError):
            MPO.random(SITES, 2, seed=0) + other


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_linear_operator(library, dtype):
    a = random_chain(SITES, 2, 0, dtype, library)
    w = dense(a.cores)
    operator = a.linear_operator() if library == "torch" else aslinearoperator(a)
    rng = np.random.default_rng(0)
    assert operator.shape == (6, 6)
    assert operator.dtype == dtype
    x, y = rng.standard_normal((6, 3)), rng.standard_normal(6) + 1j
    assert np.allclose(operator @ x, w @ x, rtol=0, atol=1e-10)
    assert np.allclose(operator.matvec(x[:, :1]), w @ x[:, :1], rtol=0, atol=1e-10)
    assert np.allclose(operator.rmatvec(y), w.conj().T @ y, rtol=0, atol=1e-10)
    assert np.allclose(operator.H @ x, w.conj().T @ x, rtol=0, atol=1e-10)
    assert np.allclose(a.matvec(x.astype("float32")), w @ x, rtol=0, atol=1e-4)
    assert operator.matvec(x[:, 0].astype("float32")).dtype == dtype


def test_scipy_finds_eigenvalues():
    a = MPO.random(Sites((2,) * 6, (2,) * 6), 2, seed=0)
    a = a + a.T
    values = scipy.sparse.linalg.eigsh(aslinearoperator(a), k=2, return_eigenvectors=False)
    full = np.linalg.eigvalsh(a.to_matrix())
    assert np.allclose(sorted(abs(values)), sorted(abs(full))[-2:], rtol=1e-9, atol=0)


def test_shapes_are_checked():
    with pytest.raises(MPOError, match=r"shape \(5,\)"):
        MPO.random(SITES, 2, seed=0).matvec(np.ones(5))
