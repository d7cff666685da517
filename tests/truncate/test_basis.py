"""Four methods, one promise: whatever the basis, the error reported is the error made."""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.chains import EPS, KINDS, C, dense, fro, host, legs, make, problems, random_chain, slack, tail_norms
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation, linalg
from mpo_tn.testing import assert_canonical
from mpo_tn.truncate.basis import LARGE, Request, factor

METHODS = ("auto", "svd", "gram", "krylov", "randomized")
APPROXIMATE = ("krylov", "randomized")
SPECTRA = ("gaussian", "decaying", "rank_deficient", "zero")
GRAM_EPS = 2.0**-26
"""Square root of the precision of doubles: what a Gram matrix resolves, relative to the norm."""


def large(kind: str, dtype: str, library: str, shape: tuple[int, int] = (96, 150), seed: int = 0):
    """A matrix large enough for approximate methods to be used, with its copy on the host."""
    sites = Sites.low_rank(*shape)
    w = make(kind, sites, dtype.startswith("complex"), seed).astype(dtype)
    return (torch.from_numpy(w) if library == "torch" else w), host(w)


@pytest.mark.guarantee("exact-error", "bounds-in-order")
@given(problems(), st.integers(1, 8), st.sampled_from(METHODS), st.booleans())
def test_error_of_every_method_is_the_frobenius_distance(problem, cap, method, with_spectra):
    """To ``4 eps sqrt(size) norm``, with no floor of sqrt(eps): no norm is taken from a difference of squares."""
    mpo, report = MPO.from_matrix(
        problem.matrix, problem.sites, Truncation(max_bond=cap), method=method, spectra=with_spectra
    )
    assert abs(report.error - fro(problem.host - dense(mpo.cores))) <= problem.slack
    assert abs(report.error - fro(np.array([bond.discarded_norm for bond in report.bonds]))) <= problem.slack
    assert report.exact
    eps_k = tail_norms(problem.host, problem.sites, mpo.bonds)
    assert report.error >= max(eps_k, default=0.0) - problem.slack
    known = report.lower_bound is not None
    assert known == (report.bound is not None) == (report.optimality is not None)
    if method == "svd" or (method in ("auto", "gram") and problem.dtype in ("float32", "complex64")):
        assert known
    if known:
        assert report.lower_bound <= report.error <= report.bound
        assert report.error <= math.hypot(*eps_k) + problem.slack


@st.composite
def requests(draw):
    """A matrix of a norm near 1 in the precision of its data or in double, how it is to be factorised, and the host."""
    problem = draw(problems(scaled=False))
    single = problem.dtype in ("float32", "complex64")
    narrow = single and draw(st.booleans())
    matrix = linalg.times_power_of_two(problem.matrix, -linalg.binary_exponent(problem.norm))
    if linalg.library(matrix) == "jax" or not narrow:
        matrix = linalg.widen(matrix)
    request = Request(draw(st.none() | st.integers(1, 12)), draw(st.just(math.inf) | st.floats(1e-6, 1.0)))
    return matrix, draw(st.sampled_from(METHODS)), request, single, host(matrix)


@pytest.mark.guarantee("measured-tail")
@given(requests())
def test_the_tail_is_what_the_basis_misses(case):
    """At every number of columns that is on offer, not only where the bond is cut."""
    matrix, method, request, single, z = case
    found = factor(matrix, method, request, single=single)
    for r in range(len(found.tail)):
        u = host(found.basis(r)) if r else np.zeros((z.shape[0], 0))
        missed = fro(z - u @ (u.conj().T @ z))
        exact = abs(found.tail[r] - missed) <= slack(linalg.dtype_name(matrix), z.size, fro(z))
        square = abs(found.tail[r] ** 2 - missed**2) <= slack("float64", z.size, fro(z) ** 2)
        assert exact or (square and single and found.method == "gram")


