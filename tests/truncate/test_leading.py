"""Leading eigenvectors without all the others: near the best, told exactly, and given up where they would be dear."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.chains import EPS, C, dense, fewer, fro, host, installed_backends, slack, to_backend
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, Sites, Truncation, linalg
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.effort import effort_of
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.structure import structure
from mpo_tn.truncate import basis, leading
from mpo_tn.truncate.basis import Request, factor

SIDE = 320


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch):
    """The same algorithm on matrices of which a test can afford all singular values."""
    for module in (leading, basis):
        monkeypatch.setattr(module, "LARGE", 64)


def stepped(ratio: float, part: float = 0.25):
    """Two levels of singular values."""
    return lambda n, _rng: np.where(np.arange(n) < part * n, ratio, 1.0)


def of_gaussian(aspect: float, spikes: int = 0, size: float = 1.0):
    def values(n, rng):
        s = np.linalg.svd(rng.standard_normal((n, int(aspect * n))), compute_uv=False)
        s[:spikes] *= size
        return s

    return values


SPECTRA = {
    "gaussian": of_gaussian(1),
    "gaussian wide": of_gaussian(2.7),
    "flat": lambda n, _: np.ones(n),
    "r**-1/4": lambda n, _: np.arange(1.0, n + 1) ** -0.25,
    "r**-1/8": lambda n, _: np.arange(1.0, n + 1) ** -0.125,
    "r**-1/2": lambda n, _: np.arange(1.0, n + 1) ** -0.5,
    "linear": lambda n, _: np.linspace(1, 0.01, n) ** 0.5,
    "3 spikes": of_gaussian(1, 3, 10.0),
    "step 1.5": stepped(1.5),
    "step 1.1": stepped(1.1),
    "step 1.03": stepped(1.03),
    "step 1.003": stepped(1.003),
    "step of an eighth": stepped(1.3, 0.125),
    "half the rank": lambda n, _: (np.arange(n) < n // 2).astype(float),
}
"""None of them makes it easy: what is cut weighs nearly as much as what is kept."""
KIND = ("gaussian", "gaussian wide", "flat", "r**-1/8")
"""Of which the filter has to be found worth its products."""


def with_values(values: np.ndarray, columns: int, seed: int, dtype: str = "float64") -> np.ndarray:
    """A matrix of these singular values, between random bases."""
    rng = np.random.default_rng(seed)
    sides = [rng.standard_normal((side, len(values))) for side in (len(values), columns)]
    if dtype.startswith("complex"):
        sides = [side + 1j * rng.standard_normal(side.shape) for side in sides]
    u, v = (np.linalg.qr(side)[0] for side in sides)
    return ((u * values) @ v.conj().T).astype(dtype)


@pytest.mark.guarantee("near-best-leading")
@pytest.mark.parametrize("wanted", [0.1, 0.18, 0.25, 0.33])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_thousandth_of_the_energy_is_lost_at_most_or_it_is_given_up(name, wanted):
    count = int(wanted * SIDE)
    values = np.sort(SPECTRA[name](SIDE, np.random.default_rng(1)))[::-1]
    w = with_values(values, SIDE, 2, "float32")
    gram = w @ w.T
    energy = float(np.trace(gram.astype(float)))
    found = leading.leading(gram, count, energy, 0.01)
    if found is None:
        assert name not in KIND or wanted > 0.3
        assert (name, wanted) not in {("step 1.5", 0.25), ("step 1.1", 0.25), ("step of an eighth", 0.18)}
        return
    u = np.linalg.qr(found.u.astype(float))[0]
    assert u.shape == (SIDE, count)
    assert fro(found.u.T @ found.u - np.eye(count)) <= C * EPS["float32"] * math.sqrt(u.size)
    captured = fro(u.T @ w.astype(float)) ** 2
    best = float((values[:count] ** 2).sum())
    assert captured >= (1 - leading.LOSS) * best - C * EPS["float32"] * energy
    assert captured == pytest.approx(float(found.values.sum()), rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_expected_to_be_lost_is(seed):
    """Of a spectrum that is known, the formula is above what a filter loses, and not by much."""
    values = np.where(np.arange(SIDE) < 80, 1.4, 1.0) ** 2
    w = with_values(values, SIDE, seed)
    q = np.linalg.qr(w)[0]
    gram = (q * values) @ q.T
    block = np.random.default_rng(seed).standard_normal((SIDE, 110))
    for degree in (1, 2, 3, 4):
        q = np.linalg.qr(leading._filtered(gram, block, None, degree, 1.0))[0]
        ritz = np.linalg.eigvalsh(q.T @ gram @ q)[::-1]
        lost = 1 - ritz[:80].sum() / values[:80].sum()
        expected = leading.expected_loss(ritz, values, [(degree, 1.0)], 80, float(values.sum()))
        assert lost <= expected * (1 + 1e-6)
        assert expected <= 6 * lost


@given(st.integers(1, 12), st.floats(-1, 20))
def test_the_polynomial_is_chebyshevs(degree, x):
    expected = abs(np.polynomial.chebyshev.Chebyshev.basis(degree)(x))
    assert float(leading.chebyshev(x, degree)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.guarantee("exact-error", "near-best-leading")
@pytest.mark.slow
@fewer
@given(
    st.sampled_from(("float32", "complex64", "bfloat16", "float16")),
    st.sampled_from(installed_backends()),
    st.sampled_from(((160, 160), (96, 250), (250, 96), (200, 130))),
    st.sampled_from(("gaussian", "r**-1/8", "r**-1/4")),
    st.sampled_from((1e-30, 1.0, 1e30)),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_the_error_reported_is_the_one_made(dtype, library, shape, name, scale, transposed, seed):
    real = "complex64" if dtype == "complex64" else "float64"
    values = SPECTRA[name](min(shape), np.random.default_rng(seed))
    w = with_values(values, max(shape), seed, real)
    w = w if shape[0] <= shape[1] else w.T
    matrix = to_backend(w * (scale if dtype.endswith(("32", "64")) else 1.0), library, dtype)
    if transposed and library != "jax":
        matrix = (matrix.T.copy() if library == "numpy" else matrix.T.contiguous()).T
    plain = host(matrix)
    cap = min(shape) // 5
    mpo, report = MPO.from_matrix(matrix, Sites.low_rank(*shape), Truncation(max_bond=cap))
    wide = [linalg.widen(core) for core in mpo.cores]
    rounding = slack(dtype, plain.size, fro(plain))
    assert abs(report.error - fro(plain - dense(wide))) <= rounding
    assert report.bonds[0].kept == cap
    s = np.linalg.svd(plain, compute_uv=False)
    assert fro(plain) ** 2 - report.error**2 >= (1 - 1.5 * leading.LOSS) * fro(s[:cap]) ** 2
    if report.bonds[0].method == "randomized":
        assert (report.bound, report.lower_bound, report.optimality) == (None, None, None)
    else:
        assert report.bonds[0].method == "gram"
        assert report.lower_bound is not None
        assert name != "gaussian"


@pytest.mark.guarantee("measured-tail", "orthonormal")
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(160, 400), (400, 160)])
def test_basis_and_tail(dtype, shape):
    """Data of 32 bits, in their precision or in double; every number of columns, not only the one wanted."""
    w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    w /= np.asarray(fro(w), w.dtype)
    found = factor(w, "auto", Request(cap=30), single=True)
    assert found.method == "randomized"
    assert not found.optimal
    for r in (1, 15, 30):
        u = found.basis(r)
        assert u.dtype == linalg.widen(w).dtype
        assert fro(u.conj().T @ u - np.eye(r)) <= 4 * C * 2.0**-52 * math.sqrt(u.size)
        assert abs(found.tail[r] - fro(w - u @ (u.conj().T @ w))) <= slack(dtype, w.size, fro(w))


def chosen(w, single=True, **request):
    return factor(w / np.asarray(fro(w), w.dtype), "auto", Request(**request), single=single).method


def test_where_it_is_used():
    w = np.random.default_rng(0).standard_normal((160, 200)).astype(np.float32)
    assert chosen(w, cap=40) == "randomized"
    # Unknown ranks, ranks near the full one, certificates and double precision take all eigenvectors.
    assert chosen(w, cap=40, share=0.9) == "gram"
    assert chosen(w, cap=75) == "gram"
    assert chosen(w, cap=40, best=True) == "gram"
    assert chosen(w.astype(float), single=False, cap=40) == "gram"
    # So do spectra of which too little would be missed for single precision to say what,
    assert chosen(with_values(0.5 ** np.arange(160.0), 200, 0, "float32"), cap=40) == "gram"
    assert chosen(with_values(np.arange(160) < 20.0, 200, 0, "float32").astype(np.float32), cap=40) == "gram"
    # and those of a tiny gap, or of many equal values of which some are wanted.
    assert chosen(with_values(stepped(1.003)(160, None), 200, 0, "float32"), cap=40) == "gram"
    assert chosen(with_values(stepped(1.5)(160, None), 200, 0, "float32"), cap=20) == "gram"


def test_spectra_that_are_asked_for_keep_their_bounds():
    w = np.random.default_rng(0).standard_normal((160, 200)).astype(np.float32)
    sites = Sites.low_rank(160, 200)
    _, near = MPO.from_matrix(w, sites, Truncation(max_bond=30))
    _, best = MPO.from_matrix(w, sites, Truncation(max_bond=30), spectra=True)
    assert near.bonds[0].method == "randomized"
    assert near.bound is None
    assert best.bonds[0].method == "gram"
    assert best.lower_bound is not None
    assert best.lower_bound <= best.error <= near.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_constant_matrices(dtype):
    for matrix in (torch.zeros(128, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype), torch.eye(128, dtype=dtype)):
        mpo, report = MPO.from_matrix(matrix, Sites.low_rank(128, 128), Truncation(max_bond=20))
        rounding = slack(str(dtype)[6:], 128 * 128, fro(host(matrix)))
        assert abs(report.error - fro(host(matrix) - dense([linalg.widen(c) for c in mpo.cores]))) <= rounding


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_a_gram_matrix_by_block_rows(library, dtype, monkeypatch):
    monkeypatch.setattr(leading, "_BLOCK", 30)
    w = np.random.default_rng(0).standard_normal((100, 130)).astype(dtype)
    w = w + 1j * w[::-1] if dtype == "complex64" else w
    gram = leading.gram_matrix(torch.from_numpy(w) if library == "torch" else w)
    assert fro(host(gram) - host(w) @ host(w).conj().T) <= slack(dtype, 100 * 100, fro(w) ** 2)


RUN = """
import hashlib, numpy as np
from mpo_tn import MPO, Sites, Truncation
from mpo_tn.truncate import leading
leading.LARGE = 64
w = np.random.default_rng(0).standard_normal((160, 200)).astype("float32")
mpo, report = MPO.from_matrix(w, Sites.low_rank(160, 200), Truncation(max_bond=30))
assert report.bonds[0].method == "randomized"
print(hashlib.sha256(repr(report).encode() + b"".join(core.tobytes() for core in mpo.cores)).hexdigest())
"""


@pytest.mark.guarantee("same-bits")
@pytest.mark.slow
def test_same_bits_in_every_process():
    runs = {
        subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(runs) == 1
    assert len(runs.pop().strip()) == 2 * hashlib.sha256().digest_size


@pytest.mark.guarantee("near-best-leading")
@pytest.mark.slow
def test_a_matrix_that_is_large_by_itself(monkeypatch):
    monkeypatch.undo()
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    sites, cut = Sites.low_rank(2048, 2048), Truncation(max_bond=512)
    mpo, report = MPO.from_matrix(w, sites, cut)
    assert report.bonds[0].method == "randomized"
    best = np.sort(np.linalg.eigvalsh(host(w) @ host(w).T))[-512:].sum()
    assert report.norm**2 - report.error**2 >= (1 - leading.LOSS) * best
    # What rounding the cores to bfloat16 adds is at right angles, and far less than what was cut.
    made = fro(host(w) - dense([linalg.widen(core) for core in mpo.cores]))
    assert abs(made - report.error) <= EPS["float32"] ** 0.5 * report.norm + 1e-4 * report.error


def test_the_work_counted_is_that_of_the_way_taken(monkeypatch):
    monkeypatch.undo()
    assert not leading.pays(leading.LARGE - 1, 100)
    assert leading.pays(4096, 1024)
    assert leading.may_pay(4096, 1490)
    assert not leading.may_pay(4096, 1800)
    assert leading.singular_work(4096, 1024) == leading.work(4096, 1024)
    assert leading.singular_work(4096, 2048) == (0.0, 4096.0**3)

    def priced(**rule):
        low_rank = structure("linear", 4096, 4096, MPOConfig(sites="low-rank", **rule))
        return effort_of(UnitPlan(("layer",), low_rank, "bfloat16", rule.get("tolerance")), 2)

    assert priced(keep=0.5).seconds < 0.7 * priced(keep=0.8).seconds
    assert priced(keep=0.5).seconds < 0.7 * priced(tolerance=0.5).seconds


def test_columns_of_small_and_large_blocks():
    assert leading.columns_of(8) == 24
    assert leading.columns_of(1024) == 1408
    assert basis.FEW == 16
