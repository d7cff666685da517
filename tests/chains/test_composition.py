"""Kronecker, block, entrywise and reversed chains, and partial traces, against dense NumPy, on chains of any length."""

import math

import jax
import numpy as np
import pytest
from helpers.chains import EPS, dense, fewer, fro, host, left_defect, legs, random_chain, right_defect, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites

LIBRARIES = st.sampled_from(("numpy", "torch", "jax"))
SEEDS = st.integers(0, 2**16)
EYE = MPO.identity(Sites((2, 2), (2, 2)))


@st.composite
def pairs(draw, square=False):
    """Two chains of the same legs, dtype and library, one of them with a centre."""
    sites = draw(legs(max_size=300))
    sites = Sites(sites.out, sites.out) if square else sites
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(LIBRARIES)
    a, b = (random_chain(sites, draw(st.integers(1, 3)), draw(SEEDS), dtype, library) for _ in range(2))
    return a.canonicalize(draw(st.integers(0, len(sites) - 1))) if draw(st.booleans()) else a, b


def gauge(*chains):
    return math.prod(fro(host(core)) for chain in chains for core in chain.cores)


def close(chain, expected, scale):
    """The chain is the matrix, in the dtype it had, and has whatever form it claims."""
    name = str(chain.dtype).rsplit(".", maxsplit=1)[-1]
    assert chain.shape == expected.shape
    assert fro(dense(chain.cores) - expected) <= slack(name, math.prod(chain.shape), scale)
    low, high = chain.canonical_interval
    for k, core in enumerate(chain.cores):
        assert k >= low or left_defect(core) <= slack(name, math.prod(core.shape), core.shape[3])
        assert k <= high or right_defect(core) <= slack(name, math.prod(core.shape), core.shape[0])


@pytest.mark.guarantee("kron")
@fewer
@given(pairs())
def test_kron(pair):
    a, b = pair
    close(a.kron(b), np.kron(dense(a.cores), dense(b.cores)), gauge(a, b))
    close(MPO.kron(b, a, b), np.kron(np.kron(dense(b.cores), dense(a.cores)), dense(b.cores)), gauge(a, b, b))
    assert a.kron(b).cores[: len(a)] == a.cores
    centred = b.canonicalize(len(b) - 1)
    assert a.kron(centred).canonical_interval == (a.canonical_interval[0], len(a) + len(b) - 1)


@pytest.mark.guarantee("concatenate")
@given(pairs(), st.sampled_from((0, 1)))
def test_concatenate(pair, axis):
    a, b = pair
    found = MPO.concatenate([a, b, a], axis)
    expected = np.concatenate([dense(part.cores) for part in (a, b, a)], axis)
    close(found, expected, 2 * gauge(a) + gauge(b))
    assert found.bonds == tuple(2 * x + y for x, y in zip(a.bonds, b.bonds, strict=True))
    close(MPO.concatenate([a], axis), dense(a.cores), gauge(a))


def test_concatenate_with_another_first_leg():
    a, b = (MPO.random(Sites((out, 2), (3, 2)), 2, seed=out) for out in (2, 5))
    found = MPO.concatenate([a, b])
    assert found.sites == Sites((7, 2), (3, 2))
    assert np.allclose(found.to_matrix(), np.concatenate([a.to_matrix(), b.to_matrix()]), rtol=0, atol=1e-13)


@pytest.mark.guarantee("reverse")
@given(pairs())
def test_reverse(pair):
    a, _ = pair
    n = len(a)
    tensor = dense(a.cores).reshape(*a.sites.out, *a.sites.in_)
    order = (*range(n - 1, -1, -1), *range(2 * n - 1, n - 1, -1))
    close(a.reverse(), tensor.transpose(order).reshape(a.shape), gauge(a))
    again = a.reverse().reverse()
    assert again.canonical_interval == a.canonical_interval
    assert all(map(np.array_equal, map(host, again.cores), map(host, a.cores)))


@pytest.mark.guarantee("hadamard")
@fewer
@given(pairs())
def test_hadamard(pair):
    a, b = pair
    close(a.hadamard(b), dense(a.cores) * dense(b.cores), gauge(a, b))


