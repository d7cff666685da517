"""The parameters of a model that are like matrices, by parameter and not by module: in cores, or dense and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from mpo_tn.planning.coverage import Coverage, DenseMatrix, is_matrix
from mpo_tn.torch.layers.cores import Cores
from mpo_tn.torch.layers.quantized import QuantizedCore


def dense_matrices(
    model: nn.Module, without: Collection[nn.Parameter] = ()
) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """The parameters like matrices that are no cores, by the module that holds them first; each once.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(2, 2, 3), nn.LayerNorm(3))
    >>> dense_matrices(model)
    {'0': (('weight', (2, 3)),), '1': (('weight', (2, 2, 3)),)}
    """
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for owner, name, parameter in _matrices(model):
        if parameter not in without:
            found.setdefault(owner, []).append((name, tuple(parameter.shape)))
    return {owner: tuple(own) for owner, own in found.items()}


def matrix_numbers(model: nn.Module) -> int:
    """How many numbers the parameters hold that are like matrices and no cores."""
    return sum(parameter.numel() for _, _, parameter in _matrices(model))


def coverage(model: nn.Module, covered: int, reasons: Mapping[str, str], default: str = "not compressed") -> Coverage:
    """What of a model's matrices is in cores, ``covered`` numbers, and every other, with the reason by module.

    Guarantee (none-in-silence): every parameter of two axes or more, of which two are longer than 1, that is no core
    is listed, once however many modules share it.
    """
    dense = [
        DenseMatrix(f"{owner}.{name}".lstrip("."), shape, reasons.get(owner, default))
        for owner, own in dense_matrices(model).items()
        for name, shape in own
    ]
    return Coverage(covered, tuple(dense))


def _matrices(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    seen: set[nn.Parameter] = set()
    for owner, module in model.named_modules():
        if isinstance(module, (Cores, QuantizedCore)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # A lazy one has no sizes until it has seen an input.
            if parameter not in seen and not is_lazy(parameter) and is_matrix(parameter.shape):
                seen.add(parameter)
                yield owner, name, parameter
