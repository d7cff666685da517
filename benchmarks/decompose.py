"""Dense matrix to MPO, against other libraries on the same matrices: ratios of medians in one run, and the errors.

Run with ``make bench``. The libraries take turns, so that a noisy machine slows them all alike. A ratio above 1 means
that the other one takes longer. Every result is contracted again and its error compared: a ratio between different
answers would mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from common import SEED, Cores, clock, header, interleaved, print_head, print_row, rebuilt_error, take_turns  # isort: skip

import numpy as np
import quimb.tensor
import tensornetwork
import torch
import torchtt
from tensorly.decomposition import tensor_train

from mpo_tn import MPO, Sites, Truncation

PAPER = Sites((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
"""The paper's legs of 768 x 3072."""


def ours(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    mpo, _ = MPO.from_matrix(matrix, sites, Truncation(max_bond=cap))
    return list(mpo.cores)


def ours_singular(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    """With singular vectors on every bond, also where nothing is cut and the default has nothing to compute."""
    mpo, _ = MPO.from_matrix(matrix, sites, Truncation(max_bond=cap), method="gram")
    return list(mpo.cores)


def tensorly_tt(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    ranks = [1, *(sites.full_bonds if cap is None else sites.capped_bonds(cap)), 1]
    train = tensor_train(interleaved(matrix, sites), rank=ranks)
    return [
        np.asarray(core).reshape(core.shape[0], *legs, core.shape[2]) for core, legs in zip(train, sites, strict=True)
    ]


def tensornetwork_chain(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
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


def torchtt_ttm(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    tensor = torch.from_numpy(matrix.reshape(*sites.out, *sites.in_))
    train = torchtt.TT(tensor, list(zip(sites.out, sites.in_, strict=True)), eps=1e-12, rmax=cap or 10**9)
    return [core.numpy() for core in train.cores]


def quimb_mps(matrix: np.ndarray, sites: Sites, cap: int | None) -> Cores:
    """Its MPO takes square legs only, so the matrix goes in as an MPS with one axis a site."""
    train = quimb.tensor.MatrixProductState.from_dense(
        interleaved(matrix, sites).ravel(), dims=sites.sizes, max_bond=cap, cutoff=0.0
    )
    train.permute_arrays("lpr")
    arrays = list(train.arrays)
    arrays[0], arrays[-1] = arrays[0][None], arrays[-1][..., None]
    return [a.reshape(a.shape[0], *legs, a.shape[2]) for a, legs in zip(arrays, sites, strict=True)]


PEERS: dict[str, Callable[[np.ndarray, Sites, int | None], Cores]] = {
    "mpo_tn": ours,
    'mpo_tn, method="gram"': ours_singular,
    "TensorNetwork": tensornetwork_chain,
    "tensorly": tensorly_tt,
    "torchTT": torchtt_ttm,
    "quimb": quimb_mps,
}


def matrices(rows: int, columns: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(SEED)
    flat = rng.standard_normal((rows, columns)).astype(np.float32)
    u, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, rows)))
    decaying = (u / np.arange(1, rows + 1)) @ v.T
    return {"flat": flat, "values 1/r": decaying.astype(np.float32)}


def compare(repeats: int) -> None:
    print_head("matrix", "bond", "library", "median s", "times ours", "relative error")
    for kind, matrix in matrices(*PAPER.shape).items():
        for cap in (64, None):
            runs = {name: lambda d=d, m=matrix, c=cap: d(m, PAPER, c) for name, d in PEERS.items()}
            medians, cores = take_turns(runs, repeats)
            for name, seconds in medians.items():
                ratio, error = seconds / medians["mpo_tn"], rebuilt_error(matrix, cores[name])
                print_row(
                    f"768x3072 float32 {kind}", cap or "full", name, f"{seconds:.3f}", f"{ratio:.1f}", f"{error:.6f}"
                )


def large(full: bool) -> None:
    """4096 x 4096 on four sites of 8 x 8 legs, of which only the middle bond is cut: flat, so the hard case."""
    print("\n4096x4096 float32, flat, four sites of 8x8 legs, bond 64\n")
    print_head("method", "seconds", "energy kept / best possible", "reported relative error", "rebuilt relative error")
    matrix = np.random.default_rng(SEED).standard_normal((4096, 4096)).astype(np.float32)
    sites = Sites((8,) * 4, (8,) * 4)
    found: dict[str, tuple[float, float, float, float]] = {}
    for method in ("auto", "krylov", "randomized", *(("gram", "svd") if full else ())):
        start = clock()
        mpo, report = MPO.from_matrix(matrix, sites, Truncation(max_bond=64), method=method)
        seconds = clock() - start
        rebuilt = rebuilt_error(matrix, list(mpo.cores))
        found[method] = seconds, report.norm**2 - report.error**2, report.rel_error, rebuilt
    if full:
        start = clock()
        cores = tensorly_tt(matrix, sites, 64)
        seconds = clock() - start
        rebuilt = rebuilt_error(matrix, cores)
        found["full SVDs (tensorly)"] = seconds, (1 - rebuilt**2) * float(np.linalg.norm(matrix)) ** 2, np.nan, rebuilt
    best = found["gram"][1] if full else np.nan
    for method, (seconds, energy, reported, rebuilt) in found.items():
        print_row(method, f"{seconds:.2f}", f"{energy / best:.4f}", f"{reported:.7f}", f"{rebuilt:.7f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--large", action="store_true", help="also 4096 x 4096")
    parser.add_argument("--full-svd", action="store_true", help="with a sweep of full SVDs beside it (minutes)")
    arguments = parser.parse_args()
    print(header(arguments.repeats))
    compare(arguments.repeats)
    if arguments.large or arguments.full_svd:
        large(arguments.full_svd)


if __name__ == "__main__":
    main()
