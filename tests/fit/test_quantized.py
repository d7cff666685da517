"""Chains with cores in integers: the error is that of the chain returned, and alternating beats rounding."""

import math
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, host, legs, random_chain
from helpers.moments import correlated, random_metric, scale, weighted
from hypothesis import given
from hypothesis import strategies as st

import mpo_tn.fit.quantized as module
from mpo_tn import MPO, Integers, Metric, MPOError, Sites, quantize, quantize_chain

SEEDS = st.integers(0, 2**32 - 10)
KINDS = st.sampled_from((None, "plain", "anchored", "two-sided"))


def stands_for(core, shape):
    """What a core of the result stands for."""
    return (core.matrix() if isinstance(core, Integers) else host(core)).reshape(shape)


def rounded(chain, bits, group):
    """Every core rounded by itself."""
    cores = []
    for core, number in zip(chain.cores, bits, strict=True):
        left, out, in_, right = core.shape
        flat = core.reshape(left * out, in_ * right)
        cores.append(core if number is None else quantize(flat, number, group).matrix().reshape(core.shape))
    return MPO(cores)


@pytest.mark.guarantee("quantized-exact")
@given(legs(max_size=200), st.integers(1, 3), SEEDS, KINDS, st.sampled_from(("float32", "float64")), st.data())
def test_the_error_is_that_of_what_the_integers_stand_for(sites, bond, seed, kind, dtype, data):
    w = np.random.default_rng(seed).standard_normal(sites.shape).astype(dtype)
    metric = None if kind is None else random_metric(sites.shape, seed, kind)
    start, _ = random_chain(sites, bond, seed + 1, dtype).fit(w, sweeps=1)
    bits = [data.draw(st.sampled_from((None, 2, 3, 4, 8))) for _ in sites.out]
    bits[seed % len(bits)] = 4
    cores, chain, report = quantize_chain(start, w, bits, 8, metric)
    assert [isinstance(core, Integers) for core in cores] == [number is not None for number in bits]
    assert [core.bits for core in cores if isinstance(core, Integers)] == [number for number in bits if number]
    parts = [stands_for(core, kept.shape) for core, kept in zip(cores, chain.cores, strict=True)]
    assert all(np.array_equal(host(kept), part) for kept, part in zip(chain.cores, parts, strict=True))
    assert chain.sites == start.sites
    assert chain.dtype == start.dtype
    target = w.astype(float) if metric is None else np.asarray(metric.target(w))
    difference = target - dense(parts)
    size = np.linalg.norm(target) + np.linalg.norm(dense(parts))
    if metric is None:
        expected, limit = float(np.linalg.norm(difference)), size
    else:
        expected, limit = weighted(metric, difference), scale(metric, size)
    assert abs(report.error - expected) <= 64 * EPS["float64"] * math.sqrt(w.size) * limit
    assert len(report.errors) == 3
    assert report.errors[2] <= report.errors[1]
    assert report.error == report.errors[-1]
    assert report.metric == ("frobenius" if metric is None else metric.name)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_alternating_beats_rounding_by_far(bits, shape):
    w = np.random.default_rng(0).standard_normal(shape)
    metric = Metric(correlated(shape[1], 0, 3.0))
    start, report = MPO.low_rank_fit(w, 20, metric)
    _, _, once = quantize_chain(start, w, (bits, bits), 32, metric, rounds=1)
    _, chain, found = quantize_chain(start, w, (bits, bits), 32, metric)
    plain = metric.error(w, rounded(start, (bits, bits), 32))
    added = [math.sqrt(error**2 - report.error**2) for error in (plain, once.error, found.error)]
    assert added[1] < 0.8 * added[0]
    assert added[2] < 0.77 * added[0]
    assert found.error <= once.error
    assert chain.bonds == start.bonds


@pytest.mark.parametrize("bits", [2, 3])
def test_pairs_gain_by_sweeps_and_by_a_second_round(bits, monkeypatch):
    w = np.random.default_rng(0).standard_normal((96, 128))
    metric = Metric(correlated(128, 0, 3.0))
    start, report = MPO.low_rank_fit(w, 40, metric)
    added = []
    for sweeps, rounds in ((0, 1), (4, 1), (4, 2)):
        monkeypatch.setattr(module, "quantize", partial(quantize, sweeps=sweeps))
        error = quantize_chain(start, w, (bits, bits), 32, metric, rounds=rounds)[2].error
        added.append(error**2 - report.error**2)
    assert added[1] < 0.99 * added[0]
    assert added[2] < 0.97 * added[1]