@pytest.mark.guarantee("partial-trace")
@given(pairs(square=True), st.data())
def test_partial_trace(pair, data):
    a, _ = pair
    n = len(a)
    gone = data.draw(st.sets(st.integers(0, n - 1)))
    expected = dense(a.cores).reshape(*a.sites.out, *a.sites.in_)
    left = n
    for k in sorted(gone, reverse=True):
        expected = np.trace(expected, axis1=k, axis2=left + k)
        left -= 1
    kept = [out for k, out in enumerate(a.sites.out) if k not in gone]
    size = math.prod(kept)
    scale = gauge(a) * math.sqrt(math.prod(a.shape) / size**2)
    close(a.partial_trace(gone), np.asarray(expected).reshape(size, size), scale)
    assert a.partial_trace(gone).sites.out == (tuple(kept) or (1,))
    one = data.draw(st.integers(0, n - 1))
    assert np.array_equal(host(a.partial_trace(one).to_matrix()), host(a.partial_trace([one]).to_matrix()))


@pytest.mark.guarantee("partial-trace")
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_long_chains(dtype):
    """Traces and products of 2,000 sites whose matrix, and most of what is carried, is out of any range."""
    n = 2000
    eye = MPO.identity(Sites((2,) * n, (2,) * n), dtype=dtype)
    tiny = MPO(tuple(core / 2 for core in eye.cores))
    assert np.array_equal(tiny.partial_trace(range(1, n)).to_matrix(), np.eye(2) / 2)
    assert np.array_equal(tiny.partial_trace(range(n)).to_matrix(), [[1.0]])
    assert tiny.hadamard(eye).log_norm() == pytest.approx(-n / 2 * math.log(2), rel=1e-5)
    assert tiny.reverse().log_norm() == pytest.approx(-n / 2 * math.log(2), rel=1e-5)
    assert tiny.kron(tiny).log_norm() == pytest.approx(-n * math.log(2), rel=1e-5)
    with pytest.raises(MPOError, match="beyond the range"):
        eye.partial_trace(range(1, n))


def test_under_jax():
    a, b = (random_chain(Sites((2, 3, 2), (2, 3, 2)), 2, seed, "float64", "jax") for seed in (0, 1))

    def all_of(a, b):
        return (
            a.kron(b).to_matrix(), MPO.concatenate([a, b]).to_matrix(), a.reverse().to_matrix(),
            a.hadamard(b).to_matrix(), a.partial_trace([0, 2]).to_matrix(), a.diagonal(), a[3, 4],
        )  # fmt: skip

    for traced, plain in zip(jax.jit(all_of)(a, b), all_of(a, b), strict=True):
        assert np.allclose(traced, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EYE.kron(np.eye(2)), "it is not an MPO"),
        (lambda: EYE.kron(EYE.astype("float32")), "numpy float64 and numpy float32"),
        (lambda: MPO.concatenate([]), "at least one"),
        (lambda: MPO.concatenate(EYE), "takes a list"),
        (lambda: MPO.concatenate([EYE], axis=2), "axis=2"),
        (lambda: MPO.concatenate([EYE, MPO.identity(Sites((2, 3), (2, 3)))]), r"out=\(2, 2\).*out=\(2, 3\)"),
        (lambda: EYE.hadamard(MPO.identity(Sites((2, 3), (2, 3)))), r"\(4, 4\) and \(6, 6\)"),
        (lambda: EYE @ MPO.identity(Sites((3, 2), (3, 2))), r"\(4, 4\) and \(6, 6\)"),
        (lambda: EYE.partial_trace(2), "sites=2 is not a site"),
        (lambda: EYE.partial_trace([0, -1]), "sites=-1 is not a site"),
        (lambda: EYE.partial_trace("a"), "sites='a' is not a site"),
        (lambda: MPO.random(Sites((2, 3), (2, 2)), 2, seed=0).partial_trace(1), r"site 1 .*\(3, 2\) differ"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=message):
        call()
