"""JAX, with and without x64: the numbers of NumPy in the dtype and on the device of the input, nothing while traced."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.chains import dense, fro, host, legs, make, random_chain, slack
from helpers.paths import ROOT, TESTS
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.linalg import to_jax
from mpo_tn.truncate.spectra import unfolding_spectra

SITES = Sites((2, 3, 2), (3, 2, 2))
SINGLE = ("float32", "complex64", "float16", "bfloat16")
DOUBLE = ("float64", "complex128")


def problem(dtype: str, sites: Sites = SITES, seed: int = 0) -> np.ndarray:
    kind = jnp.bfloat16 if dtype == "bfloat16" else dtype
    return make("gaussian", sites, dtype.startswith("complex"), seed).astype(kind)


def equal_bits(jax_mpo: MPO, numpy_mpo: MPO) -> bool:
    return all(
        isinstance(a, jax.Array) and a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes()
        for a, b in zip(jax_mpo.cores, numpy_mpo.cores, strict=True)
    )


@pytest.mark.parametrize("x64", [False, True])
@settings(max_examples=40)
@given(legs(), st.sampled_from(SINGLE + DOUBLE), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_numbers_are_those_of_numpy(x64, sites, dtype, seed, cap):
    if dtype in DOUBLE and not x64:
        dtype = SINGLE[seed % 4]
    w = problem(dtype, sites, seed)
    with jax.enable_x64(x64):
        array = to_jax(w)
        # The same memory: another layout or alignment may round differently.
        w = np.asarray(array)
        for truncation in (Truncation(), Truncation(max_bond=cap), Truncation(rel_error=0.3)):
            ours, report = MPO.from_matrix(array, sites, truncation, spectra=True)
            theirs, expected = MPO.from_matrix(w, sites, truncation, spectra=True)
            assert equal_bits(ours, theirs)
            assert replace(report, notes=expected.notes) == expected
            theirs = MPO(tuple(np.asarray(core) for core in ours.cores), ours.canonical_interval)
            assert equal_bits(ours.canonicalize(0), theirs.canonicalize(0))
            assert (ours.norm(), ours.entropies()) == (theirs.norm(), theirs.entropies())
            (ours, report), (theirs, expected) = (mpo.compress(Truncation(max_bond=cap)) for mpo in (ours, theirs))
            assert equal_bits(ours, theirs)
            assert ours.canonical_interval == theirs.canonical_interval
            assert replace(report, notes=expected.notes) == expected
        assert all(map(np.array_equal, unfolding_spectra(array, sites), unfolding_spectra(w, sites)))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", SINGLE)
def test_report_says_which_precision_was_used(x64, dtype):
    wide = "complex128" if dtype == "complex64" else "float64"
    with jax.enable_x64(x64):
        mpo, report = MPO.from_matrix(to_jax(problem(dtype)), SITES)
        note = f"computed in {wide}, stored as {dtype}; JAX arrays are factorised by NumPy on the host"
        assert report.notes == (note,)
        assert note in mpo.compress(Truncation(max_bond=2))[1].notes
        eps = {"float16": 2**-10, "bfloat16": 2**-7}.get(dtype, 2**-23)
        assert report.floor == pytest.approx(eps * 3**0.5 * report.norm)


@pytest.mark.parametrize("dtype", SINGLE)
def test_dense_matrix_without_x64(dtype):
    with jax.enable_x64(False):
        mpo, _ = MPO.from_matrix(to_jax(problem(dtype)), SITES)
        matrix = mpo.to_matrix()
        assert matrix.dtype == mpo.dtype == dtype
        expected = dense(mpo.cores)
        assert fro(host(matrix) - expected) <= 2 * slack(dtype, 144, fro(expected))
        assert len(mpo.to_nodes()) == 3


@pytest.mark.parametrize("dtype", DOUBLE)
def test_double_precision_while_x64_is_off(dtype):
    """JAX itself would cut such an array to single precision, with a warning."""
    with jax.enable_x64(True):
        array = to_jax(problem(dtype))
    with jax.enable_x64(False):
        for make_array in (lambda: MPO.from_matrix(array, SITES), lambda: to_jax(problem(dtype))):
            with pytest.raises(MPOError, match=rf"JAX cannot hold {dtype} with x64 switched off: call jax\.config"):
                make_array()


@pytest.mark.slow
def test_property_tests_hold_without_x64():
    """The same tests as for NumPy and torch, in a process in which JAX has no double precision."""
    files = [str(TESTS / name) for name in ("promises/test_error.py", "chains/test_canonical.py")]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not gauge and not differentiable",
            *files,
        ],
        env=os.environ | {"JAX_ENABLE_X64": "0", "MPO_TN_BACKENDS": "jax", "HYPOTHESIS_PROFILE": "few"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


# --- input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
def test_values_that_are_not_finite_raise(value, dtype):
    w = to_jax(problem(dtype)).at[3, 4].set(value)
    with pytest.raises(MPOError, match=r"the matrix of shape \(12, 12\) has 1 entries that are NaN or infinite"):
        MPO.from_matrix(w, SITES)
    chain = MPO(tuple(jnp.full((1, 2, 2, 1), value) for _ in range(2)))
    for verb in (chain.norm, chain.spectra, lambda: chain.canonicalize(0), lambda: chain.compress(Truncation())):
        with pytest.raises(MPOError, match=r"core 0 .* has 4 entries"):
            verb()


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, lambda f: jax.vmap(lambda x: f(x) * 1)])
def test_traced_arrays_raise(transform):
    w = jnp.ones((3, 4, 4)) if transform not in (jax.jit, jax.grad) else jnp.ones((4, 4))
    sites = Sites((2, 2), (2, 2))

    def decompose(array):
        return MPO.from_matrix(array, sites)[0].cores[0].sum()

    def canonicalize(array):
        return MPO((array.reshape(1, 2, 8, 1),)).canonicalize(0).cores[0].sum()

    for function, what in ((decompose, "the matrix"), (canonicalize, "core 0")):
        with pytest.raises(MPOError, match=f"{what} is being traced by JAX"):
            transform(function)(w)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (lambda: jnp.ones((4, 4), "int32"), "int32"),
        (lambda: jnp.ones((4, 4), bool), "bool"),
        (lambda: jnp.ones((4, 4), jnp.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: jnp.ones(16), r"shape \(16,\)"),
        (lambda: jnp.ones((0, 4)), "no entries"),
    ],
)
def test_bad_matrices(array, message):
    with pytest.raises(MPOError, match=message):
        MPO.from_matrix(array(), Sites((2, 2), (2, 2)))


def test_mixed_libraries_are_refused():
    core = np.ones((1, 2, 2, 1), "float32")
    with pytest.raises(MPOError, match="core 1 is numpy float32 and core 0 is jax float32 on "):
        MPO((jnp.asarray(core), core))


# --- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_to_matrix_under_jit_and_grad(n):
    chain = random_chain(Sites((2,) * n, (3,) * n), 2, n, "float64", "jax")
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((2**n, 3**n)))

    def inner(cores):
        return (MPO(cores).to_matrix() * weight).sum()

    expected = float((host(weight) * dense(chain.cores)).sum())
    rounding = slack("float64", 6**n, fro(host(weight)) * np.prod([fro(host(core)) for core in chain.cores]))
    value, gradient = jax.jit(jax.value_and_grad(inner))(chain.cores)
    assert abs(float(value) - expected) <= rounding
    # W is linear in every core, so <core, gradient> is the inner product itself (Euler).
    for core, slope in zip(chain.cores, gradient, strict=True):
        assert abs(float((core * slope).sum()) - expected) <= rounding


def test_products_are_not_cut_to_the_precision_of_an_accelerator():
    """By default JAX multiplies float32 in fewer bits on a GPU or TPU; this asks it not to."""
    chain = random_chain(SITES, 3, 0, "float32", "jax")
    program = str(jax.make_jaxpr(lambda cores: MPO(cores).to_matrix())(chain.cores))
    assert program.count("dot_general") >= 2
    assert program.count("Precision.HIGHEST") == 2 * program.count("dot_general[")


@pytest.mark.slow
def test_cores_are_committed_nowhere_new():
    """Two CPU devices: the cores stay where the matrix is; those of a sharded matrix go to its first device."""
    code = """