@pytest.mark.guarantee("measured-tail")
@pytest.mark.parametrize("kind", ["ones", "rank_one", "rank_deficient", "decaying", "gaussian"])
@pytest.mark.parametrize("shape", [(128, 300), (300, 128)])
def test_the_tail_of_a_large_gram_matrix(kind, shape):
    """Of a constant matrix the rounding of all sums goes the same way."""
    _, z = large(kind, "float32", "numpy", shape)
    z = z / 2.0 ** linalg.binary_exponent(fro(z))
    found = factor(z, "gram", Request(), single=True)
    u = found.basis(128)
    rows = u.T @ z
    for r in (0, 1, 2, 3, 8, 64, 127, 128):
        missed = math.hypot(fro(z - u @ rows), fro(rows[r:]))
        assert abs(found.tail[r] ** 2 - missed**2) <= slack("float64", z.size, fro(z) ** 2)


@pytest.mark.guarantee("orthonormal")
@given(requests())
def test_bases_are_orthonormal_in_double_precision(case):
    matrix, method, request, single, z = case
    found = factor(matrix, method, request, single=single)
    for r in {1, len(found.tail) - 1} & set(range(1, len(found.tail))):
        basis = found.basis(r)
        assert linalg.dtype_name(basis) == ("complex128" if np.iscomplexobj(z) else "float64")
        u = host(basis)
        assert np.linalg.norm(u.conj().T @ u - np.eye(r)) <= 4 * C * 2.0**-52 * math.sqrt(u.size)


@pytest.mark.guarantee("orthonormal")
@pytest.mark.parametrize("method", METHODS)
def test_a_search_in_single_precision_gives_a_basis_in_double(method):
    """Large enough for every method to search in the precision of the data."""
    matrix, z = large("gaussian", "float32", "numpy", (128, 300))
    found = factor(matrix / np.float32(fro(z)), method, Request(cap=8), single=True)
    u = found.basis(8)
    assert u.dtype == np.float64
    assert np.linalg.norm(u.T @ u - np.eye(8)) <= 4 * C * 2.0**-52 * math.sqrt(u.size)


@pytest.mark.guarantee("tolerance")
@given(problems(), st.floats(1e-6, 0.9), st.sampled_from(METHODS))
def test_every_method_meets_a_tolerance(problem, rel_error, method):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(rel_error=rel_error), method=method)
    allowed = rel_error * report.norm
    # A Gram matrix of doubles cannot tell small values apart: what was cut is still measured exactly.
    floor = GRAM_EPS * report.norm if method == "gram" else 0.0
    assert report.error <= allowed * (1 + 1e-12) + floor
    assert report.tolerance_met == (report.error <= allowed * (1 + 1e-12))
    assert abs(report.error - fro(problem.host - dense(mpo.cores))) <= problem.slack


@pytest.mark.guarantee("exact-rounding")
@given(legs(), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from(tuple(EPS)), st.sampled_from(METHODS))
def test_error_of_compress_by_every_method(sites, bond, seed, dtype, method):
    chain = random_chain(sites, bond, seed, dtype)
    small, report = chain.compress(Truncation(max_bond=2), method=method)
    gauge = math.prod(fro(host(core)) for core in chain.cores)
    tolerance = slack(dtype, math.prod(sites.shape), gauge)
    if method == "gram" and dtype in ("float64", "complex128"):
        # The factors to the right are known to half the digits only.
        tolerance += 4 * GRAM_EPS * gauge
    assert abs(fro(dense(chain.cores) - dense(small.cores)) - report.error) <= tolerance


@pytest.mark.guarantee("full-bonds")
@given(problems(kinds=SPECTRA), st.sampled_from(METHODS))
def test_full_bonds_lose_nothing_by_any_method(problem, method):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, method=method)
    assert mpo.bonds == problem.sites.full_bonds
    assert report.error == 0.0
    assert fro(problem.host - dense(mpo.cores)) <= problem.slack


