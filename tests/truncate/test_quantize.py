"""Integers of few bits: every entry gets the nearest, scales are exact in float16, feedback helps in the metric."""

import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.moments import correlated, moment
from hypothesis import given
from hypothesis import strategies as st

import mpo_tn.truncate.quantize as module
from mpo_tn import MPOError, quantize
from mpo_tn.truncate.quantize import BITS, Integers, packed_bytes

BIT = st.sampled_from(BITS)
SEEDS = st.integers(0, 2**32 - 1)


def matrix_of(rows, columns, seed, scale=0.0, heavy=False):
    rng = np.random.default_rng(seed)
    w = rng.standard_t(2, (rows, columns)) if heavy else rng.standard_normal((rows, columns))
    return w * 10.0**scale


def loss(w, found, metric):
    difference = np.asarray(w, dtype=float) - np.asarray(found.matrix())
    return float(np.sum((difference @ metric) * difference))


@pytest.mark.guarantee("nearest", "scales-exact")
@given(st.integers(1, 6), st.integers(1, 70), BIT, st.integers(8, 40), SEEDS, st.floats(-3, 4), st.booleans())
def test_every_entry_gets_the_nearest_and_scales_are_exact(rows, columns, bits, group, seed, scale, heavy):
    w = matrix_of(rows, columns, seed, scale, heavy)
    found = quantize(w, bits, group)
    count = -(-columns // group)
    assert found.values.dtype == np.int8
    assert found.scales.dtype == np.float16
    assert found.scales.shape == (rows, count)
    assert (found.bits, found.group) == (bits, group)
    assert found.values.min() >= -(2 ** (bits - 1))
    assert found.values.max() < 2 ** (bits - 1)
    assert np.isfinite(found.scales).all()
    assert (found.scales != 0).all()
    choices = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    for g in range(count):
        part = slice(g * group, (g + 1) * group)
        scales = found.scales[:, g : g + 1].astype(float)
        nearest = np.abs(w[:, part, None] - scales[:, :, None] * choices).min(axis=2)
        mine = np.abs(w[:, part] - found.values[:, part] * scales)
        # Two integers may be as near up to rounding.
        assert (mine <= nearest * (1 + 1e-12) + 1e-15 * np.abs(w[:, part])).all()
        np.testing.assert_array_equal(found.matrix()[:, part], found.values[:, part].astype(float) * scales)
    # Integer times scale has no more than 19 digits of two.
    np.testing.assert_array_equal(found.matrix().astype("float32"), found.matrix())


@given(st.integers(1, 4), st.integers(8, 40), BIT, SEEDS)
def test_no_scale_that_was_left_out_is_much_better(rows, columns, bits, seed):
    """The full range and none of the clips: the choice can only be better, up to what single precision rounds."""
    w = matrix_of(rows, columns, seed, heavy=True)
    found = quantize(w, bits, 64)
    top = 2 ** (bits - 1)
    for sign in (1.0, -1.0):
        scales = (sign * np.abs(w).max(axis=1, keepdims=True) / top).astype(np.float16).astype(float)
        plain = np.clip(np.round(w / scales), -top, top - 1) * scales
        error = np.sum((w - found.matrix()) ** 2, axis=1)
        assert (error <= np.sum((w - plain) ** 2, axis=1) * (1 + 1e-5) + 1e-12 * np.sum(w**2, axis=1)).all()


@pytest.mark.parametrize("bits", BITS)
def test_errors_are_those_of_a_uniform_quantiser(bits):
    """For Gaussians the best uniform quantisers of 4, 8, 16, ... levels miss .1188, .0374, .0115, .0035, ... (Max)."""
    w = matrix_of(256, 512, 0)
    error = np.sum((w - quantize(w, bits, 128).matrix()) ** 2) / np.sum(w**2)
    # The integers lack the symmetry of Max's levels; a scale follows its group, which helps where nothing is clipped.
    ideal = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001040, 7: 0.0003043, 8: 0.00008769}[bits]
    assert 0.4 * ideal < error < 1.2 * ideal


