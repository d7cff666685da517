"""LoRA on layers of cores: what PEFT puts around an MPO module, and what merging makes of its cores.

Importing this imports PEFT; see :mod:`mpo_tn.torch.hf.peft_door` for who does.
"""

# PEFT has no types that would tell what its layers hold, and its hooks have leading underscores.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.config import LoraConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from torch.nn import functional

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.hf.dora import MPODoraVariant
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import quantized_cores
from mpo_tn.torch.models.updates import merged_bonds, with_update

INSTEAD = (
    "keep the adapter beside the cores, as PeftModel.save_pretrained does; or load it onto the dense model "
    "(mpo-tn to-dense) and merge it there"
)


class _OnCores(peft_layers.LoraLayer):
    """What the two layers have in common: sizes, device and merging, read from cores and not from a weight."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if not isinstance(module, MPOLayer):
            return super()._get_in_out_features(module)  # type: ignore[return-value]
        out, in_ = module.spec.out_features, module.spec.in_features
        return (out, in_) if module.spec.kind == "embedding" else (in_, out)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        if not isinstance(base_layer, MPOLayer):
            return super()._get_base_layer_device_and_dtype(base_layer)
        core = base_layer.cores.forward(packed=True)[0]
        return core.device, core.dtype

    @property
    def _before(self) -> list[tuple[str, list[torch.Tensor], ModuleSpec, torch.Tensor | None]]:
        """What the cores and the bias were before each adapter was merged."""
        return vars(self).setdefault("_before_merging", [])  # pyright: ignore[reportAttributeAccessIssue]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update of adapters to the cores, whose bonds it raises; see :func:`merged_bonds`.

        Raises:
            MPOError: it would take more numbers than the dense matrix has, or cores are in bits.
            ValueError: with ``safe_merge``, entries that are NaN or infinite.
        """
        base = self.get_base_layer()
        if not isinstance(base, MPOLayer):  # made dense since
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            check_merge(base, self.r[name], type(base).__name__, dora=self.use_dora.get(name, False))
            delta = self.get_delta_weight(name).detach()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            bias, added = getattr(base, "bias", None), self._added_bias(name)
            merged, bonds = with_update(base, delta, self.r[name])
            if safe_merge and not all(bool(torch.isfinite(core).all()) for core in (*merged, *added)):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            old = [core.detach().clone() for core in base.cores.forward()]  # of which none is in bits
            self._before.append((name, old, base.spec, None if bias is None else bias.detach().clone()))
            base.replace_cores(merged, bonds)
            if added and bias is not None:
                bias.data += added[0].to(bias.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the cores back as they were before, bit for bit."""
        base = self.get_base_layer()
        if not isinstance(base, MPOLayer):
            super().unmerge()
            return
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            _, cores, spec, bias = self._before.pop()
            base.replace_cores(cores, spec.bonds)
            base.spec = replace(base.spec, rel_error=spec.rel_error, exact=spec.exact)
            if bias is not None:
                base.bias.data = bias  # pyright: ignore[reportAttributeAccessIssue]

    def _added_bias(self, name: str) -> list[torch.Tensor]:
        if not self.lora_bias.get(name):
            return []
        if getattr(self.get_base_layer(), "bias", None) is None:
            raise MPOError(f"adapter {name} has a bias (lora_bias=True), and the layer none to add it to: {INSTEAD}")
        return [(self.lora_B[name].bias * self.scaling[name]).detach()]  # type: ignore[operator]


class MPOLoraLinear(_OnCores, peft_layers.Linear):
    """LoRA around an :class:`~mpo_tn.torch.MPOLinear`: ``y = x W^T + b + s (x A^T) B^T``, with W in cores.

    Guarantee (lora-on-cores): outputs and gradients of A and B are those of PEFT's own layer around the dense layer of
    the same W; the cores are frozen and never made dense.
    Guarantee (merge-in-cores): what is merged is ``W + s B A``, to ``c eps(dtype) sqrt(size)``, or refused with nothing
    changed; unmerged, the cores are those from before, bit for bit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # the matrix is (out, in), whatever the layer stored before

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """What PEFT does by name beside LoRA itself."""
        return {**super().lora_variants, ("use_dora",): MPODoraVariant}


class MPOLoraEmbedding(_OnCores, peft_layers.Embedding):
    """LoRA around an :class:`~mpo_tn.torch.MPOEmbedding`. See :class:`MPOLoraLinear`."""

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, input_fn: Any = None, output_fn: Any = None) -> Any:
        base = self.get_base_layer()
        if not isinstance(base, MPOLayer):
            return super()._embed(input, weight, input_fn, output_fn)
        return functional.embedding(input, weight, padding_idx=base.spec.padding_idx)


def check_merge(base: MPOLayer, rank: int, name: str, *, dora: bool = False) -> None:
    """Refuse to merge an update into cores where that makes no sense.

    Raises:
        MPOError: DoRA; cores in bits, or more numbers than the dense matrix has.
    """
    if dora:
        raise MPOError(
            f"{name} has an adapter with use_dora, which scales every row by itself, and no cores of small bonds can: "
            f"{INSTEAD}"
        )
    if quantized_cores(base):
        raise MPOError(f"{name} holds cores in bits, which an update cannot be added to: {INSTEAD}")
    spec = replace(base.spec, bonds=merged_bonds(base.spec, rank))
    dense = spec.out_features * spec.in_features
    if spec.num_parameters > dense:
        raise MPOError(
            f"merging an update of rank {rank} into {name} would raise its bonds from {base.spec.bonds} to "
            f"{spec.bonds}: {spec.num_parameters:,} numbers in cores, where the dense matrix has {dense:,}; {INSTEAD}"
        )
