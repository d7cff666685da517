"""The testers tested: strategies give what they promise, and every assertion fails on what is wrong."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.chains import left_defect, right_defect, unfoldings
from helpers.paths import ROOT
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation, linalg, testing
from mpo_tn.testing import (
    BACKENDS,
    DTYPES,
    FORMS,
    HALF_DTYPES,
    KINDS,
    assert_canonical,
    assert_report_exact,
    assert_within_bound,
    matrix_of_kind,
    matrix_with_spectrum,
    mpos,
    problems,
    spectral_problems,
    to_backend,
    to_host,
)

SITES = Sites((2, 3, 2), (3, 2, 2))
W = np.random.default_rng(0).standard_normal((12, 12))
MPO_, REPORT = MPO.from_matrix(W, SITES, Truncation(max_bond=3), spectra=True)
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def with_core(mpo: MPO, k: int, core: np.ndarray) -> MPO:
    return MPO((*mpo.cores[:k], core, *mpo.cores[k + 1 :]), mpo.canonical_interval)


# --- assertions ------------------------------------------------------------------------------------------------------


@given(problems(), st.integers(1, 8), st.booleans())
def test_assertions_hold_for_what_is_right(problem, cap, spectra):
    mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=cap), spectra=spectra)
    assert_canonical(mpo, problem.sites.center)
    assert_report_exact(problem.matrix, mpo, report)
    assert_within_bound(problem.matrix, mpo, report)
    small, later = mpo.compress(Truncation(max_bond=1))
    assert_within_bound(problem.matrix, small, later.after(report), c=8)


@pytest.mark.parametrize(("k", "side"), [(0, "left"), (2, "right")])
@pytest.mark.parametrize("factor", [1 + 1e-12, 0.0, -2.0, np.nan])
def test_core_that_is_no_isometry(k, side, factor):
    broken = with_core(MPO_, k, MPO_.cores[k] * factor)
    with pytest.raises(AssertionError, match=rf"core {k} of shape .* is not {side}-isometric.* claims.*defect is"):
        assert_canonical(broken)
    # Nothing is claimed, so nothing is wrong.
    assert_canonical(MPO(broken.cores))


def test_isometry_of_the_other_side():
    moved = MPO_.canonicalize(0)
    with pytest.raises(AssertionError, match="left-isometric"):
        assert_canonical(MPO(moved.cores, (2, 2)))


@pytest.mark.parametrize("center", [0, 2])
def test_center_elsewhere(center):
    with pytest.raises(AssertionError, match=rf"the canonical interval is \(1, 1\), not \({center}, {center}\)"):
        assert_canonical(MPO_, center)
    with pytest.raises(AssertionError, match=r"\(0, 2\)"):
        assert_canonical(MPO(MPO_.cores), center)


LIES = {
    "error above": ({"error": REPORT.error * (1 + 1e-10)}, "report.error is .* they differ by more than"),
    "error below": ({"error": REPORT.error * (1 - 1e-10)}, "report.error is"),
    "error nan": ({"error": math.nan}, "report.error is nan"),
    "norm": ({"norm": REPORT.norm * (1 + 1e-10)}, "report.norm is"),
    "bond": ({"bonds": (replace(REPORT.bonds[0], discarded_norm=0.0), REPORT.bonds[1])}, r"sqrt\(sum_k"),
    "kept": ({"bonds": (replace(REPORT.bonds[0], kept=2), REPORT.bonds[1])}, r"kept bonds \(2, 3\)"),
    "bonds": ({"bonds": (*REPORT.bonds, replace(REPORT.bonds[0], discarded_norm=0.0))}, r"kept bonds \(3, 3, 3\)"),
    "not exact": ({"exact": False}, "use assert_within_bound"),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_report_that_is_not_exact(lie):
    changes, message = LIES[lie]
    with pytest.raises(AssertionError, match=message):
        assert_report_exact(W, MPO_, replace(REPORT, **changes))


def test_mpo_that_is_not_what_the_report_says():
    wrong = with_core(MPO_, 1, MPO_.cores[1] * (1 + 1e-6))
    other = MPO_.compress(Truncation(max_bond=1))[0]
    for mpo in (with_core(MPO_, 1, MPO_.cores[1] * np.nan), other, with_core(MPO_, 1, -MPO_.cores[1])):
        with pytest.raises(AssertionError, match=r"\|W - W'\|_F is"):
            assert_report_exact(W, mpo, REPORT)
        with pytest.raises(AssertionError, match=r"\|W - W'\|_F is .* above report.error"):
            assert_within_bound(W, mpo, REPORT)
    # Stretched by a millionth the error hardly changes, being orthogonal to the result, yet it shows.
    with pytest.raises(AssertionError):
        assert_report_exact(W, wrong, REPORT)
    with pytest.raises(AssertionError, match=r"shape \(12, 6\) and the MPO \(12, 12\)"):
        assert_report_exact(W[:, :6], MPO_, REPORT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"error": REPORT.error * (1 - 1e-10)}, "above report.error"),
        ({"bound": REPORT.error * (1 - 1e-10)}, "above report.bound"),
        ({"bound": math.nan}, "above report.bound"),
        ({"lower_bound": REPORT.error * (1 + 1e-10)}, "below report.lower_bound"),
        ({"lower_bound": math.nan}, "below report.lower_bound"),
    ],
)
def test_bound_that_does_not_hold(changes, message):
    with pytest.raises(AssertionError, match=message):
        assert_within_bound(W, MPO_, replace(REPORT, **changes))


def test_bounds_that_are_not_known():
    assert_within_bound(W, MPO_, replace(REPORT, bound=None, lower_bound=None))


def test_tolerance_is_that_of_the_less_precise():
    single, report = MPO.from_matrix(W.astype("float32"), SITES, Truncation(max_bond=3))
    assert_report_exact(W, single, report)
    with pytest.raises(AssertionError):
        assert_report_exact(W, single, report, c=1e-6)
    assert_report_exact(np.arange(144).reshape(12, 12), *MPO.from_matrix(np.arange(144.0).reshape(12, 12), SITES))


# --- strategies ------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(FORMS))
def test_mpos_have_the_form(data, form):
    mpo = data.draw(mpos(forms=(form,), max_bond=4))
    low, high = mpo.canonical_interval
    last = len(mpo) - 1
    expected = {"none": (0, last), "left": (last, last), "right": (0, 0)}.get(form, (low, high))
    assert (low, high) == expected
    assert form != "mixed" or low == high
    assert max(mpo.bonds, default=1) <= 4
    assert_canonical(mpo)
    eps = testing.tolerance(linalg.dtype_name(mpo.cores[0]), 1, 1.0, 1.0)
    for k, core in enumerate(mpo.cores):
        defect = left_defect(core) if k < low else right_defect(core) if k > high else 0.0
        assert defect <= 16 * eps * math.sqrt(math.prod(core.shape))


@given(mpos(forms=("none",), dtypes=HALF_DTYPES))
def test_mpos_in_half_precision(mpo):
    assert linalg.dtype_name(mpo.cores[0]) in HALF_DTYPES


@given(spectral_problems(dtypes=("float64", "complex128")))
def test_spectra_are_those_prescribed(problem):
    assert problem.spectra
    for k, values in problem.spectra.items():
        found = np.linalg.svd(unfoldings(problem.host, problem.sites)[k], compute_uv=False)
        assert np.abs(found - values).max() <= problem.slack


@given(spectral_problems())
def test_spectra_of_an_mpo_are_those_prescribed(problem):
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites)
    found = mpo.spectra()
    for k, values in problem.spectra.items():
        size = min(len(found[k]), len(values))
        assert np.abs(found[k][:size] - values[:size]).max() <= 2 * problem.slack


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 7), st.data())
def test_sites_multiply_to_the_shape(rows, columns, n, data):
    sites = data.draw(testing.sites_of(rows, columns, min_sites=n, max_sites=n))
    assert sites.shape == (rows, columns)
    assert len(sites) == n


@given(st.data())
def test_arrays_are_of_the_backend_and_dtype(data):
    backend = data.draw(testing.backends())
    dtype = data.draw(testing.dtypes(backend, half=True))
    array = to_backend(W, backend, dtype)
    assert linalg.library(array) == backend
    assert linalg.dtype_name(array) == dtype
    assert np.abs(to_host(array) - W).max() <= linalg.EPS[dtype] * np.abs(W).max()


def test_every_kind_and_backend_is_drawn():
    seen = set()

    @given(problems())
    def collect(problem):
        seen.add((linalg.library(problem.matrix), problem.dtype))
        assert np.array_equal(problem.host, to_host(problem.matrix))
        assert problem.host.shape == problem.sites.shape
        assert np.isfinite(problem.host).all()

    collect()
    assert {backend for backend, _ in seen} == set(testing.installed_backends())
    assert {dtype for _, dtype in seen} == set(DTYPES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_complex", [False, True])
def test_kinds(kind, is_complex):
    w = matrix_of_kind(kind, SITES, is_complex, 3)
    assert w.shape == (12, 12)
    assert np.iscomplexobj(w) == is_complex
    assert np.array_equal(w, matrix_of_kind(kind, SITES, is_complex, 3))
    rank = np.linalg.matrix_rank(unfoldings(w, SITES)[0])
    assert rank == {"rank_one": 1, "rank_deficient": 2, "zero": 0, "ones": 1, "one_entry": 1}.get(kind, rank)


def test_arguments_that_make_no_sense():
    with pytest.raises(MPOError, match="kind='flat' is not one of gaussian"):
        matrix_of_kind("flat", SITES, False, 0)
    with pytest.raises(MPOError, match="bond=2 is not a bond: 3 sites have 2"):
        matrix_with_spectrum(SITES, [1.0], 2)
    with pytest.raises(MPOError, match=r"7 singular values do not fit on groups of sites of sizes \(6, 24\)"):
        matrix_with_spectrum(SITES, [1.0] * 7, 0)
    with pytest.raises(MPOError, match=r"5 singular values do not fit on groups of sites of sizes \(6, 6, 4\)"):
        matrix_with_spectrum(SITES, [1.0] * 5)


def test_backends_can_be_chosen(monkeypatch):
    monkeypatch.delenv("MPO_TN_BACKENDS", raising=False)
    assert testing.installed_backends() == BACKENDS
    monkeypatch.setenv("MPO_TN_BACKENDS", "torch other")
    assert testing.installed_backends() == ("torch",)


def test_without_hypothesis():
    code = "import sys; sys.modules['hypothesis'] = None\nimport mpo_tn\nimport mpo_tn.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: mpo_tn.testing needs hypothesis: pip install 'mpo-tn[testing]'" in result.stderr


def test_everything_public_exists_and_is_documented():
    for name in testing.__all__:
        assert getattr(testing, name) is not None
        assert f"`{name}" in PAGE, f"docs/testing.md does not mention {name}"


def test_example_of_the_page_runs():
    blocks = [block.split("```")[0] for block in PAGE.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "docs/testing.md", "exec"), names)
        tests = [value for name, value in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()