@pytest.mark.guarantee("exact-error")
@settings(max_examples=30)
@given(
    st.sampled_from(SPECTRA),
    st.sampled_from(tuple(EPS)),
    st.sampled_from(("numpy", "torch")),
    st.sampled_from(APPROXIMATE),
    st.integers(1, 20),
    st.sampled_from(((96, 150), (150, 96), (64, 64))),
    st.integers(0, 2**32 - 1),
)
def test_approximate_methods_where_they_are_used(kind, dtype, library, method, cap, shape, seed):
    matrix, plain = large(kind, dtype, library, shape, seed)
    mpo, report = MPO.from_matrix(matrix, Sites.low_rank(*shape), Truncation(max_bond=cap), method=method)
    tolerance = slack(dtype, plain.size, fro(plain))
    assert report.bonds[0].method == method
    assert (report.bound, report.lower_bound, report.optimality) == (None, None, None) or report.error == 0.0
    assert "best possible" not in str(report) or report.error == 0.0
    assert abs(report.error - fro(plain - dense(mpo.cores))) <= tolerance
    values = np.linalg.svd(plain, compute_uv=False)
    assert fro(values[cap:]) <= report.error + tolerance
    captured, best = (fro(plain) ** 2 - report.error**2) / (fro(plain) ** 2 or 1.0), values[:cap]
    assert captured >= 0.97 * fro(best) ** 2 / (fro(plain) ** 2 or 1.0) - 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", APPROXIMATE)
def test_captured_energy_of_a_flat_spectrum(dtype, method):
    """Gaussian, of which 24 of 600 values are wanted: at least 0.97 of the best possible energy."""
    plain = np.random.default_rng(1).standard_normal((600, 600))
    values = np.linalg.svd(plain, compute_uv=False)
    _, report = MPO.from_matrix(plain.astype(dtype), Sites.low_rank(600, 600), Truncation(max_bond=24), method=method)
    assert (report.norm**2 - report.error**2) / fro(values[:24]) ** 2 >= 0.97


