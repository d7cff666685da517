"""Other dtypes and devices: each core rounded once, forms claimed only where they hold, range shared out."""

import jax
import numpy as np
import pytest
import torch
from helpers.chains import dense, host, left_defect, random_chain, slack

from mpo_tn import MPO, MPOError, Sites

SITES = Sites((2, 3, 2), (2, 2, 3))


@pytest.mark.guarantee("astype")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("float64", "float32"), ("complex128", "complex64"), ("float32", "complex128"), ("float64", "bfloat16")],
)
def test_every_core_is_rounded_once(library, before, after):
    if library == "numpy" and after == "bfloat16":
        after = "float16"
    a = random_chain(SITES, 3, 0, before, library).canonicalize(2)
    b = a.astype(after)
    assert str(b.dtype).endswith(after)
    assert type(b.cores[0]) is type(a.cores[0])
    for old, new in zip(a.cores, b.cores, strict=True):
        assert np.array_equal(
            host(new), host(old.astype(after) if library != "torch" else old.to(getattr(torch, after)))
        )
    narrows = after in ("float32", "complex64")
    assert b.canonical_interval == (a.canonical_interval if narrows else (0, 2))
    if narrows:
        assert left_defect(b.cores[0]) <= slack(after, 12, 3)
    assert a.astype(a.dtype) is a


@pytest.mark.guarantee("astype")
def test_what_one_core_cannot_hold_the_others_do():
    cores = [np.full((1, 2, 2, 1), value) for value in (1e100, 1e-99, 1.0)]
    narrow = MPO(cores).astype("float32")
    assert np.allclose(dense(narrow.cores), 10.0, rtol=1e-6, atol=0)
    with pytest.raises(MPOError, match="range of float32"):
        MPO([np.full((1, 2, 2, 1), 1e200)] * 3).astype("float32")
    with pytest.raises(MPOError, match="range of float32"):
        MPO([np.full((1, 2, 2, 1), 1e-200)] * 3).astype("float32")


def test_bad_dtypes():
    a = MPO.random(SITES, 2, seed=0, dtype="complex128")
    with pytest.raises(MPOError, match="imaginary part"):
        a.astype("float64")
    for dtype in ("int64", "Q", None, 3):
        with pytest.raises(MPOError, match="dtype="):
            a.astype(dtype)
    single = random_chain(SITES, 2, 0, "float32", "jax")
    with jax.enable_x64(False), pytest.raises(MPOError, match="x64"):
        single.astype("float64")


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_devices(library):
    a = random_chain(SITES, 3, 0, "float64", library).canonicalize(1)
    there = a.to("cpu")
    assert there.canonical_interval == a.canonical_interval
    assert np.array_equal(dense(there.cores), dense(a.cores))
    for device in ("nowhere", "cuda:99", 3.5):
        with pytest.raises(MPOError, match="device="):
            a.to(device)
    if library == "jax":
        assert a.to(jax.devices()[0]).cores[0].devices() == {jax.devices()[0]}
