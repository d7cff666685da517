"""The policy and the report as plain values."""

import math
from fractions import Fraction

import numpy as np
import pytest

from mpo_tn import BondReport, Report, Truncation


def test_whole_numbers_and_real_numbers_of_numpy():
    truncation = Truncation(max_bond=np.int64(3), rel_error=np.float32(0.25), abs_error=Fraction(1, 2))
    assert truncation == Truncation(max_bond=3, rel_error=0.25, abs_error=0.5)
    assert type(truncation.max_bond) is int
    assert type(truncation.rel_error) is type(truncation.abs_error) is float
    bonds = Truncation(max_bond=[np.int32(2), 3]).max_bond
    assert bonds == (2, 3)
    assert all(type(bond) is int for bond in bonds)


def test_caps():
    assert Truncation().caps(3) == (None, None, None)
    assert Truncation(max_bond=4).caps(2) == (4, 4)
    assert Truncation(max_bond=(4, 5)).caps(2) == (4, 5)
    assert Truncation(max_bond=()).caps(0) == ()


def test_budget_is_the_smallest():
    assert Truncation(max_bond=3).budget(2.0, 1e-16, "float64") == math.inf
    assert Truncation(rel_error=0.5).budget(2.0, 1e-16, "float64") == 1.0
    assert Truncation(rel_error=0.5, abs_error=3.0).budget(2.0, 1e-16, "float64") == 1.0
    assert Truncation(rel_error=0.5, abs_error=0.3).budget(2.0, 1e-16, "float64") == 0.3
    assert Truncation(rel_error=0.5).budget(0.0, 1e-16, "float64") == 0.0


@pytest.mark.parametrize(
    ("truncation", "expected"),
    [
        (Truncation(), False),
        (Truncation(max_bond=1), False),
        (Truncation(rel_error=0.1), True),
        (Truncation(abs_error=0.1), True),
    ],
)
def test_has_tolerance(truncation, expected):
    assert truncation.has_tolerance is expected


def report(error, norm=10.0, lower=1.0):
    return Report(error, norm, (BondReport(2, 4, error),), bound=error, lower_bound=lower, floor=0.0)


def test_derived_numbers():
    assert report(2.0).rel_error == 0.2
    assert report(2.0).optimality == 2.0
    assert report(0.0, lower=0.0).optimality == 1.0
    assert report(2.0, lower=0.0).optimality == math.inf
    assert report(0.0, norm=0.0, lower=0.0).rel_error == 0.0
    assert "error = 2 (20.0000% of the norm)" in str(report(2.0))
    assert "2/4" in str(report(2.0))


@pytest.mark.parametrize(("first", "second", "exact"), [(1.0, 1.0, False), (0.0, 1.0, True), (1.0, 0.0, True)])
def test_after(first, second, exact):
    both = report(second).after(report(first, norm=20.0))
    assert both.error == both.bound == first + second
    assert both.norm == 20.0
    assert both.exact is exact
    assert not report(0.0).after(both if not exact else report(1.0).after(report(1.0))).exact
