"""MPOEmbedding: a table held as an MPO, of which only the rows asked for are contracted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.packing import Held
from mpo_tn.torch.layers.product import no_autocast
from mpo_tn.torch.layers.tracing import is_traced

# An embedding contracts so many rows at a time that the gathered slices of a core hold at most this many numbers.
_GATHERED_ENTRIES = 2**24


class MPOEmbedding(MPOLayer):
    """A table (ids, width) held as an MPO.

    Guarantee (table-never-built): only the rows asked for are contracted, forward and backward; of cores in few bits
    only what these rows need is unpacked.

    An id is read as the mixed-radix number of its out legs; each digit picks one slice of one core, and the slices of
    the unique ids are multiplied together::

        id = (o_1, ..., o_n)      row[id] = T_1[:, o_1] -- T_2[:, o_2] -- ... -- T_n[:, o_n]
                                                |             |                     |
                                              in_1          in_2                  in_n

    Ids are any integer shape; the result has one more axis, the width. ``padding_idx`` gets no gradient of its own,
    as in ``nn.Embedding``.
    """

    @property
    def num_embeddings(self) -> int:
        """How many ids there are."""
        return self.spec.out_features

    @property
    def embedding_dim(self) -> int:
        """The width."""
        return self.spec.in_features

    @property
    def padding_idx(self) -> int | None:
        """The id whose row takes no gradient."""
        return self.spec.padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Shape (...) of ids to (..., width).

        Raises:
            IndexError: an id that is negative or not below ``num_embeddings`` (outside of tracing).
            MPOError: ids that are not int32 or int64.
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise MPOError(f"ids are {ids.dtype}: a table takes torch.int64 or torch.int32")
        if torch.compiler.is_compiling() or is_traced():  # how many ids are unique depends on data
            return self._rows(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim)
        unique, inverse = torch.unique(ids, return_inverse=True)
        if unique.numel():
            least, largest = int(unique[0]), int(unique[-1])
            if least < 0 or largest >= self.num_embeddings:
                bad = least if least < 0 else largest
                raise IndexError(f"id {bad} is out of range: the table has ids 0 to {self.num_embeddings - 1}")
        return self._rows(unique)[inverse]

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        with no_autocast(ids.device):
            rows = table_rows(self.cores.forward(packed=True), ids)[:, : self.embedding_dim]
        if self.padding_idx is not None:
            padding = (ids == self.padding_idx).unsqueeze(1)
            rows = torch.where(padding, rows.detach(), rows)
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
