"""One bond cut, in arrays of any library: as good as a dense SVD, two cores and no gauge, by maps that are told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.chains import dense, fro, host, installed_backends, slack, to_backend, unfoldings
from helpers.gauges import gauged, scale_at, sides, sites_of
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError, linalg
from mpo_tn.linalg import Array, dtype_name
from mpo_tn.testing import DTYPES
from mpo_tn.truncate import bond_cut
from mpo_tn.truncate.bond_cut import cut_bond

LIBRARIES = installed_backends()
WIDE = ("float64", "complex128")


def best_of(cores: list[Array], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of the dense unfolding at bond k."""
    return np.linalg.svd(unfoldings(dense(cores), sites_of(cores))[k], full_matrices=False)


def after(cores: list[Array], k: int, cut: bond_cut.Cut) -> list[Array]:
    return [*cores[:k], cut.left, cut.right, *cores[k + 2 :]]


@pytest.mark.guarantee("best-cut")
@pytest.mark.parametrize("library", LIBRARIES)
@given(st.data())
def test_a_cut_is_the_best_approximation(library: str, data: st.DataObject) -> None:
    cores = data.draw(gauged(dtypes=DTYPES, library=library))
    k = data.draw(st.integers(0, len(cores) - 2))
    new = data.draw(st.integers(1, int(cores[k].shape[3])))
    cut = cut_bond(cores, k, new)
    u, s, vh = best_of(cores, k)
    before, then = dense(cores), dense(after(cores, k, cut))
    allowed = slack(dtype_name(cores[0]), before.size, scale_at(cores, k))
    assert abs(fro(before - then) - fro(s[new:])) <= allowed
    gap = s[new - 1] - s[new] if new < len(s) else math.inf
    if gap > 0.1 * s[0]:  # otherwise the best approximation is not unique
        best = (u[:, :new] * s[:new]) @ vh[:new]
        assert fro(unfoldings(then, sites_of(cores))[k] - best) <= 10 * allowed
    assert cut.left.shape[3] == cut.right.shape[0] == new
    for part, core in ((cut.left, cores[k]), (cut.right, cores[k + 1])):
        assert type(part) is type(core)
        assert part.dtype == core.dtype
        assert part.device == core.device
    if library == "torch":
        assert cut.left.is_contiguous()


@pytest.mark.guarantee("best-cut")
@pytest.mark.parametrize("library", LIBRARIES)
@given(st.data())
def test_the_spectrum_is_that_of_the_unfolding(library: str, data: st.DataObject) -> None:
    """In double precision whatever the dtype: what the two sides leave out of it is zero."""
    cores = data.draw(gauged(dtypes=DTYPES, library=library))
    k = data.draw(st.integers(0, len(cores) - 2))
    found, expected = cut_bond(cores, k, 1).spectrum, best_of(cores, k)[1]
    length = min(len(found), len(expected))
    allowed = slack("float64", dense(cores).size, scale_at(cores, k))
    assert fro(found[:length] - expected[:length]) <= allowed
    assert max([0.0, *found[length:], *expected[length:]]) <= allowed


@pytest.mark.guarantee("cut-maps")
@given(gauged(dtypes=WIDE), st.data())
def test_the_maps_of_a_cut(cores: list[np.ndarray], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(cores) - 2))
    d = cores[k].shape[3]
    new = data.draw(st.integers(1, d))
    cut = cut_bond(cores, k, new)
    assert (cut.p.shape, cut.q.shape) == ((d, new), (new, d))
    assert cut.p.dtype == cut.q.dtype == cores[0].dtype
    assert np.array_equal(cut.q[:, cut.kept], np.eye(new))
    assert list(cut.kept) == sorted(set(cut.kept))
    assert np.abs(cut.q).max() <= 2.0  # what goes is added to what stays with small weights
    for part, made in (
        (cut.left, np.tensordot(cores[k], cut.p, axes=1)), (cut.right, np.tensordot(cut.q, cores[k + 1], axes=1))
    ):  # fmt: skip
        assert fro(part - made) <= slack("float64", part.size, fro(cut.p) * fro(cores[k]) + fro(cores[k + 1]))
    if new == d and min(*unfoldings(dense(cores), sites_of(cores))[k].shape) >= d:
        assert np.array_equal(cut.q, np.eye(d))
        # What rounds the product of both sides comes back through the inverses of both.
        left, right = sides(cores, k)
        amplified = fro(np.linalg.pinv(left)) * fro(np.linalg.pinv(right)) * fro(left) * fro(right)
        np.testing.assert_allclose(cut.p, np.eye(d), rtol=0, atol=slack("float64", d, amplified))


