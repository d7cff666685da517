"""The values of tensors on the host: copies to keep, and digests to tell them from others."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.models.feeding import entries_of


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on the host, which shares no memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def tensors_digest(tensors: Iterable[torch.Tensor]) -> str:
    """BLAKE2b over the bytes of the tensors, each in C order; without a copy where they lie so on the host."""
    return bytes_digest(map(entries_of, tensors))
