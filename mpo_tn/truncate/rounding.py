"""Rounding a chain: one truncating sweep at the orthogonality centre, and the spectra it would see."""

from __future__ import annotations

import math

import array_api_compat

from mpo_tn.chains.canonical import ChainT, check_cores, moved, stored
from mpo_tn.chains.scaled import Scaled, Size, unit, unit_cores
from mpo_tn.linalg import (
    Array,
    adjoint,
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
from mpo_tn.truncate.sweep import LIGHT_SITES, LIGHT_SIZE, BondCallback, Budget, Sweep
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
    light = gram and single and not notes and n <= LIGHT_SITES and math.prod(chain.shape) >= LIGHT_SIZE
    low, high = chain.canonical_interval
    cores, exponent = unit_cores([(narrow if light else widen)(core) for core in chain.cores], low, high)
    rights = _right_factors(cores, high, gram=gram)
    xp = namespace(cores[0])

    first = _times(Scaled(cores[0], exponent), rights[0])
    size = Size(frobenius_norm(first.array), first.exponent)
    norm = abs(size.number("the norm", "normalized() first, and log_norm()"))
    scale = math.ldexp(1.0, size.top)
    budget = Budget(truncation.budget(norm, precision, dtype_name(chain.cores[0])), n - 1)
    budget.scale(scale)
    sweep = Sweep(caps, budget, method, single, scale, callback)
    sweep.notes += notes
    if chain.center is None:
        sweep.notes.append(f"brought to canonical form first; the canonical interval was {chain.canonical_interval}")

    here = Scaled(cores[0], exponent)
    for k in range(n - 1):
        left, out, in_, _ = here.array.shape
        group = _times(here, rights[k])
        u, _ = sweep.cut(times_power_of_two(_rows(group.array), group.exponent - size.top), k)
        rest = adjoint(xp.astype(u, here.array.dtype, copy=False)) @ _rows(here.array)
        cores[k] = xp.reshape(u, (left, out, in_, u.shape[1]))
        here = unit(xp.tensordot(rest, cores[k + 1], axes=1), here.exponent)
    if known is not None:
        sweep.know(known)
    cores = [widen(core) for core in (*cores[:-1], here.array)]
    cores, exponent = moved(cores, here.exponent, (n - 1, n - 1), chain.sites.center)
    rounded, loss = stored(chain.with_cores(cores, (chain.sites.center,) * 2), chain.cores[0], exponent)
    return rounded, sweep.report(norm, precision, truncation, loss)


def _right_factors(cores: list[Array], last: int, *, gram: bool) -> list[Scaled | None]:
    """``L`` of ``T_{k+1} .. T_n = L Q`` for every site k, with ``Q Q^H = 1``; None where it is the identity.

    Sites after ``last`` are right-isometric. A Gram matrix gives ``L`` to half the digits, for data that has no more.
    """
    xp = namespace(cores[0])
    factors: list[Scaled | None] = [None] * len(cores)
    for k in range(last, 0, -1):
        product = _times(Scaled(cores[k]), factors[k])
        columns = xp.reshape(product.array, (cores[k].shape[0], -1))
        if columns.shape[0] < columns.shape[1] and gram:
            found = left_factor(widen(columns), gram=True)
            weighted = found.u * xp.asarray(found.values, device=array_api_compat.device(found.u))
            columns = xp.astype(weighted, columns.dtype, copy=False)
        elif columns.shape[0] < columns.shape[1]:
            columns = adjoint(triangle(adjoint(columns)))
        factors[k - 1] = unit(columns, product.exponent)
    return factors


def _times(core: Scaled, factor: Scaled | None) -> Scaled:
    if factor is None:
        return core
    product = namespace(core.array).tensordot(core.array, factor.array, axes=1)
    return Scaled(product, core.exponent + factor.exponent)


def _rows(core: Array) -> Array:
    """A core as a matrix (left out in, right)."""
    return namespace(core).reshape(core, (-1, core.shape[3]))
