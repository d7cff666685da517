"""What the adapter's tests share: single layers as MPOs, a reference without the package, and snapshots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.chains import slack
from helpers.gauges import sites_of
from helpers.tiny_models import tiny
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch import CompressionReport, MPOConfig, MPOLayer, MPOLinear, compress


def compressed(module: nn.Module, **config: Any) -> tuple[Any, CompressionReport]:
    """``module`` as an MPO module, and the report."""
    holder = nn.Sequential(module)
    report = compress(holder, MPOConfig(**{"target_modules": r".*", "sites": 3, **config}))
    return holder[0], report


def linear(in_: int, out: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_, out, bias=bias, dtype=dtype)


def embedding(
    ids: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(ids, width, dtype=dtype, **options)


def unit_of(cores: Sequence[torch.Tensor]) -> MPOLinear:
    """A layer without a bias on these cores."""
    sites = sites_of(cores)
    spec = ModuleSpec("linear", sites, tuple(core.shape[3] for core in cores[:-1]), *sites.shape)
    return MPOLinear(spec, [nn.Parameter(core.contiguous()) for core in cores])


def reference_matrix(layer: MPOLayer) -> torch.Tensor:
    """The cropped matrix of the cores in float64 by one einsum; differentiable, and independent of the package."""
    n = len(layer.cores)
    operands: list[Any] = []
    for k, core in enumerate(layer.cores):
        operands += [core.double(), [k, n + 1 + k, 2 * n + 1 + k, k + 1]]
    legs = [*range(n + 1, 3 * n + 1)]
    tensor = torch.einsum(*operands, [0, *legs, n]).squeeze(0).squeeze(-1)
    rows = math.prod(core.shape[1] for core in layer.cores)
    return tensor.reshape(rows, -1)[: layer.spec.out_features, : layer.spec.in_features]


def cores_norm(layer: MPOLayer) -> torch.Tensor:
    """The product of the norms of the cores: what the rounding of any order of contraction is measured by."""
    return torch.stack([core.detach().double().norm() for core in layer.cores]).prod()


def close(actual: torch.Tensor, expected: torch.Tensor, *scale: torch.Tensor) -> None:
    """Equal within ``C eps sqrt(size)`` times the expected norm, or times the product of the norms of ``scale``."""
    assert actual.shape == expected.shape
    norm = math.prod(float(part.detach().double().norm()) for part in scale or (expected,))
    tolerance = slack(str(actual.dtype).removeprefix("torch."), max(expected.numel(), 1), norm)
    difference = float((actual.detach().double() - expected.detach().double()).norm())
    assert difference <= tolerance, f"{difference} > {tolerance}"


class Snapshot:
    """The modules, parameters and bits of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.bits = {name: value.clone() for name, value in model.state_dict().items()}

    def assert_same(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        assert modules.keys() == self.modules.keys()
        assert all(modules[name] is module for name, module in self.modules.items())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert parameters.keys() == self.parameters.keys()
        assert all(parameters[name] is parameter for name, parameter in self.parameters.items())
        state = model.state_dict()
        assert state.keys() == self.bits.keys()
        for name, value in self.bits.items():
            assert value.device == state[name].device
            if value.device.type != "meta":
                assert torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0))


def small(family: str = "bert", *, tied: bool = True, **config: Any) -> Any:
    """A compressed tiny model, its word table included."""
    model = tiny(family, tied=tied)
    compress(model, MPOConfig(**{"target_modules": r".*(?<!position_embeddings)", "sites": 3, "bond": 5, **config}))
    return model


def roundtrip(model: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    return loaded.eval()


def kept_for_backward(run: Callable[[], object]) -> dict[int, int]:
    """The memory that autograd keeps for the backward pass of what is run: bytes by where it lies."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept
