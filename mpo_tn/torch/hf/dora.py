"""DoRA on layers of cores: how long the rows of ``W + s B A`` are, without W at hand.

Importing this imports PEFT; see :mod:`mpo_tn.torch.hf.peft_door` for who does.
"""

# PEFT has no types that would tell what its layers hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from mpo_tn.torch.layers.dense_weight import DenseWeight
from mpo_tn.torch.layers.layer import MPOLayer, MPOLinear
from mpo_tn.torch.layers.packing import apart


class MPODora(DoraLinearLayer):
    """The magnitudes of DoRA for an :class:`~mpo_tn.torch.MPOLinear`.

    ::

        y = m_i / |V_i| (V x)_i + b_i,     V = W + s B A
        |V_i|^2 = |W_i|^2 + 2 s (B (A W^T))_ii + s^2 (B (A A^T) B^T)_ii

    The first term is computed once, while the cores stay what they are, and A W^T is the layer itself on the rows of A.

    Guarantee (dora-on-cores): outputs, magnitudes and gradients are those of PEFT's own layer around the dense layer of
    the same W.

    Cost: a forward pass of as many tokens as the rank; once, and again whenever the cores have changed, W is dense.
    """

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)
        self._rows: DenseWeight | None = None

    def update_layer(self, *, base_layer: Any, lora_A: Any, lora_B: Any, scaling: float, **_: Any) -> None:  # noqa: N803
        """See PEFT's: the magnitudes start as what the rows have."""
        if not isinstance(base_layer, MPOLinear):
            super().update_layer(base_layer=base_layer, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
            return
        self.weight = nn.Parameter(self._norms(base_layer, lora_A, lora_B, scaling).to(lora_A.dtype))

    def forward(
        self, x: Any, *, lora_A: Any, lora_B: Any, scaling: float,  # noqa: N803
        base_layer: Any, base_result: Any = None, adapter_name: str = "default",
    ) -> Any:  # fmt: skip
        """What is added to the output of the layer."""
        if not isinstance(base_layer, MPOLinear):  # made dense since
            return super().forward(
                x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, base_layer=base_layer, base_result=base_result,
                adapter_name=adapter_name,
            )  # fmt: skip
        norms = self._norms(base_layer, lora_A.weight, lora_B.weight, scaling)
        ratio = (self.weight / norms.to(self.weight.dtype)).view(1, -1)
        if base_result is None:  # of the input after dropout
            base_result = base_layer.times(x)
        elif isinstance(bias := base_layer.bias, torch.Tensor):
            base_result = base_result - bias
        return (ratio - 1) * base_result + ratio * lora_B(lora_A(x)) * scaling

    @torch.no_grad()
    def _norms(self, layer: MPOLinear, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        products = layer.times(a.to(layer.cores.forward(packed=True)[0].dtype)).float()
        a, b = a.float(), b.float()
        cross = (b * products.T).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        squared = self._squared_rows(layer).to(b.device) + 2 * scaling * cross + scaling**2 * own
        return squared.clamp_min(0).sqrt()

    def _squared_rows(self, layer: MPOLayer) -> torch.Tensor:
        tensors = apart(layer.cores.forward(packed=True))[0]
        if torch.compiler.is_compiling() or not DenseWeight.can_watch(tensors):
            return layer.dense_weight().float().square().sum(1)
        if self._rows is None or not self._rows.is_of(tensors, torch.float32):
            with torch.inference_mode(False):
                self._rows = DenseWeight(tensors, layer.dense_weight().float().square().sum(1))
        return self._rows.weight


class MPODoraVariant(DoraLinearVariant):
    """What PEFT asks for DoRA on a layer of cores."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Give the layer its magnitudes."""
        if not isinstance(module.get_base_layer(), MPOLinear):
            DoraLinearVariant.init(module, adapter_name, **kwargs)
            return
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        held = MPODora()
        held.update_layer(
            base_layer=module.get_base_layer(), lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight, scaling=module.scaling[adapter_name],
        )  # fmt: skip
        module.lora_magnitude_vector[adapter_name] = held
