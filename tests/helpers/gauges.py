"""Chains in a random gauge, of any library, and what rounding at one of their bonds is relative to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from helpers.chains import dense, fro, host, legs, random_chain, to_backend
from mpo_tn import Sites
from mpo_tn.linalg import Array


def sites_of(cores: Sequence[Array]) -> Sites:
    return Sites(tuple(int(core.shape[1]) for core in cores), tuple(int(core.shape[2]) for core in cores))


def sides(cores: Sequence[Array], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Everything left of bond k, (rows, bond), and everything right of it, (bond, columns)."""
    wide = [host(core) for core in cores]
    d = wide[k].shape[3]
    eye = np.eye(d)
    left = dense([*wide[: k + 1], eye.reshape(d, d, 1, 1)])  # the bond as the last leg of the rows
    right = dense([eye.reshape(1, d, 1, d), *wide[k + 1 :]])  # and as the first one
    return left.reshape(-1, d, left.shape[1]).transpose(0, 2, 1).reshape(-1, d), right.reshape(d, -1)


def scale_at(cores: Sequence[Array], k: int) -> float:
    """The norm of everything left of bond k times that of everything right of it."""
    left, right = sides(cores, k)
    return fro(left) * fro(right)


@st.composite
def gauged(
    draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32", "float64"), library: str = "numpy", max_sites: int = 4
) -> list[Array]:
    """Gaussian cores in a random gauge, with bonds that may be wider than their neighbours can span."""
    sites = draw(legs(min_sites=2, max_sites=max_sites, max_size=400))
    seed = draw(st.integers(0, 10**6))
    dtype = draw(st.sampled_from(tuple(dtypes)))
    wide = "complex128" if dtype.startswith("complex") else "float64"
    cores = list(random_chain(sites, draw(st.integers(1, 6)), seed, wide).cores)
    rng = np.random.default_rng(seed)
    for k in range(len(cores) - 1):
        d = cores[k].shape[3]
        gauge = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.logspace(0, rng.uniform(-2, 2), d)
        if wide == "complex128":
            gauge = gauge * np.exp(2j * np.pi * rng.uniform(size=(d, 1)))
        cores[k] = cores[k] @ gauge
        cores[k + 1] = np.tensordot(np.linalg.inv(gauge), cores[k + 1], axes=1)
    return [to_backend(core, library, dtype) for core in cores]
