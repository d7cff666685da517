"""quimb and tensorly: the same matrix there, the same bits back, no copies, and what is no chain."""

import numpy as np
import pytest
import quimb.tensor as qtn
import tensorly
from helpers.chains import dense, legs, random_chain, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites

SITES = Sites((2, 3, 2), (3, 2, 2))


@pytest.mark.guarantee("quimb")
@given(legs(max_size=200), st.sampled_from(("float32", "float64", "complex64", "complex128")), st.integers(1, 3))
def test_quimb(sites, dtype, bond):
    a = random_chain(sites, bond, 0, dtype)
    there = a.to_quimb()
    w = dense(a.cores)
    assert there.to_dense().shape == a.shape
    gauge = np.prod([np.linalg.norm(core) for core in a.cores])
    assert np.linalg.norm(there.to_dense() - w) <= slack(dtype, w.size, gauge)
    back = MPO.from_quimb(there)
    assert all(map(np.array_equal, back.cores, a.cores))
    assert all(np.shares_memory(x, y) for x, y in zip(back.cores, a.cores, strict=True))


@pytest.mark.guarantee("quimb")
def test_quimb_on_torch_and_of_its_own():
    a = random_chain(SITES, 3, 0, "float64", "torch")
    assert all(bool((x == y).all()) for x, y in zip(MPO.from_quimb(a.to_quimb()).cores, a.cores, strict=True))
    heisenberg = qtn.MPO_ham_heis(5)
    assert np.allclose(MPO.from_quimb(heisenberg).to_matrix(), heisenberg.to_dense(), rtol=0, atol=1e-13)
    shuffled = qtn.MPO_rand(5, 4, seed=0)
    shuffled.compress(max_bond=3)
    assert np.allclose(MPO.from_quimb(shuffled).to_matrix(), shuffled.to_dense(), rtol=0, atol=1e-12)
    before = shuffled.to_dense()
    shuffled.exponent = 2.0
    assert np.allclose(MPO.from_quimb(shuffled).to_matrix(), 100 * before, rtol=0, atol=1e-10)
    product = qtn.MPO_identity(3)
    product.squeeze_()
    assert MPO.from_quimb(product).bonds == (1, 1)


@pytest.mark.guarantee("tensorly")
def test_tensorly():
    a = random_chain(SITES, 3, 0)
    there = a.to_tensorly()
    assert np.allclose(there.to_matrix(), a.to_matrix(), rtol=0, atol=1e-13)
    assert all(x is y for x, y in zip(MPO.from_tensorly(there).cores, a.cores, strict=True))
    other = tensorly.decomposition.tensor_train_matrix(np.arange(36.0).reshape(2, 3, 2, 3), rank=[1, 4, 1])
    assert np.allclose(MPO.from_tensorly(other).to_matrix(), other.to_matrix(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qtn.MPO_rand(4, 3, cyclic=True), "no chain with open ends"),
        (lambda: qtn.MPO_rand(2, 3, cyclic=True), "no chain with open ends"),
        (lambda: qtn.MPS_rand_state(4, 3), "no chain of operators"),
        (lambda: qtn.PEPO.rand(2, 2, 2), "coordinates"),
        (lambda: np.eye(4), "ndarray is no chain of operators"),
        (lambda: None, "NoneType is no chain"),
        (lambda: qtn.MPO_rand(4, 3) & qtn.rand_tensor((2,), "x"), "no chain"),
    ],
)
def test_what_is_no_chain_of_quimb(make, message):
    with pytest.raises(MPOError, match=message):
        MPO.from_quimb(make())


@pytest.mark.parametrize("given", [[], None, "abc", [np.eye(2)], np.eye(2), [1.0]])
def test_what_is_no_tensorly_matrix(given):
    with pytest.raises(MPOError, match="TTMatrix"):
        MPO.from_tensorly(given)
