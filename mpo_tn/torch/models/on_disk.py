"""A model whose weights lie in files: read when a part of it is run, given back afterwards."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError

Read = Callable[[], torch.Tensor]


@dataclass(eq=False)
class _Weight:
    """A parameter or buffer of a model, at all its places; ``users`` have asked for it and not given it back."""

    name: str
    empty: torch.Tensor
    read: Read | None
    places: list[tuple[nn.Module, str]] = field(default_factory=list[tuple[nn.Module, str]])
    users: int = 0

    def put(self, tensor: torch.Tensor) -> None:
        for module, attribute in self.places:
            held: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = tensor


class WeightsOnDisk:
    """Fills a model on the meta device part by part.

    Args:
        model: its parameters, and those buffers that are stored, are on the meta device; other buffers hold their data.
        readers: what reads a tensor, in the dtype of the model, by one of its names.

    Guarantee (weights-given-back): outside of :meth:`loaded` every parameter is the very empty one that it was.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Read]) -> None:
        self.model = model
        self._of: dict[nn.Module, list[_Weight]] = {}
        known: dict[int, _Weight] = {}
        for prefix, module in model.named_modules():
            held = {**module._parameters, **module._buffers}
            for attribute, tensor in held.items():
                name = f"{prefix}.{attribute}".lstrip(".")
                if tensor is None or (attribute in module._buffers and name not in readers):
                    continue
                weight = known.setdefault(id(tensor), _Weight(name, tensor, None))
                weight.read = weight.read or readers.get(name)
                weight.places.append((module, attribute))
                self._of.setdefault(module, []).append(weight)

    @contextmanager
    def loaded(self, module: nn.Module, but: Iterable[nn.Module] = ()) -> Generator[None]:
        """With all weights of a module, and of those in it, but not of those in ``but``.

        Raises:
            MPOError: one of them is in no file as it is, or its file was changed.
        """
        apart = {part for other in but for part in other.modules()}
        wanted = [weight for part in module.modules() if part not in apart for weight in self._of.get(part, ())]
        taken: list[_Weight] = []
        try:
            for weight in wanted:
                self._take(weight, taken)
            yield
        finally:
            self._give_back(taken)

    def _take(self, weight: _Weight, taken: list[_Weight]) -> None:
        if weight.users == 0:
            if weight.read is None:
                raise MPOError(
                    f"{weight.name} is not in the checkpoint, so the model cannot be run block by block: give moments "
                    "that were made where it fits into memory (Calibration.save, --calibration FILE)"
                )
            data = weight.read()
            weight.put(nn.Parameter(data, requires_grad=False) if isinstance(weight.empty, nn.Parameter) else data)
        weight.users += 1
        taken.append(weight)

    @staticmethod
    def _give_back(taken: list[_Weight]) -> None:
        for weight in taken:
            weight.users -= 1
            if weight.users == 0:
                weight.put(weight.empty)
