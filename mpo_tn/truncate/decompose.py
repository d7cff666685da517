"""Dense matrix to chain: peel both ends inward, the widest bond last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import array_api_compat
import numpy as np

from mpo_tn.chains.canonical import stored
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    check_matrix,
    dtype_name,
    eps,
    frobenius_norm,
    interleave,
    left_factor,
    namespace,
    share_memory,
    storage_notes,
    times_power_of_two,
    widen,
)
from mpo_tn.sites import Sites, checked_sites
from mpo_tn.truncate.basis import Method, Request, checked_method, factor
from mpo_tn.truncate.spectra import Spectra, float_floor, unfolding_spectra
from mpo_tn.truncation import BondReport, Report, Truncation, checked_truncation

LIGHT_SIZE, LIGHT_NORMS = 2**16, (1e-25, 1e25)
"""Single precision matrices of at least so many entries, and of these norms, are multiplied in single precision: what
rounding adds stays far below the guarantee, which grows with the square root of the size. Factorisations are double all
the same."""

BondCallback = Callable[[int, BondReport], object]
"""Called after each bond with its index and what happened there, in the order of the sweep."""


def decompose(
    matrix: Array,
    sites: Sites,
    truncation: Truncation,
    *,
    spectra: bool = False,
    method: Method = "auto",
    callback: BondCallback | None = None,
) -> tuple[Chain, Report]:
    """Decompose a dense matrix. See :meth:`mpo_tn.MPO.from_matrix`, which says what is guaranteed."""
    matrix = check_matrix(matrix)
    sites = checked_sites(sites)
    truncation = checked_truncation(truncation)
    chosen = checked_method(method)
    if sites.shape != tuple(matrix.shape):
        raise MPOError(
            f"legs out={sites.out}, in_={sites.in_} multiply to {sites.shape} and the matrix is "
            f"{tuple(matrix.shape)}: legs must multiply exactly, see Sites.balanced"
        )
    caps = truncation.caps(len(sites) - 1)
    norm = frobenius_norm(matrix)
    budget = Budget(truncation.budget(norm, eps(matrix), dtype_name(matrix)), len(sites) - 1)

    if norm == math.inf:
        raise MPOError(
            f"the norm of the matrix of shape {tuple(matrix.shape)} overflows double precision: scale it down"
        )
    known = unfolding_spectra(matrix, sites) if spectra or truncation.max_parameters is not None else None
    if known is not None and truncation.max_parameters is not None:
        caps = known.bonds_for(truncation.max_parameters, caps)
    # To a norm from 1 to 2, by a power of two: squares of huge or tiny entries stay within range, and a multiple by a
    # power of two is factorised from the same bits, as no LAPACK promises the same digits for 2 A as for A.
    exponent = binary_exponent(norm)
    scale = 2.0**exponent
    single = dtype_name(matrix) not in ("float64", "complex128")
    notes = storage_notes(matrix)
    large = math.prod(sites.shape) >= LIGHT_SIZE and LIGHT_NORMS[0] < norm < LIGHT_NORMS[1]
    light = single and chosen != "svd" and large and not notes
    given = matrix if light else widen(matrix)
    tensor = interleave(given, sites.out, sites.in_)
    tensor = times_power_of_two(tensor, -exponent, in_place=not share_memory(tensor, given))
    budget.scale(scale)
    sweep = Sweep(caps, budget, chosen, single, scale, callback)
    cores = _peel(tensor, sites, sweep)

    center = sites.center
    cores[center] = widen(cores[center]) * scale
    chain = stored(Chain(tuple(cores), (center, center)), matrix)

    sweep.notes += notes
    if known is not None:
        sweep.know(known)
    return chain, sweep.report(norm, eps(matrix), truncation)


@dataclass
class Budget:
    """The total error still to be spent and the bonds that may still spend it."""

    error: float
    bonds_left: int

    def scale(self, unit: float) -> None:
        """Measure in multiples of ``unit`` from now on."""
        self.error /= unit

    @property
    def share(self) -> float:
        """What the next bond may cut; infinite where only bonds are capped."""
        return self.error / math.sqrt(self.bonds_left)

    def keep(self, tail: np.ndarray, cap: int | None) -> int:
        """How many singular values the next bond keeps: its share of the budget, then its cap, at least one.

        ``tail[r]`` is the norm of what keeping ``r`` values cuts, see :func:`mpo_tn.linalg.tails`.
        """
        rank = len(tail) - 1
        if math.isfinite(self.error):
            # An approximate method may know the first values only.
            rank = min(rank, int((tail > self.share).sum()))
        if cap is not None:
            rank = min(rank, cap)
        rank = max(rank, 1)
        cut = float(tail[rank])
        if math.isfinite(self.error):
            self.error = math.sqrt(max(self.error**2 - cut**2, 0.0))
        self.bonds_left -= 1
        return rank


class Sweep:
    """What the steps of one truncating sweep share, and what they leave behind: reports and notes.

    Args:
        caps: the largest number of columns at each bond.
        budget: the error still to be spent, in multiples of ``scale``.
        method: see :func:`mpo_tn.truncate.basis.factor`.
        single: the data had 32 bits or fewer.
        scale: what matrices were divided by.
        callback: see :data:`BondCallback`.
    """

    def __init__(
        self,
        caps: tuple[int | None, ...],
        budget: Budget,
        method: Method,
        single: bool,
        scale: float,
        callback: BondCallback | None,
    ) -> None:
        self.caps = caps
        self.budget = budget
        self.method: Method = method
        self.single = single
        self.scale = scale
        self.callback = callback
        self.steps: list[BondReport] = [BondReport(1, 1, 0.0)] * len(caps)
        self.notes: list[str] = []
        self.optimal = True

    def passes(self, shape: tuple[int, ...], bond: int) -> bool:
        """Whether nothing can be cut at a bond between so many rows and columns; if so it is reported as full."""
        rows, columns = shape
        cap = self.caps[bond]
        if rows > columns or math.isfinite(self.budget.error) or (cap is not None and cap < rows):
            return False
        self.budget.bonds_left -= 1
        self._record(bond, BondReport(rows, rows, 0.0, method="full"))
        return True

    def cut(self, group: Array, bond: int) -> tuple[Array, Array | None]:
        """The basis ``u`` (m, kept) that budget and cap leave of ``group`` (m, k), and ``u^H group`` if known."""
        found = factor(group, self.method, Request(self.caps[bond], self.budget.share), single=self.single)
        if found.note:
            self.notes.append(f"bond {bond}: {found.note}")
        kept = self.budget.keep(found.tail, self.caps[bond])
        missed = float(found.tail[kept])
        self.optimal = self.optimal and (found.optimal or missed == 0.0)
        self._record(bond, BondReport(kept, found.available, missed * self.scale, method=found.method))
        return found.basis(kept), None if found.image is None else found.image[:kept, :]

    def split(self, group: Array, bond: int) -> tuple[Array, Array]:
        """As :meth:`cut`, with ``u^H group`` in the dtype of ``group`` in any case."""
        u, image = self.cut(group, bond)
        xp = namespace(group)
        if image is None:
            return u, adjoint(xp.astype(u, group.dtype, copy=False)) @ group
        return u, xp.astype(image, group.dtype, copy=False)

    def _record(self, bond: int, step: BondReport) -> None:
        self.steps[bond] = step
        if self.callback is not None:
            self.callback(bond, step)

    def know(self, known: Spectra) -> None:
        """Add to every step what the spectra of the original say of it."""
        self.steps = [replace(step, tail=known.tail(k, step.kept)) for k, step in enumerate(self.steps)]

    def report(self, norm: float, precision: float, truncation: Truncation) -> Report:
        """See :func:`sweep_report`; without bounds where a bond was not cut in the best way."""
        report = sweep_report(self.steps, norm, len(self.caps) + 1, precision, truncation, self.notes)
        return report if self.optimal else replace(report, bound=None, lower_bound=None)


def _peel(tensor: Array, sites: Sites, sweep: Sweep) -> list[Array]:
    """Split sites off both ends until the centre is left.

    ::

        left --[ l  ...  c  ...  r ]-- right      peel l:  U_l -- left' --[ l+1 ... c ... r ]-- right

    Every step is an orthogonal projection, left ones nested, right ones nested, and left commutes with right, so the
    squared errors of the steps add up to the squared total error.

    A site whose bond cannot be cut waits for the next one and is split off from that one's small basis: the large
    tensor is read less often, and the product is the same. If none up to the centre can be cut, `auto` makes them
    identities; a method asked for by name makes them singular vectors.
    """
    xp = namespace(tensor)
    sizes = sites.sizes
    center = sites.center
    low, high = 0, len(sites) - 1
    left = right = 1
    waiting_left: list[int] = []
    waiting_right: list[int] = []
    cores: list[Array] = [None] * len(sites)

    while low < high:
        if low < center and (high == center or left * sizes[low] <= right * sizes[high]):
            group = xp.reshape(tensor, (left * sizes[low], -1))
            waiting_left.append(low)
            if (low + 1 < center or sweep.method == "auto") and sweep.passes(group.shape, low):
                left = group.shape[0]
                if low + 1 == center:
                    _identities(tensor, waiting_left, sites, cores)
            else:
                u, tensor = sweep.split(group, low)
                left = u.shape[1]
                _split_left(u, tensor, waiting_left, sites, cores)
                waiting_left = []
            low += 1
        else:
            group = adjoint(xp.reshape(tensor, (-1, sizes[high] * right)))
            waiting_right.append(high)
            if (high - 1 > center or sweep.method == "auto") and sweep.passes(group.shape, high - 1):
                right = group.shape[0]
                if high - 1 == center:
                    _identities(tensor, waiting_right, sites, cores)
            else:
                u, rest = sweep.split(group, high - 1)
                right = u.shape[1]
                _split_right(adjoint(u), rest, waiting_right, sites, cores)
                tensor, waiting_right = adjoint(rest), []
            high -= 1
    cores[center] = xp.reshape(tensor, (left, sites.out[center], sites.in_[center], right))
    return cores


def _identities(like: Array, waiting: list[int], sites: Sites, cores: list[Array]) -> None:
    """Cores of sites whose bonds cannot be cut, up to the centre: any complete basis does, nothing is computed."""
    xp = namespace(like)
    for site in waiting:
        on_left = site < sites.center
        if on_left:
            bond = 1 if site == 0 else int(cores[site - 1].shape[3])
        else:
            bond = 1 if site == len(sites) - 1 else int(cores[site + 1].shape[0])
        full = bond * sites.sizes[site]
        ends = (bond, full) if on_left else (full, bond)
        identity = widen(xp.eye(full, dtype=like.dtype, device=array_api_compat.device(like)))
        cores[site] = xp.reshape(identity, (ends[0], sites.out[site], sites.in_[site], ends[1]))


def _split_left(basis: Array, rest: Array, waiting: list[int], sites: Sites, cores: list[Array]) -> None:
    """Cores of sites that waited, and of the last one, from the basis (rows of all of them, bond) they share.

    Bonds in between are full, so any complete basis will do: that of the singular vectors is the usual gauge.
    """
    xp = namespace(basis)
    bond = 1 if waiting[0] == 0 else int(cores[waiting[0] - 1].shape[3])
    weights = _row_norms(rest, basis)
    for site in waiting[:-1]:
        rows = bond * sites.sizes[site]
        weighted = xp.reshape(basis * weights, (rows, -1))
        turn = left_factor(weighted @ adjoint(weighted), gram=False).u
        cores[site] = xp.reshape(turn, (bond, sites.out[site], sites.in_[site], rows))
        basis = xp.reshape(adjoint(turn) @ xp.reshape(basis, (rows, -1)), (-1, basis.shape[1]))
        bond = rows
    cores[waiting[-1]] = xp.reshape(basis, (bond, sites.out[waiting[-1]], sites.in_[waiting[-1]], basis.shape[1]))


def _split_right(basis: Array, rest: Array, waiting: list[int], sites: Sites, cores: list[Array]) -> None:
    """The mirror image of :func:`_split_left`, for a basis (bond, columns of all sites)."""
    xp = namespace(basis)
    bond = 1 if waiting[0] == len(sites) - 1 else int(cores[waiting[0] + 1].shape[0])
    weights = xp.reshape(_row_norms(rest, basis), (-1, 1))
    for site in waiting[:-1]:
        columns = sites.sizes[site] * bond
        weighted = xp.reshape(basis * weights, (-1, columns))
        turn = left_factor(adjoint(weighted) @ weighted, gram=False).u
        cores[site] = xp.reshape(adjoint(turn), (columns, sites.out[site], sites.in_[site], bond))
        basis = xp.reshape(xp.reshape(basis, (-1, columns)) @ turn, (basis.shape[0], -1))
        bond = columns
    cores[waiting[-1]] = xp.reshape(basis, (basis.shape[0], sites.out[waiting[-1]], sites.in_[waiting[-1]], bond))


def _row_norms(rest: Array, basis: Array) -> Array:
    """The norms of rows in the dtype of the basis: how much each of its vectors weighs."""
    xp = namespace(rest)
    return xp.astype(xp.linalg.vector_norm(rest, axis=1), basis.dtype)


def sweep_report(
    steps: list[BondReport], norm: float, n: int, precision: float, truncation: Truncation, notes: list[str]
) -> Report:
    """The report of one truncating sweep, whose squared errors add up.

    Raises:
        MPOError: ``truncation.strict`` and the tolerance was missed.
    """
    error = math.hypot(*(step.discarded_norm for step in steps))
    floor = float_floor(precision, n, norm)
    allowed = truncation.budget(norm, 0.0, "")
    met = error <= allowed * (1 + 1e-12)
    if not met and truncation.strict:
        raise MPOError(
            f"{truncation.limit} leaves an error of {error:.6g}, above the {allowed:.6g} allowed: raise "
            "it or the tolerance, or use strict=False to accept it"
        )
    measured = [step.discarded_norm if step.tail is None else step.tail for step in steps]
    return Report(
        error=error,
        norm=norm,
        bonds=tuple(steps),
        # In exact arithmetic the error lies between the two; rounding of what was measured must not say otherwise.
        bound=max(math.hypot(*measured), error),
        lower_bound=min(max(measured, default=0.0), error),
        floor=floor,
        tolerance_met=met,
        notes=tuple(notes),
    )
