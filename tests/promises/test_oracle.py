"""Other libraries on small problems: tensorly's TT-SVD, quimb's MPO, NumPy's einsum."""

import math
import warnings

import numpy as np
import opt_einsum
import pytest
import torch
from helpers.chains import EPS, C, dense, fro, make, random_chain, slack, tail_norms, unfoldings

from mpo_tn import MPO, Sites, Truncation

CASES = [
    (Sites((2, 3, 2), (3, 2, 2)), 3),
    (Sites((2, 2, 2, 2), (2, 2, 2, 2)), 4),
    (Sites((5, 1, 3), (1, 7, 2)), 2),
    (Sites((2, 1, 3, 1, 2), (2, 2, 2, 2, 2)), 3),
    (Sites((4, 4), (3, 3)), 5),
]
KINDS = ["gaussian", "decaying", "rank_deficient"]


def interleaved(w: np.ndarray, sites: Sites) -> np.ndarray:
    n = len(sites)
    tensor = w.reshape(*sites.out, *sites.in_).transpose([axis for k in range(n) for axis in (k, n + k)])
    return tensor.reshape(sites.sizes)


@pytest.fixture(scope="module")
def tensorly():
    return pytest.importorskip("tensorly")


@pytest.fixture(scope="module")
def quimb():
    with warnings.catch_warnings():
        # quimb compiles with numba if it is there, and numba warns about its own cache.
        warnings.filterwarnings("ignore", module="numba")
        return pytest.importorskip("quimb.tensor")


