"""The dense weight that a module may keep beside its cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class DenseWeight:
    """A dense weight and the state of the cores that it was made from."""

    def __init__(self, cores: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
        self.weight = weight
        # The old memory is held, so that no new tensor can come to lie at the same address.
        self._cores = [core.detach() for core in cores]
        self._seen = [(core.data_ptr(), core._version, core.stride()) for core in cores]

    @staticmethod
    def can_watch(cores: Sequence[torch.Tensor]) -> bool:
        """Whether changes of the cores can be seen: not those of inference tensors, and not those of no data at all."""
        return not any(core.is_inference() or core.is_meta for core in cores)

    def is_of(self, cores: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
        """Whether these are the same cores in the same memory, unchanged since, and the weight has this dtype."""
        # The same memory means the same dtype and device, and the shapes are those of the spec.
        return self.weight.dtype == dtype and self._seen == [
            (core.data_ptr(), core._version, core.stride()) for core in cores
        ]
