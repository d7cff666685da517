"""Gradients at the outputs of units: listened to while a model, or a part of it, is gone back through."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.feeding import Call, counted_rows, is_encoder_decoder
from mpo_tn.torch.models.listening import Reader, is_table
from mpo_tn.torch.models.sums import GradientSum, Loss, sketched_distance


class Backward:
    """Sums up gradients at the outputs of units.

    Args:
        model: that is run, or a part of it.
        readers: the units in it.
        gradients: a loss, called with the output and the batch; ``True`` for random combinations of the output.
        seed: of those.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader], gradients: bool | Loss, seed: int) -> None:
        self.model = model
        self.readers = readers
        self.loss = None if isinstance(gradients, bool) else gradients
        self.sums: dict[str, GradientSum] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.encoder_decoder = is_encoder_decoder(model)

    @contextlib.contextmanager
    def listening(self, call: Call) -> Generator[None]:
        """Around a forward and a backward pass."""

        def listen(reader: Reader, module: nn.Module) -> Any:
            def take(g: torch.Tensor) -> None:
                counted, _ = counted_rows(g.detach(), call.mask_of(reader.name, self.encoder_decoder, g.shape[:-1]))
                if reader.name not in self.sums:
                    self.sums[reader.name] = GradientSum(g.shape[-1], g.device)
                self.sums[reader.name].add(counted, reader.name)

            def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
                if not output.requires_grad:
                    # Nothing before it takes a gradient. The clone may be changed in place, a leaf may not.
                    output = output.detach().requires_grad_().clone()
                output.register_hook(take)
                return output

            return module.register_forward_hook(hook)

        handles: list[Any] = []
        try:
            for reader in self.readers.values():
                handles += [listen(reader, module) for module in reader.modules if not is_table(module)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, call: Call, output: Any) -> None:
        """Go back from what the model returned."""
        mask = call.mask_of("decoder", self.encoder_decoder, torch.Size())
        sketch = partial(sketched_distance, output, mask, self.generator)
        loss = sketch() if self.loss is None else self.loss(output, call.batch)
        if self.loss is None and not loss.requires_grad:
            return  # only tables are looked at, or layers that nothing reached: there is no G
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(
                f"the loss is {loss!r}: it must be a scalar tensor that depends on what the linear layers compute"
            )
        loss.backward()

    def outers(self) -> dict[str, torch.Tensor]:
        """``G`` of every unit that a gradient came back to."""
        return {unit: total.mean() for unit, total in self.sums.items() if total.tokens}

    def notes(self) -> list[str]:
        """Of which units there is none."""
        silent_ = [
            name
            for name, reader in self.readers.items()
            if name not in self.sums and not all(is_table(module) for module in reader.modules)
        ]
        return [f"no gradient reached {', '.join(silent_)}: G is not known there"] if silent_ else []
