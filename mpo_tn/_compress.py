"""Rounding a chain: one truncating sweep at the orthogonality centre, and the spectra it would see."""

from __future__ import annotations

import numpy as np

from mpo_tn._canonical import ChainT, canonicalize, shift_right, stored
from mpo_tn._decompose import Budget, sweep_report
from mpo_tn.bounds import Spectra
from mpo_tn.chain import Chain
from mpo_tn.linalg import (
    adjoint,
    binary_exponent,
    dtype_name,
    eps,
    frobenius_norm,
    left_factor,
    namespace,
    singular_values,
    storage_notes,
    tails,
    times_power_of_two,
    widen,
)
from mpo_tn.truncation import BondReport, Report, Truncation, checked_truncation


def compress(chain: ChainT, truncation: Truncation) -> tuple[ChainT, Report]:
    """Truncate the bonds of a chain in one sweep. See :meth:`mpo_tn.MPO.compress`."""
    truncation = checked_truncation(truncation)
    n = len(chain)
    caps = truncation.caps(n - 1)
    notes = storage_notes(chain.cores[0])
    if chain.center is None:
        notes.append(f"brought to canonical form first; the canonical interval was {chain.canonical_interval}")
    start = canonicalize(wide_chain(chain), 0)
    known = None if truncation.max_parameters is None else spectra(start)
    if known is not None and truncation.max_parameters is not None:
        caps = known.bonds_for(truncation.max_parameters, caps)
    cores = list(start.cores)
    norm = frobenius_norm(cores[0])
    precision = eps(chain.cores[0])
    budget = Budget(truncation.budget(norm, precision, dtype_name(chain.cores[0])), n - 1)
    exponent = binary_exponent(norm)
    scale = 2.0**exponent
    budget.scale(scale)
    cores[0] = times_power_of_two(cores[0], -exponent)

    xp = namespace(cores[0])
    steps: list[BondReport] = []
    for k in range(n - 1):
        # The centre sits at k and everything else is isometric, so its singular values are those of the unfolding.
        left, out, in_, right = cores[k].shape
        group = xp.reshape(cores[k], (left * out * in_, right))
        factor = left_factor(group, gram=False)
        if factor.note:
            notes.append(f"bond {k}: {factor.note}")
        tail = tails(factor.values)
        kept = budget.keep(tail, caps[k])
        u = factor.u[:, :kept]
        eps_k = None if known is None else known.tail(k, kept)
        steps.append(BondReport(kept, len(factor.values), float(tail[kept]) * scale, eps_k))
        cores[k] = xp.reshape(u, (left, out, in_, kept))
        cores[k + 1] = xp.tensordot(adjoint(u) @ group, cores[k + 1], axes=1)
    cores[-1] = cores[-1] * scale
    swept = canonicalize(start.with_cores(cores, (n - 1, n - 1)), chain.sites.center)
    result = stored(swept, chain.cores[0])
    return result, sweep_report(steps, norm, n, precision, truncation, notes)


def spectra(chain: Chain) -> Spectra:
    """The singular values of every bond, ``n - 1`` host arrays, largest first.

    Each has ``min`` of the bond and what its neighbours allow as its length.
    """
    cores = list(canonicalize(wide_chain(chain), 0).cores)
    xp = namespace(cores[0])
    found: list[np.ndarray] = []
    for k in range(len(cores) - 1):
        cores[k], cores[k + 1] = shift_right(cores[k], cores[k + 1])
        left = cores[k + 1].shape[0]
        found.append(singular_values(xp.reshape(cores[k + 1], (left, -1)), gram=False))
    return Spectra(found, chain.sites)


def wide_chain(chain: ChainT) -> ChainT:
    """The chain in double precision."""
    return chain.with_cores((widen(core) for core in chain.cores), chain.canonical_interval)
