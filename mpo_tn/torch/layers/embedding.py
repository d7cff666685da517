"""MPOEmbedding: a table held as an MPO, of which only the rows asked for are contracted."""

from __future__ import annotations

import torch

from mpo_tn.torch.layers.layer import MPOLayer


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
        return self.looked_up(ids, self.padding_idx)