@pytest.mark.parametrize("missed", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("method", METHODS)
def test_small_errors_are_not_lost_in_a_difference_of_squares(method, missed):
    """The floor of ``sqrt(|W|**2 - |W'|**2)`` is 1.5e-8 of the norm; what is reported goes down to eps."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((80, 80)))
    v, _ = np.linalg.qr(rng.standard_normal((80, 80)))
    values = np.full(80, missed / math.sqrt(76))
    values[:4] = 0.5
    w = (u * values) @ v.T
    _, report = MPO.from_matrix(w, Sites.low_rank(80, 80), Truncation(max_bond=4), method=method)
    rounding = slack("float64", w.size, 1.0)
    # A Gram matrix finds the space to half the digits, so it may cut more, and says so.
    above = GRAM_EPS if method == "gram" else 1e-3 * missed
    assert missed - rounding <= report.error <= missed + above + rounding


@pytest.mark.guarantee("same-bits")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_twice(library, method):
    matrix, _ = large("gaussian", "float32", library)
    sites = Sites((8, 4, 3), (5, 5, 6))
    runs = [MPO.from_matrix(matrix, sites, Truncation(max_bond=5), method=method) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert all(np.array_equal(host(a), host(b)) for a, b in zip(runs[0][0].cores, runs[1][0].cores, strict=True))


DIGEST = """
import hashlib, numpy as np
from mpo_tn import MPO, Sites, Truncation
w = np.random.default_rng(0).standard_normal((96, 150))
digest = hashlib.sha256()
for dtype in ("float32", "float64"):
    for method in ("svd", "gram", "krylov", "randomized"):
        mpo, report = MPO.from_matrix(w.astype(dtype), Sites.low_rank(96, 150), Truncation(max_bond=5), method=method)
        small, _ = mpo.compress(Truncation(max_bond=3), method=method)
        digest.update(repr(report).encode())
        for core in (*mpo.cores, *small.cores):
            digest.update(np.ascontiguousarray(core).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.guarantee("same-bits")
def test_same_bits_in_a_fresh_process():
    digests = set()
    for seed in ("0", "7"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 2 * hashlib.sha256().digest_size


def test_auto_chooses_by_dtype_size_and_what_is_wanted():
    few, all_ = Request(cap=8), Request()
    w = np.zeros((LARGE, LARGE + 1))
    w[:40, :40] = np.eye(40)
    assert factor(w, "auto", few, single=True).method == "krylov"
    assert factor(w, "auto", few, single=False).method == "krylov"
    small = w[:64, :80]
    assert factor(small, "auto", all_, single=True).method == "gram"
    assert factor(small, "auto", all_, single=False).method == "svd"
    # Of double precision data a Gram matrix keeps half the digits: enough where much is missed, and only there.
    assert factor(small, "auto", few, single=False).method == "gram"
    decaying = np.diag(0.3 ** np.arange(64.0))
    assert factor(decaying, "auto", few, single=False).method == "svd"
    assert factor(decaying, "auto", few, single=True).method == "gram"
    # Where an approximation would span the whole space there is nothing to save.
    assert factor(small[:12], "krylov", few, single=False).method == "svd"
    assert factor(small[:12], "randomized", few, single=True).method == "gram"


@pytest.mark.parametrize("method", APPROXIMATE)
def test_approximate_methods_grow_until_a_tolerance_is_met(method):
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    w = (u * 0.9 ** np.arange(200)) @ u.T
    for rel_error in (0.3, 1e-2, 1e-4):
        mpo, report = MPO.from_matrix(w, Sites.low_rank(200, 200), Truncation(rel_error=rel_error), method=method)
        least = MPO.from_matrix(w, Sites.low_rank(200, 200), Truncation(rel_error=rel_error))[0].bonds[0]
        assert report.tolerance_met
        assert least <= mpo.bonds[0] <= 1.1 * least + 2
        assert abs(report.error - fro(w - dense(mpo.cores))) <= slack("float64", w.size, fro(w))


@given(problems(kinds=KINDS), st.integers(1, 5), st.sampled_from(METHODS))
def test_callback_sees_every_bond_once_as_in_the_report(problem, cap, method):
    seen = []
    truncation = Truncation(max_bond=cap)
    mpo, report = MPO.from_matrix(
        problem.matrix, problem.sites, truncation, method=method, callback=lambda k, bond: seen.append((k, bond))
    )
    assert sorted(k for k, _ in seen) == list(range(len(mpo) - 1))
    assert dict(seen) == dict(enumerate(report.bonds))
    # Both ends go inward: below the centre bonds rise, from it on they fall.
    order = [k for k, _ in seen]
    center = problem.sites.center
    assert [k for k in order if k < center] == list(range(center))
    assert [k for k in order if k >= center] == list(range(center, len(mpo) - 1))[::-1]
    seen.clear()
    _, report = mpo.compress(truncation, method=method, callback=lambda k, bond: seen.append((k, bond)))
    assert seen == list(enumerate(report.bonds))


def test_full_bonds_are_reported_as_such():
    w = np.random.default_rng(0).standard_normal((64, 64))
    _, report = MPO.from_matrix(w, Sites.balanced(64, 64, n=6), Truncation(max_bond=10))
    full = [bond.method == "full" for bond in report.bonds]
    assert full == [True, False, False, False, True]
    assert all(bond.kept == bond.available for bond, known in zip(report.bonds, full, strict=True) if known)


@pytest.mark.parametrize("method", ["SVD", "", None, 3, "qr"])
def test_unknown_method(method):
    with pytest.raises(MPOError, match="method="):
        MPO.from_matrix(np.eye(4), Sites.balanced(4, 4, n=2), method=method)
    with pytest.raises(MPOError, match="method="):
        MPO.from_matrix(np.eye(4), Sites.balanced(4, 4, n=2))[0].compress(Truncation(), method=method)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["eigh", "svd"])
def test_factorisation_that_fails_is_repeated_and_reported(monkeypatch, dtype, method, name):
    matrix, plain = large("gaussian", dtype, "numpy")
    sites = Sites.low_rank(*plain.shape)

    def fail(*_args, **_kwargs):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(linalg.namespace(matrix).linalg, name, fail)
    monkeypatch.setattr(linalg, f"small_{name}", fail)
    mpo, report = MPO.from_matrix(matrix, sites, Truncation(max_bond=5), method=method)
    used = "eigh" if method in ("gram", "auto") or (dtype == "float32" and method != "svd") else "svd"
    assert any("did not converge" in note for note in report.notes) == (name == used)
    assert abs(report.error - fro(plain - dense(mpo.cores))) <= slack(dtype, plain.size, fro(plain))


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (9, 3), (40, 40), (400, 7), (7, 400)])
def test_triangle_is_the_one_of_qr(library, dtype, shape):
    matrix, plain = large("gaussian", dtype, library, shape)
    wide = linalg.widen(matrix)
    r = host(linalg.triangle(wide))
    assert r.shape == (min(shape), shape[1])
    assert np.array_equal(r, np.triu(r))
    rounding = C * 2.0**-52 * math.sqrt(plain.size) * fro(plain) ** 2
    assert fro(r.conj().T @ r - plain.conj().T @ plain) <= rounding


