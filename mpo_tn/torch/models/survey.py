"""What of a model can be compressed: its dense matrices, each once, and what stays as it is, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.entries import LeftDense
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES, matches
from mpo_tn.planning.spec import PARAMETER, matrix_shape
from mpo_tn.sites import Sites
from mpo_tn.torch.layers.parameter import held_name
from mpo_tn.torch.models.eligible import cannot_be_mpo, head_modules, kind_of
from mpo_tn.torch.models.parameters import cannot_be_reached, is_linear_by_itself


@dataclass(frozen=True)
class DenseUnit:
    """One matrix before compression: a weight, the modules that use it, each under all its names, and their kinds.

    ``names[0][0]`` is the first occurrence and names the unit, as it will name the :class:`MPOUnit` it becomes. Where
    the kind is ``"parameter"`` the module owns a parameter that is reached, and the names are of what will hold it.
    ``lends_bias`` says that a module of another unit, or of none, uses a bias of this one.
    """

    weight: nn.Parameter
    modules: tuple[nn.Module, ...]
    names: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    lends_bias: bool = False

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0][0]

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names of all its modules, the first occurrence first."""
        return tuple(name for group in self.names for name in group)

    def matrix(self) -> torch.Tensor:
        """The dense weight as (out, in), whatever layout the module stores."""
        weight = self.weight.detach()
        if self.kinds[0] == PARAMETER:
            return weight.reshape(matrix_shape(weight.shape))
        return weight.T if self.kinds[0] == "conv1d" else weight

    @property
    def blocks(self) -> int:
        """How many matrices are one above the other in it, as experts are."""
        shape = self.weight.shape
        stacked = self.kinds[0] == PARAMETER and len(shape) > 2 and matrix_shape(shape)[0] > shape[0]
        return int(shape[0]) if stacked else 1

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix (out, in) in the layout and the shape of the weight."""
        return (matrix.T if self.kinds[0] == "conv1d" else matrix).contiguous().view(self.weight.shape)

    @property
    def readers(self) -> tuple[nn.Module, ...]:
        """The modules that are called with what the matrix multiplies, or with ids."""
        return tuple(m for m, kind in zip(self.modules, self.kinds, strict=True) if kind != PARAMETER)

    def padded(self, sites: Sites) -> torch.Tensor:
        """The matrix with rows and columns of zeros up to what legs multiply to."""
        matrix, (rows, columns) = self.matrix(), sites.shape
        return functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))

    @property
    def storage(self) -> str:
        """The name of the weight's dtype."""
        return str(self.weight.dtype).removeprefix("torch.")