@given(gauged(dtypes=WIDE, library="torch"), st.integers(1, 3))
def test_a_cut_without_numpy_is_the_same(cores: list[Array], new: int) -> None:
    """Cores that are not on the host are swept by their own library."""
    k = len(cores) // 2 - 1
    new = min(new, int(cores[k].shape[3]))
    expected = cut_bond(cores, k, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bond_cut, "workable", lambda cores, name: [core.detach() for core in cores])
        cut = cut_bond(cores, k, new)
    assert np.abs(cut.spectrum - expected.spectrum).max() <= slack("float64", 1, scale_at(cores, k))
    before, then = dense(cores), dense(after(cores, k, cut))
    tail = fro(cut.spectrum[new:])
    assert abs(fro(before - then) - tail) <= slack("float64", before.size, scale_at(cores, k))
    assert linalg.library(cut.left) == "torch"


@pytest.mark.guarantee("best-cut")
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bonds_beyond_the_rank_and_zero_matrices(library: str, dtype: str) -> None:
    rng = np.random.default_rng(3)
    for kind in ("left", "right", "both", "zero", "tiny"):
        a, b = (rng.standard_normal(shape) for shape in ((1, 5, 4, 8), (8, 3, 6, 1)))
        if dtype.startswith("complex"):
            a, b = a * np.exp(1j * np.arange(8)), b * (1 - 2j)
        if kind in ("left", "both"):
            a[..., 3:] = a[..., :1]  # columns that are equal
        if kind in ("right", "both"):
            b[2:] = 0.0
        if kind == "zero":
            a *= 0
        if kind == "tiny":
            a, b = a * 1e-30, b * 1e-8
        cores = [to_backend(a, library, dtype), to_backend(b, library, dtype)]
        rank = int(np.linalg.matrix_rank(unfoldings(dense(cores), sites_of(cores))[0]))
        assert rank == {"left": 3, "right": 2, "both": 2, "zero": 0, "tiny": 8}[kind]
        for new in range(8, 0, -1):
            cut = cut_bond(cores, 0, new)
            for part in (cut.left, cut.right, cut.p, cut.q):
                assert np.isfinite(host(part)).all()
            assert np.array_equal(cut.q[:, cut.kept], np.eye(new))
            difference = fro(dense(cores) - dense([cut.left, cut.right]))
            tail = fro(cut.spectrum[new:])
            assert abs(difference - tail) <= slack(dtype, 360, scale_at(cores, 0))


@pytest.mark.parametrize(("library", "dtype"), [("numpy", "float16"), ("torch", "bfloat16"), ("jax", "bfloat16")])
def test_half_precision_is_cut_in_double(library: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    cores = [to_backend(rng.standard_normal(shape), library, dtype) for shape in ((1, 4, 3, 6), (6, 3, 4, 1))]
    exact = cut_bond([host(core) for core in cores], 0, 2)
    cut = cut_bond(cores, 0, 2)
    assert np.abs(cut.spectrum - exact.spectrum).max() <= slack("float64", 144, scale_at(cores, 0))
    assert dtype_name(cut.left) == dtype_name(cut.right) == dtype
    difference = fro(dense(cores) - dense([cut.left, cut.right]))
    # What is stored is rounded once, in two cores that may be larger than the matrix.
    stored = fro(host(exact.left)) * fro(host(exact.right))
    assert abs(difference - fro(exact.spectrum[2:])) <= slack(dtype, 1, stored)


@pytest.mark.parametrize("library", LIBRARIES)
def test_arguments_are_left_alone(library: str) -> None:
    rng = np.random.default_rng(0)
    cores = [to_backend(rng.standard_normal(shape), library, "float64") for shape in ((1, 2, 3, 4), (4, 3, 2, 1))]
    before = [host(core) for core in cores]
    cut_bond(cores, 0, 2)
    assert all(np.array_equal(a, host(b)) for a, b in zip(before, cores, strict=True))


def test_bonds_that_are_refused() -> None:
    cores = [np.ones((1, 2, 3, 4)), np.ones((4, 3, 2, 2)), np.ones((2, 2, 2, 1))]
    for k, new in [(0, 0), (0, 5), (0, 1.5), (0, True), (2, 1), (-1, 1)]:
        with pytest.raises(MPOError, match=r"bond"):
            cut_bond(cores, k, new)  # type: ignore[arg-type]
    broken = [cores[0], cores[1] * np.nan, cores[2]]
    with pytest.raises(MPOError, match=r"core 1 of the matrix .*NaN or infinite"):
        cut_bond(broken, 0, 1, "the matrix")
