"""Rounding a chain: one truncating sweep at the orthogonality centre, and the spectra it would see."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import array_api_compat

from mpo_tn.chains.canonical import ChainT, canonicalize, check_cores, stored
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    dtype_name,
    eps,
    frobenius_norm,
    is_single,
    left_factor,
    namespace,
    narrow,
    storage_notes,
    times_power_of_two,
    triangle,
    widen,
)
from mpo_tn.truncate.basis import CANCELS, Method, checked_method
from mpo_tn.truncate.spectra import Spectra, spectra
from mpo_tn.truncate.sweep import LIGHT_SIZE, BondCallback, Budget, Sweep
from mpo_tn.truncation import Report, Truncation, checked_truncation


def compress(
    chain: ChainT, truncation: Truncation, *, method: Method = "auto", callback: BondCallback | None = None
) -> tuple[ChainT, Report]:
    """Truncate the bonds of a chain in one sweep. See :meth:`mpo_tn.MPO.compress`.

    ::

        T_1 -- T_2 -- (T_3 -- T_4 = L_3 Q_3)        of the isometries Q to the right only the factors L are formed
        U_1 -- (B_2 -- L_3) -- Q_3                  the left basis of B_2 L_3 is that of the whole unfolding
    """
    truncation = checked_truncation(truncation)
    method = checked_method(method)
    check_cores(chain)
    n = len(chain)
    caps = truncation.caps(n - 1)
    known = None if truncation.max_parameters is None else spectra(chain)
    if known is not None and truncation.max_parameters is not None:
        caps = known.bonds_for(truncation.max_parameters, caps)
    single = is_single(chain.cores[0])
    gram = method == "gram" or (single and method != "svd")
    if method == "auto" and not single and not truncation.has_tolerance and _halves(caps, chain.bonds):
        rounded, report = _sweep(chain, truncation, caps, known, method, None, gram=True)
        if all(step.discarded_norm == 0 or step.discarded_norm > CANCELS * report.norm for step in report.bonds):
            if callback is not None:
                for k, step in enumerate(report.bonds):
                    callback(k, step)
            return rounded, report
    return _sweep(chain, truncation, caps, known, method, callback, gram=gram)


def _halves(caps: tuple[int | None, ...], bonds: tuple[int, ...]) -> bool:
    """Whether so much is cut that half the digits probably tell what to cut, which is several times as fast."""
    return any(cap is not None and 2 * cap <= bond for cap, bond in zip(caps, bonds, strict=True))


def _sweep(
    chain: ChainT,
    truncation: Truncation,
    caps: tuple[int | None, ...],
    known: Spectra | None,
    method: Method,
    callback: BondCallback | None,
    *,
    gram: bool,
) -> tuple[ChainT, Report]:
    n = len(chain)
    precision = eps(chain.cores[0])
    single = is_single(chain.cores[0])
    notes = storage_notes(chain.cores[0])
    light = gram and single and not notes and math.prod(chain.shape) >= LIGHT_SIZE
    cores, exponent = _unit_cores(chain, narrow if light else widen)
    rights = _right_factors(cores, chain.canonical_interval[1], gram=gram)

    size = frobenius_norm(_times(cores[0], rights[0]))
    exponent += binary_exponent(size)
    if exponent >= sys.float_info.max_exp:
        raise MPOError(f"the norm of the matrix of shape {chain.shape} overflows double precision: scale a core down")
    cores[0] = times_power_of_two(cores[0], -binary_exponent(size))
    scale = math.ldexp(1.0, exponent)
    norm = math.ldexp(size, exponent - binary_exponent(size))
    budget = Budget(truncation.budget(norm, precision, dtype_name(chain.cores[0])), n - 1)
    # A norm below the smallest number is reported as 0, and so is everything that was cut from it.
    budget.scale(scale or 1.0)
    sweep = Sweep(caps, budget, method, single, scale, callback)
    sweep.notes += notes
    if chain.center is None:
        sweep.notes.append(f"brought to canonical form first; the canonical interval was {chain.canonical_interval}")

    xp = namespace(cores[0])
    for k in range(n - 1):
        left, out, in_, _ = cores[k].shape
        u, _ = sweep.cut(_rows(_times(cores[k], rights[k])), k)
        rest = adjoint(xp.astype(u, cores[k].dtype, copy=False)) @ _rows(cores[k])
        cores[k] = xp.reshape(u, (left, out, in_, u.shape[1]))
        cores[k + 1] = xp.tensordot(rest, cores[k + 1], axes=1)
    if known is not None:
        sweep.know(known)
    cores = [widen(core) for core in cores]
    cores[-1] = times_power_of_two(cores[-1], exponent)
    swept = canonicalize(chain.with_cores(cores, (n - 1, n - 1)), chain.sites.center)
    return stored(swept, chain.cores[0]), sweep.report(norm, precision, truncation)


def _unit_cores(chain: Chain, convert: Callable[[Array], Array]) -> tuple[list[Array], int]:
    """The cores, converted, of norms near one where they are no isometries, and the power of two left out."""
    low, high = chain.canonical_interval
    cores = [convert(core) for core in chain.cores]
    total = 0
    for k in range(low, high + 1):
        exponent = binary_exponent(frobenius_norm(cores[k]))
        cores[k] = times_power_of_two(cores[k], -exponent)
        total += exponent
    return cores, total


def _right_factors(cores: list[Array], last: int, *, gram: bool) -> list[Array | None]:
    """``L`` of ``T_{k+1} .. T_n = L Q`` for every site k, with ``Q Q^H = 1``; None where it is the identity.

    Sites after ``last`` are right-isometric. A Gram matrix gives ``L`` to half the digits, for data that has no more.
    """
    xp = namespace(cores[0])
    factors: list[Array | None] = [None] * len(cores)
    for k in range(last, 0, -1):
        columns = xp.reshape(_times(cores[k], factors[k]), (cores[k].shape[0], -1))
        if columns.shape[0] < columns.shape[1] and gram:
            found = left_factor(widen(columns), gram=True)
            weighted = found.u * xp.asarray(found.values, device=array_api_compat.device(found.u))
            columns = xp.astype(weighted, columns.dtype, copy=False)
        elif columns.shape[0] < columns.shape[1]:
            columns = adjoint(triangle(adjoint(columns)))
        factors[k - 1] = columns
    return factors


def _times(core: Array, factor: Array | None) -> Array:
    return core if factor is None else namespace(core).tensordot(core, factor, axes=1)


def _rows(core: Array) -> Array:
    """A core as a matrix (left out in, right)."""
    return namespace(core).reshape(core, (-1, core.shape[3]))
