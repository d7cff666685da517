"""The best low-rank matrices in a metric: what whitening and truncating gives, of all ranks, without an inverse."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.chains import EPS, dense, host
from helpers.moments import moment, random_metric, roots, scale, weighted
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, LowRankFits, Metric, MPOError, Truncation
from mpo_tn.sites import Sites

SIZES = st.integers(1, 10)
SEEDS = st.integers(0, 2**32 - 10)
KINDS = st.sampled_from(("plain", "anchored", "two-sided"))


@pytest.mark.guarantee("low-rank-best")
@given(SIZES, SIZES, SEEDS, KINDS, st.sampled_from(("float64", "float32")), st.data())
def test_every_cut_reaches_the_tail_of_the_weighted_spectrum(out, in_, seed, kind, dtype, data):
    samples = data.draw(st.integers(1, 12))
    metric = random_metric((out, in_), seed, kind, rank=samples, spread=1.0)
    w = np.random.default_rng(seed).standard_normal((out, in_)).astype(dtype)
    target = np.asarray(metric.target(w))
    left, right = roots(metric, out)
    values = np.linalg.svd(left.T @ target @ right, compute_uv=False)
    fits = LowRankFits(w, metric)
    limit = scale(metric, np.linalg.norm(target))
    # 1e-7: what a Gram matrix in double precision resolves, sqrt(eps), times a few; and eps of what is stored.
    tolerance = (64 * EPS["float64"] * math.sqrt(w.size) if dtype == "float64" else 4e-7 * math.sqrt(w.size)) * limit
    for rank in range(1, min(out, in_) + 1):
        tail = math.hypot(*values[rank:])
        assert abs(fits.error(rank) - tail) <= tolerance
        chain = fits.cut(rank)
        assert chain.sites == Sites.low_rank(out, in_)
        assert chain.bonds[0] <= rank
        assert weighted(metric, target - dense(chain.cores)) <= tail + tolerance * (1e3 if kind == "two-sided" else 1)
    assert abs(fits.norm - math.hypot(*values)) <= tolerance


@given(SIZES, SIZES, SEEDS)
def test_the_metric_of_the_identity_is_the_truncated_svd(out, in_, seed):
    w = np.random.default_rng(seed).standard_normal((out, in_))
    rank = 1 + seed % min(out, in_)
    mpo, report = MPO.low_rank_fit(w, rank, Metric(np.eye(in_)))
    plain, other = MPO.from_matrix(w, Sites.low_rank(out, in_), Truncation(max_bond=rank))
    np.testing.assert_allclose(dense(mpo.cores), dense(plain.cores), atol=1e-9)
    assert report.error == pytest.approx(other.error, abs=1e-13 * report.norm)
    assert (report.metric, report.converged, report.sweeps) == ("activation", True, 0)


def test_factors_are_balanced():
    w = np.random.default_rng(0).standard_normal((8, 6))
    for kind in ("plain", "two-sided"):
        left, right = LowRankFits(w, random_metric((8, 6), 0, kind)).cut(4).cores
        norms = np.linalg.norm(left[0, :, 0, :], axis=0), np.linalg.norm(right[:, 0, :, 0], axis=1)
        np.testing.assert_allclose(*norms, rtol=1e-12)


def test_a_rank_beyond_that_of_the_inputs_is_lowered_and_loses_nothing():
    metric = Metric(moment(8, 0, rank=3))
    w = np.random.default_rng(1).standard_normal((6, 8))
    mpo, report = MPO.low_rank_fit(w, 6, metric)
    assert mpo.bonds == (3,)
    assert report.error <= 1e-12 * report.norm


def test_a_matrix_of_zeros():
    mpo, report = MPO.low_rank_fit(np.zeros((3, 4)), 2, random_metric((3, 4), 0))
    assert (report.error, report.norm, report.rel_error) == (0.0, 0.0, 0.0)
    assert not dense(mpo.cores).any()


def test_library_and_dtype_are_those_of_the_matrix():
    w = np.random.default_rng(0).standard_normal((5, 7))
    metric = random_metric((5, 7), 0)
    expected = dense(LowRankFits(w, metric).cut(2).cores)
    for array in (torch.from_numpy(w).float(), jnp.asarray(w), w.astype("float32"), torch.from_numpy(w).bfloat16()):
        mpo, report = MPO.low_rank_fit(array, 2, metric)
        assert type(mpo.cores[0]) is type(array)
        assert mpo.dtype == array.dtype
        coarse = 0.05 if "bfloat16" in str(array.dtype) else 1e-5
        np.testing.assert_allclose(dense(mpo.cores), expected, atol=coarse)
        assert report.error == pytest.approx(weighted(metric, host(array) - dense(mpo.cores)), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 4, 1.5, True])
def test_ranks_out_of_range(rank):
    with pytest.raises(MPOError, match=re.escape(f"rank={rank!r} must be a whole number from 1 to 3")):
        LowRankFits(np.ones((3, 4)), random_metric((3, 4), 0)).cut(rank)
