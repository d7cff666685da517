"""Low rank of large weights: the leading eigenvectors alone against all of them, paired, and the energy each keeps.

Run with ``make bench``. Both are ``MPO.from_matrix`` on two sites; for "all" the shortcut is switched off. The two take
turns, and the ratio is the median of those of the turns. Best possible is what all eigenvectors keep.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from common import SEED, clock, header, print_head, print_row  # isort: skip

import numpy as np
import torch

from mpo_tn import MPO, Report, Sites, Truncation
from mpo_tn.planning.structure import structure
from mpo_tn.torch import MPOConfig
from mpo_tn.truncate import basis, leading

SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))
SPECTRA = {"flat": 0.0, "decaying": 0.25}
"""Gaussian matrices, whose columns are multiplied by r**-decay."""


@contextmanager
def all_eigenvectors() -> Iterator[None]:
    with patch.object(basis, "may_pay", lambda *_: False):
        yield


def weight(rows: int, columns: int, decay: float, dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(SEED))
    return (w * torch.arange(1, columns + 1.0) ** -decay).to(dtype)


def run(w: torch.Tensor, rank: int) -> tuple[float, Report, list[int]]:
    """Seconds, report, and the degrees of the filters."""
    degrees: list[int] = []
    plain = leading._filtered

    def counted(*arguments: object) -> object:
        degrees.append(arguments[3])  # type: ignore[arg-type]
        return plain(*arguments)  # type: ignore[arg-type]

    with patch.object(leading, "_filtered", counted):
        start = clock()
        _, report = MPO.from_matrix(w, Sites.low_rank(*w.shape), Truncation(max_bond=rank))
        return clock() - start, report, degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=int, default=2048, help="side up to which shapes are tried")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA))
    arguments = parser.parse_args()
    print(header(arguments.repeats, ("numpy", "torch")))
    print_head(
        "matrix",
        "keep",
        "rank",
        "way",
        "degrees",
        "leading s",
        "all s",
        "times",
        "energy kept / best",
        "relative error",
    )
    for rows, columns in SHAPES:
        for name in arguments.spectra if rows <= arguments.largest else ():
            for dtype in arguments.dtypes:
                w = weight(rows, columns, SPECTRA[name], getattr(torch, dtype))
                for keep in arguments.keep:
                    rank = structure("linear", rows, columns, MPOConfig(sites="low-rank", keep=keep)).bonds[0]
                    near, every = [], []
                    for _ in range(arguments.repeats):
                        time.sleep(0.3)
                        near.append(run(w, rank))
                        time.sleep(0.3)
                        with all_eigenvectors():
                            every.append(run(w, rank))
                    (_, report, degrees), best = near[-1], every[-1][1]
                    kept = (report.norm**2 - report.error**2) / (best.norm**2 - best.error**2)
                    seconds = [np.median([turn[0] for turn in turns]) for turns in (near, every)]
                    ratio = np.median([b[0] / a[0] for a, b in zip(near, every, strict=True)])
                    print_row(
                        f"{rows}x{columns} {dtype} {name}", keep, rank, report.bonds[0].method,
                        " + ".join(map(str, degrees)) or "none", *(f"{value:.2f}" for value in seconds), f"{ratio:.1f}",
                        f"{kept:.5f}", f"{report.rel_error:.6f}",
                    )  # fmt: skip


if __name__ == "__main__":
    main()
