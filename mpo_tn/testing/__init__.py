"""Hypothesis strategies and assertions for tests of matrix product operators, yours and ours.

Everything is checked on the host in double precision by plain NumPy, with none of the package's own algebra. Needs
hypothesis (``pip install 'mpo-tn[testing]'``). docs/testing.md shows how to test a decomposition of your own.

>>> from hypothesis import given, settings, strategies as st
>>> from mpo_tn import MPO, Truncation
>>> @settings(max_examples=10, database=None, deadline=None)
... @given(problems(), st.integers(1, 8))
... def test_error_is_reported(problem, max_bond):
...     mpo, report = MPO.from_matrix(problem.matrix, problem.sites, Truncation(max_bond=max_bond))
...     assert_canonical(mpo, problem.sites.center)
...     assert_report_exact(problem.matrix, mpo, report)
...     assert_within_bound(problem.matrix, mpo, report)
>>> test_error_is_reported()
"""

from mpo_tn.testing.reference import (
    BACKENDS,
    KINDS,
    C,
    dense_matrix,
    frobenius,
    holds,
    installed_backends,
    left_defect,
    matrix_of_kind,
    matrix_with_spectrum,
    right_defect,
    to_backend,
    to_host,
    tolerance,
)
from mpo_tn.testing.strategies import (
    DTYPES,
    FORMS,
    HALF_DTYPES,
    Problem,
    assert_canonical,
    assert_report_exact,
    assert_within_bound,
    backends,
    dtypes,
    legs,
    mpos,
    problems,
    sites_of,
    spectral_problems,
)

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FORMS",
    "HALF_DTYPES",
    "KINDS",
    "C",
    "Problem",
    "assert_canonical",
    "assert_report_exact",
    "assert_within_bound",
    "backends",
    "dense_matrix",
    "dtypes",
    "frobenius",
    "holds",
    "installed_backends",
    "left_defect",
    "legs",
    "matrix_of_kind",
    "matrix_with_spectrum",
    "mpos",
    "problems",
    "right_defect",
    "sites_of",
    "spectral_problems",
    "to_backend",
    "to_host",
    "tolerance",
]
