"""Weight decay in ``transformers.Trainer``: of cores there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from mpo_tn.torch.layers.cores import Cores

if TYPE_CHECKING:  # importing it takes a second
    from transformers import Trainer


def sparing(original: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``Trainer.get_decay_parameter_names`` without cores.

    A matrix is a *product* of its cores: decay of each shrinks it by a power of the factor, by amounts that hang on how
    its norm happens to be spread over them. See :func:`~mpo_tn.torch.parameter_groups`, which has none either.

    Guarantee (cores-not-decayed): whatever ``weight_decay``, the optimiser that Trainer makes decays no core, and what
    else it decays is what it would without this.
    """

    def get_decay_parameter_names(self: Trainer, model: nn.Module) -> list[str]:
        spared = {
            f"{name}.{own}" for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, Cores) for own, _ in module.named_parameters()
        }  # fmt: skip
        return [name for name in original(self, model) if name not in spared]

    return get_decay_parameter_names
