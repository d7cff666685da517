"""The product of two MPOs of bond d cut to bond d, by each way of ``matmul``, against quimb's; run with ``make bench``.

``direct`` forms bonds of d**2 and compresses them, the others never do. quimb gets the product as a network that is not
contracted yet; its fit starts from its zip-up as ours does, with the same limit of sweeps and of what ends them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import header, print_head, print_row, take_turns  # isort: skip

import numpy as np
from compress import chain, from_quimb, quimb_of
from quimb.tensor import MatrixProductOperator, tensor_network_1d_compress
from scaling import exponent

from mpo_tn import MPO, Truncation, matmul
from mpo_tn.mpo.product import GAIN, SWEEPS

LEG, SITES, BONDS = 2, 12, (8, 16, 24, 32)
WAYS = ("direct", "zipup", "fit")
FLOPS = {"direct": 6, "zipup": 5, "fit": 5}


def factors(bond: int, dtype: str) -> tuple[MPO, MPO]:
    """Two chains whose singular values decay."""
    first, second = (chain(LEG, dtype, bond, SITES, decay=1.5, seed=seed) for seed in (0, 1))
    return first, second


def quimb_product(a: MatrixProductOperator, b: MatrixProductOperator, bond: int, way: str) -> Any:
    options: dict[str, Any] = {"max_iterations": SWEEPS, "tol": GAIN} if way == "fit" else {}
    method = "fit-zipup" if way == "fit" else way
    lazy = a.apply(b, contract=False)
    return tensor_network_1d_compress(lazy, max_bond=bond, cutoff=0.0, method=method, **options)


def runs_of(a: MPO, b: MPO, bond: int) -> dict[str, Callable[[], Any]]:
    """What each way and library is to do."""
    runs: dict[str, Callable[[], Any]] = {}
    trains = quimb_of(a), quimb_of(b)
    for way in WAYS:
        runs[f"{way} mpo_tn"] = lambda w=way: matmul(a, b, Truncation(max_bond=bond), w)
        runs[f"{way} quimb"] = lambda w=way: quimb_product(*trains, bond, w)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float64")
    options = parser.parse_args()
    print(header(options.repeats))
    print_head("bond", "way", "library", "median s", "times our direct", "relative error", "reported")
    seconds: dict[tuple[str, str], list[float]] = {
        (way, library): [] for way in WAYS for library in ("mpo_tn", "quimb")
    }
    for bond in BONDS:
        a, b = factors(bond, options.dtype)
        medians, results = take_turns(runs_of(a, b, bond), options.repeats)
        exact = MPO(tuple(core.astype(np.float64) for core in (a @ b).cores))
        for way, library in seconds:
            name = f"{way} {library}"
            seconds[way, library].append(medians[name])
            found = results[name]
            told = f"{found[1].rel_error:.6f}" if library == "mpo_tn" else ""
            cores = list(found[0].cores) if library == "mpo_tn" else from_quimb(found)
            error = exact.distance(MPO(tuple(np.asarray(core, np.float64) for core in cores))) / exact.norm()
            ratio = f"{medians[name] / medians['direct mpo_tn']:.2f}"
            print_row(bond, way, library, f"{medians[name]:.3f}", ratio, f"{error:.6f}", told)
    print()
    print_head("way", "library", "exponent of the time", "exponent of the flops")
    for (way, library), values in seconds.items():
        print_row(way, library, f"{exponent(list(BONDS), values):.2f}", FLOPS[way])


if __name__ == "__main__":
    main()
