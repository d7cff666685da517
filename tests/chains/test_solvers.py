"""Linear systems and eigenvalues against dense ones: the heat equation, the Ising chain, every dtype and library."""

import numpy as np
import pytest
from helpers.chains import dense, host, random_chain, to_backend

from mpo_tn import MPO, MPOError, Sites, Truncation, eigsh, solve

X, Z = np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, -1.0])


def qubits(n):
    return Sites((2,) * n, (2,) * n)


def ising(n, **options):
    terms = [(-1.0, {k: Z, k + 1: Z}) for k in range(n - 1)] + [(-1.0, {k: X}) for k in range(n)]
    return MPO.from_terms(qubits(n), terms, **options)


@pytest.mark.guarantee("eigenpairs")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("which", ["SA", "LA", "LM"])
def test_ising_ground_state(library, dtype, which):
    a = ising(6, like=to_backend(np.ones(1), library, dtype))
    w = dense(a.cores)
    full = np.linalg.eigvalsh(w)
    values, vectors = eigsh(a, 3, which=which)
    expected = full[:3] if which == "SA" else full[-3:] if which == "LA" else None
    off = 1e-4 if dtype in ("float32", "complex64") else 1e-9
    if expected is not None:
        assert np.allclose(values, expected, rtol=0, atol=off)
    assert np.allclose(sorted(abs(values)), sorted(abs(full))[-3:], rtol=0, atol=off) or which != "LM"
    v = host(vectors)
    assert str(vectors.dtype) == str(a.dtype)
    assert np.linalg.norm(w @ v - v * values) <= 1e-6 * np.linalg.norm(w)
    assert np.allclose(v.conj().T @ v, np.eye(3), rtol=0, atol=1e-5)
    assert np.array_equal(host(eigsh(a, 3, which=which)[1]), v)


def test_exact_energy_of_twelve_sites():
    """The critical Ising chain with open ends: E = 1 - 1 / sin(pi / (4 n + 2)) (Pfeuty, Ann. Phys. 57, 1970)."""
    values, _ = eigsh(ising(12))
    assert values[0] == pytest.approx(1 - 1 / np.sin(np.pi / 50), abs=1e-9)


@pytest.mark.guarantee("solved")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_solve(library, dtype):
    noise = random_chain(qubits(5), 2, 0, dtype, library)
    a = MPO.identity(qubits(5), like=noise) + noise / (4 * noise.norm())
    b = to_backend(np.random.default_rng(0).standard_normal(32), library, dtype)
    tol = 1e-5 if dtype in ("float32", "complex64") else 1e-11
    x = solve(a, b, tol=tol)
    assert str(x.dtype) == str(a.dtype)
    assert np.linalg.norm(dense(a.cores) @ host(x) - host(b)) <= 1.1 * tol * np.linalg.norm(host(b))
    assert not host(solve(a, b * 0)).any()


def test_one_step_of_the_heat_equation():
    n = 6
    size = 2**n
    w = 3 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    a, _ = MPO.from_matrix(w, qubits(n))
    b = np.sin(np.pi * np.arange(1, size + 1) / (size + 1))
    for hermitian in (False, True):
        x = solve(a, b, tol=1e-9, hermitian=hermitian)
        assert np.allclose(x, np.linalg.solve(w, b), rtol=0, atol=1e-7)


@pytest.mark.guarantee("solved")
def test_a_condition_number_does_not_stop_minres_early():
    """SciPy's MINRES alone stops at some 1e-8 here, for a tolerance of 1e-10."""
    n = 8
    size = 2**n
    w = np.eye(size) + 200 * (2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1))
    a, _ = MPO.from_matrix(w, qubits(n), Truncation(rel_error=1e-14))
    b = np.where(np.arange(size) < size // 3, 1.0, 0.0)
    x = solve(a, b, hermitian=True)
    assert np.linalg.norm(w @ x - b) <= 1.1e-10 * np.linalg.norm(b)
    with pytest.raises(MPOError, match="no solution to tol=1e-10 in 20 products"):
        solve(a, b, hermitian=True, max_steps=20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve(np.eye(2), np.ones(2)), "is not an MPO"),
        (lambda: solve(ising(3), np.ones(7)), r"shape \(7,\): expected numpy float64 of shape \(8,\)"),
        (lambda: solve(ising(3), np.ones(8, "float32")), "numpy float32"),
        (lambda: solve(ising(3), np.ones(8), tol=1e-20), "tol=1e-20"),
        (lambda: solve(ising(3), np.ones(8), max_steps=0), "max_steps=0"),
        (lambda: solve(ising(3), np.full(8, np.nan)), "NaN"),
        (lambda: solve(MPO.identity(qubits(2)) * 0, np.ones(4)), "no solution"),
        (lambda: solve(MPO.random(Sites((2,), (3,)), 1, seed=0), np.ones(2)), "not square"),
        (lambda: solve(MPO.identity(qubits(30)), np.ones(4)), "to_quimb"),
        (lambda: eigsh(MPO.identity(qubits(2000))), "to_quimb"),
        (lambda: eigsh(MPO.random(qubits(3), 2, seed=0)), "not Hermitian"),
        (lambda: eigsh(ising(3), 0), "k=0"),
        (lambda: eigsh(ising(3), 9), "k=9"),
        (lambda: eigsh(ising(3), which="SM"), "which='SM'"),
        (lambda: eigsh(ising(3), tol=-1.0), "tol=-1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=message):
        call()
