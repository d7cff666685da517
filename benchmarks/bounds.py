"""What one question to known spectra costs, in microseconds, and choosing bonds for a budget, in milliseconds.

Run with ``python benchmarks/bounds.py``. Dimension squeezing asks :meth:`mpo_tn.Spectra.what_if` thousands of times.
"""

from __future__ import annotations

import platform
import random
import statistics
import timeit

import numpy as np

from mpo_tn import Sites, Spectra

SEED = 0
CALLS = 20_000


def main() -> None:
    print(f"Python {platform.python_version()}, numpy {np.__version__}, seed {SEED}, best and median of 7\n")
    print("| legs | inner bonds | what_if, us best | us median | bonds_for, ms |")
    print("| --- | --- | --- | --- | --- |")
    for label, sites in (
        ("768 x 3072, low rank", Sites.low_rank(768, 3072)),
        ("768 x 3072, 5 sites", Sites.balanced(768, 3072)),
        ("4096 x 4096, 4 sites", Sites.balanced(4096, 4096, n=4)),
        ("4096 x 4096, 12 sites", Sites.balanced(4096, 4096, n=12)),
    ):
        spectra = Spectra([np.arange(1.0, full + 1) ** -0.5 for full in sites.full_bonds], sites)
        asked, chosen = measure(spectra)
        print(f"| {label} | {len(spectra)} | {min(asked):.2f} | {statistics.median(asked):.2f} | {chosen:.1f} |")


def measure(spectra: Spectra) -> tuple[list[float], float]:
    """Microseconds of a question, one per round, and milliseconds of a choice for a third of the entries."""
    sites, rng = spectra.sites, random.Random(SEED)
    bonds = [[rng.randint(1, full) for full in sites.full_bonds] for _ in range(64)]

    def ask() -> None:
        for some in bonds:
            spectra.what_if(some)

    rounds = CALLS // len(bonds)
    asked = [seconds / rounds / len(bonds) * 1e6 for seconds in timeit.repeat(ask, number=rounds, repeat=7)]
    budget = sites.shape[0] * sites.shape[1] // 3
    return asked, min(timeit.repeat(lambda: spectra.bonds_for(budget), number=1, repeat=7)) * 1e3


if __name__ == "__main__":
    main()
