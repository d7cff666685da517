"""Cuts: the spectra of all bonds as they are now, which bond to cut next, and the cut itself.

Nothing here builds a matrix or moves a gauge. A bond is looked at from both sides through triangular factors::

    T_1 -- .. -- T_k --d-- T_{k+1} -- .. -- T_n  =  Q_left (R --d-- L) Q_right        R, L at most (d, d)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.linalg import Array, adjoint, check_values, namespace, pivoted_qr, singular_values, svd, to_numpy, triangle
from mpo_tn.planning.config import ModuleSpec
from mpo_tn.torch._units import MPOUnit, mpo_units, specs_changed
from mpo_tn.torch.models.moments import OptimizerLike, map_moments
from mpo_tn.truncate.spectra import Spectra

Score = str | Callable[[str, int, np.ndarray, int, ModuleSpec], float]
"""``"error"``, ``"error_per_parameter"``, or ``f(unit, bond index, its spectrum, new bond, spec now) -> float``."""

_EPS = 2.0**-52


@dataclass(frozen=True)
class RankedCut:
    """Bond ``bond`` of ``unit`` from ``before`` to ``after``; the lower the score, the sooner it is cut."""

    unit: str
    bond: int
    before: int
    after: int
    score: float

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"unit": self.unit, "bond": self.bond, "from": self.before, "to": self.after, "score": self.score}


@dataclass(frozen=True)
class Cut:
    """The two new cores and the maps ``A' = A p`` and ``B' = q B`` that made them.

    ``p`` is (d, r) and ``q`` (r, d), in double precision on the host. ``q`` is the identity on the columns ``kept``:
    these old indices of the bond are the new ones.
    """

    left: torch.Tensor
    right: torch.Tensor
    p: np.ndarray
    q: np.ndarray
    kept: tuple[int, ...]
    spectrum: np.ndarray


def bond_spectra(model: nn.Module) -> dict[str, Spectra]:
    """The singular values of every bond of every unit, from the cores as they are now, which stay as they are.

    Of the padded matrix, where legs pad: cutting also clears what training left on the padding. Cost: two triangular
    factors of each core in double precision, about ``4 sum_k p_k d_{k-1} d_k (d_{k-1} + d_k)`` flops a unit.

    Raises:
        MPOError: as for :func:`mpo_units`; cores with entries that are NaN or infinite.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> [len(values) for values in bond_spectra(model)["0"]]
    [4, 4]
    """
    return {name: unit_spectra(unit) for name, unit in mpo_units(model).items()}


def unit_spectra(unit: MPOUnit) -> Spectra:
    """The spectra of one unit. See :func:`bond_spectra`."""
    cores = _workable(unit.cores, unit.name)
    lefts, rights = _left_factors(cores), _right_factors(cores)
    values = [singular_values(left @ right, gram=False) for left, right in zip(lefts, rights, strict=True)]
    return Spectra(values, unit.spec.sites)


def _workable(cores: Sequence[torch.Tensor], name: str) -> list[Array]:
    """The cores in double precision.

    They stay with torch: handed to NumPy and SciPy they would meet two more pools of threads, which wait for the cores
    of the machine by spinning on them (1.4 s in place of 0.25 s for the spectra of 36 matrices on two threads).
    """
    wide: list[Array] = []
    for k, core in enumerate(cores):
        value = core.detach()
        check_values(value, f"core {k} of {name}")
        if value.device.type == "mps":  # which has no double precision
            value = value.cpu()
        wide.append(value.double())
    return wide


def _left_factors(cores: Sequence[Array]) -> list[Array]:
    """``R_k`` of ``T_1 .. T_k = Q R_k``, (at most d_k, d_k), for every bond."""
    factors: list[Array] = []
    for core in cores[:-1]:
        xp = namespace(core)
        here = xp.tensordot(factors[-1], core, axes=1) if factors else core
        rows = xp.reshape(here, (-1, core.shape[3]))
        factors.append(triangle(rows) if rows.shape[0] > rows.shape[1] else rows)
    return factors


def _right_factors(cores: Sequence[Array]) -> list[Array]:
    """``L_k`` of ``T_{k+1} .. T_n = L_k Q``, (d_k, at most d_k), for every bond, first to last."""
    factors: list[Array] = []
    for core in reversed(cores[1:]):
        xp = namespace(core)
        here = xp.tensordot(core, factors[-1], axes=1) if factors else core
        columns = xp.reshape(here, (core.shape[0], -1))
        longer = columns.shape[1] > columns.shape[0]
        factors.append(adjoint(triangle(adjoint(columns))) if longer else columns)
    return factors[::-1]


class Ranking:
    """The next best cuts, from spectra alone: no core is read, no matrix built.

    Args:
        spectra: of every unit, see :func:`bond_spectra`.
        specs: of every unit; the bonds from which to cut.
        score: ``"error"``: by how much the cut raises the squared bound on the error, relative to the squared norm of
            the matrix as it is, ``s_d**2 / |W|**2`` from d to d - 1 (the corrected Eq. 3 and 4 of Liu, Gao et al., ACL
            2021, of which one term changes). ``"error_per_parameter"``: the same for each parameter that goes. Or a
            callable, see :data:`Score`.
        minimum_bond: no bond is cut below this.

    Ties go to the unit and the bond that come first. Cost: a heap of one entry a bond; a cut touches three of them.

    Raises:
        MPOError: an unknown score, or a callable that gives something else than a number.
    """

    def __init__(
        self,
        spectra: Mapping[str, Spectra],
        specs: Mapping[str, ModuleSpec],
        *,
        score: Score = "error",
        minimum_bond: int = 1,
    ) -> None:
        self.spectra, self.specs = spectra, dict(specs)
        self.score, self.minimum_bond = checked_score(score), minimum_bond
        self._order = {name: position for position, name in enumerate(self.specs)}
        self._heap: list[tuple[float, int, int, int, str]] = []
        self._version: dict[tuple[str, int], int] = {}
        self._squared_norms = {name: part.norm**2 for name, part in spectra.items()}
        for name, spec in self.specs.items():
            for k in range(len(spec.bonds)):
                self._push(name, k)

    def best(self) -> RankedCut | None:
        """The cut of least score, or None if there is nothing left to cut."""
        while self._heap:
            score, _, k, version, name = self._heap[0]
            if self._version[name, k] == version:
                bond = self.specs[name].bonds[k]
                return RankedCut(name, k, bond, bond - 1, score)
            heapq.heappop(self._heap)
        return None

    def take(self, cut: RankedCut) -> None:
        """Count ``cut`` as done. Its spectra stay those of before, as the bound is additive over cuts."""
        spec = self.specs[cut.unit]
        bonds = [cut.after if k == cut.bond else bond for k, bond in enumerate(spec.bonds)]
        self.specs[cut.unit] = replace(spec, bonds=tuple(bonds))
        # What a cut saves depends on the bonds beside it.
        for k in range(max(cut.bond - 1, 0), min(cut.bond + 2, len(bonds))):
            self._push(cut.unit, k)

    def ranked(self) -> list[RankedCut]:
        """One cut for every bond that can be cut, the best first."""
        live = sorted(entry for entry in self._heap if self._version[entry[4], entry[2]] == entry[3])
        bonds = [(name, k, self.specs[name].bonds[k], score) for score, _, k, _, name in live]
        return [RankedCut(name, k, bond, bond - 1, score) for name, k, bond, score in bonds]

    def _push(self, name: str, k: int) -> None:
        version = self._version[name, k] = self._version.get((name, k), 0) + 1
        spec = self.specs[name]
        if spec.bonds[k] > self.minimum_bond:
            heapq.heappush(self._heap, (self._score(name, k, spec), self._order[name], k, version, name))

    def _score(self, name: str, k: int, spec: ModuleSpec) -> float:
        bond = spec.bonds[k]
        values = self.spectra[name][k]
        if not isinstance(self.score, str):
            score = float(self.score(name, k, values, bond - 1, spec))
            if math.isnan(score):
                raise MPOError(f"the score of bond {k} of {name} is NaN: return a number, the least is cut first")
            return score
        squared = self._squared_norms[name]
        score = float(values[bond - 1]) ** 2 / squared if bond <= len(values) and squared > 0 else 0.0
        return score if self.score == "error" else score / saved_parameters(spec, k)


def checked_score(score: Score) -> Score:
    """The score, if it is one.

    Raises:
        MPOError: it is not.
    """
    if score in ("error", "error_per_parameter") or callable(score):
        return score
    raise MPOError(f'score={score!r} must be "error", "error_per_parameter" or a function that returns a number')


def saved_parameters(spec: ModuleSpec, k: int) -> int:
    """How many parameters go with one unit of bond k: ``d_{k-1} p_k + p_{k+1} d_{k+1}``."""
    around = (1, *spec.bonds, 1)
    sizes = spec.sites.sizes
    return around[k] * sizes[k] + sizes[k + 1] * around[k + 2]


def cut_bond(cores: Sequence[torch.Tensor], k: int, new_bond: int, name: str = "the chain") -> Cut:
    """Cut bond ``k`` of a chain to ``new_bond``: the best approximation there is, and only two cores change.

    ::

        A = Q_A R,  B = L Q_B,  R L = U S V^H       p q  =  L V_r S_r^-1 U_r^H R, an oblique projector of rank r
        --A--B--  ->  --(A p)--(q B)--              (A p)(q B) = Q_A U_r S_r V_r^H Q_B, the best of rank r

    Of all the pairs (p m, m^-1 q) that give this, the one is taken for which r of the old indices of the bond go on
    as they were: ``q = [1 | c]`` up to the order of columns, chosen by a pivoted QR so that ``c`` stays small. What an
    optimiser knows about them then stays nearly right.

    Args:
        cores: (left bond, out leg, in leg, right bond); any canonical form or none.
        k: the bond between core k and core k + 1.
        new_bond: at least 1 and at most the bond. Beyond the numerical rank the matrix stays the same.
        name: for messages.

    Guarantee: ``|W - W'|`` is the tail of the spectrum of bond k beyond ``new_bond``, to ``c eps norm`` with the eps
    of the cores' dtype; singular values that are zero do no harm. The maps are exact in double precision.

    Raises:
        MPOError: no such bond, a bond out of range, cores with entries that are NaN or infinite.
    """
    if not 0 <= k < len(cores) - 1:
        raise MPOError(f"bond {k} of {name} does not exist: it has bonds 0 to {len(cores) - 2}")
    bond, number = int(cores[k].shape[3]), whole_number(new_bond)
    if number is None or not 1 <= number <= bond:
        raise MPOError(f"new_bond={new_bond!r} of bond {k} of {name} must be a whole number from 1 to {bond}")
    wide = _workable(cores, name)
    left = to_numpy(_left_factors(wide[: k + 2])[k])
    right = to_numpy(_right_factors(wide[k:])[0])
    u, values, vh = svd(left @ right)
    # Below this a singular value is rounding of the product.
    floor = _EPS * bond * float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    rank = min(number, int((values > floor).sum()))
    rows = u[:, :rank].T @ left
    projector = (right @ (vh[:rank].T / values[:rank])) @ rows
    kept, q = _identity_where_possible(rows / np.sqrt(values[:rank])[:, None], number)
    p = projector[:, list(kept)]
    first, second = wide[k], wide[k + 1]
    xp = namespace(first)
    new_left = xp.tensordot(first, _beside(p, first), axes=1)
    new_right = xp.tensordot(_beside(q, second), second, axes=1)
    return Cut(_like(new_left, cores[k]), _like(new_right, cores[k + 1]), p, q, kept, values)


def _identity_where_possible(rows: np.ndarray, bond: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Which ``bond`` columns to keep, and ``q`` (bond, d): the identity there, and the same row space as ``rows``.

    Where ``rows`` has fewer rows than that, further columns are kept that nothing depends on.
    """
    rank, width = rows.shape
    r, order = pivoted_qr(rows) if rank else (rows, np.arange(width))
    kept = np.sort(order[:bond])
    rest = order[bond:]
    q = np.zeros((bond, width))
    q[np.arange(bond), kept] = 1.0
    if rank and rest.size:
        q[np.ix_(np.searchsorted(kept, order[:rank]), rest)] = np.linalg.solve(r[:, :rank], r[:, bond:])
    return tuple(int(index) for index in kept), q


