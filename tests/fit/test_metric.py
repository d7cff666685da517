"""The metric of a layer: its norm is that of the outputs, it knows its rank, and it refuses what is no moment."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, random_chain
from helpers.moments import moment, random_metric, scale, weighted
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import Metric, MPOError, Sites

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 10)
KINDS = st.sampled_from(("plain", "anchored", "two-sided"))


@given(SIZES, SIZES, SEEDS, KINDS, st.sampled_from((0.0, 3.0)))
def test_norm_and_error_are_those_of_the_definition(out, in_, seed, kind, spread):
    metric = random_metric((out, in_), seed, kind, spread=spread)
    w = np.random.default_rng(seed).standard_normal((out, in_))
    chain = random_chain(Sites((out, 1), (1, in_)), 2, seed)
    target = np.asarray(metric.target(w))
    # 64: both sides factorise a moment, each to a few eps sqrt(size) of its norm.
    tolerance = 64 * EPS["float64"] * math.sqrt(w.size) * scale(metric, np.linalg.norm(target))
    assert abs(metric.norm(w) - weighted(metric, target)) <= tolerance
    difference = target - dense(chain.cores)
    tolerance = 64 * EPS["float64"] * math.sqrt(w.size) * scale(metric, np.linalg.norm(difference))
    assert abs(metric.error(w, chain) - weighted(metric, difference)) <= tolerance


def test_it_is_the_mean_square_of_the_outputs():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((5, 400)), rng.standard_normal((3, 5))
    chain = random_chain(Sites((3, 1), (1, 5)), 2, 1)
    metric = Metric(x @ x.T / 400)
    outputs = (w - dense(chain.cores)) @ x
    assert metric.error(w, chain) == pytest.approx(math.sqrt((outputs**2).sum(axis=0).mean()), rel=1e-12)


def test_an_error_where_nothing_is_weighed_costs_nothing():
    """By inner products it would cost sqrt(eps) of the norm."""
    x = np.random.default_rng(0).standard_normal((6, 3))
    metric = Metric(x @ x.T)
    null = np.linalg.svd(x)[0][:, 3:]
    assert metric.rank == 3
    assert metric.weighed(null.T) <= 64 * EPS["float64"] * math.sqrt(18) * scale(metric, math.sqrt(3))


@given(SIZES, SEEDS, st.integers(1, 9))
def test_the_rank_is_that_of_the_samples(size, seed, samples):
    assert Metric(moment(size, seed, rank=samples, spread=0.0)).rank == min(size, samples)


def test_the_anchored_target_is_the_least_squares_matrix_where_much_was_seen_and_the_matrix_where_nothing_was():
    rng = np.random.default_rng(2)
    dense_inputs = rng.standard_normal((6, 500))
    inputs = dense_inputs + 0.3 * rng.standard_normal((6, 500))
    inputs[5] = 0.0  # never seen
    w = rng.standard_normal((4, 6))
    metric = Metric(inputs @ inputs.T, cross=dense_inputs @ inputs.T, damping=1e-9)
    best = np.linalg.lstsq(inputs[:5].T, (w @ dense_inputs).T, rcond=None)[0].T
    target = metric.target(w)
    np.testing.assert_allclose(target[:, :5], best, atol=1e-6)
    np.testing.assert_allclose(target[:, 5], w[:, 5], atol=1e-12)
    # The error to the target is what E|W x_dense - W' x|^2 is above its minimum.
    chain = random_chain(Sites((4, 1), (1, 6)), 3, 0)
    other = dense(chain.cores)
    excess = np.sum((w @ dense_inputs - other @ inputs) ** 2) - np.sum((w @ dense_inputs - best @ inputs[:5]) ** 2)
    assert metric.error(w, chain) ** 2 == pytest.approx(excess, rel=1e-6)


def test_more_damping_stays_closer_to_the_matrix():
    w = np.random.default_rng(0).standard_normal((3, 5))
    second, cross = moment(5, 0), moment(5, 1)
    moves = [np.linalg.norm(Metric(second, cross, damping=damping).target(w) - w) for damping in (1e-6, 1e-2, 1.0, 1e6)]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < 1e-4


def test_any_library_and_precision():
    second = moment(4, 0)
    w = np.random.default_rng(0).standard_normal((3, 4)).astype("float32")
    expected = Metric(second).norm(w)
    for library in (np.asarray, torch.from_numpy, jnp.asarray):
        for other in (np.asarray, torch.from_numpy):
            assert Metric(other(second)).norm(library(w)) == pytest.approx(expected, rel=1e-13)
    assert Metric(torch.from_numpy(second.astype("float32"))).norm(w) == pytest.approx(expected, rel=1e-6)


def test_names():
    assert random_metric((2, 3), 0).name == "activation"
    assert random_metric((2, 3), 0, "anchored").name == "activation, anchored"
    assert random_metric((2, 3), 0, "two-sided").name == "activation, two-sided"


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Metric(np.ones((2, 3))), "second is (2, 3): a moment is square"),
        (lambda: Metric(EYE * np.nan), "second: the matrix of shape (3, 3) has 9 entries that are NaN"),
        (lambda: Metric(0 * EYE), "second is zero"),
        (lambda: Metric(np.triu(np.ones((3, 3)))), "second is not symmetric"),
        (lambda: Metric(np.diag([1.0, 1.0, -0.1])), "second is not positive semidefinite"),
        (lambda: Metric(np.array([[0.0, 1.0], [1.0, 0.0]])), "second is not positive semidefinite"),
        (lambda: Metric(EYE * 1j), "second is complex128: a metric is for real matrices"),
        (lambda: Metric(EYE, cross=np.eye(2)), "cross is (2, 2) and second (3, 3)"),
        (lambda: Metric(EYE, outer=-EYE), "outer is not positive semidefinite"),
        (lambda: Metric(EYE, damping=0), "damping=0 must be positive"),
        (lambda: Metric(EYE, damping=math.nan), "damping=nan must be positive"),
        (lambda: Metric([[1.0]]), "second: a list is not an array"),
        (lambda: Metric(EYE).norm(np.ones((3, 2))), "the matrix is (3, 2) and second (3, 3): second is (in, in)"),
        (lambda: Metric(EYE, outer=EYE).norm(np.ones((2, 3))), "the matrix is (2, 3) and outer (3, 3)"),
        (lambda: Metric(EYE).norm(np.ones((2, 3)) * 1j), "the matrix is complex128"),
        (lambda: Metric(EYE).error(EYE, random_chain(Sites((2,), (3,)), 1, 0)), "the chain is (2, 3) and the matrix"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        call()
