"""What of a model can be compressed: its dense matrices, each once, and what stays as it is, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.entries import LeftDense
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES, check_matched, matches, prefixes
from mpo_tn.planning.spec import PARAMETER, matrix_shape
from mpo_tn.sites import Sites
from mpo_tn.torch.layers.parameter import held_name, place_of
from mpo_tn.torch.models.adapters import adapted_parameters, adapter_modules, asked_names
from mpo_tn.torch.models.coverage import dense_matrices
from mpo_tn.torch.models.eligible import cannot_be_mpo, head_modules, kind_of
from mpo_tn.torch.models.parameters import UNSAVED, cannot_be_reached, is_linear_by_itself, unsaved_parameters


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

    @property
    def asked_names(self) -> list[str]:
        """The names by which patterns may mean it: those of what is and of what will be there, and of the owner."""
        places = [place_of(name) for name in self.all_names]
        own = [spelled for place in places if place for spelled in (f"{place[0]}.{place[1]}", place[0])]
        return asked_names([*self.all_names, *own])

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
        MPOError: nothing that can be compressed matches, or one of the patterns matches nothing at all.
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
    shorthand = shorthand_of(target)
    named = () if target in _SHORTHANDS else _named(target)
    check_patterns(model, target, exclude)
    heads, adapters = head_modules(model) if shorthand else set[nn.Module](), adapter_modules(model)

    def unwanted(module: nn.Module, names: Sequence[str], parameter: str | None) -> str | None:
        asked = asked_names(names)
        if exclude and any(matches(own, exclude) for name in asked for own in prefixes(name)):
            return _EXCLUDED
        if named and any(matches(name, named) for name in asked):
            return None
        if shorthand is None:
            return cannot_be_mpo(module) or "target_modules does not match it"
        if module in adapters:
            return _ADAPTER
        if kind_of(module) == "embedding" or (parameter == "weight" and isinstance(module, nn.Embedding)):
            return "an embedding, which has to be named" if shorthand == ALL_LINEAR else None
        is_linear = kind_of(module) is not None if parameter is None else is_linear_by_itself(module, parameter)
        if is_linear and module in heads:
            return f"a task head or the output embeddings, which {shorthand} leaves alone"
        return None if is_linear else cannot_be_mpo(module)

    found = _survey(model, unwanted)
    if not found.units:
        excluded = [part.name for part in found.left if part.reason == _EXCLUDED]
        if excluded and not found.skipped:
            raise MPOError(
                f"exclude_modules={exclude!r} leaves no module of target_modules={target!r}: of {len(excluded)} that "
                f"it takes out the first is {excluded[0]}"
            )
        raise MPOError(_nothing_matched(model, target, found.skipped))
    return found


def survey_named(model: nn.Module, names: Collection[str]) -> Survey:
    """The units of which a module has one of these names, and the rest."""
    return _survey(model, lambda _module, own, _parameter: None if any(n in names for n in own) else NOT_NAMED)


NOT_NAMED = "not named"
_EXCLUDED = "excluded by exclude_modules"
_ADAPTER = "a part of an adapter, which stays as it is"


_SHORTHANDS = (ALL_MATRICES, ALL_LINEAR)


def shorthand_of(target: str | Sequence[str]) -> str | None:
    """What of a target stands for many, if anything does."""
    entries = (target,) if isinstance(target, str) else tuple(target)
    return next((entry for entry in _SHORTHANDS if entry in entries), None)


def is_asked(names: Iterable[str], target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> bool:
    """Whether patterns mean a module of these names; what stands for many is not looked at."""
    asked, named = asked_names(names), () if target in _SHORTHANDS else _named(target)
    if exclude and any(matches(own, exclude) for name in asked for own in prefixes(name)):
        return False
    return bool(named) and any(matches(name, named) for name in asked)


def _named(target: str | Sequence[str]) -> str | tuple[str, ...]:
    """The targets that are patterns, without what stands for many."""
    return target if isinstance(target, str) else tuple(entry for entry in target if entry not in _SHORTHANDS)


def check_patterns(model: nn.Module, target: str | Sequence[str], exclude: str | Sequence[str] = ()) -> None:
    """Refuse patterns of which one means nothing in ``model``.

    Raises:
        MPOError: there is one; the message has names that come close.
    """
    named = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    # Those that could be meant come first: an example is taken from the front.
    names = [name for matrices in (True, False) for name, m in named if matrices == (kind_of(m) is not None)]
    names = list(dict.fromkeys((*asked_names(names), *_spelled(named))))
    if names and target not in _SHORTHANDS:
        check_matched("target_modules={}", _named(target), names)
    if exclude:
        check_matched("exclude_modules={}", exclude, names)


def _spelled(named: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """What modules, their parameters, and what may hold these are called."""
    found: list[str] = []
    for name, module in named:
        found.append(name)
        for own, _ in module.named_parameters(recurse=False):
            found += f"{name}.{own}", held_name(name, own)
    return asked_names(found)


def check_overrides(model: nn.Module, overrides: Iterable[str], found: Survey) -> None:
    """Refuse patterns of overrides of which one means no unit.

    Guarantee (overrides-count): returning means that every pattern decides of a unit, by any of its names.

    Raises:
        MPOError: there is one; the message says why what it matches stays dense, or has names that come close.
    """
    units = [unit.asked_names for unit in found.units]
    taken: dict[int, str] = {}
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for pattern in overrides:
        meant = [k for k, own in enumerate(units) if any(matches(name, (pattern,)) for name in own)]
        if meant and all(k in taken for k in meant):
            raise MPOError(
                f"overrides[{pattern!r}] never counts: the first match wins, and {taken[meant[0]]!r} before it matches "
                f"{units[meant[0]][0]} and all else that it could mean; put it first"
            )
        if meant:
            taken.update((k, pattern) for k in meant if k not in taken)
            continue
        check_matched("overrides[{}]", (pattern,), _spelled(names.items()))
        own = [
            module for name, module in names.items()
            if any(matches(n, (pattern,)) for n in _spelled([(name, module)]))
        ]  # fmt: skip
        part = next((part for part in found.left if names.get(part.name) in own), None)
        if part is not None:
            raise MPOError(f"overrides[{pattern!r}] matches only what stays dense: {part.name}: {part.reason}")
        raise MPOError(
            f"overrides[{pattern!r}] matches only a {type(own[0]).__name__}, which holds no matrix itself: name what "
            f"is below it, for instance 're:(.*\\.)?{pattern.removeprefix('re:')}\\..*'"
        )


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
    adapters, adapted, unsaved = adapter_modules(model), adapted_parameters(model), unsaved_parameters(model)
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
            reason = _ADAPTER if module in adapters else cannot_be_mpo(module)
        if unsaved.intersection(module.parameters(recurse=False)) and reason in (None, cannot_be_mpo(module)):
            reason = UNSAVED
        if reason is None:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            chosen.setdefault(weight)
        else:
            why[module] = reason
        for own, parameter in module.named_parameters(recurse=False):
            if module in adapters or parameter in adapted or kind_of(module) is not None:
                continue
            if parameter in unsaved or cannot_be_reached(module, own):
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
        stuck = [
            p for p in places if p[0] in adapters or _stuck(*p, model) or why.get(p[0]) == _EXCLUDED or p in excluded
        ]
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
    matrices = dense_matrices(model, held)
    return Survey(tuple(units), tuple(replace(part, matrices=matrices.get(part.name, ())) for part in left), beside)


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
