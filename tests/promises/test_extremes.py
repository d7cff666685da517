"""Unusual but legal input: memory layouts, subclasses, scales and shapes at the ends of the range."""

import math

import numpy as np
import pytest
import torch
from helpers.chains import EPS, HALF_EPS, dense, fro, host, left_defect, make, right_defect, slack

from mpo_tn import MPO, Sites, Truncation, linalg
from mpo_tn.linalg import tails

SITES = Sites((2, 3, 2), (3, 2, 2))
W = np.random.default_rng(7).standard_normal((12, 12))


def assert_exact(w, sites=SITES, dtype="float64"):
    mpo, report = MPO.from_matrix(w, sites)
    plain = host(w)
    assert report.error == 0.0
    assert fro(dense(mpo.cores) - plain) <= slack(dtype, plain.size, fro(plain))
    return mpo


def read_only(w):
    w = w.copy()
    w.setflags(write=False)
    return w


LAYOUTS = {
    "fortran": np.asfortranarray(W),
    "transposed": W.T,
    "reversed": W[::-1, ::-1],
    "strided": np.kron(W, np.ones((2, 3)))[::2, ::3],
    "read only": read_only(W),
    "broadcast": np.broadcast_to(W[0], (12, 12)),
    "unaligned": np.frombuffer(b"\0" + W.tobytes(), dtype="u1")[1:].view("float64").reshape(12, 12),
    "torch transposed": torch.from_numpy(W).T,
    "torch strided": torch.from_numpy(np.kron(W, np.ones((2, 3))))[::2, ::3],
    "torch expanded": torch.from_numpy(W)[:1].expand(12, 12),
    "torch conjugate view": torch.from_numpy(W * (1 + 2j)).conj(),
    "torch negative view": torch.from_numpy(W * (1 + 2j)).conj().imag,
    "torch parameter": torch.nn.Parameter(torch.from_numpy(W), requires_grad=False),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_memory_layout(layout):
    w = LAYOUTS[layout]
    mpo = assert_exact(w)
    plain = w.resolve_conj().resolve_neg().contiguous() if isinstance(w, torch.Tensor) else np.ascontiguousarray(w)
    again, _ = MPO.from_matrix(plain, SITES, spectra=True)
    assert all(
        np.allclose(a, b, rtol=0, atol=slack("float64", 144, mpo.norm()))
        for a, b in zip(mpo.cores, again.cores, strict=True)
    )


class Labelled(np.ndarray):
    pass


@pytest.mark.filterwarnings("ignore:the matrix subclass is not the recommended way:PendingDeprecationWarning")
@pytest.mark.parametrize("subclass", [Labelled, np.matrix, np.memmap])
def test_numpy_subclass(subclass, tmp_path):
    if subclass is np.memmap:
        w = np.memmap(tmp_path / "w", dtype="float64", mode="w+", shape=W.shape)
        w[:] = W
    else:
        w = np.asarray(W).view(subclass)
    mpo = assert_exact(w)
    assert all(type(core) is np.ndarray for core in mpo.cores)
    assert type(mpo.to_matrix()) is np.ndarray


@pytest.mark.parametrize("w", [np.full((1, 1), -3.0), torch.full((1, 1), 2 - 1j), np.zeros((1, 1), "float32")])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_by_one(w, n):
    dtype = str(w.dtype).rsplit(".", maxsplit=1)[-1]
    mpo = assert_exact(w, Sites((1,) * n, (1,) * n), dtype)
    assert mpo.bonds == (1,) * (n - 1)
    assert abs(mpo.norm() - abs(complex(w[0, 0]))) <= slack(dtype, 1, 4.0)
    assert len(mpo.spectra()) == len(mpo.entropies()) == n - 1
    assert mpo.compress(Truncation(max_bond=1))[1].error == 0.0


@pytest.mark.parametrize("n", [33, 70])
def test_more_sites_than_numpy_has_axes(n):
    legs = [1] * n
    legs[3], legs[n // 2], legs[-2] = 2, 3, 2
    mpo = assert_exact(W, Sites(tuple(legs), tuple(reversed(legs))))
    assert fro(mpo.to_matrix() - W) <= slack("float64", 144, fro(W))
    assert len(mpo.spectra()) == n - 1
    assert len(MPO.from_matrix(W, mpo.sites, spectra=True)[1].bonds) == n - 1


@pytest.mark.parametrize("shape", [(1, 20000), (20000, 1)])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_extremely_wide_and_tall(shape, dtype):
    w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    sites = Sites.balanced(*shape, n=4)
    assert_exact(w, sites, dtype)
    mpo, report = MPO.from_matrix(w, sites, Truncation(max_bond=2), spectra=True)
    assert abs(fro(host(w) - dense(mpo.cores)) - report.error) <= slack(dtype, w.size, fro(w))


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("end", ["largest", "smallest normal"])
def test_ends_of_the_range(dtype, library, end):
    """Entries near the end of the range, whose squares lie beyond it."""
    info = np.finfo(dtype)
    w = make("gaussian", SITES, dtype.startswith("complex"), 0)
    # The centre holds the norm, so it is the norm that has to stay in range.
    scale = float(info.max) / 12 if end == "largest" else float(info.smallest_normal) * 1e8
    w = (w / np.abs(w).max() * scale).astype(dtype)
    matrix = torch.from_numpy(w) if library == "torch" else w
    exact, _ = MPO.from_matrix(matrix, SITES)
    unit = float(np.abs(w).max())
    plain = host(w) / unit
    assert fro(
        dense([core / unit if k == exact.sites.center else core for k, core in enumerate(exact.cores)]) - plain
    ) <= (slack(dtype, w.size, fro(plain)))
    mpo, report = MPO.from_matrix(matrix, SITES, Truncation(max_bond=2), spectra=True)
    cores = [core / unit if k == mpo.sites.center else core for k, core in enumerate(mpo.cores)]
    assert abs(report.error / unit - fro(plain - dense(cores))) <= slack(dtype, w.size, fro(plain))
    assert 0 < report.lower_bound <= report.error <= report.bound <= math.sqrt(2) * report.lower_bound * (1 + 1e-12)
    _, again = exact.compress(Truncation(max_bond=2))
    assert abs(again.norm / unit - fro(plain)) <= slack(dtype, w.size, fro(plain))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_norm_beyond_the_range_is_refused(dtype, library):
    w = np.full((12, 12), np.finfo(dtype).max, dtype=dtype)
    with pytest.raises(linalg.MPOError, match="norm"):
        MPO.from_matrix(torch.from_numpy(w) if library == "torch" else w, SITES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_denormals(dtype):
    tiny = float(np.finfo(dtype).smallest_subnormal)
    w = (np.random.default_rng(0).integers(-9, 10, (12, 12)) * tiny).astype(dtype)
    mpo, report = MPO.from_matrix(w, SITES)
    # The centre is rounded to multiples of the smallest subnormal, which is 6 % of such a number.
    assert fro(host(w) - dense(mpo.cores)) <= math.sqrt(mpo.num_parameters) * tiny
    assert report.error == 0.0
    assert MPO.from_matrix(w, SITES, Truncation(max_bond=1))[1].error < report.norm


@pytest.mark.parametrize("values", [[4e200, 3e200], [4e-200, 3e-200], [4e300, 3e-300], [1e308, 1e-308], [0.0, 0.0], []])
def test_tails_neither_overflow_nor_underflow(values):
    found = tails(np.array(values))
    expected = [math.hypot(*values[k:]) for k in range(len(values) + 1)]
    assert np.allclose(found, expected, rtol=4 * 2.0**-52, atol=0)


def test_gauge_at_the_ends_of_the_range():
    rng = np.random.default_rng(0)
    cores = [rng.standard_normal(shape) for shape in ((1, 2, 2, 3), (3, 2, 2, 3), (3, 2, 2, 1))]
    scaled = MPO((cores[0] * 1e-200, cores[1] * 1e200, cores[2] * 1e200))
    with pytest.raises(linalg.MPOError, match="overflow"):
        MPO(tuple(core * 1e200 for core in cores)).norm()
    expected = MPO(tuple(cores)).norm() * 1e200
    for value in (scaled.norm(), scaled.compress(Truncation())[1].norm):
        assert abs(value - expected) <= slack("float64", 64, math.prod(map(fro, cores))) * 1e200


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize(("name", "sites"), [("svd", SITES), ("eigh", Sites((4, 4, 4), (4, 4, 4)))])
def test_factorisation_that_fails_is_repeated_and_reported(monkeypatch, library, dtype, name, sites):
    w = make("gaussian", sites, dtype.startswith("complex"), 1).astype(dtype)
    matrix = torch.from_numpy(w) if library == "torch" else w
    plain, expected = MPO.from_matrix(matrix, sites, Truncation(max_bond=3))

    def fail(*_args, **_kwargs):
        raise (torch.linalg.LinAlgError if library == "torch" else np.linalg.LinAlgError)("did not converge")

    xp = linalg.namespace(matrix)
    monkeypatch.setattr(xp.linalg, name, fail)
    monkeypatch.setattr(linalg, f"small_{name}", fail)
    mpo, report = MPO.from_matrix(matrix, sites, Truncation(max_bond=3))
    small, _ = plain.compress(Truncation(max_bond=2))
    # An SVD decides what is small; of what is large so much is cut here that the Gram matrix is enough.
    assert any("did not converge" in note for note in report.notes)
    assert mpo.dtype == matrix.dtype
    assert abs(report.error - expected.error) <= slack(dtype, w.size, fro(w))
    assert abs(fro(host(w) - dense(mpo.cores)) - report.error) <= slack(dtype, w.size, fro(w))
    assert left_defect(small.cores[0]) + right_defect(small.cores[2]) <= slack(dtype, w.size, 1.0)


@pytest.mark.parametrize("dtype", list(HALF_EPS))
def test_half_precision_at_the_end_of_its_range(dtype):
    w = torch.full((16, 16), 60000.0).to(getattr(torch, dtype))
    mpo, report = MPO.from_matrix(w, Sites.balanced(16, 16, n=3), Truncation(max_bond=1))
    assert report.norm == pytest.approx(float(w[0, 0]) * 16, rel=1e-12)
    assert fro(host(w) - dense(mpo.cores)) <= slack(dtype, 256, report.norm)
    assert bool(torch.isfinite(mpo.to_matrix()).all())