@given(st.integers(2, 12), st.integers(4, 60), st.sampled_from((2, 3, 4)), SEEDS)
def test_greedy_steps_are_the_best_for_what_is_left(rows, columns, bits, seed):
    """Each integer is the nearest to the least-squares optimum of its column, given the columns before it."""
    w = matrix_of(rows, columns, seed)
    metric = moment(columns, seed, spread=0.5)
    found = quantize(w, bits, 16, metric=metric, sweeps=0)
    damped = metric / np.mean(np.diag(metric)) + module._DAMPING * np.eye(columns)
    order, _, weights = module._feedback(damped)
    difference = w - found.matrix()
    spread = np.repeat(found.scales.astype(float), 16, axis=1)[:, :columns]
    top = 2 ** (bits - 1)
    total = 0.0
    for place, j in enumerate(order):
        done, left = order[:place], order[place:]
        # With the columns that are left free, those before cost their Schur complement: column j moves by this much.
        moved = np.zeros(rows)
        if place:
            inner = np.linalg.solve(damped[np.ix_(left, left)], damped[np.ix_(left, done)])
            moved = difference[:, done] @ inner[0]
        wanted = np.clip((w[:, j] + moved) / spread[:, j], -top, top - 1)
        assert (np.abs(wanted - found.values[:, j]) <= 0.5 + 1e-6).all()
        total += weights[place] * np.sum((difference[:, j] + moved) ** 2)
    assert total == pytest.approx(np.sum((difference @ damped) * difference), rel=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_feedback_helps_in_the_metric(bits):
    gains = []
    for seed in range(8):
        w = matrix_of(48, 96, seed)
        metric = correlated(96, seed)
        gains.append(loss(w, quantize(w, bits, 32, metric=metric), metric) / loss(w, quantize(w, bits, 32), metric))
    assert max(gains) < 0.75


def test_scales_are_chosen_by_what_columns_weigh():
    """A large column without weight does not make the steps of the others coarse."""
    w = matrix_of(16, 16, 0)
    w[:, 3] *= 3
    metric = np.eye(16)
    metric[3, 3] = 1e-6
    others = np.arange(16) != 3
    plain, weighed = (np.sum((w - quantize(w, 4, 16, metric=m).matrix())[:, others] ** 2) for m in (None, metric))
    assert weighed < 0.7 * plain


def test_the_identity_rounds_to_the_nearest():
    w = matrix_of(5, 30, 0)
    a, b = quantize(w, 3, 8), quantize(w, 3, 8, metric=7 * np.eye(30), sweeps=0)
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.scales, b.scales)


@given(st.integers(1, 5), st.integers(1, 40), BIT, SEEDS, st.booleans())
def test_torch_and_jax_give_what_numpy_gives(rows, columns, bits, seed, with_metric):
    w = matrix_of(rows, columns, seed)
    metric = moment(columns, seed) if with_metric else None
    expected = quantize(w, bits, 16, metric=metric)
    for library, kind in ((torch.from_numpy, torch.Tensor), (jnp.asarray, np.ndarray)):
        found = quantize(library(w), bits, 16, metric=metric)
        assert isinstance(found.values, kind)
        assert isinstance(found.scales, kind)
        assert "int8" in str(found.values.dtype)
        assert "float16" in str(found.scales.dtype)
        weight = np.eye(columns) if metric is None else metric
        # Of two clips that are as good to rounding either may win.
        assert loss(w, found, weight) == pytest.approx(loss(w, expected, weight), rel=0.05, abs=1e-12)
        if metric is None:
            difference = np.asarray(found.matrix()) - expected.matrix()
            assert np.mean(difference != 0) <= 0.5 or columns < 8


