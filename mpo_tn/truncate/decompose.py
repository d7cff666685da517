"""Dense matrix to chain: peel both ends inward, the widest bond last."""

from __future__ import annotations

import math

import array_api_compat
import numpy as np

from mpo_tn.chains.canonical import stored
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.unfolding import interleave
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import (
    Array,
    adjoint,
    binary_exponent,
    check_matrix,
    dtype_name,
    eps,
    frobenius_norm,
    is_single,
    left_factor,
    namespace,
    storage_notes,
    times_power_of_two,
    widen,
)
from mpo_tn.sites import Sites, check_legs, checked_sites
from mpo_tn.truncate.basis import Method, checked_method
from mpo_tn.truncate.spectra import unfolding_spectra
from mpo_tn.truncate.sweep import LIGHT_NORMS, LIGHT_SIZE, BondCallback, Budget, Sweep, peels_left
from mpo_tn.truncation import Report, Truncation, checked_truncation


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
    check_legs(sites, matrix.shape)
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
    single = is_single(matrix)
    notes = storage_notes(matrix)
    large = math.prod(sites.shape) >= LIGHT_SIZE and LIGHT_NORMS[0] < norm < LIGHT_NORMS[1]
    light = single and chosen != "svd" and large and not notes
    given = matrix if light else widen(matrix)
    tensor = interleave(given, sites.out, sites.in_)
    del given  # the largest array there is
    tensor = times_power_of_two(tensor, -exponent, in_place=not _share_memory(tensor, matrix))
    budget.scale(scale)
    sweep = Sweep(caps, budget, chosen, single, scale, callback, best=known is not None)
    cores = _peel(tensor, sites, sweep)

    center = sites.center
    cores[center] = widen(cores[center])
    chain, lost = stored(Chain(tuple(cores), (center, center)), matrix, exponent)

    sweep.notes += notes
    if known is not None:
        sweep.know(known)
    return chain, sweep.report(norm, eps(matrix), truncation, lost)


def _share_memory(a: Array, b: Array) -> bool:
    """Whether writing into one of two arrays of NumPy or torch could change the other."""
    if isinstance(a, np.ndarray):
        return np.may_share_memory(a, b)
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


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
        if peels_left(sites, low, high, left, right):
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
