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
from mpo_tn.sites import Sites
from mpo_tn.torch.models.adapters import adapter_modules, asked_names
from mpo_tn.torch.models.coverage import dense_matrices
from mpo_tn.torch.models.eligible import cannot_be_mpo, head_modules, kind_of, read_by_parent


@dataclass(frozen=True)
class DenseUnit:
    """One matrix before compression: a weight, the modules that use it, each under all its names, and their kinds.

    ``names[0][0]`` is the first occurrence and names the unit, as it will name the :class:`MPOUnit` it becomes.
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
        """The names by which patterns may mean it."""
        return asked_names(self.all_names)

    def matrix(self) -> torch.Tensor:
        """The dense weight as (out, in), whatever layout the module stores."""
        weight = self.weight.detach()
        return weight.T if self.kinds[0] == "conv1d" else weight

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

    See :func:`find_units`, of ties and of what is raised.
    """
    entries = (target,) if isinstance(target, str) else tuple(target)
    shorthand = next((entry for entry in _SHORTHANDS if entry in entries), None)
    named = () if target in _SHORTHANDS else _named(target)
    check_patterns(model, target, exclude)
    heads, adapters = head_modules(model) if shorthand else set[nn.Module](), adapter_modules(model)

    def unwanted(module: nn.Module, names: Sequence[str]) -> str | None:
        asked = asked_names(names)
        if exclude and any(matches(own, exclude) for name in asked for own in prefixes(name)):
            return _EXCLUDED
        if named and any(matches(name, named) for name in asked):
            return None
        if shorthand is None:
            return cannot_be_mpo(module) or "target_modules does not match it"
        if module in adapters:
            return _ADAPTER
        if kind_of(module) == "embedding":
            return "an embedding, which has to be named" if shorthand == ALL_LINEAR else None
        if kind_of(module) is not None and module in heads:
            return f"a task head or the output embeddings, which {shorthand} leaves alone"
        return None if kind_of(module) else cannot_be_mpo(module)

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
    return _survey(model, lambda _, own: None if any(name in names for name in own) else NOT_NAMED)


NOT_NAMED = "not named"
_EXCLUDED = "excluded by exclude_modules"
_ADAPTER = "a part of an adapter, which stays as it is"


_SHORTHANDS = (ALL_MATRICES, ALL_LINEAR)


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
    names = asked_names(name for matrices in (True, False) for name, m in named if matrices == (kind_of(m) is not None))
    if names and target not in _SHORTHANDS:
        check_matched("target_modules={}", _named(target), names)
    if exclude:
        check_matched("exclude_modules={}", exclude, names)


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
        check_matched("overrides[{}]", (pattern,), asked_names(names))
        own = [module for name, module in names.items() if any(matches(n, (pattern,)) for n in asked_names([name]))]
        part = next((part for part in found.left if names.get(part.name) in own), None)
        if part is not None:
            raise MPOError(f"overrides[{pattern!r}] matches only what stays dense: {part.name}: {part.reason}")
        raise MPOError(
            f"overrides[{pattern!r}] matches only a {type(own[0]).__name__}, which holds no matrix itself: name what "
            f"is below it, for instance 're:(.*\\.)?{pattern.removeprefix('re:')}\\..*'"
        )


def _survey(model: nn.Module, unwanted: Callable[[nn.Module, Sequence[str]], str | None]) -> Survey:
    names: dict[nn.Module, list[str]] = {}
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in names:
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, []).append(module)
        names.setdefault(module, []).append(name)
    reserved = {**read_by_parent(model), **dict.fromkeys(adapter_modules(model), _ADAPTER)}
    why: dict[nn.Module, str] = {}
    matched: set[nn.Module] = set()
    chosen: dict[nn.Parameter, None] = {}
    for module, own_names in names.items():
        if module is model:
            why[module] = cannot_be_mpo(module) or "the model itself, in whose place nothing can be put"
            continue
        reason = unwanted(module, own_names)
        if reason is None:
            matched.add(module)
            reason = reserved.get(module) or cannot_be_mpo(module)
        if reason is None:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            chosen.setdefault(weight)
        else:
            why[module] = reason

    units: list[DenseUnit] = []
    for weight in chosen:
        owners = users[weight]
        unit = DenseUnit(
            weight, tuple(owners), tuple(tuple(names[m]) for m in owners), tuple(kind_of(m) or "other" for m in owners),
            any(user not in owners for m in owners for own in m.parameters(recurse=False) for user in users[own]),
        )  # fmt: skip
        stuck = [m for m in owners if m in reserved or cannot_be_mpo(m) or why.get(m) == _EXCLUDED]
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
            for owner in owners:
                why.pop(owner, None)
    unit_of = {module: unit for unit in units for module in unit.modules}
    counted = {unit.weight for unit in units}
    beside = {unit.name: (0, 0) for unit in units}
    left: list[LeftDense] = []
    for module, module_names in names.items():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in counted]
        counted.update(own)
        # A lazy module has no sizes until it has seen an input.
        own = [parameter for parameter in own if not is_lazy(parameter)]
        size, bytes_ = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        if module in unit_of:
            numbers, room = beside[unit_of[module].name]
            beside[unit_of[module].name] = numbers + size, room + bytes_
        elif module in matched or any(True for _ in module.parameters(recurse=False)):
            left.append(LeftDense(module_names[0], size, bytes_, why[module], module in matched))
    matrices = dense_matrices(model, {unit.weight for unit in units})
    return Survey(tuple(units), tuple(replace(part, matrices=matrices.get(part.name, ())) for part in left), beside)


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
