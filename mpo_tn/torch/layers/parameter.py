"""MPOParameter: a weight that its module reads by itself, held as cores; and how a module comes to read it."""

# The tables of a module have names with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.layers.cores import Core
from mpo_tn.torch.layers.layer import MPOLayer

HELD = "mpo"
"""The child of a module under which those of its parameters are held that are cores: ``<module>.mpo.<parameter>``."""


class MPOParameter(MPOLayer):
    """A weight of any shape that the module which owns it reads by itself, held as an MPO.

    Fused experts, the projections of ``nn.MultiheadAttention``, the weight of a subclass of ``nn.Linear`` that computes
    in its own way. The owner stays what it is; where it reads the parameter it gets a
    :class:`~mpo_tn.torch.layers.computed.ComputedWeight`. See :func:`reach`.

    >>> import torch
    >>> from mpo_tn import Sites
    >>> spec = ModuleSpec("parameter", Sites((2, 4), (1, 3)), (2,), out_features=8, in_features=3, shape=(2, 4, 3))
    >>> MPOParameter(spec, [nn.Parameter(torch.ones(shape)) for shape in spec.core_shapes])().shape
    torch.Size([2, 4, 3])
    """

    def __init__(
        self,
        spec: ModuleSpec,
        cores: Sequence[Core] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if spec.kind != PARAMETER or not spec.shape:
            raise MPOError(f"kind={spec.kind!r} with shape={spec.shape} is no parameter with a shape")
        super().__init__(spec, cores, device=device, dtype=dtype)

    def forward(self) -> torch.Tensor:
        """The weight in its own shape, computed."""
        return self.stored_weight()


class HeldParameters(nn.Module):
    """The parameters of a module that are cores, by their names.

    They are put back in the order that all its parameters had when the first of them was taken.
    """

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        self._order = tuple(order)


def place_of(name: str) -> tuple[str, str] | None:
    """The owner and the parameter that the name of an :class:`MPOParameter` means; None if it is no such name.

    >>> place_of("layers.0.experts.mpo.down_proj"), place_of("layers.0.down_proj")
    (('layers.0.experts', 'down_proj'), None)
    """
    path, _, parameter = name.rpartition(".")
    owner, _, held = path.rpartition(".")
    return (owner, parameter) if held == HELD and owner else None


def dense_key(name: str) -> str:
    """The name that the dense weight of an MPO module has in a state dict.

    >>> dense_key("layers.0.experts.mpo.down_proj"), dense_key("layers.0.q_proj")
    ('layers.0.experts.down_proj', 'layers.0.q_proj.weight')
    """
    return ".".join(place_of(name) or (name, "weight"))


def held_name(owner: str, parameter: str) -> str:
    """The name of the :class:`MPOParameter` that holds a parameter of ``owner``."""
    return f"{owner}.{HELD}.{parameter}"


def reach(owner: nn.Module, name: str, held: MPOParameter) -> None:
    """Have ``owner`` read its parameter ``name`` from ``held``.

    The parameter is gone, ``owner.mpo.<name>`` is there, and the class of the owner is a subclass of what it was, of
    the same name, in which ``owner.<name>`` computes. All else stays: hooks, buffers, its other parameters.

    Guarantee (reached-exact): the owner computes what it did with the dense weight of the cores, to rounding, and
    gradients reach the cores.

    Raises:
        MPOError: it has no such parameter, or of another shape.
    """
    weight = owner._parameters.get(name)
    if weight is None or tuple(weight.shape) != held.spec.shape:
        there = "no such parameter" if weight is None else f"one of shape {tuple(weight.shape)}"
        raise MPOError(
            f"{name} of shape {held.spec.shape} is to be reached, and this {type(owner).__name__} has {there}"
        )
    if HELD not in owner._modules:
        owner.add_module(HELD, HeldParameters(tuple(owner._parameters)))
    del owner._parameters[name]
    container = owner._modules[HELD]
    assert isinstance(container, HeldParameters)
    container.add_module(name, held)
    container.train(owner.training)
    _read_by_class(owner, tuple(container._modules))


def release(owner: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Undo :func:`reach`: ``weight`` is the parameter ``name`` of ``owner`` again, at the place where it was."""
    container = owner._modules[HELD]
    assert isinstance(container, HeldParameters)
    del container._modules[name]
    left = tuple(container._modules)
    if not left:
        del owner._modules[HELD]
    _read_by_class(owner, left)
    order = {own: place for place, own in enumerate(container._order)}
    own = {**owner._parameters, name: weight}
    owner._parameters = dict(sorted(own.items(), key=lambda item: order.get(item[0], len(order))))


def _read_by_class(owner: nn.Module, names: tuple[str, ...]) -> None:
    cls: type[nn.Module] = getattr(type(owner), "_reads_parameters_of", type(owner))
    owner.__class__ = _reading(cls, names) if names else cls


@cache
def _reading(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``cls`` that reads some parameters from cores."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> torch.Tensor:
            return getattr(getattr(self, HELD), name).weight

        return property(read)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _made, (cls, names), *super(_reading(cls, names), self).__reduce_ex__(protocol)[2:]

    same = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    read = {name: reader(name) for name in names}
    return type(cls.__name__, (cls,), {**same, **read, "_reads_parameters_of": cls, "__reduce_ex__": reduce})


def _made(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty module, for copies."""
    made = _reading(cls, names)
    return made.__new__(made)
