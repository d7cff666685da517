"""Hypothesis strategies for matrices, legs and MPOs, and what can be asserted of a decomposition."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpo_tn import linalg
from mpo_tn.chains.chain import Chain
from mpo_tn.linalg import Array
from mpo_tn.mpo import MPO
from mpo_tn.sites import Sites
from mpo_tn.testing.reference import (
    KINDS,
    C,
    dense_matrix,
    frobenius,
    holds,
    installed_backends,
    left_defect,
    matrix_of_kind,
    matrix_with_spectrum,
    normal,
    right_defect,
    to_backend,
    to_host,
    tolerance,
)
from mpo_tn.truncation import Report

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("mpo_tn.testing needs hypothesis: pip install 'mpo-tn[testing]'") from error

DTYPES = ("float32", "float64", "complex64", "complex128")
HALF_DTYPES = ("float16", "bfloat16")
FORMS = ("none", "left", "right", "mixed", "partial")
"""What the canonical forms of :func:`mpos` are called."""

_LEG_SIZES = st.sampled_from((1, 1, 2, 2, 3, 4, 5, 7))
_SEEDS = st.integers(0, 2**32 - 1)


# --- assertions ------------------------------------------------------------------------------------------------------


def assert_canonical(mpo: Chain, center: int | None = None, *, c: float = 4 * C) -> None:
    """Assert that every core outside the canonical interval is the isometry it is claimed to be.

    Args:
        mpo: any chain.
        center: also assert that the centre is this site.
        c: the constant of the tolerance. LAPACK promises ``p(m, n) * eps`` with a modest ``p``, of which a core of few
            entries sees all, hence 16 rather than 4.

    The tolerance is ``c * eps(dtype) * sqrt(entries of the core)`` for ``|Q^H Q - 1|_F``.

    Raises:
        AssertionError: names the core, its defect and the tolerance.
    """
    low, high = mpo.canonical_interval
    if center is not None and (low, high) != (center, center):
        raise AssertionError(f"the canonical interval is {(low, high)}, not ({center}, {center})")
    for k, core in enumerate(mpo.cores):
        allowed = tolerance(linalg.dtype_name(core), math.prod(core.shape), 1.0, c)
        if low <= k <= high:
            continue
        side, defect = ("left", left_defect(core)) if k < low else ("right", right_defect(core))
        if not defect <= allowed:
            raise AssertionError(
                f"core {k} of shape {tuple(core.shape)} is not {side}-isometric, as the canonical interval "
                f"{(low, high)} claims: its defect is {defect:.3g}, the tolerance {allowed:.3g}"
            )


def assert_report_exact(matrix: Array, mpo: Chain, report: Report, *, c: float = C) -> None:
    """Assert that ``report.error`` is the Frobenius distance of an MPO from its matrix, and adds up.

    Args:
        matrix: what was decomposed, shape (out, in), any backend.
        mpo: what came out.
        report: what it claims.
        c: the constant of the tolerance; larger if the cores had far larger norms than their matrix.

    Asserted are ``report.exact``, ``error == |W - W'|_F``, ``norm == |W|_F``, ``error**2 == sum_k e_k**2``, and that no
    bond is wider than what is reported as kept. The tolerance is ``c * eps(dtype) * sqrt(size of W) * |W|_F``; eps is
    that of the less precise of the matrix and the cores.

    Raises:
        AssertionError: names the claim, the truth and the tolerance.
    """
    host, distance, allowed = _compared(matrix, mpo, c)
    if not report.exact:
        raise AssertionError("the report does not claim an exact error: use assert_within_bound")
    _assert_close("report.error", report.error, "|W - W'|_F", distance, allowed)
    _assert_close("report.norm", report.norm, "|W|_F", frobenius(host), allowed)
    total = math.hypot(*(bond.discarded_norm for bond in report.bonds))
    _assert_close("report.error", report.error, "sqrt(sum_k e_k**2)", total, allowed)
    kept = tuple(bond.kept for bond in report.bonds)
    if len(kept) != len(mpo.bonds) or any(bond > most for bond, most in zip(mpo.bonds, kept, strict=True)):
        raise AssertionError(f"the report kept bonds {kept} and the MPO has {mpo.bonds}")


def assert_within_bound(matrix: Array, mpo: Chain, report: Report, *, c: float = C) -> None:
    """Assert ``lower_bound <= |W - W'|_F <= error <= bound``, each as far as the report has it.

    For arguments and tolerance see :func:`assert_report_exact`; this one holds for reports that are not exact, too.

    Raises:
        AssertionError: names the bound, the distance and the tolerance.
    """
    _, distance, allowed = _compared(matrix, mpo, c)
    bounds: dict[str, float | None] = {"error": report.error, "bound": report.bound, "lower": report.lower_bound}
    lower = bounds.pop("lower")
    for name, bound in bounds.items():
        if not (bound is None or distance <= bound + allowed):
            raise AssertionError(
                f"|W - W'|_F is {distance:.6g}, above report.{name} = {bound:.6g} by more than {allowed:.3g}"
            )
    if not (lower is None or lower - allowed <= distance):
        raise AssertionError(
            f"|W - W'|_F is {distance:.6g}, below report.lower_bound = {lower:.6g} by more than {allowed:.3g}"
        )


def _compared(matrix: Array, mpo: Chain, c: float) -> tuple[np.ndarray, float, float]:
    """The matrix on the host, its distance from the MPO and the tolerance."""
    if tuple(matrix.shape) != mpo.shape:
        raise AssertionError(f"the matrix has shape {tuple(matrix.shape)} and the MPO {mpo.shape}")
    host = to_host(matrix)
    names = (linalg.dtype_name(matrix), linalg.dtype_name(mpo.cores[0]))
    allowed = max(tolerance(name, host.size, frobenius(host), c) for name in names if name in linalg.EPS)
    return host, frobenius(host - dense_matrix(mpo.cores)), allowed


def _assert_close(claim: str, claimed: float, truth: str, true: float, allowed: float) -> None:
    if not abs(claimed - true) <= allowed:
        raise AssertionError(
            f"{claim} is {claimed:.9g} and {truth} is {true:.9g}: they differ by more than {allowed:.3g}"
        )


# --- strategies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A matrix to decompose.

    Attributes:
        matrix: an array of some backend, shape ``sites.shape``.
        sites: its legs.
        dtype: the name of its dtype.
        host: the same matrix as a NumPy array in double precision.
        spectra: the singular values of unfoldings that are known by construction, by bond.
    """

    matrix: Array
    sites: Sites
    dtype: str
    host: np.ndarray
    spectra: Mapping[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return frobenius(self.host)

    @property
    def slack(self) -> float:
        """``4 * eps(dtype) * sqrt(size) * norm``, see :func:`tolerance`."""
        return tolerance(self.dtype, self.host.size, self.norm)


def backends() -> st.SearchStrategy[str]:
    """The names of the backends that are installed, see :func:`installed_backends`."""
    return st.sampled_from(installed_backends())


def dtypes(backend: str = "numpy", *, half: bool = False) -> st.SearchStrategy[str]:
    """The names of the dtypes that a backend holds; with ``half`` those of half precision, too."""
    return st.sampled_from([name for name in DTYPES + HALF_DTYPES * half if holds(backend, name)])


@st.composite
def legs(draw: st.DrawFn, *, min_sites: int = 1, max_sites: int = 6, max_size: int = 3000) -> Sites:
    """Legs of 1, primes and composites, for matrices of at most ``max_size`` entries."""
    n = draw(st.integers(min_sites, max_sites))
    out: list[int] = []
    in_: list[int] = []
    left = max_size
    for _ in range(n):
        out.append(min(draw(_LEG_SIZES), left))
        in_.append(min(draw(_LEG_SIZES), left // out[-1]))
        left //= out[-1] * in_[-1]
    return Sites(tuple(draw(st.permutations(out))), tuple(draw(st.permutations(in_))))


@st.composite
def sites_of(draw: st.DrawFn, rows: int, columns: int, *, min_sites: int = 1, max_sites: int = 6) -> Sites:
    """Any legs that multiply to a given shape: every prime factor goes to a site of its own choice."""
    n = draw(st.integers(min_sites, max_sites))
    sides: list[tuple[int, ...]] = []
    for size in (rows, columns):
        side = [1] * n
        for prime in _prime_factors(size):
            side[draw(st.integers(0, n - 1))] *= prime
        sides.append(tuple(side))
    return Sites(*sides)


def problems(
    sites: st.SearchStrategy[Sites] | None = None,
    *,
    min_sites: int = 1,
    kinds: Sequence[str] = KINDS,
    dtypes: Sequence[str] = DTYPES,
    scaled: bool = True,
) -> st.SearchStrategy[Problem]:
    """Matrices over backends, dtypes, legs and spectra.

    Guarantee (draws-load-nothing): the backends that are installed are imported when a strategy is made, by this
    function or its neighbours, and not when it is drawn from, so that the first draw is no slower than the others.

    Args:
        sites: a strategy for the legs; by default :func:`legs` with at least ``min_sites``.
        min_sites: the fewest sites of the default.
        kinds: some of :data:`KINDS`.
        dtypes: some of :data:`DTYPES`.
        scaled: sometimes near the ends of the range of the dtype, where squares overflow or vanish.
    """
    _load_backends()
    return _problems(sites, min_sites=min_sites, kinds=kinds, dtypes=dtypes, scaled=scaled)


@st.composite
def _problems(
    draw: st.DrawFn,
    sites: st.SearchStrategy[Sites] | None = None,
    *,
    min_sites: int = 1,
    kinds: Sequence[str] = KINDS,
    dtypes: Sequence[str] = DTYPES,
    scaled: bool = True,
) -> Problem:
    chosen = draw(legs(min_sites=min_sites) if sites is None else sites)
    backend, dtype = draw(_kinds_of_array(dtypes))
    huge = 1e250 if linalg.EPS[dtype] < 1e-10 else 1e25 if linalg.EPS[dtype] < 1e-4 else 1.0
    scale = draw(st.sampled_from((1.0, 1.0, huge, 1 / huge))) if scaled else 1.0
    matrix = matrix_of_kind(draw(st.sampled_from(kinds)), chosen, dtype.startswith("complex"), draw(_SEEDS))
    return _problem(matrix * scale, chosen, backend, dtype)


def spectral_problems(
    sites: st.SearchStrategy[Sites] | None = None, *, dtypes: Sequence[str] = DTYPES
) -> st.SearchStrategy[Problem]:
    """Matrices of which the spectrum of one bond, or of every bond, is known by construction (``problem.spectra``).

    See :func:`matrix_with_spectrum`. There are at least two sites.
    """
    _load_backends()
    return _spectral_problems(sites, dtypes=dtypes)


@st.composite
def _spectral_problems(
    draw: st.DrawFn, sites: st.SearchStrategy[Sites] | None = None, *, dtypes: Sequence[str] = DTYPES
) -> Problem:
    chosen = draw(legs(min_sites=2) if sites is None else sites)
    backend, dtype = draw(_kinds_of_array(dtypes))
    bond = draw(st.none() | st.integers(0, len(chosen) - 2))
    most = min(chosen.sizes) if bond is None else chosen.full_bonds[bond]
    values = draw(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=min(most, 8)))
    spectrum = np.array(sorted(values, reverse=True))
    matrix = matrix_with_spectrum(chosen, spectrum, bond, is_complex=dtype.startswith("complex"), seed=draw(_SEEDS))
    known = range(len(chosen) - 1) if bond is None else (bond,)
    padded = {k: np.pad(spectrum, (0, chosen.full_bonds[k] - len(spectrum))) for k in known}
    return _problem(matrix, chosen, backend, dtype, padded)


def mpos(
    sites: st.SearchStrategy[Sites] | None = None,
    *,
    forms: Sequence[str] = FORMS,
    max_bond: int = 5,
    dtypes: Sequence[str] = DTYPES,
) -> st.SearchStrategy[MPO]:
    """Random MPOs in a given canonical form, made of Gaussian cores and of random isometries.

    Args:
        sites: a strategy for the legs; by default :func:`legs` of matrices of at most 1500 entries.
        forms: some of :data:`FORMS`. ``"left"``: all but the last core left-isometric; ``"right"``: all but the first
            right-isometric; ``"mixed"``: a centre anywhere; ``"partial"``: an interval of any length; ``"none"``: no
            form claimed, and bonds that may be wider than the full ones.
        max_bond: the widest bond. Isometries narrow it where the legs do not allow it.
        dtypes: some of :data:`DTYPES`; of :data:`HALF_DTYPES` with the form ``"none"``.
    """
    _load_backends()
    return _mpos(sites, forms=forms, max_bond=max_bond, dtypes=dtypes)


@st.composite
def _mpos(
    draw: st.DrawFn,
    sites: st.SearchStrategy[Sites] | None = None,
    *,
    forms: Sequence[str] = FORMS,
    max_bond: int = 5,
    dtypes: Sequence[str] = DTYPES,
) -> MPO:
    chosen = draw(legs(max_size=1500) if sites is None else sites)
    backend, dtype = draw(_kinds_of_array(dtypes))
    form, n = draw(st.sampled_from(forms)), len(chosen)
    anywhere = st.integers(0, n - 1)
    ends = {"none": (0, n - 1), "left": (n - 1, n - 1), "right": (0, 0)}.get(form)
    if ends is None:
        first = draw(anywhere)
        ends = (first, first) if form == "mixed" else (first, draw(st.integers(first, n - 1)))
    low, high = ends
    bonds = [1, *(draw(st.integers(1, max_bond)) for _ in range(n - 1)), 1]
    for k in range(low):
        bonds[k + 1] = min(bonds[k + 1], bonds[k] * chosen.sizes[k])
    for k in reversed(range(high + 1, n)):
        bonds[k] = min(bonds[k], chosen.sizes[k] * bonds[k + 1])
    rng = np.random.default_rng(draw(_SEEDS))
    cores: list[np.ndarray] = []
    for k, (out, in_) in enumerate(chosen):
        shape = (bonds[k], out, in_, bonds[k + 1])
        core = normal(rng, dtype.startswith("complex"), *shape)
        if k < low:
            core = np.linalg.qr(core.reshape(-1, shape[3]))[0].reshape(shape)
        elif k > high:
            core = np.linalg.qr(core.reshape(shape[0], -1).T)[0].T.reshape(shape)
        cores.append(core)
    return MPO(tuple(to_backend(core, backend, dtype) for core in cores), (low, high))


@functools.cache
def _load_backends() -> None:
    """Import what arrays will be made of, and make one of each: in the first draw it would count as a slow strategy."""
    for backend in installed_backends():
        to_host(to_backend(np.ones((1, 1)), backend, "float32"))


def _problem(
    matrix: np.ndarray, sites: Sites, backend: str, dtype: str, spectra: Mapping[int, np.ndarray] | None = None
) -> Problem:
    array = to_backend(matrix, backend, dtype)
    return Problem(array, sites, dtype, to_host(array), spectra or {})


def _kinds_of_array(dtypes: Sequence[str]) -> st.SearchStrategy[tuple[str, str]]:
    """Pairs of an installed backend and one of the dtypes that it holds."""
    pairs = [(backend, dtype) for backend in installed_backends() for dtype in dtypes if holds(backend, dtype)]
    # JAX compiles a program for every new shape, so it gets half the share of the others.
    return st.sampled_from(pairs + [pair for pair in pairs if pair[0] != "jax"])


def _prime_factors(number: int) -> list[int]:
    factors: list[int] = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor = divisor + 1 if divisor * divisor <= number else number
    return factors