def test_groups_of_zeros_and_matrices_of_zeros():
    w = matrix_of(3, 40, 0)
    w[:, 8:16] = 0.0
    found = quantize(w, 4, 8)
    assert not found.matrix()[:, 8:16].any()
    assert (found.scales[:, 1] == 1).all()
    for metric in (None, np.zeros((40, 40)), moment(40, 0)):
        assert not quantize(0 * w, 2, 8, metric=metric).matrix().any()


def test_groups_start_anew_at_their_edges():
    w = np.concatenate([np.full((2, 8), 1e-3), np.full((2, 8), 1e3), np.full((2, 3), 1.0)], axis=1)
    found = quantize(w, 8, 8)
    np.testing.assert_allclose(found.matrix(), w, rtol=2e-3)
    assert found.scales.shape == (2, 3)


def test_small_groups_in_a_large_matrix_are_coarse_but_not_lost():
    w = matrix_of(4, 32, 0)
    w[:, :8] *= 1e-6
    found = quantize(w, 4, 8)
    small = w[:, :8]
    assert np.abs(found.matrix()[:, :8] - small).max() <= np.abs(small).max() / 16 + 2.0**-24


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lower_precision(dtype):
    w = matrix_of(4, 32, 0).astype(dtype)
    np.testing.assert_array_equal(quantize(w, 4, 8).matrix(), quantize(w.astype(float), 4, 8).matrix())


def test_the_matrix_and_the_metric_stay_as_they_are():
    w, metric = matrix_of(4, 16, 0), moment(16, 0)
    before = w.copy(), metric.copy()
    quantize(w, 2, 8, metric=metric)
    quantize(torch.from_numpy(w), 2, 8, metric=torch.from_numpy(metric))
    np.testing.assert_array_equal(w, before[0])
    np.testing.assert_array_equal(metric, before[1])


def test_bytes_are_words_scales_and_the_shape():
    for rows, columns, bits, group in itertools.product((1, 7), (1, 32, 33, 200), BITS, (8, 128)):
        words = math.ceil(columns * bits / 32)
        expected = 4 * rows * words + 2 * rows * math.ceil(columns / group) + 16
        assert packed_bytes(rows, columns, bits, group) == expected


W = np.ones((2, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(W, 1), "bits=1 is not one of 2, 3"),
        (lambda: quantize(W, 9), "bits=9"),
        (lambda: quantize(W, 4.0), "bits=4.0"),
        (lambda: quantize(W, True), "bits=True"),
        (lambda: quantize(W, 4, 7), "group=7 must be a whole number of at least 8"),
        (lambda: quantize(W, 4, None), "group=None"),
        (lambda: quantize(W * 1j, 4), "a complex matrix has no integers"),
        (lambda: quantize(W * np.nan, 4), "32 entries that are NaN"),
        (lambda: quantize(W.astype(int), 4), "of dtype int64 cannot be decomposed"),
        (lambda: quantize(W * 1e7, 4), "entries of size 1e+07 are beyond scales in float16"),
        (lambda: quantize(W * 1e-7, 4), "no entry is larger than 1e-07, below scales in float16"),
        (lambda: quantize(W, 4, metric=np.eye(16), sweeps=-1), "sweeps=-1 must be a whole number of at least 0"),
        (lambda: quantize(W, 4, metric=np.eye(16), sweeps=None), "sweeps=None"),
        (lambda: quantize(W, 4, metric=np.eye(3)), "the metric is (3, 3) for a matrix with 16 columns"),
        (lambda: quantize(W, 4, metric=np.full((16, 16), np.inf)), "the metric has entries that are NaN or infinite"),
        (lambda: quantize(W, 4, metric=np.eye(16) - 0.5), "the metric has negative eigenvalues"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        call()


def test_integers_are_a_record():
    found = quantize(W, 4)
    assert isinstance(found, Integers)
    np.testing.assert_allclose(found.matrix(), W, rtol=1e-3)
