"""Cores in bits read in another way: by compressed-tensors and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import nn

from helpers.adapter import reference_matrix, unit_of
from mpo_tn.torch import MPOLayer, QuantizedCore


def read_core(core: QuantizedCore) -> torch.Tensor:
    """What a core stands for, in float64."""
    held = dict(core.named_buffers())
    if core.bits == 16:
        return held["weight"].double()
    rows, columns = held["weight_shape"].tolist()
    integers = unpack_from_int32(held["weight_packed"], core.bits, torch.Size((rows, columns))).numpy()
    scales = np.repeat(held["weight_scale"].double().numpy(), core.group, axis=1)[:, :columns]
    return torch.from_numpy(integers * scales).reshape(core.shape)


def read_matrix(layer: MPOLayer) -> torch.Tensor:
    """The cropped matrix of a layer in float64."""
    cores = [read_core(core) if isinstance(core, QuantizedCore) else core.detach().double() for core in layer.cores]
    return reference_matrix(unit_of(cores))[: layer.spec.out_features, : layer.spec.in_features].detach()


def bytes_of(model: nn.Module) -> int:
    """Of all parameters and buffers, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()})


def bits_held(model: nn.Module) -> dict[str, Any]:
    """Every tensor that holds a core in bits, by name."""
    return {
        f"{name}.{own}": buffer.clone()
        for name, core in model.named_modules()
        if isinstance(core, QuantizedCore)
        for own, buffer in core.named_buffers()
    }