def test_the_core_that_is_not_rounded_makes_up_for_the_other():
    shape = (48, 64)
    w = np.random.default_rng(0).standard_normal(shape)
    metric = random_metric(shape, 0)
    start, report = MPO.low_rank_fit(w, 20, metric)
    for bits in ((2, None), (None, 2)):
        cores, _, found = quantize_chain(start, w, bits, 32, metric)
        _, _, both = quantize_chain(start, w, (2, 2), 32, metric)
        assert report.error < found.error < both.error
        assert isinstance(cores[bits.index(None)], np.ndarray)


def test_a_frozen_centre_of_many_sites():
    sites = Sites((2, 6, 2), (3, 8, 2))
    w = np.random.default_rng(0).standard_normal(sites.shape)
    metric = random_metric(sites.shape, 0)
    start, _ = random_chain(sites, 4, 0).fit(w, metric=metric, sweeps=4)
    bits = (None, 3, None)
    _, _, found = quantize_chain(start, w, bits, 8, metric)
    assert found.error < metric.error(w, rounded(start, bits, 8))
    assert found.error < 1.2 * found.errors[0]


def test_one_site_is_the_dense_matrix_with_feedback():
    w = np.random.default_rng(0).standard_normal((16, 24))
    metric = random_metric((16, 24), 0)
    chain = MPO([w[None, :, :, None]])
    cores, result, report = quantize_chain(chain, w, [4], 8, metric, rounds=1)
    expected = quantize(w, 4, 8, metric=metric.second)
    np.testing.assert_allclose(cores[0].matrix(), expected.matrix(), atol=1e-12)
    assert report.error == pytest.approx(metric.error(w, result), rel=1e-12)


def test_eight_bits_lose_next_to_nothing():
    w = np.random.default_rng(0).standard_normal((32, 32))
    metric = random_metric((32, 32), 0)
    start, report = MPO.low_rank_fit(w, 16, metric)
    assert quantize_chain(start, w, (8, 8), metric=metric)[2].error < 1.001 * report.error


def test_any_library():
    sites = Sites((2, 3), (3, 4))
    w = np.random.default_rng(0).standard_normal(sites.shape)
    metric = random_metric(sites.shape, 0)
    start = random_chain(sites, 3, 0)
    expected = quantize_chain(start, w, (None, 4), 8, metric)[2]
    for library, kind in ((torch.from_numpy, torch.Tensor), (jnp.asarray, np.ndarray)):
        again = MPO([library(core) for core in start.cores])
        cores, chain, report = quantize_chain(again, library(w), (None, 4), 8, metric)
        assert isinstance(cores[1].values, kind)
        assert type(chain.cores[1]) is type(cores[0]) is type(library(w))
        assert report.error == pytest.approx(expected.error, rel=1e-2)


CHAIN = random_chain(Sites((2, 2), (2, 4)), 2, 0)
W = np.ones((4, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_chain(CHAIN, W, (4,)), "bits=(4,) must have one entry for each of 2 cores"),
        (lambda: quantize_chain(CHAIN, W, (None, None)), "not all None"),
        (lambda: quantize_chain(CHAIN, W, 4), "bits=4 must have one entry"),
        (lambda: quantize_chain(CHAIN, W, (4, 0)), "bits=0 is not one of"),
        (lambda: quantize_chain(CHAIN, W, (4, 4), 5), "group=5"),
        (lambda: quantize_chain(CHAIN, W, (4, 4), rounds=0), "rounds=0 must be a whole number of at least 1"),
        (lambda: quantize_chain(CHAIN, W.T, (4, 4)), "the target is (8, 4) and the MPO (4, 8)"),
        (lambda: quantize_chain(CHAIN, W, (4, 4), metric=random_metric((4, 5), 0)), "second is (in, in)"),
        (lambda: quantize_chain(MPO([c * 1j for c in CHAIN.cores]), W * 1j, (4, 4)), "the chain is complex128"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        call()