import jax, numpy as np
from mpo_tn import MPO, MPOError, Sites, Truncation
w = np.random.default_rng(0).standard_normal((12, 12)).astype("float32")
second = jax.devices()[1]
mpo, _ = MPO.from_matrix(jax.device_put(w, second), Sites.balanced(12, 12, n=3))
for chain in (mpo, mpo.canonicalize(0), mpo.compress(Truncation(max_bond=2))[0]):
    assert all(core.devices() == {second} for core in chain.cores), chain.cores
    assert chain.to_matrix().devices() == {second}
try:
    MPO((mpo.cores[0], *jax.device_put(mpo.cores[1:], jax.devices()[0])))
except MPOError as error:
    assert "core 1 is jax float32 on" in str(error) and "cpu:1" in str(error).lower(), error
else:
    raise AssertionError("mixed devices")
mesh = jax.make_mesh((2,), ("x",))
sharded = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
spread, _ = MPO.from_matrix(sharded, Sites.balanced(12, 12, n=3))
assert all(core.devices() == {jax.devices()[0]} for core in spread.cores)
assert all(np.array_equal(a, b) for a, b in zip(mpo.cores, spread.cores))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "float64", "complex128"])
def test_algebra(x64, dtype):
    with jax.enable_x64(x64 or dtype in DOUBLE):
        a, b = (random_chain(Sites((2, 3), (2, 3)), 2, seed, dtype, "jax") for seed in (0, 1))
        x, y = dense(a.cores), dense(b.cores)
        gauge = np.prod([fro(host(core)) for core in (*a.cores, *b.cores)])
        vector = jnp.ones(6, dtype)
        for found, expected in (
            ((a + b).to_matrix(), x + y),
            ((a - b).to_matrix(), x - y),
            ((2.5 * a / 2).to_matrix(), 1.25 * x),
            ((a @ b).to_matrix(), x @ y),
            ((a @ vector)[:, None], x.sum(axis=1, keepdims=True)),
            ((vector @ a)[None], x.sum(axis=0, keepdims=True)),
            (a.H.to_matrix(), x.conj().T),
        ):
            assert isinstance(found, jax.Array)
            assert found.dtype == dtype
            assert fro(host(found) - expected) <= slack(dtype, 36, gauge)
        # Numbers come in double precision, whatever x64 says.
        assert abs(a.inner(b) - np.vdot(x, y)) <= slack("float64", 36, gauge)
        assert abs(a.trace() - np.trace(x)) <= slack("float64", 36, gauge)
        assert abs(a.distance(b) - fro(x - y)) <= slack("float64", 36, gauge)
        assert np.array_equal(MPO.identity(Sites((2, 3), (2, 3)), like=a).to_matrix(), np.eye(6))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
