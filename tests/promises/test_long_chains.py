"""Chains of any length and scale: every verb is right, or refuses with the cause.

What is right says `helpers.transfer`: transfer matrices in plain NumPy, rescaled at every site. Logarithms are compared
to ``1e-9``: rounding of either side is about ``n d eps`` for n sites and bonds d, at most ``2e-11`` here.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import time

import numpy as np
import pytest
from helpers import transfer
from helpers.chains import EPS, holds, host, installed_backends, to_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation
from mpo_tn.chains.canonical import norm_of
from mpo_tn.testing import assert_canonical, matrix_with_spectrum
from mpo_tn.truncate.bond_cut import cut_bond

LOG = 1e-9
SOAK = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "soak", reason="2,000 sites are for make soak")
SHORT = settings(max_examples={"soak": 400, "few": 10}.get(os.environ.get("HYPOTHESIS_PROFILE", "ci"), 25))
"""A chain of hundreds of sites takes longer than the examples of other tests."""
LENGTHS = (1, 2, 3, 9, 33, 120)
SPREADS = ("even", "one", "waves", "random", "first and last")
REACH = {"float32": 25.0, "complex64": 25.0, "float64": 250.0, "complex128": 250.0}
"""Powers of ten that one core may be scaled by."""
RANGE = {
    "float32": (-36.0, 38.0),
    "complex64": (-36.0, 38.0),
    "float64": (-305.0, 307.0),
    "complex128": (-305.0, 307.0),
}
"""Powers of ten between which a dtype surely holds a norm with all its digits."""


class Case:
    """A chain, and its cores in double precision on the host."""

    def __init__(self, chain: MPO, cores: list[np.ndarray], dtype: str) -> None:
        self.chain, self.cores, self.dtype = chain, cores, dtype

    def __repr__(self) -> str:
        powers = [round(math.log10(float(np.abs(core).max()) or 1.0)) for core in self.cores]
        return f"{self.chain} of log {self.log:.6g}, powers of ten {powers}"

    @property
    def log(self) -> float:
        return transfer.log_norm(self.cores)

    @property
    def fits(self) -> bool:
        """Whether its dtype holds its norm."""
        low, high = RANGE[self.dtype]
        return low < self.log / math.log(10) < high


def legs_of(rng: np.random.Generator, n: int, most: int, square: bool) -> Sites:
    out = rng.integers(1, most + 1, n).tolist()
    return Sites(tuple(out), tuple(out if square else rng.integers(1, most + 1, n).tolist()))


def powers(rng: np.random.Generator, n: int, spread: str, decades: float, reach: float) -> np.ndarray:
    """Powers of ten for every core, that add up to ``decades`` where the reach of a dtype allows it."""
    total = float(np.clip(decades, -n * reach, n * reach))
    share = np.full(n, total / n)
    room = reach - abs(total / n)
    if spread == "one" and abs(total) <= reach:
        share = np.zeros(n)
        share[rng.integers(n)] = total
    elif spread == "waves":
        share += room * np.sin(np.arange(n)) - np.mean(room * np.sin(np.arange(n)))
    elif spread == "random":
        noise = rng.uniform(-room / 2, room / 2, n)
        share += noise - noise.mean()
    elif spread == "first and last" and n > 1:
        share[0] += room
        share[-1] -= room
    return share


def make(
    n: int, bond: int, seed: int, dtype: str, library: str, decades: float, spread: str, most: int = 3,
    square: bool = False, sites: Sites | None = None,
) -> Case:  # fmt: skip
    """A Gaussian chain of a norm of about ``10**decades``, shared out among its cores in some way."""
    rng = np.random.default_rng(seed)
    sites = legs_of(rng, n, most, square) if sites is None else sites
    ends = [1, *sites.capped_bonds(bond), 1]
    share = powers(rng, n, spread, decades, REACH[dtype])
    cores = []
    for k, (out, in_) in enumerate(sites):
        core = rng.standard_normal((2, ends[k], out, in_, ends[k + 1])) / math.sqrt(ends[k] * out * in_)
        core = core[0] + 1j * core[1] if dtype.startswith("complex") else core[0]
        cores.append(to_backend(core * 10.0 ** share[k], library, dtype))
    return Case(MPO(tuple(cores)), [host(core) for core in cores], dtype)


@st.composite
def cases(draw, lengths=LENGTHS, most=3, square=False, bonds=(1, 2, 5, 12), twins=False):
    n = draw(st.sampled_from(lengths))
    pairs = [(b, d) for b in installed_backends() for d in EPS if holds(b, d) and (b != "jax" or n < 40)]
    library, dtype = draw(st.sampled_from(pairs))
    seed, bond = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(bonds))
    decades = draw(st.sampled_from((0.0, 0.0, 20.0, -20.0, 150.0, -150.0, 299.0, -299.0)))
    spread = st.sampled_from(SPREADS)
    first = make(n, bond, seed, dtype, library, decades, draw(spread), most, square)
    if not twins:
        return first
    other = make(
        n, draw(st.sampled_from(bonds)), seed + 1, dtype, library, decades, draw(spread), sites=first.chain.sites
    )
    return first, other


def cores_of(chain: MPO) -> list[np.ndarray]:
    return [host(core) for core in chain.cores]


def digits(case: Case) -> float:
    """What storing a core at every site may change, relative to the norm; transfer matrices see no less than 2e-6.

    A distance is the root of a difference of squares, which are known to ``eps log(norm)`` a site, about 1e-12.
    """
    return 4 * EPS[case.dtype] * math.sqrt(len(case.cores)) + 2e-6


def same(found: tuple[complex, float], expected: tuple[complex, float], log: float = 1e-7) -> bool:
    """Phases and logarithms agree; both may be of nothing."""
    if -math.inf in (found[1], expected[1]):
        return found[1] == expected[1]
    return abs(found[1] - expected[1]) <= log and abs(found[0] - expected[0]) <= log


def refused_or(call, verb: str):
    """The result, or None if it is refused with a message that names the verb that helps."""
    try:
        return call()
    except MPOError as error:
        if re.search(rf"\b{verb}", str(error)) and re.search("range|overflow", str(error)):
            return None
        raise


# --- norms, inner products, traces -----------------------------------------------------------------------------------


@pytest.mark.guarantee("norm", "log-norm")
@SHORT
@given(cases())
def test_norm(case):
    log = case.log
    assert abs(case.chain.log_norm() - log) <= LOG
    norm = refused_or(case.chain.norm, "log_norm")
    assert (norm is not None) >= (-307 < log / math.log(10) < 307.5)
    assert norm is None or abs(math.log(norm) - log) <= LOG


@pytest.mark.guarantee("log-inner")
@SHORT
@given(cases(twins=True))
def test_inner(pair):
    a, b = pair
    expected = transfer.log_overlap(a.cores, b.cores)
    # Two random chains have little in common: rounding is relative to their norms site by site, not to what is left.
    assert same(a.chain.log_inner(b.chain), expected, 1e-6)
    found = refused_or(lambda: a.chain.inner(b.chain), "log_inner")
    assert (found is not None) >= (-307 < expected[1] / math.log(10) < 307.5)
    if found is not None:
        assert same((found / abs(found), math.log(abs(found))), expected, 1e-6)


@pytest.mark.guarantee("log-trace")
@SHORT
@given(cases(square=True))
def test_trace(case):
    expected = transfer.log_trace(case.cores)
    assert same(case.chain.log_trace(), expected, 1e-6)
    found = refused_or(case.chain.trace, "log_trace")
    assert (found is not None) >= (-307 < expected[1] / math.log(10) < 307.5)
    if found is not None:
        assert same((found / abs(found), math.log(abs(found))), expected, 1e-6)


@pytest.mark.guarantee("normalized")
@SHORT
@given(cases(), st.booleans())
def test_normalized(case, canonical):
    chain = case.chain.canonicalize(0) if canonical and case.fits else case.chain
    unit = chain.normalized()
    assert abs(unit.log_norm()) <= 4 * EPS[case.dtype] * math.sqrt(len(unit)) + LOG
    assert unit.canonical_interval == chain.canonical_interval
    assert_canonical(unit)
    phase, log = transfer.log_overlap(cores_of(unit), case.cores)
    assert abs(phase - 1) <= digits(case)
    assert abs(log - case.log) <= digits(case)


@pytest.mark.guarantee("norm", "log-inner", "log-trace")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("n", [500, 600, 1023, 1024, 1100, 3000])
def test_products_of_matrices_of_norm_one(n, library):
    """Every partial product but the whole is out of range, or soon would be, if nothing were taken out."""
    u, rho, big = (
        MPO([to_backend(np.eye(2).reshape(1, 2, 2, 1) / by, library, "float64")] * n) for by in (2**0.5, 2, 1)
    )
    slack = 2 * n * EPS["float64"]
    assert u.inner(u) == pytest.approx(1.0, rel=slack)
    assert u.norm() == pytest.approx(1.0, rel=slack)
    assert rho.trace() == 1.0
    assert rho.log_trace() == (1.0, 0.0)
    assert rho.log_norm() == pytest.approx(-n * math.log(2) / 2, rel=1e-12)
    assert big.log_trace() == (1.0, pytest.approx(n * math.log(2), rel=1e-12))
    assert rho.log_inner(big) == (1.0, 0.0)
    assert u.compress(Truncation(rel_error=1e-5))[1].norm == pytest.approx(1.0, rel=slack)
    if n > 1023:
        with pytest.raises(MPOError, match=r"the trace, about .*, overflows double precision: use log_trace\(\)"):
            big.trace()


def test_nothing():
    """A chain of zeros, somewhere in it, has a norm of 0 and no logarithm."""
    cores = [np.full((1, 2, 2, 1), 1e200)] * 900
    cores[450] = cores[450] * 0
    zero = MPO(cores)
    assert (zero.norm(), zero.log_norm()) == (0.0, -math.inf)
    assert (zero.inner(zero), zero.log_inner(zero)) == (0.0, (0.0, -math.inf))
    assert (zero.trace(), zero.log_trace()) == (0.0, (0.0, -math.inf))
    assert zero.distance(zero) == 0.0
    assert zero.compress(Truncation(max_bond=1))[1].error == 0.0
    assert zero.canonicalize(3).norm() == 0.0
    with pytest.raises(MPOError, match="is 0: there is nothing to normalize"):
        zero.normalized()


# --- canonical form, rounding, spectra -------------------------------------------------------------------------------


@pytest.mark.guarantee("canonical")
@SHORT
@given(cases(), st.randoms(use_true_random=False))
def test_canonicalize(case, random):
    center = random.randrange(len(case.chain))
    moved = refused_or(lambda: case.chain.canonicalize(center), "log_norm")
    assert (moved is not None) >= case.fits
    if moved is not None:
        assert_canonical(moved, center)
        assert transfer.relative_distance(case.cores, cores_of(moved)) <= digits(case)


@pytest.mark.guarantee("exact-rounding", "lost-below-range")
@SHORT
@given(cases(), st.integers(1, 6), st.sampled_from(("auto", "svd", "gram", "krylov")))
def test_compress(case, cap, method):
    found = refused_or(lambda: case.chain.compress(Truncation(max_bond=cap), method=method), "log_norm")
    assert (found is not None) >= case.fits
    if found is None:
        return
    small, report = found
    assert abs(math.log(report.norm) - case.log) <= (LOG if method == "svd" else digits(case))
    distance = transfer.relative_distance(case.cores, cores_of(small))
    assert abs(report.rel_error - distance) <= digits(case)
    assert report.exact == (method != "gram" or case.dtype in ("float32", "complex64"))
    assert all(bond <= cap for bond in small.bonds)


@pytest.mark.guarantee("tolerance")
@SHORT
@given(cases(twins=True, bonds=(1, 2, 3)), st.sampled_from((1e-1, 1e-3, 1e-5)), st.sampled_from((1e-2, 1e-4)))
def test_compress_to_a_tolerance(pair, rel_error, strength):
    """A chain with a small addition, which is cut or kept."""
    a, b = (case.chain.normalized() for case in pair)
    chain = a + strength * b
    small, report = chain.compress(Truncation(rel_error=rel_error))
    assert report.tolerance_met
    assert report.rel_error <= rel_error * (1 + 1e-12)
    distance = transfer.relative_distance(cores_of(chain), cores_of(small))
    assert abs(report.rel_error - distance) <= digits(pair[0])
    assert chain.distance(small) == pytest.approx(report.error, abs=digits(pair[0]))


@SHORT
@given(cases(bonds=(1, 2, 4)))
def test_spectra_and_entropies(case):
    expected = transfer.log_spectra(case.cores)
    for values, entropy in zip(expected, case.chain.entropies(), strict=True):
        weights = values[values > 0] ** 2
        assert abs(entropy + float((weights * np.log(weights)).sum())) <= 1e-6
    found = refused_or(case.chain.spectra, "normalized")
    assert (found is not None) >= (-307 < case.log / math.log(10) < 307.5)
    for values, part in zip(expected, found or (), strict=found is not None):
        assert abs(math.log(part[0]) - case.log - math.log(values[0])) <= 1e-6
        assert np.abs(values[: len(part)] / values[0] - part / part[0]).max() <= 1e-6


# --- sums, products, distances ---------------------------------------------------------------------------------------


@SHORT
@given(cases(twins=True, bonds=(1, 2, 4)), st.sampled_from((1.0, -0.3, 1e30, 1e-30)))
def test_sums_and_distances(pair, factor):
    a, b = pair
    phase, cross = transfer.log_overlap(a.cores, b.cores)
    top = max(a.log, b.log)
    for sign, chain in ((1, a.chain + b.chain), (-1, a.chain - b.chain)):
        square = (
            sum(math.exp(2 * (case.log - top)) for case in pair) + sign * 2 * (phase * math.exp(cross - 2 * top)).real
        )
        assert abs(chain.log_norm() - top - math.log(square) / 2) <= 1e-6
    if abs(top) < 600:
        distance = a.chain.distance(b.chain)
        assert abs(math.log(distance) - top - math.log(square) / 2) <= 1e-6
        assert a.chain.distance(a.chain) <= 1e-12 * math.exp(a.log)
    scaled = refused_or(lambda: factor * a.chain, "normalized")
    if scaled is not None:
        assert abs(scaled.log_norm() - a.log - math.log(abs(factor))) <= digits(a)
        undone = scaled / factor
        assert abs(undone.log_norm() - a.log) <= digits(a)


@SHORT
@given(cases(twins=True, square=True, bonds=(1, 2, 3)))
def test_products(pair):
    a, b = pair
    expected = []
    log = 0.0
    for left, right in zip(a.cores, b.cores, strict=True):
        (left, first), (right, second) = transfer.scaled(left), transfer.scaled(right)
        core = np.einsum("aomb,cmid->acoibd", left, right)
        expected.append(core.reshape(core.shape[0] * core.shape[1], *core.shape[2:4], -1))
        log += first + second
    product = refused_or(lambda: a.chain @ b.chain, "normalized")
    unit = a.chain.normalized() @ b.chain.normalized()
    for chain, norms in ((product, 0.0), (unit, a.log + b.log)):
        if chain is not None:
            # Cores of a product are rounded in their own dtype, and what they cancel to is smaller than they are.
            assert abs(chain.log_norm() + norms - log - transfer.log_norm(expected)) <= 30 * digits(a)
            phase, _ = transfer.log_overlap(cores_of(chain), expected)
            assert abs(phase - 1) <= 30 * digits(a)


# --- matrices of many sites without legs -----------------------------------------------------------------------------


def few_legs(n: int, seed: int) -> Sites:
    """Legs of which all but a few are 1."""
    rng = np.random.default_rng(seed)
    out, in_ = [1] * n, [1] * n
    for side in (out, in_):
        for k in rng.integers(0, n, 3):
            side[k] = int(rng.integers(2, 5))
    return Sites(tuple(out), tuple(in_))


def dense(cores: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """The matrix of cores over its norm, and the logarithm of that."""
    matrix, log = np.ones((1, 1, 1)), 0.0
    for core in cores:
        core, first = transfer.scaled(core)
        matrix = np.einsum("xya,aoib->xoyib", matrix, core)
        matrix = matrix.reshape(matrix.shape[0] * matrix.shape[1], -1, matrix.shape[4])
        size = float(np.linalg.norm(matrix))
        matrix, log = matrix / size, log + first + math.log(size)
    return matrix[:, :, 0], log


@pytest.mark.parametrize("library", installed_backends())
@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("n", [2, 20, 90])
@pytest.mark.parametrize("decades", [0.0, 30.0, -30.0, 290.0, -290.0])
def test_matrices_and_products_with_vectors(library, dtype, n, decades):
    if library == "jax" and n > 20:
        return
    sites = few_legs(n, n)
    for spread in SPREADS:
        case = make(n, 3, n, dtype, library, decades, spread, sites=sites)
        matrix, log = dense(case.cores)
        tolerance = 8 * EPS[dtype] * n + 1e-11
        found = refused_or(case.chain.to_matrix, "normalized")
        assert (found is not None) >= case.fits
        if found is not None:
            assert np.linalg.norm(host(found) / math.exp(log) - matrix) <= tolerance
        x = np.random.default_rng(0).standard_normal((sites.shape[1], 2)) * 0.1
        y = refused_or(lambda case=case, x=x: case.chain @ to_backend(x, library, dtype), "normalized")
        assert (y is not None) >= case.fits
        if y is not None:
            assert np.linalg.norm(host(y) / math.exp(log) - matrix @ x) <= tolerance * np.linalg.norm(x)


# --- casts and fits --------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("cast-error")
@pytest.mark.parametrize("n", [3, 40, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decades", [0.0, -290.0])
def test_cast_error(n, dtype, decades):
    case = make(n, 4, n, dtype, "numpy", 0.0, "even")
    rounded = [core.astype("float16").astype("float64") for core in case.cores]
    expected = transfer.relative_distance(case.cores, rounded) * math.exp(case.log)
    assert case.chain.cast_error("float16") == pytest.approx(expected, rel=1e-6)
    if dtype == "float64":
        # Powers of two change no digit, wherever they are, as long as the narrow dtype holds them.
        error = case.chain.cast_error("float32")
        power = round(decades / math.log10(2) / n)
        power = max(power, -90)
        scaled = MPO([core * 2.0**power for core in case.chain.cores])
        assert math.log(scaled.cast_error("float32")) == pytest.approx(
            math.log(error) + n * power * math.log(2), abs=1e-9
        )


@pytest.mark.guarantee("fit-never-worse")
@pytest.mark.parametrize("n", [5, 60, 400])
@pytest.mark.parametrize("decades", [0.0, -250.0, 250.0])
@pytest.mark.parametrize("sites", [1, 2])
def test_fit_from_a_chain_that_has_nothing_in_common(n, decades, sites):
    """Overlaps fall by a factor at every site, far out of range, and a fit has to start from them all the same."""
    target = make(n, 5, 1, "float64", "numpy", decades, "even", most=2)
    start = make(n, 6, 2, "float64", "numpy", 0.0, "even", sites=target.chain.sites)
    norms = []
    fitted, report = start.chain.fit(
        target.chain,
        sites=sites,
        sweeps=3,
        max_bond=6 if sites == 2 else None,
        callback=lambda sweep, k, chain: norms.append(norm_of(chain).log),
    )
    # A projection of the target is never larger, and grows from update to update.
    assert max(norms) <= target.log + 1e-9
    if sites == 1:
        # Double precision, in which the chain is shown, does not hold the first of them if the target is small.
        held = [norm for norm in norms if norm > -690]
        assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(held))
    assert report.norm == pytest.approx(math.exp(target.log), rel=1e-9)
    distance = transfer.relative_distance(target.cores, cores_of(fitted))
    assert abs(report.rel_error - distance) <= 3e-6
    slack = 1e-12 * (report.norm + math.exp(start.log))
    assert all(later <= earlier + slack for earlier, later in zip(report.errors, report.errors[1:], strict=False))
    assert report.rel_error < 0.9


@pytest.mark.guarantee("best-core")
@pytest.mark.parametrize("n", [5, 400])
def test_refit_one_core_of_a_long_chain(n):
    target = make(n, 3, 1, "float64", "numpy", -200.0, "waves")
    cores = list(target.chain.cores)
    cores[n // 2] = np.random.default_rng(0).standard_normal(cores[n // 2].shape)
    again, report = MPO(cores).refit(n // 2, target.chain)
    assert report.rel_error <= 1e-9
    assert transfer.relative_distance(target.cores, cores_of(again)) <= 1e-6


# --- what was silent -------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("best-cut")
@pytest.mark.parametrize("n", [6, 500])
def test_cut_one_bond_of_a_long_chain(n):
    case = make(n, 4, 0, "float64", "numpy", -200.0, "waves")
    cut = cut_bond(case.chain.cores, n // 2, 2)
    cores = [*case.cores[: n // 2], cut.left, cut.right, *case.cores[n // 2 + 2 :]]
    values = transfer.log_spectra(case.cores)[n // 2]
    assert np.abs(cut.spectrum / cut.spectrum[0] - values / values[0]).max() <= 1e-6
    assert math.log(cut.spectrum[0]) == pytest.approx(case.log + math.log(values[0]), abs=1e-6)
    assert transfer.relative_distance(case.cores, cores) == pytest.approx(float(np.linalg.norm(values[2:])), abs=1e-5)


def ising(n: int, dtype: str) -> MPO:
    """``sum Z Z + sum X / 2`` over ``2**(n / 2)``: Frobenius norm ``sqrt(n - 1 + n / 4)``."""
    eye, x, z = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]]), np.diag([1.0, -1.0])
    core = np.zeros((3, 2, 2, 3))
    core[0, :, :, 0] = core[2, :, :, 2] = eye
    core[0, :, :, 1] = core[1, :, :, 2] = z
    core[0, :, :, 2] = x / 2
    core /= math.sqrt(2)
    cores = [core[:1], *[core] * (n - 2), core[..., 2:]]
    return MPO([part.astype(dtype) for part in cores])


@pytest.mark.guarantee("exact-rounding")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("method", ["auto", "svd", "gram"])
def test_a_long_ising_chain_keeps_its_norm(n, dtype, method):
    chain = ising(n, dtype)
    expected = math.sqrt(n - 1 + n / 4)
    # Entries of float32 are off by up to half its precision at every site.
    assert chain.norm() == pytest.approx(expected, rel=n * EPS[dtype])
    small, report = chain.compress(Truncation(rel_error=1e-5), method=method)
    assert report.norm == pytest.approx(chain.norm(), rel=2 * EPS[dtype])
    assert set(small.bonds) == {3}
    assert report.rel_error <= 1e-5
    assert transfer.relative_distance(cores_of(chain), cores_of(small)) <= 1e-5 + 2e-7


@pytest.mark.parametrize(("bond", "n"), [(64, 70), (16, 110), (16, 90)])
def test_wide_chains_of_norm_one(bond, n):
    chain = MPO.random(Sites((2,) * n, (2,) * n), bond, seed=0)
    chain = MPO([(core / 2).astype("float32") for core in chain.cores])
    _, report = chain.compress(Truncation(rel_error=1e-3))
    assert report.norm == pytest.approx(math.exp(transfer.log_norm(cores_of(chain))), rel=1e-6)
    assert 0 <= report.rel_error <= 1e-3


@pytest.mark.guarantee("lost-below-range")
@pytest.mark.parametrize("total", [1e-40, 1e-43, 1e-48])
def test_a_norm_below_the_range_is_never_met(total):
    chain = MPO.random(Sites((2,) * 8, (2,) * 8), 4, seed=0)
    chain = MPO([(core * (total / 173) ** (1 / 8)).astype("float32") for core in chain.cores])
    small, report = chain.compress(Truncation(rel_error=1e-6))
    distance = transfer.relative_distance(cores_of(chain), cores_of(small))
    assert report.rel_error == pytest.approx(distance, rel=0.05)
    assert not report.tolerance_met
    assert any("below the range" in note for note in report.notes)
    with pytest.raises(MPOError, match="the range of the dtype leaves an error"):
        chain.compress(Truncation(rel_error=1e-6, strict=True))
    with pytest.raises(MPOError, match=r"below the range of float32.*normalized\(\) and log_norm\(\)"):
        chain.canonicalize(3)
    with pytest.raises(MPOError, match="below the range of float32"):
        chain.to_matrix()
    assert chain.normalized().compress(Truncation(rel_error=1e-6))[1].tolerance_met


@pytest.mark.guarantee("lost-below-range")
def test_a_matrix_below_the_range():
    w = (np.random.default_rng(0).standard_normal((16, 16)) * 1e-44).astype("float32")
    mpo, report = MPO.from_matrix(w, Sites((4, 4), (4, 4)), Truncation(max_bond=8, rel_error=1e-6))
    wide = w.astype("float64")
    distance = float(np.linalg.norm((wide - dense_of(cores_of(mpo))) * 1e44)) / float(np.linalg.norm(wide * 1e44))
    assert report.rel_error == pytest.approx(distance, rel=1e-6)
    assert not report.tolerance_met


def dense_of(cores: list[np.ndarray]) -> np.ndarray:
    matrix, log = dense(cores)
    return matrix * math.exp(log)


@pytest.mark.guarantee("estimates-told")
@pytest.mark.parametrize("cap", [4, 8, 12])
def test_gram_on_double_precision_claims_no_exact_error(cap):
    sites = Sites((4,) * 4, (4,) * 4)
    w = matrix_with_spectrum(sites, 10.0 ** -np.linspace(0, 14, 16), seed=1)
    exact, _ = MPO.from_matrix(w, sites)
    for method in ("auto", "svd", "gram"):
        small, report = MPO(exact.cores).compress(Truncation(max_bond=cap), method=method)
        error = float(np.linalg.norm(w - small.to_matrix()))
        assert report.exact == (method != "gram")
        if report.exact:
            assert abs(report.error - error) <= report.floor
        else:
            assert abs(report.error - error) <= 6e-8 * report.norm
            assert report.bound is report.lower_bound is None
            assert str(report).startswith("error is about")


# --- thousands of sites ----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("plan-soon")
@pytest.mark.parametrize("n", [3000, 14300])
def test_too_many_sites_are_printed_and_refused_at_once(n):
    chain = MPO([np.ones((1, 2, 2, 1))] * n)
    assert len(repr(chain)) < 400
    assert len(str(chain.sites)) < 200
    for call in (chain.plan, chain.to_matrix, lambda: chain @ np.ones(3), lambda: np.ones(3) @ chain):
        start = time.perf_counter()
        with pytest.raises(MPOError, match=r"10\*\*\d+"):
            call()
        assert time.perf_counter() - start < 1
    small, report = chain.normalized().compress(Truncation(max_bond=1))
    assert max(len(str(report)), len(repr(report)), len(repr(small))) < 400


@pytest.mark.guarantee("plan-soon")
def test_a_plan_for_thousands_of_sites_without_legs():
    chain = make(2000, 3, 0, "float64", "numpy", 0.0, "even", sites=few_legs(2000, 0)).chain
    start = time.perf_counter()
    plan = chain.plan()
    assert time.perf_counter() - start < 5
    assert plan.flops < 10**6
    assert chain.plan(batch=1).flops < 10**6
    assert len(repr(plan)) < 200


@pytest.mark.slow
@SOAK
@settings(max_examples=40)
@given(cases(lengths=(700, 2000), bonds=(1, 3, 16)))
def test_two_thousand_sites(case):
    assert abs(case.chain.log_norm() - case.log) <= LOG
    unit = case.chain.normalized()
    assert abs(unit.log_norm()) <= 4 * EPS[case.dtype] * math.sqrt(len(unit)) + LOG
    center = len(unit) // 3
    assert_canonical(unit.canonicalize(center), center)
    small, report = unit.compress(Truncation(rel_error=1e-3))
    assert abs(report.rel_error - transfer.relative_distance(cores_of(unit), cores_of(small))) <= digits(case)


@pytest.mark.slow
@SOAK
@pytest.mark.parametrize("dtype", list(EPS))
def test_two_thousand_sites_of_bond_64(dtype):
    a, b = (make(2000, 64, seed, dtype, "numpy", 0.0, "waves", most=4) for seed in (0, 1))
    b = make(2000, 64, 1, dtype, "numpy", 0.0, "waves", sites=a.chain.sites)
    assert abs(a.chain.log_norm() - a.log) <= 1e-8
    assert same(a.chain.log_inner(b.chain), transfer.log_overlap(a.cores, b.cores), 1e-5)
    unit = a.chain.normalized()
    small, report = unit.compress(Truncation(max_bond=40))
    assert abs(report.rel_error - transfer.relative_distance(cores_of(unit), cores_of(small))) <= digits(a)
