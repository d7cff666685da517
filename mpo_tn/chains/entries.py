"""Single entries, rows, columns and the diagonal of a chain, found without its matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains import contraction
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, has_values, placed, unit
from mpo_tn.exceptions import MPOError, shape_text, whole_number
from mpo_tn.linalg import Array, full_precision, namespace

_WIDE = 2**62
"""Matrices with so many rows or columns are indexed by Python's own integers."""

_MOST_INDICES = 2**26
"""The most entries that are looked up one by one."""


def item(chain: Chain, key: Any) -> Array:
    """What ``matrix[key]`` is for a NumPy matrix. See :meth:`mpo_tn.MPO.__getitem__`."""
    keys = key if isinstance(key, tuple) else (key, slice(None))
    if len(keys) != 2:
        raise MPOError(f"a[{key!r}] has {len(keys)} indices: a matrix has two, a[row, column]")
    everything = [isinstance(part, slice) and part == slice(None) for part in keys]
    numbers = [whole_number(part) for part in keys]
    if everything == [True, True]:
        return _dense(chain)
    if numbers[0] is not None and everything[1]:
        return _flat(_fixed(chain, digits(numbers[0], chain.sites.out, "row"), 1))
    if numbers[1] is not None and everything[0]:
        return _flat(_fixed(chain, digits(numbers[1], chain.sites.in_, "column"), 2))
    rows, columns = (_indices(part, size, name) for part, size, name in zip(keys, chain.shape, _AXES, strict=True))
    if isinstance(keys[0], slice):
        rows = rows.reshape(-1, *(1,) * columns.ndim)
    elif isinstance(keys[1], slice):
        rows = rows[..., None]
    try:
        shape = np.broadcast_shapes(rows.shape, columns.shape)
    except ValueError:
        raise MPOError(
            f"row and column indices of shapes {rows.shape} and {columns.shape} do not fit together"
        ) from None
    if math.prod(shape) > _MOST_INDICES:
        raise MPOError(f"{math.prod(shape)} entries are too many to look up one by one: use to_matrix()")
    if 0 in shape:
        first = chain.cores[0]
        return namespace(first).zeros(shape, dtype=first.dtype, device=array_api_compat.device(first))
    found = entries(chain, np.broadcast_to(rows, shape).ravel(), np.broadcast_to(columns, shape).ravel())
    return found[0] if shape == () else namespace(found).reshape(found, shape)


_AXES = ("row", "column")


def entries(chain: Chain, rows: np.ndarray, columns: np.ndarray) -> Array:
    """The entries at so many rows and columns, (m,), in the cores' own dtype, a product of matrices each.

    Cost: ``2 m sum_k d_{k-1} d_k`` flops. A power of two is taken out at every site.

    Raises:
        MPOError: an index that is not there, or an entry out of the range of the dtype.
    """
    xp = namespace(chain.cores[0])
    outs = digits(rows, chain.sites.out, "row")
    ins = digits(columns, chain.sites.in_, "column")
    ones = xp.ones((len(rows), 1, 1), dtype=chain.dtype, device=array_api_compat.device(chain.cores[0]))
    carried = Scaled(ones)
    for core, out, in_ in zip(chain.cores, outs, ins, strict=True):
        left, _, columns_here, right = core.shape
        where = xp.asarray(np.asarray(out * columns_here + in_, "int64"), device=array_api_compat.device(core))
        matrices = xp.take(xp.reshape(xp.permute_dims(core, (1, 2, 0, 3)), (-1, left, right)), where, axis=0)
        product = xp.matmul(carried.array, matrices, **full_precision(xp))
        carried = unit(product, carried.exponent) if has_values(product) else Scaled(product)
    return xp.reshape(placed(carried, "the entry" if len(rows) == 1 else "the vector of entries"), (-1,))


def diagonal(chain: Chain) -> Array:
    """The diagonal. See :meth:`mpo_tn.MPO.diagonal`."""
    rows, columns = chain.shape
    if any(out != in_ for out, in_ in chain.sites):
        if min(rows, columns) > _MOST_INDICES:
            raise MPOError(f"the diagonal of a matrix of shape {shape_text(chain.shape)} is too long to be looked up")
        where = np.arange(min(rows, columns))
        return entries(chain, where, where)
    xp = namespace(chain.cores[0])
    cores: list[Array] = []
    for core in chain.cores:
        left, out, _, right = core.shape
        kept = xp.linalg.diagonal(xp.permute_dims(core, (0, 3, 1, 2)))  # (left, right, leg)
        cores.append(xp.reshape(xp.permute_dims(kept, (0, 2, 1)), (left, out, 1, right)))
    return _flat(Chain(tuple(cores)))


def digits(index: Any, legs: Sequence[int], name: str) -> list[Any]:
    """The digits of one index or of an array of them, first leg first; counted from the end if negative.

    Raises:
        MPOError: beyond the end.

    >>> digits(-1, (2, 3), "row"), digits(np.array([0, 4]), (2, 3), "row")
    ([1, 2], [array([0, 1]), array([0, 1])])
    """
    size = math.prod(legs)
    for value in np.ravel(np.asarray(index, object)):
        if not -size <= value < size:
            raise MPOError(f"there is no {name} {value}: the matrix has {size}")
    rest: Any = index
    if isinstance(index, np.ndarray):
        rest = index.astype(object) if size >= _WIDE else index
        rest = np.where(index < 0, rest + size, rest)
    elif index < 0:
        rest = index + size
    found: list[Any] = []
    for leg in reversed(legs):
        found.append(rest % leg)
        rest = rest // leg
    return found[::-1]


def _indices(key: Any, size: int, name: str) -> np.ndarray:
    if isinstance(key, slice):
        chosen = range(size)[key]
        if len(chosen) > _MOST_INDICES:
            raise MPOError(f"{len(chosen)} of the {name}s are too many to look up one by one: use to_matrix()")
        return np.array(chosen, "int64" if size < _WIDE else object)
    number = whole_number(key)
    if number is not None:
        return np.array(number, "int64" if abs(number) < _WIDE and size < _WIDE else object)
    try:
        found = np.asarray(key)
    except (TypeError, ValueError, RuntimeError):
        found = np.empty(0, "bool")
    if found.dtype.kind not in "iuO" or any(whole_number(value) is None for value in found.ravel()):
        raise MPOError(f"{key!r} is no {name} of a matrix: use whole numbers, arrays of them, or slices")
    return found.astype("int64") if size < _WIDE and found.dtype.kind != "O" else found.astype(object)


def _fixed(chain: Chain, where: Sequence[int], axis: int) -> Chain:
    """The chain of a single row (axis 1) or column (axis 2)."""
    if axis == 1:
        return Chain(tuple(core[:, k : k + 1, :, :] for core, k in zip(chain.cores, where, strict=True)))
    return Chain(tuple(core[:, :, k : k + 1, :] for core, k in zip(chain.cores, where, strict=True)))


def _dense(chain: Chain) -> Array:
    return contraction.contract_matrix(chain.cores, contraction.plan_for_chain(chain))


def _flat(chain: Chain) -> Array:
    """The only row or column of a chain."""
    return namespace(chain.cores[0]).reshape(_dense(chain), (-1,))
