"""How the cost grows with size: the fitted exponent of the time beside that of the flops. Run with ``make bench``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from common import SEED, header, print_head, print_row, take_turns  # isort: skip

import numpy as np
from compress import chain

from mpo_tn import MPO, Sites, Truncation


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def square(side: int) -> Sites:
    return Sites((8, side // 64, 8), (8, side // 64, 8)) if side < 512 else Sites.balanced(side, side, n=4)


def gram_flops(sites: Sites) -> float:
    """Of full bonds: the Gram matrix, its eigenvectors and the projection, for the widest bonds, which are everything.

    At most two bonds next to the centre are factorised; the others wait.
    """
    total = 0.0
    size = float(np.prod(sites.sizes))
    for k in {sites.center - 1, sites.center} & set(range(len(sites) - 1)):
        m = float(sites.full_bonds[k])
        total += m * size + 9 * m**3 + 2 * m * size
    return total


def compress_flops(bonds: tuple[int, ...], legs: int, kept: int) -> float:
    """Products with the factors, Gram matrices and eigenvectors from the right, then the sweep."""
    total = 0.0
    for left, right in zip((1, *bonds), (*bonds, 1), strict=True):
        p = legs * legs
        total += 2 * left * p * right**2 + left**2 * p * right + 9 * left**3
        total += 2 * min(left, kept) * p * right**2 + min(left, kept) * p * right**2 + 9 * right**3
    return total


def import_seconds(modules: str, repeats: int) -> float:
    """On the wall whatever the clock of the rest: the work is another process's."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env=os.environ)
        return time.perf_counter() - start

    return float(np.median([once() for _ in range(repeats)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(header(repeats))
    rng = np.random.default_rng(SEED)

    print_head("what", "sizes", "seconds", "exponent of the time", "exponent of the flops")
    sides = [256, 512, 1024, 2048]
    w = {side: rng.standard_normal((side, side)).astype(np.float32) for side in sides}
    for label, method, cap in (
        ("from_matrix, full bonds, gram", "gram", None),
        ("from_matrix, bond 32, krylov", "krylov", 32),
    ):
        runs = {
            str(side): lambda s=side, m=method, c=cap: MPO.from_matrix(
                w[s], square(s), Truncation(max_bond=c), method=m
            )
            for side in sides
        }
        medians, _ = take_turns(runs, repeats)
        seconds = [medians[str(side)] for side in sides]
        flops = [gram_flops(square(side)) if cap is None else float(side) ** 2 for side in sides]
        shown = ", ".join(f"{value:.3f}" for value in seconds)
        print_row(label, sides, shown, f"{exponent(sides, seconds):.2f}", f"{exponent(sides, flops):.2f}")
    bonds = [64, 128, 256, 512]
    chains = {bond: chain(8, "float32", bond) for bond in bonds}
    runs = {str(bond): lambda b=bond: chains[b].compress(Truncation(max_bond=b // 4)) for bond in bonds}
    medians, _ = take_turns(runs, repeats)
    seconds = [medians[str(bond)] for bond in bonds]
    flops = [compress_flops(chains[bond].bonds, 8, bond // 4) for bond in bonds]
    shown = ", ".join(f"{value:.3f}" for value in seconds)
    label = "compress to a quarter of the bond, raw float32, six sites of 8x8"
    print_row(label, bonds, shown, f"{exponent(bonds, seconds):.2f}", f"{exponent(bonds, flops):.2f}")

    alone, with_us = (import_seconds(modules, repeats) for modules in ("numpy, scipy", "numpy, scipy, mpo_tn"))
    print(f"\nimport numpy, scipy: {alone:.2f} s; with mpo_tn {with_us:.2f} s, {with_us - alone:.2f} s more")


if __name__ == "__main__":
    main()
