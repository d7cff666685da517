"""Rounding an MPO of bond 256 to 64 on six sites, against torchTT's ``round`` and quimb's ``compress``.

Run with ``make bench``. ``raw`` cores claim no canonical form, ``centred`` ones have their centre in the middle, as
everything that mpo_tn makes has; the other libraries start from scratch either way.
"""

from __future__ import annotations

import argparse
import itertools
import math

from common import SEED, Cores, header, print_head, print_row, take_turns  # isort: skip

import numpy as np
import quimb.tensor
import torch
import torchtt

from mpo_tn import MPO, Sites, Truncation

SITES, BOND, KEPT = 6, 256, 64
MANY = ((100, 60, 30), (100, 24, 12), (400, 2, 1), (400, 4, 2))


def chain(leg: int, dtype: str, bond: int = BOND, n: int = SITES, *, decay: float = 0.5, seed: int = SEED) -> MPO:
    """Gaussian cores of unit scale, weighted so that the singular values of bonds decay."""
    rng = np.random.default_rng(seed)
    full = Sites((leg,) * n, (leg,) * n).full_bonds
    ends = [1, *(min(bond, value) for value in full), 1]
    cores: Cores = []
    for left, right in itertools.pairwise(ends):
        core = rng.standard_normal((left, leg, leg, right)) / math.sqrt(left * leg * leg)
        cores.append((core / np.arange(1, right + 1) ** decay).astype(dtype))
    return MPO(tuple(cores))


def torchtt_of(mpo: MPO) -> torchtt.TT:
    return torchtt.TT([torch.from_numpy(core) for core in mpo.cores])


def quimb_of(mpo: MPO) -> quimb.tensor.MatrixProductOperator:
    arrays = [core.transpose(0, 3, 1, 2) for core in mpo.cores]
    return quimb.tensor.MatrixProductOperator([arrays[0][0], *arrays[1:-1], arrays[-1][:, 0]], shape="lrud")


def quimb_compress(train: quimb.tensor.MatrixProductOperator) -> quimb.tensor.MatrixProductOperator:
    copy = train.copy()
    copy.compress(max_bond=KEPT, cutoff=0.0)
    return copy


def from_quimb(train: quimb.tensor.MatrixProductOperator) -> Cores:
    train.permute_arrays("lrud")
    arrays = list(train.arrays)
    arrays[0], arrays[-1] = arrays[0][None], arrays[-1][:, None]
    return [array.transpose(0, 2, 3, 1) for array in arrays]


def distance(first: Cores, second: Cores) -> float:
    """``|A - B| / |A|`` from the QR of the difference, which loses no digits."""
    cores: Cores = []
    last = len(first) - 1
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        left = [0, 0] if k == 0 else [0, a.shape[0]]
        right = [0, 0] if k == last else [0, a.shape[3]]
        shape = (max(left[1] + b.shape[0], 1), *a.shape[1:3], max(right[1] + b.shape[3], 1))
        core = np.zeros(shape)
        core[: a.shape[0], :, :, : a.shape[3]] += a
        core[left[1] :, :, :, right[1] :] += -b.astype(np.float64) if k == 0 else b
        cores.append(core)
    return MPO(tuple(cores)).norm() / MPO(tuple(np.asarray(core, np.float64) for core in first)).norm()


def many_sites(repeats: int) -> None:
    """Chains of many small sites, where what is done beside the arithmetic counts."""
    print()
    print_head("sites", "bond", "to", "dtype", "mpo_tn s", "torchTT s", "ours over torchTT's", "relative errors")
    for (n, bond, kept), dtype in itertools.product(MANY, ("float32", "float64")):
        plain = MPO.random(Sites((2,) * n, (2,) * n), bond, seed=SEED)
        mpo = MPO(tuple((core / 2).astype(dtype) for core in plain.cores))
        train = torchtt_of(mpo)
        runs = {
            "mpo_tn": lambda m=mpo, r=kept: m.compress(Truncation(max_bond=r)),
            "torchTT": lambda t=train, r=kept: t.round(1e-14, r),
        }
        medians, results = take_turns(runs, repeats)
        ours, theirs = list(results["mpo_tn"][0].cores), [core.numpy() for core in results["torchTT"].cores]
        errors = ", ".join(f"{distance(list(mpo.cores), cores):.4f}" for cores in (ours, theirs))
        ratio = f"{medians['mpo_tn'] / medians['torchTT']:.2f}"
        print_row(n, bond, kept, dtype, f"{medians['mpo_tn']:.4f}", f"{medians['torchTT']:.4f}", ratio, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many", action="store_true", help="only chains of many sites")
    options = parser.parse_args()
    repeats = options.repeats
    print(header(repeats))
    if options.many:
        many_sites(repeats)
        return
    print_head("legs", "dtype", "cores", "library", "median s", "times ours", "relative error", "reported")
    for leg in (8, 4):
        for dtype in ("float32", "float64"):
            raw = chain(leg, dtype)
            for form, mpo in (("raw", raw), ("centred", raw.canonicalize(raw.sites.center))):
                train, network = torchtt_of(mpo), quimb_of(mpo)
                runs = {
                    "mpo_tn": lambda m=mpo: m.compress(Truncation(max_bond=KEPT)),
                    "torchTT": lambda t=train: t.round(1e-14, KEPT),
                    "quimb": lambda q=network: quimb_compress(q),
                }
                medians, results = take_turns(runs, repeats)
                small, report = results["mpo_tn"]
                cores = {
                    "mpo_tn": list(small.cores),
                    "torchTT": [core.numpy() for core in results["torchTT"].cores],
                    "quimb": from_quimb(results["quimb"]),
                }
                for name, seconds in medians.items():
                    error = distance(list(mpo.cores), cores[name])
                    told = f"{report.rel_error:.6f}" if name == "mpo_tn" else ""
                    ratio = f"{seconds / medians['mpo_tn']:.1f}"
                    print_row(f"{leg}x{leg}", dtype, form, name, f"{seconds:.3f}", ratio, f"{error:.6f}", told)
    many_sites(repeats)


if __name__ == "__main__":
    main()