def _beside(small: np.ndarray, core: Array) -> Array:
    """A host array in the library and on the device of a core."""
    return small if isinstance(core, np.ndarray) else torch.as_tensor(small, device=core.device)


def _like(array: Array, core: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(array).to(core.device, core.dtype).contiguous()


def cut_unit(unit: MPOUnit, k: int, new_bond: int, optimizer: OptimizerLike | None = None) -> list[str]:
    """Cut bond ``k`` of a unit, in place, with fresh factors; an optimiser's moments follow.

    The parameters keep their identity and lose their gradients. Returns notes on optimiser state that could not
    follow. See :func:`cut_bond`, :func:`~mpo_tn.torch.models.moments.map_moments`.
    """
    cores = unit.cores
    cut = cut_bond(cores, k, new_bond, unit.name)
    bonds = [new_bond if j == k else bond for j, bond in enumerate(unit.spec.bonds)]
    tensors = [{k: cut.left, k + 1: cut.right}.get(j, core) for j, core in enumerate(cores)]
    notes: list[str] = []
    if optimizer is not None:
        # dL/dA' = dL/dA q^H and dL/dB' = p^H dL/dB, and a core has its bond last or first.
        notes += map_moments(optimizer, cores[k], cut.q.T, axis=3, name=f"{unit.name}.cores.{k}")
        notes += map_moments(optimizer, cores[k + 1], cut.p, axis=0, name=f"{unit.name}.cores.{k + 1}")
    unit.replace(tensors, bonds)
    return notes


def cut_model(
    model: nn.Module, bonds: Mapping[str, Sequence[int]], optimizer: OptimizerLike | None = None
) -> list[str]:
    """Cut units to given bonds at once, in place: the one-shot truncation with which squeezing is compared.

    Args:
        model: with MPO modules.
        bonds: unit name to its new bonds, none above what it has; units that are not named stay as they are.
        optimizer: whose state is to follow.

    The bonds of a unit are cut one after another with fresh factors, so the error is at most the sum of the tails.

    Returns:
        Notes on optimiser state that could not follow.

    Raises:
        MPOError: an unknown unit, or bonds that do not fit; nothing has been changed.
    """
    units = mpo_units(model)
    for name, wanted in bonds.items():
        if name not in units:
            raise MPOError(f"bonds names {name}, which is no unit of the model: the units are {', '.join(units)}")
        have = units[name].spec.bonds
        numbers = [whole_number(bond) for bond in wanted]
        if len(numbers) != len(have) or any(n is None or not 1 <= n <= h for n, h in zip(numbers, have, strict=True)):
            raise MPOError(f"bonds of {name} are {have} and cannot be cut to {tuple(wanted)}: give each from 1 to that")
    notes: list[str] = []
    for name, wanted in bonds.items():
        for k, bond in enumerate(wanted):
            if bond < units[name].spec.bonds[k]:
                notes += cut_unit(units[name], k, int(bond), optimizer)
    specs_changed(model)
    return notes
