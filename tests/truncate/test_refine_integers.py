"""Integers and scales improved in a metric: never worse, in the end no single change helps, all libraries alike."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.chains import EPS
from helpers.moments import correlated, moment
from hypothesis import given
from hypothesis import strategies as st

import mpo_tn.truncate.refine_integers as module
from mpo_tn import quantize
from mpo_tn.truncate.quantize import BITS
from mpo_tn.truncate.refine_integers import refine_integers
from mpo_tn.truncate.scales import LARGEST_SCALE

SEEDS = st.integers(0, 2**32 - 1)
BIT = st.sampled_from(BITS)
GROUP = 16


def damped(metric):
    """What quantize works in."""
    return metric / np.mean(np.diag(metric)) + 0.01 * np.eye(len(metric))


def spread(scales, columns, group=GROUP):
    return np.repeat(scales, group, axis=1)[:, :columns]


def errors(w, values, scales, metric, group=GROUP):
    """Of every row."""
    difference = w - values * spread(scales, w.shape[1], group)
    return np.sum((difference @ metric) * difference, axis=1)


def slack(columns):
    """Single precision rounds the sums of a column."""
    return 1 + 16 * EPS["float32"] * math.sqrt(columns)


def problem(rows, columns, bits, seed, rank=None):
    """A matrix, a metric, and integers and scales that may be far from good."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-4, 3)
    top = 2 ** (bits - 1)
    values = rng.integers(-top, top, (rows, columns)).astype(float)
    sizes = np.max(np.abs(w), axis=1, keepdims=True) / top * rng.uniform(0.2, 1, (rows, -(-columns // GROUP)))
    scales = (sizes * rng.choice([-1, 1], sizes.shape)).astype(np.float16).astype(float)
    scales[scales == 0] = 2.0**-24
    return w, values, scales, damped(moment(columns, seed, rank=rank))


@pytest.mark.guarantee("refined-integers")
@given(st.integers(1, 8), st.integers(1, 70), BIT, SEEDS, st.sampled_from((None, 1, 5)))
def test_no_row_gets_worse_and_what_comes_out_is_integers_and_scales(rows, columns, bits, seed, rank):
    w, values, scales, metric = problem(rows, columns, bits, seed, rank)
    given_ = [part.copy() for part in (w, values, scales, metric)]
    before, top = errors(w, values, scales, metric), 2 ** (bits - 1)
    for _ in range(3):
        found, steps = refine_integers(w, values, scales, metric, bits, GROUP, 1)
        for kept, part in zip(given_, (w, values, scales, metric), strict=True):
            np.testing.assert_array_equal(kept, part)
        assert np.array_equal(found, np.round(found))
        assert -top <= found.min() <= found.max() < top
        np.testing.assert_array_equal(steps, steps.astype(np.float16))
        assert (steps != 0).all()
        after = errors(w, found, steps, metric)
        assert (after <= before * slack(columns)).all()
        values, scales, before = found, steps, after
        given_ = [part.copy() for part in (w, values, scales, metric)]


@pytest.mark.guarantee("sweeps-improve")
@given(st.integers(1, 8), st.integers(1, 70), BIT, st.integers(8, 40), SEEDS, st.sampled_from((None, 1, 5)))
def test_more_sweeps_are_never_worse_than_feedback_alone(rows, columns, bits, group, seed, rank):
    w, second = np.random.default_rng(seed).standard_t(3, (rows, columns)), moment(columns, seed, rank=rank)
    found = [quantize(w, bits, group, metric=second, sweeps=sweeps) for sweeps in (0, 1, 2, 5)]
    sizes = [errors(w, each.values, each.scales.astype(float), damped(second), group) for each in found]
    for before, after in itertools.pairwise(sizes):
        assert (after <= before * slack(columns)).all()
    for each in found:
        assert np.isfinite(each.scales).all()
        assert (each.scales != 0).all()


@pytest.mark.parametrize("bits", [2, 3])
@given(seed=SEEDS)
def test_in_the_end_no_single_change_helps(bits, seed):
    """Against all integers there are: of three columns, each at its best, and the scale as well."""
    w, values, scales, metric = problem(1, 3, bits, seed)
    found, steps = refine_integers(w, values, scales, metric, bits, GROUP, 60)
    choices = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    everything = {
        each: errors(w, np.array([each], dtype=float), steps, metric)[0]
        for each in itertools.product(choices, repeat=3)
    }
    mine = tuple(int(value) for value in found[0])
    near = [error for each, error in everything.items() if sum(a != b for a, b in zip(each, mine, strict=True)) <= 1]
    assert everything[mine] <= min(near) * slack(3)
    for towards in (-np.inf, np.inf):
        beside = np.nextafter(steps.astype(np.float16), np.float16(towards)).astype(float)
        assert errors(w, found, beside, metric)[0] >= everything[mine] / slack(3)
    # From the best there is, nothing moves away.
    best = min(everything, key=everything.__getitem__)
    again, final = refine_integers(w, np.array([best], dtype=float), steps, metric, bits, GROUP, 3)
    assert errors(w, again, final, metric)[0] <= everything[best] * slack(3)


@given(st.integers(1, 5), st.integers(1, 40), BIT, SEEDS)
def test_where_columns_do_not_meet_each_gets_the_nearest(rows, columns, bits, seed):
    w, values, scales, metric = problem(rows, columns, bits, seed)
    metric = np.diag(np.diag(metric))
    found, steps = refine_integers(w, values, scales, metric, bits, GROUP, 1)
    top = 2 ** (bits - 1)
    nearest = np.clip(np.round(w / spread(scales, columns)), -top, top - 1)
    apart = np.abs(w / spread(scales, columns) - found)
    assert (apart <= np.abs(w / spread(scales, columns) - nearest) + 2**bits * 1e-6).all()
    # The scale is that of least squares, as float16 rounds it; a step that would overshoot is not taken.
    for g in range(steps.shape[1]):
        part = slice(g * GROUP, (g + 1) * GROUP)
        weighted = found[:, part] * np.diag(metric)[part]
        below = np.sum(weighted * found[:, part], axis=1)
        best = np.sum(weighted * w[:, part], axis=1) / np.maximum(below, 1e-300)
        assert (np.abs(steps[:, g] - best) <= np.abs(scales[:, g] - best) * (1 + 1e-3) + 1e-3 * np.abs(best))[
            below > 0
        ].all()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.93), (3, 0.96), (4, 0.97)])
