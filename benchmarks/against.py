"""The cases of the other tables, by this package and by another checkout of it, in turns within one process.

``python benchmarks/against.py CHECKOUT`` prints what each case takes here over what it takes there.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from common import SEED, header, print_head, print_row, take_turns  # isort: skip

import numpy as np
from compress import chain

Case = Callable[[Any], Callable[[], Any]]
"""Of a package what it is to do."""


def loaded_from(folder: str) -> Any:
    """The package of a checkout, beside the one that is imported."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mpo_tn"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("mpo_tn")
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "mpo_tn"]:
            del sys.modules[name]
        sys.modules.update(ours)


def decomposed(sides: tuple[int, int], bond: int | None, method: str = "auto") -> Case:
    matrix = np.random.default_rng(SEED).standard_normal(sides).astype(np.float32)

    def case(package: Any) -> Callable[[], Any]:
        sites, cut = package.Sites.balanced(*sides, n=5), package.Truncation(max_bond=bond)
        return lambda: package.MPO.from_matrix(matrix, sites, cut, method=method)

    return case


def rounded(leg: int, dtype: str, *, centred: bool) -> Case:
    raw = chain(leg, dtype)
    cores = (raw.canonicalize(raw.sites.center) if centred else raw).cores
    interval = (raw.sites.center, raw.sites.center) if centred else None

    def case(package: Any) -> Callable[[], Any]:
        mpo = package.MPO(cores, interval)
        return lambda: mpo.compress(package.Truncation(max_bond=64))

    return case


def verb(name: str, *arguments: str) -> Case:
    cores = chain(4, "float32", 64).cores

    def case(package: Any) -> Callable[[], Any]:
        mpo = package.MPO(cores)
        return lambda: getattr(mpo, name)(*(mpo if value == "itself" else value for value in arguments))

    return case


CASES: dict[str, Case] = {
    "768x3072, bond 64": decomposed((768, 3072), 64),
    "768x3072, full bonds": decomposed((768, 3072), None),
    "768x3072, full bonds, gram": decomposed((768, 3072), None, "gram"),
    "1024x1024, bond 32, krylov": decomposed((1024, 1024), 32, "krylov"),
    **{
        f"compress {leg}x{leg} {dtype} {'centred' if centred else 'raw'}": rounded(leg, dtype, centred=centred)
        for leg in (8, 4)
        for dtype in ("float32", "float64")
        for centred in (False, True)
    },
    "norm, bond 64": verb("norm"),
    "inner, bond 64": verb("inner", "itself"),
    "distance, bond 64": verb("distance", "itself"),
    "cast_error, bond 64": verb("cast_error", "float16"),
    "to_matrix, bond 64": verb("to_matrix"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    here, there = importlib.import_module("mpo_tn"), loaded_from(options.checkout)
    print(header(options.repeats))
    print_head("case", "s here", "s there", "ratio")
    for name, case in CASES.items():
        medians, _ = take_turns({"here": case(here), "there": case(there)}, options.repeats)
        ratio = medians["here"] / medians["there"]
        print_row(name, f"{medians['here']:.4f}", f"{medians['there']:.4f}", f"{ratio:.2f}")


if __name__ == "__main__":
    main()
