"""to_dense: the way back, from cores to modules with a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.planning.cost import rebuild_route
from mpo_tn.planning.patterns import matches
from mpo_tn.planning.spec import PARAMETER
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.merging import dense_matrix
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.models.compress import HOOKS
from mpo_tn.torch.models.host import current_host
from mpo_tn.torch.models.places import There, put
from mpo_tn.torch.models.units import MPOUnit, mpo_units


def to_dense(model: nn.Module, pattern: str | Sequence[str] | None = None) -> list[str]:
    """Replace the MPO modules of ``model`` by dense ones with the matrices that their cores stand for, in place.

    Args:
        model: any ``torch.nn.Module``.
        pattern: only matrices of which a module has a name that matches (PEFT's grammar, as in
            :class:`~mpo_tn.torch.MPOConfig`); ``None`` is all.

    Returns:
        The names of the matrices that are dense now, each by its first occurrence.

    Guarantee (to-dense): ``nn.Linear``, ``nn.Embedding`` and the ``Conv1D`` of GPT-2 come back, with the weights that
    the cores, dequantised, stand for, computed in double precision and rounded once to their dtype. Bias, dtype,
    device, training mode and hooks of each module are kept; modules that were one are one, and matrices that were
    shared, as those of a table and its head, are one parameter. It trains if one of the cores did, or if all are in
    bits.
    Guarantee (to-dense-all-or-nothing): modules are only swapped once all are computed. A transformers model without
    MPO modules is saved as a dense one afterwards.

    Cost: the dense matrices beside the cores, and one more in double precision.

    Raises:
        MPOError: no MPO module (whose name matches), the model itself is one, cores without data.

    >>> import torch
    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
    >>> _ = compress(model, MPOConfig(sites=3, keep=0.5))
    >>> to_dense(model), model[2]
    (['0', '2'], Linear(in_features=24, out_features=16, bias=True))
    """
    units = mpo_units(model)
    if "" in units:
        raise MPOError(
            f"the model is itself an {type(model).__name__}, in whose place nothing can be put: read its "
            "dense_weight(), or wrap it in a Sequential"
        )
    chosen = [
        unit
        for unit in units.values()
        if pattern is None or any(matches(name, pattern) for names in unit.names for name in names)
    ]
    if not chosen:
        raise MPOError(
            f"pattern={pattern!r} matches none of the {len(units)} MPO modules, for instance {next(iter(units))}"
        )
    dense = {name: module for unit in chosen for name, module in _dense_modules(unit).items()}
    put(model, dense)
    current_host().detach(model)
    return [unit.name for unit in chosen]


def dense_weight(layer: MPOLayer, dtype: torch.dtype) -> torch.Tensor:
    """The weight as its dense module has it, computed in double precision and rounded once."""
    wide = [
        core.detach().double() if isinstance(core, torch.Tensor) else
        replace(core.form, dtype=torch.float64).core(core.tensors)
        for core in layer.cores.forward(packed=True)
    ]  # fmt: skip
    size = layer.spec.out_features, layer.spec.in_features
    matrix = dense_matrix(wide, rebuild_route(layer.spec.core_shapes, *size).segments[0], size).to(dtype)
    return (matrix.T if layer.spec.kind == "conv1d" else matrix.reshape(layer.weight_shape)).contiguous()


def _dense_modules(unit: MPOUnit) -> dict[str, There]:
    """What is dense in place of the modules of a unit, under all their names: modules, or parameters of owners."""
    for layer, names in zip(unit.modules, unit.names, strict=True):
        for name, held in (*layer.named_parameters(), *layer.named_buffers()):
            if held.is_meta:
                raise MPOError(f"{names[0]}.{name} holds no data: load the model without offloading it")
            check_loaded(held, f"{names[0]}.{name}")
    with torch.inference_mode(False), torch.no_grad():
        weight = nn.Parameter(dense_weight(unit.modules[0], unit.cores[0].dtype), requires_grad=_trains(unit))
    return {
        name: module
        for layer, names in zip(unit.modules, unit.names, strict=True)
        for module in [_with_weight(layer, weight)]
        for name in names
    }


def _trains(unit: MPOUnit) -> bool:
    floating = [core for core in unit.cores if not isinstance(core, QuantizedCore)]
    return not floating or any(core.requires_grad for core in floating)


def _with_weight(layer: MPOLayer, weight: nn.Parameter) -> There:
    spec = layer.spec
    if spec.kind == PARAMETER:
        return weight
    module: nn.Module
    with torch.device("meta"):
        if spec.kind == "embedding":
            module = nn.Embedding(spec.out_features, spec.in_features, padding_idx=spec.padding_idx)
        elif spec.kind == "conv1d":
            module = current_host().conv1d(spec.in_features, spec.out_features)
        else:
            module = nn.Linear(spec.in_features, spec.out_features, bias=False)
    module.weight = weight
    if spec.kind != "embedding":
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        module.bias = bias
    for table in HOOKS:  # the tables themselves, so that handles their owners hold still remove from them
        module.__dict__[table] = layer.__dict__[table]
    return module.train(layer.training)