def test_fits_and_measures_are_those_of_numpy(x64, dtype):
    with jax.enable_x64(x64):
        array = to_jax(problem(dtype))
        w = np.asarray(array)
        ours, _ = MPO.from_matrix(array, SITES, Truncation(max_parameters=60))
        theirs = MPO(tuple(np.asarray(core) for core in ours.cores), ours.canonical_interval)
        assert ours.num_parameters <= 60
        for options in ({}, {"sites": 2, "max_bond": 3}):
            (fitted, report), (oracle, expected) = (m.fit(t, **options) for m, t in ((ours, array), (theirs, w)))
            assert equal_bits(fitted, oracle)
            assert report == expected
        (again, report), (oracle, expected) = (m.refit(1, t) for m, t in ((ours, array), (theirs, w)))
        assert equal_bits(again, oracle)
        assert report == expected
        assert ours.operator_norm(array) == theirs.operator_norm(w)
        assert ours.spectra().what_if((2, 2)) == theirs.spectra().what_if((2, 2))
        assert ours.cast_error("float64" if dtype[0] != "c" else "complex128") == 0.0
        if dtype == "float32":
            assert ours.cast_error("float16") == theirs.cast_error("float16") > 0
            assert ours.cast_error("bfloat16") > ours.cast_error("float16")
