"""Chains whose cores hold values of very different sizes that cancel at the bonds: nothing of them is lost."""

import numpy as np
import pytest
from helpers.chains import EPS, dense, fro, host, legs, random_chain
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.chains.balance import balanced
from mpo_tn.linalg import namespace

REACH = {"float32": 40, "complex64": 40, "float64": 470, "complex128": 470}
"""What each side of a bond is scaled by at most, as an exponent, so that cores between two bonds stay in range."""


@st.composite
def wild(draw):
    """A tame chain, and the same one with columns and rows scaled by powers of two."""
    sites = draw(legs(max_size=200))
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(st.sampled_from(("numpy", "torch", "jax")))
    plain = random_chain(sites, 3, draw(st.integers(0, 99)), dtype, library)
    cores = list(plain.cores)
    for k, bond in enumerate(plain.bonds):
        powers = np.asarray(draw(st.lists(st.integers(-REACH[dtype], REACH[dtype]), min_size=bond, max_size=bond)))
        xp = namespace(cores[k])
        real = "float32" if dtype in ("float32", "complex64") else "float64"
        before, after = (xp.asarray((2.0**part).astype(real)) for part in (powers, -powers))
        cores[k], cores[k + 1] = cores[k] * before, cores[k + 1] * after[:, None, None, None]
    return plain, MPO(cores), dtype


@pytest.mark.guarantee("any-gauge")
@given(wild())
def test_what_cancels_at_bonds_is_not_lost(found):
    plain, mpo, dtype = found
    w = dense(plain.cores)
    # The gauge of what is compared with, not the wild one.
    gauge = np.prod([fro(host(core)) for core in plain.cores])
    off = 64 * EPS[dtype] * w.size**0.5 * gauge
    assert abs(mpo.norm() - fro(w)) <= off
    assert abs(mpo.inner(plain) - fro(w) ** 2) <= off * gauge
    assert mpo.distance(plain) <= off
    assert fro(host(mpo.to_matrix()) - w) <= off
    assert fro(host((mpo @ mpo.H).to_matrix()) - w @ w.conj().T) <= off * gauge
    small, report = mpo.compress(Truncation(max_bond=2))
    expected = plain.compress(Truncation(max_bond=2))[1]
    assert abs(report.norm - fro(w)) + abs(report.error - expected.error) <= off
    assert abs(fro(dense(small.cores) - w) - report.error) <= off
    assert fro(dense(mpo.canonicalize(0).cores) - w) <= off
    for values, others in zip(mpo.spectra(), plain.spectra(), strict=True):
        assert np.abs(values - others).max() <= off


def test_what_is_left_is_the_same_chain():
    rng = np.random.default_rng(0)
    cores = [rng.standard_normal(shape) for shape in ((1, 2, 2, 3), (3, 2, 1, 3), (3, 1, 2, 1))]
    cores[0][..., 1] *= 2.0**900
    cores[1][1] *= 2.0**-900
    cores[1][..., 2] = 0.0
    tame, exponent = balanced(cores)
    assert [core.shape for core in tame] == [core.shape for core in cores]
    for core in tame:
        largest = np.abs(core).max(axis=(0, 1, 2))
        assert np.all((largest == 0) | ((largest >= 0.5) & (largest < 1)))
    cores[0][..., 1] *= 2.0**-900
    cores[1][1] *= 2.0**900
    assert np.array_equal(dense(tame) * 2.0**exponent, dense(cores))


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_operator_norm_of_any_size(size):
    rng = np.random.default_rng(0)
    mpo = MPO([rng.standard_normal(shape) for shape in ((1, 2, 2, 3), (3, 2, 2, 3), (3, 2, 2, 1))])
    mpo = mpo.normalized()
    largest = np.linalg.norm(dense(mpo.cores), 2)
    assert (size * mpo).operator_norm().lower / size == pytest.approx(largest, rel=1e-12)


def test_operator_norm_of_long_chains():
    eye = MPO.identity(Sites((2,) * 8 + (1,) * 1200, (2,) * 8 + (1,) * 1200))
    there_and_back = [core * (1e-3 if k < 604 else 1e3) for k, core in enumerate(eye.cores)]
    assert MPO(there_and_back).operator_norm().lower == pytest.approx(1.0, rel=1e-10)
    with pytest.raises(MPOError, match=r"vectors for a matrix of shape .* are too large"):
        MPO.identity(Sites((2,) * 2000, (2,) * 2000)).operator_norm()