def test_what_a_few_sweeps_are_worth(bits, gain):
    for seed in range(4):
        w, second = np.random.default_rng(seed).standard_normal((64, 160)), correlated(160, seed)
        sizes = []
        for sweeps in (0, 1, 4):
            found = quantize(w, bits, 32, metric=second, sweeps=sweeps)
            sizes.append(errors(w, found.values, found.scales.astype(float), second, 32).sum())
        assert sizes[2] < sizes[1] < sizes[0]
        assert sizes[2] < gain * sizes[0]


@given(st.integers(1, 5), st.integers(1, 40), BIT, SEEDS)
def test_torch_gives_what_numpy_gives(rows, columns, bits, seed):
    w, values, scales, metric = problem(rows, columns, bits, seed)
    first = refine_integers(w, values, scales, metric, bits, GROUP, 1)
    second = refine_integers(*(torch.from_numpy(part) for part in (w, values, scales, metric)), bits, GROUP, 1)
    expected, found = (errors(w, *(np.asarray(part) for part in each), metric) for each in (first, second))
    # A tie may be broken either way, and what follows differs.
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.05, atol=1e-12 * np.sum(w**2))


def test_nothing_to_do():
    w, values, scales, metric = problem(2, 20, 3, 0)
    for got, kept in zip(refine_integers(w, values, scales, metric, 3, GROUP, 0), (values, scales), strict=True):
        np.testing.assert_array_equal(got, kept)
        assert not np.shares_memory(got, kept)
    zeros = refine_integers(0 * w, 0 * values, scales, metric, 3, GROUP, 2)
    assert not zeros[0].any()
    np.testing.assert_array_equal(zeros[1], scales)


@pytest.mark.parametrize("bits", [2, 4])
def test_scales_stay_within_float16(bits):
    """The best one may be zero, where a matrix has nothing along its integers, or beyond what there is."""
    values, ones = np.array([[1.0, 1.0]]), np.ones((1, 1))
    metric = np.array([[1.0, 0.999], [0.999, 1.0]])
    _, steps = refine_integers(np.array([[0.9, -0.9]]), values, ones, metric, bits, GROUP, 1)
    assert steps[0, 0] != 0
    found, steps = refine_integers(np.full((1, 2), 3e6), values, LARGEST_SCALE * ones, metric, bits, GROUP, 2)
    assert steps[0, 0] == LARGEST_SCALE
    assert (found == 2 ** (bits - 1) - 1).all()


def test_no_scale_becomes_zero():
    values, steps = np.ones((2, 1), dtype=np.float32), np.array([0.5])
    pull = -0.5 * values  # all of what is there should go
    np.testing.assert_array_equal(module._best_scale(values, steps, pull, np.eye(2, dtype=np.float32)), steps)
    np.testing.assert_array_equal(module._best_scale(values, steps, pull / 2, np.eye(2, dtype=np.float32)), steps / 2)
