"""Rounding a chain: one truncating sweep at the orthogonality centre, and the spectra it would see."""

from __future__ import annotations

import math
from dataclasses import replace

from mpo_tn.chains.canonical import ChainT, check_cores, moved, stored
from mpo_tn.chains.scaled import Scaled, Size, join, unit, unit_cores
from mpo_tn.lapack import is_small
from mpo_tn.linalg import (
    EPS,
    Array,
    adjoint,
    dtype_name,
    eps,
    frobenius_norm,
    gram_factor,
    is_single,
    namespace,
    narrow,
    storage_notes,
    times_power_of_two,
    triangle,
    widen,
)
from mpo_tn.truncate.basis import Factor, Method, checked_method
from mpo_tn.truncate.spectra import Spectra, spectra
from mpo_tn.truncate.sweep import LIGHT_SITES, LIGHT_SIZE, BondCallback, Budget, Sweep
from mpo_tn.truncation import Report, Truncation, checked_truncation

_FLAT = 2
"""From so many times as wide as high on, a matrix has its Gram matrix in much less time than its triangle."""

_ADDS_UP = 64
"""What is cut and what is kept add up to the whole to so many times the precision, and the root of the sites."""


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
    # Where much is cut, half the digits probably tell what to cut: that is looked at bond by bond.
    hasty = method == "auto" and not single and not truncation.has_tolerance and _halves(caps, chain.bonds)
    found = _sweep(chain, truncation, caps, known, method, callback, rough=gram, hasty=hasty)
    if found is None:
        found = _sweep(chain, truncation, caps, known, "svd", callback, rough=False, hasty=False)
    assert found is not None
    rounded, report = found
    # Gram matrices of double precision data have half its digits.
    return rounded, replace(report, exact=False, bound=None, lower_bound=None) if gram and not single else report


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
    rough: bool,
    hasty: bool,
) -> tuple[ChainT, Report] | None:
    """One truncating sweep; None if what was cut and what was kept do not add up, as Gram matrices had too few digits.

    Factors from the right come from Gram matrices, with half the digits, if ``rough``; if ``hasty``, where that is
    cheaper and as long as it is enough.
    """
    n = len(chain)
    precision = eps(chain.cores[0])
    single = is_single(chain.cores[0])
    notes = storage_notes(chain.cores[0])
    light = rough and single and not notes and n <= LIGHT_SITES and math.prod(chain.shape) >= LIGHT_SIZE
    low, high = chain.canonical_interval
    cores, exponent = unit_cores([(narrow if light else widen)(core) for core in chain.cores], low, high)
    rights, half = _right_factors(cores, high, least=1 if rough else _FLAT if hasty else math.inf)
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
        group = _group(here, rights[k], size.top)
        found = sweep.found(group, k)
        if hasty and half and not _tells_enough(found, int(group.shape[0]), caps[k]):
            again, half = _right_factors(cores, high, least=math.inf, first=k)
            rights[k:] = again[k:]
            found = sweep.found(_group(here, rights[k], size.top), k)
        u, _ = sweep.take(found, k)
        rest = adjoint(xp.astype(u, here.array.dtype, copy=False)) @ _rows(here.array)
        cores[k] = xp.reshape(u, (left, out, in_, u.shape[1]))
        here = unit(join(rest, cores[k + 1]), here.exponent)
    if known is not None:
        sweep.know(known)
    cut = math.hypot(*(step.discarded_norm / scale for step in sweep.steps))
    whole = cut**2 + frobenius_norm(times_power_of_two(here.array, here.exponent - size.top)) ** 2
    # Isometries are what they are claimed to be to the precision they were stored in.
    digits = (precision if light or (low, high) != (0, n - 1) else EPS["float64"]) * math.sqrt(n)
    if half and method != "gram" and abs(whole - (norm / scale) ** 2) > _ADDS_UP * digits * whole:
        return None
    cores = [widen(core) for core in (*cores[:-1], here.array)]
    center = chain.sites.center
    cores, exponent = moved(cores, here.exponent, (n - 1, n - 1), center)
    rounded, loss = stored(chain.with_cores(cores, (center, center)), chain.cores[0], exponent)
    return rounded, sweep.report(norm, precision, truncation, loss)


def _right_factors(cores: list[Array], last: int, *, least: float, first: int = 0) -> tuple[list[Scaled | None], bool]:
    """``L`` of ``T_{k+1} .. T_n = L Q`` for every site k from ``first`` on, with ``Q Q^H = 1``; None: the identity.

    Sites after ``last`` are right-isometric. A Gram matrix gives ``L`` to half the digits; it is taken for what is
    wider than high, at least so many times, and whether it was is told.
    """
    xp = namespace(cores[0])
    factors: list[Scaled | None] = [None] * len(cores)
    half = False
    for k in range(last, first, -1):
        product = _times(Scaled(cores[k]), factors[k])
        columns = xp.reshape(product.array, (cores[k].shape[0], -1))
        rows, width = columns.shape
        if rows < width:
            wide = widen(columns)
            rough = width >= least * rows and not is_small(wide)
            factor = gram_factor(wide) if rough else adjoint(triangle(adjoint(wide)))
            columns, half = xp.astype(factor, columns.dtype, copy=False), half or rough
        factors[k - 1] = unit(columns, product.exponent)
    return factors, half


def _group(here: Scaled, factor: Scaled | None, top: int) -> Array:
    """What is left of the chain at a site, as a matrix (left out in, right), in multiples of ``2**top``."""
    product = _times(here, factor)
    return times_power_of_two(_rows(product.array), product.exponent - top)


def _tells_enough(found: Factor, rows: int, cap: int | None) -> bool:
    """Whether a basis is as good as any although what is right of its bond has half the digits.

    Either it is complete, or so much is missed that a Gram matrix was enough to find it.
    """
    return found.method == "gram" or (rows == found.available and (cap is None or cap >= rows))


def _times(core: Scaled, factor: Scaled | None) -> Scaled:
    return core if factor is None else core.times(factor)


def _rows(core: Array) -> Array:
    """A core as a matrix (left out in, right)."""
    return namespace(core).reshape(core, (-1, core.shape[3]))