def find_units(
    model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[list[DenseUnit], dict[str, str]]:
    """The units that ``target`` means, in order of first occurrence, and what matched but cannot be an MPO, with why.

    Modules that share a weight with a matched one belong to its unit, so that ties survive; if one of them is excluded
    or cannot be an MPO, the unit is left alone.

    Raises:
        MPOError: nothing that can be compressed matches.
    """
    found = survey(model, target, exclude)
    return list(found.units), found.skipped


@dataclass(frozen=True)
class Survey:
    """What of a model can be compressed, as :func:`survey` finds it.

    ``left`` are the modules that stay as they are; ``beside`` says how many numbers, and bytes, the modules of a unit
    hold beside its matrix.
    """

    units: tuple[DenseUnit, ...]
    left: tuple[LeftDense, ...]
    beside: dict[str, tuple[int, int]]

    @property
    def skipped(self) -> dict[str, str]:
        """What was asked for and cannot be an MPO, by name, with the reason."""
        return {part.name: part.reason for part in self.left if part.matched}


def survey(model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> Survey:
    """The units that ``target`` means, and every other module with parameters of its own, with the reason why not.

    A parameter that is no module's plain ``weight`` is meant by its own name, by that of what will hold it, and by the
    name of its owner. See :func:`find_units`, of ties and of what is raised.
    """
    heads = head_modules(model) if target in (ALL_LINEAR, ALL_MATRICES) else set[nn.Module]()

    def unwanted(module: nn.Module, names: Sequence[str], parameter: str | None) -> str | None:
        if exclude and any(matches(name, exclude) for name in names):
            return _EXCLUDED
        if target not in (ALL_LINEAR, ALL_MATRICES):
            wanted = any(matches(name, target) for name in names)
            return None if wanted else cannot_be_mpo(module) or "target_modules does not match it"
        if kind_of(module) == "embedding" or (parameter == "weight" and isinstance(module, nn.Embedding)):
            return "an embedding, which has to be named" if target == ALL_LINEAR else None
        is_linear = kind_of(module) is not None if parameter is None else is_linear_by_itself(module, parameter)
        if is_linear and module in heads:
            return f"a task head or the output embeddings, which {target} leaves alone"
        return None if is_linear else cannot_be_mpo(module)

    found = _survey(model, unwanted)
    if not found.units:
        raise MPOError(_nothing_matched(model, target, found.skipped))
    return found


def survey_named(model: nn.Module, names: Collection[str]) -> Survey:
    """The units of which a module has one of these names, and the rest."""
    return _survey(model, lambda _module, own, _parameter: None if any(n in names for n in own) else "not named")


_EXCLUDED = "excluded by exclude_modules"

Place = tuple[nn.Module, str]
"""A module and the name of one of its parameters."""


def _survey(model: nn.Module, unwanted: Callable[[nn.Module, Sequence[str], str | None], str | None]) -> Survey:
    names: dict[nn.Module, list[str]] = {}
    users: dict[nn.Parameter, list[Place]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in names:
            for own, parameter in module.named_parameters(recurse=False):
                users.setdefault(parameter, []).append((module, own))
        names.setdefault(module, []).append(name)
    why: dict[nn.Module, str] = {}
    matched: set[nn.Module] = set()
    chosen: dict[nn.Parameter, None] = {}
    excluded: set[Place] = set()
    for module, own_names in names.items():
        if module is model:
            why[module] = cannot_be_mpo(module) or "the model itself, in whose place nothing can be put"
            continue
        reason = unwanted(module, own_names, None)
        if reason is None:
            matched.add(module)
            reason = cannot_be_mpo(module)
        if reason is None:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            chosen.setdefault(weight)
        else:
            why[module] = reason
        for own, parameter in module.named_parameters(recurse=False):
            if kind_of(module) is not None or cannot_be_reached(module, own):
                continue
            spelled = [f"{n}.{own}" for n in own_names] + _names(module, own, own_names)
            reason = unwanted(module, [*own_names, *spelled], own)
            if reason is None:
                chosen.setdefault(parameter)
            elif reason == _EXCLUDED:
                excluded.add((module, own))

    units: list[DenseUnit] = []
    for weight in chosen:
        places = users[weight]
        owners = [module for module, _ in places]
        kinds = tuple(kind_of(m) or PARAMETER for m in owners)
        unit = DenseUnit(
            weight, tuple(owners), tuple(tuple(_names(m, own, names[m])) for m, own in places), kinds,
            any(user not in owners for m in owners for own in m.parameters(recurse=False) for user, _ in users[own]),
        )  # fmt: skip
        stuck = [p for p in places if _stuck(*p, model) or why.get(p[0]) == _EXCLUDED or p in excluded]
        mixed = len({"conv1d" if kind == "conv1d" else "rows" for kind in unit.kinds}) > 1
        if stuck or mixed:
            why[owners[0]] = (
                f"its weight is shared by {', '.join(n[0] for n in unit.names)}, and not all of them can or may be MPOs"
            )
            matched.add(owners[0])
            for owner in owners[1:]:
                why.setdefault(owner, f"its weight is that of {unit.name}")
        else:
            units.append(unit)
        for owner in owners if not (stuck or mixed) else ():
            if kind_of(owner) is not None:
                why.pop(owner, None)
    user_of = {module: unit for unit in units for module in unit.readers}
    held = {unit.weight for unit in units}
    counted = set(held)
    beside = {unit.name: (0, 0) for unit in units}
    left: list[LeftDense] = []
    for module, module_names in names.items():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in counted]
        counted.update(own)
        # A lazy module has no sizes until it has seen an input.
        own = [parameter for parameter in own if not is_lazy(parameter)]
        size, bytes_ = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        if module in user_of:
            numbers, room = beside[user_of[module].name]
            beside[user_of[module].name] = numbers + size, room + bytes_
            continue
        parameters = set(module.parameters(recurse=False))
        asked = module in matched and not parameters & held
        if asked or parameters - held:
            left.append(LeftDense(module_names[0], size, bytes_, why[module], asked))
    return Survey(tuple(units), tuple(left), beside)


def _names(module: nn.Module, parameter: str, names: Sequence[str]) -> list[str]:
    """What will hold a parameter of a module is called so: the module itself, or what it reads the parameter from."""
    return list(names) if kind_of(module) is not None else [held_name(name, parameter) for name in names]


def _stuck(module: nn.Module, parameter: str, model: nn.Module) -> bool:
    """Whether a parameter cannot be held as cores."""
    if module is model:
        return True
    return bool(cannot_be_mpo(module) if kind_of(module) is not None else cannot_be_reached(module, parameter))


def _nothing_matched(model: nn.Module, target: str | Sequence[str], skipped: dict[str, str]) -> str:
    """What to tell who asked for modules of which none can be an MPO."""
    if skipped:
        name, reason = next(iter(skipped.items()))
        which = f"{name or 'the model'}: {reason}"
        return f"target_modules={target!r} matches {len(skipped)} modules but none can be an MPO; {which}"
    if kind_of(model):
        return (
            f"the model is itself a {type(model).__name__}, in whose place nothing can be put: wrap it in a Sequential"
        )
    linear = [name for name, module in model.named_modules() if kind_of(module)]
    hint = f"the model has for instance {', '.join(linear[:3])}" if linear else "the model has no linear layer at all"
    return f"target_modules={target!r} matches no module: {hint}"