@pytest.mark.guarantee("exact-error", "full-bonds")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_large_single_precision_matrices_are_as_exact(library, scale):
    """Multiplied in single precision, still within the guarantee; at norms where products could leave the range too."""
    matrix, plain = large("gaussian", "float32", library, (256, 512))
    matrix, plain = matrix * scale, plain * scale
    plain = host(matrix)
    sites = Sites((4, 4, 4, 4), (8, 4, 4, 4))
    for method in METHODS:
        for cap in (None, 40):
            mpo, report = MPO.from_matrix(matrix, sites, Truncation(max_bond=cap), method=method)
            tolerance = slack("float32", plain.size, fro(plain)) / 16
            assert abs(report.error - fro(plain - dense(mpo.cores))) <= tolerance
            small, again = mpo.compress(Truncation(max_bond=16), method=method)
            assert abs(again.error - fro(dense(mpo.cores) - dense(small.cores))) <= tolerance


@pytest.mark.guarantee("near-best")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [(256, 300), (300, 256)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_auto_misses_no_more_than_the_best_basis(library, dtype, shape, decay):
    """Whatever precision its Gram matrix has: to ``4 eps sqrt(size) norm`` of the tail of the singular values."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype.startswith("complex") else 0.0)
    u, s, v = np.linalg.svd(w, full_matrices=False)
    plain = ((u * (s * np.arange(1, len(s) + 1.0) ** -decay)) @ v).astype(dtype)
    matrix = torch.from_numpy(plain) if library == "torch" else plain
    wide = host(plain)
    mpo, report = MPO.from_matrix(matrix, Sites.low_rank(*shape), Truncation(max_bond=32))
    tail = fro(np.linalg.svd(wide, compute_uv=False)[32:])
    allowed = slack(dtype, wide.size, fro(wide))
    assert abs(report.error - tail) <= allowed
    assert abs(report.error - fro(wide - dense(mpo.cores))) <= allowed
    assert report.lower_bound is not None
    assert report.bonds[0].method in ("gram", "svd")


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0, 8.0])
def test_auto_rounds_double_precision_as_well_as_svd(dtype, decay):
    """Half the digits decide what to cut only where much is cut; then nothing is lost, and else an SVD decides."""
    mpo = MPO.random(Sites((4, 4, 4, 4), (4, 4, 4, 4)), bonds=40, seed=1, dtype=dtype)
    # Weights to the left, where they make what the sweep knows of the cores to the right ill-conditioned.
    cores = [(core.T * np.arange(1, core.shape[0] + 1.0) ** -decay).T for core in mpo.cores]
    mpo = MPO(tuple(cores))
    calls: list[int] = []
    rounded, report = mpo.compress(Truncation(max_bond=10), callback=lambda k, _: calls.append(k))
    _, best = mpo.compress(Truncation(max_bond=10), method="svd")
    allowed = slack(dtype, math.prod(mpo.shape), report.norm)
    assert calls == [0, 1, 2]
    assert [a.kept for a in report.bonds] == [b.kept for b in best.bonds]
    assert abs(report.error - best.error) <= allowed
    assert abs(report.error - fro(dense(mpo.cores) - dense(rounded.cores))) <= allowed
    assert any(bond.method == "gram" for bond in report.bonds) == (decay < 4)


@given(problems())
def test_nothing_is_factorised_where_nothing_can_be_cut(problem):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites)
    assert report.error == 0.0
    assert mpo.bonds == problem.sites.full_bonds
    beside = [k for k in range(len(mpo.bonds)) if report.bonds[k].method != "full"]
    # Left over are bonds whose site alone has more rows than the rest of the matrix.
    for k in beside:
        left = math.prod(problem.sites.sizes[: k + 1])
        assert min(left, math.prod(problem.sites.sizes) // left) == mpo.bonds[k]
    assert fro(problem.host - dense(mpo.cores)) <= problem.slack
    assert_canonical(mpo)
