"""An MPO as a tree of JAX: fixed, traced in part or as a whole, batched, differentiated, and never JAX for others."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.chains import random_chain

from mpo_tn import MPO, MPOError, Sites, Truncation, truncated
from mpo_tn.chains.chain import Chain

SITES = Sites((2, 2, 2), (2, 2, 2))
X = jnp.arange(8.0)


@pytest.fixture
def a():
    return random_chain(SITES, 3, 0, "float64", "jax").canonicalize(1)


def equal(x, y, off=1e-11):
    return np.allclose(x, y, rtol=0, atol=off)


def test_a_fixed_chain_inside_transformations(a):
    w = a.to_matrix()
    assert equal(jax.jit(lambda x: a @ x)(X), w @ X)
    assert equal(jax.grad(lambda x: ((a @ x) ** 2).sum())(X), 2 * w.T @ (w @ X))
    assert equal(jax.vmap(lambda x: a @ x)(jnp.stack([X, 2 * X])), jnp.stack([w @ X, 2 * w @ X]))
    assert equal(jax.jit(lambda c: MPO([c, *a.cores[1:]]).to_matrix())(a.cores[0]), w)
    assert equal(jax.jit(lambda cores, x: MPO(cores) @ x)(list(a.cores), X), w @ X)
    verbs = [
        lambda x: (a + a) @ x, lambda x: (a - a.T) @ x, lambda x: (a @ a) @ x, lambda x: a.H @ x, lambda x: x @ a,
        lambda x: a.norm() * x, lambda x: a.inner(a) * x, lambda x: a.compress(Truncation(max_bond=2))[0] @ x,
    ]  # fmt: skip
    for verb in verbs:
        assert equal(jax.jit(verb)(X), verb(X))


def test_traced_numbers_scale(a):
    w = a.to_matrix()
    assert equal(jax.jit(lambda c: (c * a / 2) @ X)(3.0), 1.5 * w @ X)
    assert equal(jax.grad(lambda c: ((c * a) @ X).sum())(1.0), (w @ X).sum())
    assert jax.jit(lambda c: (a * c).to_matrix())(1j).dtype == "complex128"
    with pytest.raises(MPOError, match=r"shape \(8,\) is no plain scalar"):
        a * X


def test_an_mpo_is_a_tree(a):
    leaves, tree = jax.tree.flatten(a)
    assert all(x is y for x, y in zip(leaves, a.cores, strict=True))
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is MPO
    assert again.canonical_interval == (0, 2)
    assert jax.tree.structure(a) == jax.tree.structure(a.canonicalize(0))
    assert type(jax.tree.map(lambda core: core, Chain(a.cores))) is Chain
    assert equal(jax.jit(lambda m, x: m @ x)(a, X), a @ X)
    assert equal(jax.jit(lambda m: m.T)(a).to_matrix(), a.to_matrix().T)
    batch = jax.tree.map(lambda core: jnp.stack([core, 2 * core]), a)
    assert equal(jax.vmap(lambda m, x: m @ x, in_axes=(0, None))(batch, X)[1], 8 * (a @ X))


def test_gradient_steps(a):
    """The gradient is a tree of the same kind, and a step along it makes the loss smaller."""

    def loss(m):
        return ((m @ X - 1.0) ** 2).sum()

    slope = jax.grad(loss)(a)
    assert [core.shape for core in slope.cores] == [core.shape for core in a.cores]
    better = jax.tree.map(lambda core, step: core - 1e-6 * step, a, slope)
    assert better.center is None
    assert loss(better) < loss(a)
    k, eps = (0, 1, 1, 2), 1e-6
    moved = MPO([a.cores[0].at[k].add(eps), *a.cores[1:]])
    assert float((loss(moved) - loss(a)) / eps) == pytest.approx(float(slope.cores[0][k]), rel=1e-3)


def test_what_needs_values_says_so(a):
    for verb in (lambda m: m.distance(a), lambda m: m.compress(Truncation())[0].cores, lambda m: m.spectra()):
        with pytest.raises(MPOError, match=r"core 0 is being traced by JAX.*use mpo_tn.truncated"):
            jax.jit(verb)(a)


@pytest.mark.guarantee("traced")
@pytest.mark.parametrize(
    ("dtype", "n", "scale"),
    [("float32", 3, 1.0), ("complex128", 3, 1.0), ("complex64", 12, 1e9), ("float64", 12, 1e-60)],
)
def test_numbers_while_traced(dtype, n, scale):
    plain, other = (MPO.random(Sites((2,) * n, (2,) * n), 3, seed=seed, dtype=dtype) for seed in (0, 1))
    near = [(other.cores[k] * 0.1 + core) * scale for k, core in enumerate(plain.cores)]
    first, second = (MPO([jnp.asarray(core.astype(dtype)) for core in cores]) for cores in (plain.cores, near))

    def told(a, b):
        return a.log_norm(), *a.log_inner(b), *b.log_trace()

    off = 4 * n * 12 * (2.0**-23 if dtype in ("float32", "complex64") else 2.0**-52)
    for found, expected in zip(jax.jit(told)(first, second), told(first, second), strict=True):
        assert abs(found - expected) <= off * max(1.0, abs(expected))
    if n == 3:
        for verb in (lambda a: a.norm(), lambda a: a.inner(second), lambda a: second.trace() + a.trace()):
            assert abs(jax.jit(verb)(first) - verb(first)) <= off * abs(verb(first))
        slope = jax.grad(lambda a: a.norm())(first)
        for step, core in zip(slope.cores, first.cores, strict=True):  # the norm is homogeneous of degree 1 in each
            assert abs((step * core).sum() - first.norm()) <= off * first.norm()
        both = jax.vmap(lambda c: MPO([c, *first.cores[1:]]).norm())(jnp.stack([first.cores[0], 2 * first.cores[0]]))
        assert abs(both[1] / both[0] - 2) <= off


def test_traced_zero_has_no_logarithm():
    zero = MPO([jnp.zeros((1, 2, 2, 1))] * 3)
    assert jax.jit(lambda a: a.norm())(zero) == 0
    assert jax.jit(lambda a: a.log_norm())(zero) == -jnp.inf


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_truncated_while_traced(dtype):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((8, 8)) + (1j * rng.standard_normal((8, 8)) if dtype[0] == "c" else 0), dtype)

    def cut(w):
        return truncated(w, SITES, Truncation(max_bond=2))

    def loss(w):
        return (abs(cut(w) - 1.0) ** 4).sum()

    off = 1e-4 if dtype in ("float32", "complex64") else 1e-11
    assert equal(jax.jit(cut)(w), cut(w), off)
    assert equal(jax.vmap(cut)(jnp.stack([w, 2 * w]))[1], cut(2 * w), off)
    slope = jax.grad(loss)(w)
    scale = float(abs(slope).max())
    assert equal(jax.jit(jax.grad(loss))(w), slope, off * scale)
    assert equal(jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([w, w]))[1], slope, off * scale)
    with pytest.raises(MPOError, match="multiply to"):
        jax.jit(lambda w: truncated(w, Sites((2, 2), (2, 2)), Truncation(max_bond=2)))(w)


def test_jax_is_not_loaded_for_others():
    code = (
        "import sys, numpy as np; from mpo_tn import MPO, Sites\n"
        "a = MPO.random(Sites((2, 2), (2, 2)), 2, seed=0); print('jax' in sys.modules)\n"
        "import jax; b = a.T; print(len(jax.tree.leaves(a)), len(jax.tree.leaves(b)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "2", "2"]
