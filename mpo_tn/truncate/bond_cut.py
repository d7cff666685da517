"""One bond of a chain cut by oblique projectors: two cores change and no gauge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import array_api_compat
import numpy as np

from mpo_tn.chains.scaled import Scaled, unit
from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.lapack import pivoted_qr, svd
from mpo_tn.linalg import (
    Array,
    adjoint,
    check_values,
    namespace,
    restored,
    singular_values,
    times_power_of_two,
    to_numpy,
    triangle,
    widen,
)

_EPS = 2.0**-52


@dataclass(frozen=True)
class Cut:
    """The two new cores and the maps ``A' = A p`` and ``B' = q B`` that made them.

    ``p`` is (d, r) and ``q`` (r, d), in double precision on the host. ``q`` is the identity on the columns ``kept``:
    these old indices of the bond are the new ones.
    """

    left: Array
    right: Array
    p: np.ndarray
    q: np.ndarray
    kept: tuple[int, ...]
    spectrum: np.ndarray


def workable(cores: Sequence[Array], name: str) -> list[Array]:
    """The cores in double precision, without their gradients.

    Those of torch stay with torch: handed to NumPy and SciPy they would meet two more pools of threads, which wait for
    the cores of the machine by spinning on them (1.4 s in place of 0.25 s for the spectra of 36 matrices on two
    threads).

    Raises:
        MPOError: a core with entries that are NaN or infinite, or without values; it is named.
    """
    wide: list[Array] = []
    for k, core in enumerate(cores):
        value = core.detach() if hasattr(core, "detach") else core
        check_values(value, f"core {k} of {name}")
        if "mps" in str(array_api_compat.device(value)):  # which has no double precision
            value = value.cpu()
        wide.append(widen(value))
    return wide


def left_factors(cores: Sequence[Array]) -> list[Scaled]:
    """``R_k`` of ``T_1 .. T_k = Q R_k``, (at most d_k, d_k), for every bond."""
    factors: list[Scaled] = []
    for core in cores[:-1]:
        xp = namespace(core)
        here = xp.tensordot(factors[-1].array, core, axes=1) if factors else core
        rows = xp.reshape(here, (-1, core.shape[3]))
        factor = triangle(rows) if rows.shape[0] > rows.shape[1] else rows
        factors.append(unit(factor, factors[-1].exponent if factors else 0))
    return factors


def right_factors(cores: Sequence[Array]) -> list[Scaled]:
    """``L_k`` of ``T_{k+1} .. T_n = L_k Q``, (d_k, at most d_k), for every bond, first to last."""
    factors: list[Scaled] = []
    for core in reversed(cores[1:]):
        xp = namespace(core)
        here = xp.tensordot(core, factors[-1].array, axes=1) if factors else core
        columns = xp.reshape(here, (core.shape[0], -1))
        longer = columns.shape[1] > columns.shape[0]
        factor = adjoint(triangle(adjoint(columns))) if longer else columns
        factors.append(unit(factor, factors[-1].exponent if factors else 0))
    return factors[::-1]


def values_between(left: Scaled, right: Scaled) -> np.ndarray:
    """The singular values of a bond between its two factors."""
    return times_power_of_two(singular_values(left.array @ right.array, gram=False), left.exponent + right.exponent)


def cut_bond(cores: Sequence[Array], k: int, new_bond: int, name: str = "the chain") -> Cut:
    """Cut bond ``k`` of a chain to ``new_bond``: the best approximation there is, and only two cores change.

    ::

        A = Q_A R,  B = L Q_B,  R L = U S V^H       p q  =  L V_r S_r^-1 U_r^H R, an oblique projector of rank r
        --A--B--  ->  --(A p)--(q B)--              (A p)(q B) = Q_A U_r S_r V_r^H Q_B, the best of rank r

    Of all the pairs (p m, m^-1 q) that give this, the one is taken for which r of the old indices of the bond go on
    as they were: ``q = [1 | c]`` up to the order of columns, chosen by a pivoted QR so that ``c`` stays small. What an
    optimiser knows about them then stays nearly right.

    Args:
        cores: arrays of one library, (left bond, out leg, in leg, right bond); any canonical form or none.
        k: the bond between core k and core k + 1.
        new_bond: at least 1 and at most the bond. Beyond the numerical rank the matrix stays the same.
        name: for messages.

    Guarantee (best-cut): ``|W - W'|`` is the tail of the spectrum of bond k beyond ``new_bond``, to
    ``4 eps(dtype) sqrt(size)`` times the norm of all that is left of the bond and of all that is right of it; singular
    values that are zero do no harm.
    Guarantee (cut-maps): the new cores are ``A p`` and ``q B`` to the rounding of these products in double precision,
    and ``q`` is the identity on the columns ``kept``, exactly.

    Raises:
        MPOError: no such bond, a bond out of range, cores with entries that are NaN or infinite.
    """
    if not 0 <= k < len(cores) - 1:
        raise MPOError(f"bond {k} of {name} does not exist: it has bonds 0 to {len(cores) - 2}")
    bond, number = int(cores[k].shape[3]), whole_number(new_bond)
    if number is None or not 1 <= number <= bond:
        raise MPOError(f"new_bond={new_bond!r} of bond {k} of {name} must be a whole number from 1 to {bond}")
    wide = workable(cores, name)
    # Their powers of two cancel in the projectors.
    first_factor, second_factor = left_factors(wide[: k + 2])[k], right_factors(wide[k:])[0]
    left, right = to_numpy(first_factor.array), to_numpy(second_factor.array)
    u, values, vh = svd(left @ right)
    spectrum = times_power_of_two(values, first_factor.exponent + second_factor.exponent)
    # Below this a singular value is rounding of the product.
    floor = _EPS * bond * float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    rank = min(number, int((values > floor).sum()))
    rows = adjoint(u[:, :rank]) @ left
    projector = (right @ (adjoint(vh[:rank]) / values[:rank])) @ rows
    kept, q = _identity_where_possible(rows / np.sqrt(values[:rank])[:, None], number)
    p = projector[:, list(kept)]
    first, second = wide[k], wide[k + 1]
    xp = namespace(first)
    new_left = xp.tensordot(first, _beside(p, first), axes=1)
    new_right = xp.tensordot(_beside(q, second), second, axes=1)
    return Cut(restored(new_left, cores[k]), restored(new_right, cores[k + 1]), p, q, kept, spectrum)


def _identity_where_possible(rows: np.ndarray, bond: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Which ``bond`` columns to keep, and ``q`` (bond, d): the identity there, and the same row space as ``rows``.

    Where ``rows`` has fewer rows than that, further columns are kept that nothing depends on.
    """
    rank, width = rows.shape
    r, order = pivoted_qr(rows) if rank else (rows, np.arange(width))
    kept = np.sort(order[:bond])
    rest = order[bond:]
    q = np.zeros((bond, width), dtype=rows.dtype)
    q[np.arange(bond), kept] = 1.0
    if rank and rest.size:
        q[np.ix_(np.searchsorted(kept, order[:rank]), rest)] = np.linalg.solve(r[:, :rank], r[:, bond:])
    return tuple(int(index) for index in kept), q


def _beside(small: np.ndarray, core: Array) -> Array:
    """A host array in the library and on the device of a core."""
    return namespace(core).asarray(small, device=array_api_compat.device(core))
