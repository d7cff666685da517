"""Dense matrix to MPO, against other libraries on the same matrices: ratios of medians in one run, and the errors.

Run with ``make bench``. The libraries take turns, so that a noisy machine slows them all alike. A ratio above 1 means
that the other one takes longer. Every result is contracted again and its error compared: a ratio between different
answers would mean nothing.
"""

from __future__ import annotations

import os

THREADS = "2"
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = THREADS
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from mpo_tn import MPO, Sites, Truncation

warnings.filterwarnings("ignore", module="tensorly")
warnings.filterwarnings("ignore", module="tensornetwork")

Cores = list[np.ndarray]
SEED = 0


def ours(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    mpo, _ = MPO.from_matrix(matrix, sites, Truncation(max_bond=cap))
    return list(mpo.cores)


def tensorly_tt(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    from tensorly.decomposition import tensor_train

    ranks = [1, *(sites.full_bonds if cap is None else sites.capped_bonds(cap)), 1]
    train = tensor_train(interleaved(matrix, sites), rank=ranks)
    return [
        np.asarray(core).reshape(core.shape[0], *legs, core.shape[2]) for core, legs in zip(train, sites, strict=True)
    ]


def tensornetwork_chain(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    import tensornetwork

    rest = tensornetwork.Node(interleaved(matrix, sites)[None, ..., None], backend="numpy")
    cores: Cores = []
    for legs in list(sites)[:-1]:
        edges = [rest[0], rest[1]], [rest[axis] for axis in range(2, len(rest.edges))]
        left, values, right, _ = tensornetwork.split_node_full_svd(rest, *edges, max_singular_values=cap)
        cores.append(left.tensor.reshape(left.shape[0], *legs, left.shape[-1]))
        scaled = np.diag(values.tensor)[:, None] * right.tensor.reshape(right.shape[0], -1)
        rest = tensornetwork.Node(scaled.reshape(right.shape), backend="numpy")
    cores.append(rest.tensor.reshape(rest.shape[0], *list(sites)[-1], 1))
    return cores


def interleaved(matrix: np.ndarray, sites: Sites) -> np.ndarray:
    n = len(sites)
    axes = [axis for k in range(n) for axis in (k, n + k)]
    return np.ascontiguousarray(matrix.reshape(*sites.out, *sites.in_).transpose(axes).reshape(sites.sizes))


PEERS: dict[str, Callable[[np.ndarray, Sites, int | None], Cores]] = {
    "mpo_tn": ours,
    "tensorly": tensorly_tt,
    "TensorNetwork": tensornetwork_chain,
}


def matrices(rows: int, columns: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)
    flat = rng.standard_normal((rows, columns)).astype(np.float32)
    u, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    decaying = (u / np.arange(1, rows + 1)) @ v.T
    return {"flat": flat, "values 1/r": decaying.astype(np.float32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "tensorly", "tensornetwork"))
    print(f"Python {platform.python_version()}, {packages}, {THREADS} threads, seed {SEED}, {repeats} repeats\n")
    print("| matrix | bond | library | median s | times ours | relative error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in ((768, 3072), (768, 768)):
        sites = Sites.balanced(*shape)
        for kind, matrix in matrices(*shape).items():
            for cap in (64, None):
                report(f"{shape[0]}x{shape[1]} float32 {kind}", matrix, sites, cap, repeats)


def report(label: str, matrix: np.ndarray, sites: Sites, cap: int | None, repeats: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    errors: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first round warms up
        for name, decompose in PEERS.items():
            start = time.perf_counter()
            cores = decompose(matrix, sites, cap)
            times[name].append(time.perf_counter() - start)
            if name not in errors:
                rebuilt = MPO([core.astype(np.float64) for core in cores]).to_matrix()
                errors[name] = float(np.linalg.norm(rebuilt - matrix) / np.linalg.norm(matrix))
    medians = {name: float(np.median(values[1:])) for name, values in times.items()}
    for name in PEERS:
        ratio = medians[name] / medians["mpo_tn"]
        print(
            f"| {label} | {cap or 'full'} | {name} | {medians[name]:.3f} | {ratio:.1f} | {errors[name]:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