@pytest.mark.parametrize(("sites", "bond"), CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tensorly_tt_svd_with_the_same_bonds(tensorly, sites, bond, kind, dtype):
    from tensorly.decomposition import tensor_train

    w = make(kind, sites, False, 5).astype(dtype)
    bonds = tuple(min(bond, full) for full in sites.full_bonds)
    mpo, report = MPO.from_matrix(w, sites, Truncation(max_bond=bonds))
    train = tensor_train(interleaved(w, sites), rank=[1, *bonds, 1])
    assert tuple(factor.shape[2] for factor in train.factors[:-1]) == mpo.bonds
    theirs = fro(interleaved(w, sites).astype("float64") - tensorly.tt_to_tensor(train).astype("float64"))
    rounding = slack(dtype, w.size, fro(w))
    # Both are sweeps of truncated SVDs, in different orders, so both are near the best and neither is always ahead.
    best = max(tail_norms(w.astype("float64"), sites, bonds))
    assert best - rounding <= report.error <= math.sqrt(len(sites) - 1) * theirs + rounding
    assert theirs <= math.sqrt(len(sites) - 1) * report.error + rounding
    if kind != "gaussian":
        assert report.error <= 1.1 * theirs + rounding
    assert abs(fro(dense(mpo.cores) - w) - report.error) <= rounding


@pytest.mark.parametrize(("sites", "bond"), CASES)
def test_tensorly_sweep_of_compress_is_the_same_sweep(tensorly, sites, bond):
    """`compress` goes from left to right like tensorly, so the results agree and not just their errors."""
    from tensorly.decomposition import tensor_train

    w = make("gaussian", sites, False, 6)
    exact, _ = MPO.from_matrix(w, sites)
    bonds = tuple(min(bond, full) for full in sites.full_bonds)
    small, report = exact.compress(Truncation(max_bond=bonds))
    theirs = tensorly.tt_to_tensor(tensor_train(interleaved(w, sites), rank=[1, *bonds, 1]))
    gaps = [(s[r - 1] - s[r]) / s[0] for s, r in zip(exact.spectra(), bonds, strict=True) if r < len(s)]
    rounding = slack("float64", w.size, fro(w)) / min([1.0, *gaps])
    assert fro(interleaved(dense(small.cores), sites) - theirs) <= 4 * rounding
    assert abs(fro(interleaved(w, sites) - theirs) - report.error) <= 4 * rounding


@pytest.mark.parametrize(("sites", "_bond"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_full_bonds_of_tensorly(tensorly, sites, _bond, dtype):
    from tensorly.decomposition import tensor_train_matrix

    w = make("gaussian", sites, False, 7).astype(dtype)
    mpo, _ = MPO.from_matrix(w, sites)
    train = tensor_train_matrix(w.reshape(*sites.out, *sites.in_), rank=[1, *sites.full_bonds, 1])
    assert [factor.shape for factor in train.factors] == [core.shape for core in mpo.cores]
    # The same convention of axes: their cores are a chain of ours, and ours one of theirs.
    assert fro(MPO(tuple(train.factors)).to_matrix() - w) <= 4 * slack(dtype, w.size, fro(w))
    ours = tensorly.tt_matrix.TTMatrix(list(mpo.cores)).to_matrix()
    assert fro(ours - w) <= 2 * slack(dtype, w.size, fro(w))


@pytest.mark.parametrize("dims", [(2, 2, 2), (2, 3, 2), (3, 4), (2, 2, 2, 2)])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_quimb_mpo(quimb, dims, dtype):
    sites = Sites(dims, dims)
    w = make("gaussian", sites, dtype == "complex128", 8)
    mpo, _ = MPO.from_matrix(w, sites)
    theirs = quimb.MatrixProductOperator.from_dense(w, dims=dims, cutoff=0.0)
    rounding = slack(dtype, w.size, fro(w))
    assert fro(theirs.to_dense() - mpo.to_matrix()) <= 2 * rounding
    # quimb has no outer bonds, and writes axes (left, right, upper, lower) with the upper leg the row.
    arrays = [core.transpose(0, 3, 1, 2) for core in mpo.cores]
    arrays = [arrays[0][0], *arrays[1:-1], arrays[-1][:, 0]]
    loaded = quimb.MatrixProductOperator(arrays, shape="lrud")
    assert fro(loaded.to_dense() - w) <= 2 * rounding
    assert abs(loaded.norm() - mpo.norm()) <= rounding
    for k, values in enumerate(mpo.spectra()):
        assert np.abs(loaded.singular_values(k + 1) - values).max() <= rounding


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize(("sites", "bond"), CASES)
def test_einsum_over_all_indices_at_once(sites, bond, dtype, library):
    chain = random_chain(sites, bond, 9, dtype, library)
    n = len(sites)
    symbols = [opt_einsum.get_symbol(k) for k in range(3 * n + 1)]
    outs, ins, bonds = symbols[:n], symbols[n : 2 * n], symbols[2 * n :]
    terms = [bonds[k] + outs[k] + ins[k] + bonds[k + 1] for k in range(n)]
    equation = ",".join(terms) + "->" + "".join(outs + ins)
    cores = [np.asarray(core) for core in chain.cores]
    expected = np.einsum(equation, *cores, optimize=True).reshape(sites.shape)
    gauge = math.prod(fro(core) for core in cores)
    assert fro(np.asarray(chain.to_matrix()) - expected) <= slack(dtype, expected.size, gauge)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_kronecker_product_is_a_chain_of_bond_one(library):
    rng = np.random.default_rng(10)
    factors = [rng.standard_normal(shape) for shape in ((2, 3), (3, 2), (4, 1))]
    w = np.kron(np.kron(*factors[:2]), factors[2])
    sites = Sites((2, 3, 4), (3, 2, 1))
    mpo, report = MPO.from_matrix(torch.from_numpy(w) if library == "torch" else w, sites, Truncation(max_bond=1))
    assert report.error <= C * EPS["float64"] * math.sqrt(w.size) * fro(w)
    assert fro(np.asarray(mpo.to_matrix()) - w) <= 2 * slack("float64", w.size, fro(w))
    assert all(np.linalg.matrix_rank(m) == 1 for m in unfoldings(w, sites))
