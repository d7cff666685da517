"""Rows of a matrix from its cores; the matrix is never built."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.layers.packing import Held
from mpo_tn.torch.layers.product import no_autocast
from mpo_tn.torch.layers.tracing import is_traced

# So many rows are contracted at a time that the gathered slices of a core hold at most this many numbers.
_GATHERED_ENTRIES = 2**24


def looked_up(
    cores: Sequence[Held], ids: torch.Tensor, size: tuple[int, int], padding_idx: int | None = None
) -> torch.Tensor:
    """Rows of a table by ids of any shape, (...) to (..., width); each distinct id is contracted once.

    Args:
        cores: of the table.
        ids: int32 or int64.
        size: (ids, width) of the table, its padding apart.
        padding_idx: the id whose row takes no gradient.

    Raises:
        IndexError: an id that is negative or too large (outside of tracing).
        MPOError: ids that are not int32 or int64.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise MPOError(f"ids are {ids.dtype}: a table takes torch.int64 or torch.int32")
    if torch.compiler.is_compiling() or is_traced():  # how many ids are unique depends on data
        return _rows(cores, ids.reshape(-1), size[1], padding_idx).reshape(*ids.shape, size[1])
    unique, inverse = torch.unique(ids, return_inverse=True)
    if unique.numel():
        least, largest = int(unique[0]), int(unique[-1])
        if least < 0 or largest >= size[0]:
            bad = least if least < 0 else largest
            raise IndexError(f"id {bad} is out of range: the table has ids 0 to {size[0] - 1}")
    return _rows(cores, unique, size[1], padding_idx)[inverse]


def _rows(cores: Sequence[Held], ids: torch.Tensor, width: int, padding_idx: int | None) -> torch.Tensor:
    with no_autocast(ids.device):
        rows = table_rows(cores, ids)[:, :width]
    if padding_idx is not None:
        rows = torch.where((ids == padding_idx).unsqueeze(1), rows.detach(), rows)
    return rows


def table_rows(cores: Sequence[Held], rows: torch.Tensor) -> torch.Tensor:
    """Rows of the matrix of ``cores``, shape (len(rows), in), without building the matrix.

    Cost: about ``2 sum_k (in_1 ... in_k) bond_{k-1} bond_k`` flops a row, and one slice of every core in memory a row.
    """
    if torch.compiler.is_compiling() or is_traced():  # a graph must not depend on how many rows there are
        return _contract_rows(cores, rows)
    slice_entries = max(core.shape[0] * core.shape[2] * core.shape[3] for core in cores)
    at_once = max(1, _GATHERED_ENTRIES // slice_entries)
    if rows.numel() <= at_once:
        return _contract_rows(cores, rows)
    return torch.cat([_contract_rows(cores, chunk) for chunk in rows.split(at_once)])


def _contract_rows(cores: Sequence[Held], rows: torch.Tensor) -> torch.Tensor:
    legs = [core.shape[1] for core in cores]
    columns = 1
    # (row, columns so far, bond)
    partial = torch.ones(rows.numel(), 1, 1, dtype=cores[0].dtype, device=cores[0].device)
    for k, core in enumerate(cores):
        digit = rows // math.prod(legs[k + 1 :]) % legs[k]
        left, _, in_, right = core.shape
        whole = isinstance(core, torch.Tensor)
        slices = core.transpose(0, 1)[digit] if whole else core.form.slices(core.tensors, digit)
        slices = slices.reshape(rows.numel(), left, in_ * right)  # (row, bond, in_k * next bond)
        columns *= in_
        partial = torch.bmm(partial, slices).reshape(rows.numel(), columns, right)
    return partial.reshape(rows.numel(), columns)


def slice_of_rows(cores: Sequence[Held], index: int, parts: int) -> list[torch.Tensor] | None:
    """The cores of one of ``parts`` equal parts of the rows; None if no leg ends, or can be split, at their bounds.

    A part is one digit of each of the first out legs, as a row is one digit of all of them.
    """
    chosen: list[torch.Tensor] = []
    for core in cores:
        left, out, _, _ = core.shape
        if parts == 1:
            chosen.append(_whole(core))
            continue
        first, count = (index // (parts // out), 1) if parts % out == 0 else (index * (out // parts), out // parts)
        if parts % out and out % parts:
            return None
        if isinstance(core, torch.Tensor):
            chosen.append(core[:, first : first + count])
        else:
            digits = torch.arange(first, first + count, device=core.device)
            slices = core.form.slices(core.tensors, digits).transpose(0, 1)
            chosen.append(slices.reshape(left, count, *core.shape[2:]))
        index, parts = (index % (parts // out), parts // out) if parts % out == 0 else (0, 1)
    return chosen


def _whole(core: Held) -> torch.Tensor:
    return core if isinstance(core, torch.Tensor) else core.core()
