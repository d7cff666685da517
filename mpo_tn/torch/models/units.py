"""The matrices of a model, each once however many modules and names use it: one idea, before and after.

Before compression :func:`find_units` says which weights a pattern means, as :class:`DenseUnit`; afterwards
:func:`mpo_units` lists the chains of cores, as :class:`MPOUnit`. Compressing turns one into the other, name for name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.planning.entries import ITEMSIZES, LeftDense
from mpo_tn.planning.patterns import ALL_LINEAR, ALL_MATRICES, HEADS, matches
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.sites import Sites
from mpo_tn.torch.layers.cores import Core, held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import QuantizedCore, quantized_cores, trained_scales


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

    See :func:`find_units`, of ties and of what is raised.
    """
    heads = head_modules(model) if target in (ALL_LINEAR, ALL_MATRICES) else set[nn.Module]()

    def unwanted(module: nn.Module, names: Sequence[str]) -> str | None:
        if exclude and any(matches(name, exclude) for name in names):
            return _EXCLUDED
        if target not in (ALL_LINEAR, ALL_MATRICES):
            wanted = any(matches(name, target) for name in names)
            return None if wanted else _cannot_be_mpo(module) or "target_modules does not match it"
        if kind_of(module) == "embedding":
            return "an embedding, which has to be named" if target == ALL_LINEAR else None
        if kind_of(module) is not None and module in heads:
            return f"a task head or the output embeddings, which {target} leaves alone"
        return None if kind_of(module) else _cannot_be_mpo(module)

    found = _survey(model, unwanted)
    if not found.units:
        raise MPOError(_nothing_matched(model, target, found.skipped))
    return found


def survey_named(model: nn.Module, names: Collection[str]) -> Survey:
    """The units of which a module has one of these names, and the rest."""
    return _survey(model, lambda _, own: None if any(name in names for name in own) else "not named")


_EXCLUDED = "excluded by exclude_modules"


def _survey(model: nn.Module, unwanted: Callable[[nn.Module, Sequence[str]], str | None]) -> Survey:
    names: dict[nn.Module, list[str]] = {}
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in names:
            for parameter in module.parameters(recurse=False):
                users.setdefault(parameter, []).append(module)
        names.setdefault(module, []).append(name)
    reserved = _read_by_parent(model)
    why: dict[nn.Module, str] = {}
    matched: set[nn.Module] = set()
    chosen: dict[nn.Parameter, None] = {}
    for module, own_names in names.items():
        if module is model:
            why[module] = _cannot_be_mpo(module) or "the model itself, in whose place nothing can be put"
            continue
        reason = unwanted(module, own_names)
        if reason is None:
            matched.add(module)
            reason = reserved.get(module) or _cannot_be_mpo(module)
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
        stuck = [m for m in owners if m in reserved or _cannot_be_mpo(m) or why.get(m) == _EXCLUDED]
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
    return Survey(tuple(units), tuple(left), beside)


def kind_of(module: nn.Module) -> str | None:
    """``"linear"``, ``"conv1d"``, ``"embedding"`` or None. Subclasses may compute differently, so they do not count."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module) is nn.Embedding:
        return "embedding"
    # GPT-2's transposed linear; named rather than imported, because only the quantizer knows transformers.
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return "conv1d"
    return None


def _cannot_be_mpo(module: nn.Module) -> str | None:
    if kind_of(module) is None:
        return f"a {type(module).__name__} is not a linear layer or an embedding"
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "its weight is computed from something else (a parametrization)"
    if is_lazy(weight):
        return "its weight has no size before a first input"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point"
    if str(weight.dtype).removeprefix("torch.") not in ITEMSIZES:
        return f"its weight is {weight.dtype}, in which nothing can be computed"
    beside = _beside_weight_and_bias(module)
    if beside:
        return f"it holds {', '.join(beside)} beside weight and bias, and an MPO module would lose that"
    if weight.numel() == 0:
        return f"its weight has no entries: {tuple(weight.shape)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rescales the table in place"
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq):
        return "sparse and frequency-scaled gradients need the table"
    return None


def _beside_weight_and_bias(module: nn.Module) -> list[str]:
    """What an MPO module would not hold: adapters, masks, scales, a bias that is computed."""
    held = {
        *(name for name, _ in module.named_parameters(recurse=False)),
        *(name for name, _ in module.named_buffers(recurse=False)),
        *(name for name, _ in module.named_children()),
    }
    computed = getattr(module, "bias", None) is not None and "bias" not in held
    return sorted(held - {"weight", "bias"}) + (["a bias that is computed"] if computed else [])


def _read_by_parent(model: nn.Module) -> dict[nn.Module, str]:
    """Modules whose weight their parent hands to a fused kernel or reads in its own code."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        fused = isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention))
        read = _weights_read_by(type(parent))
        for name, child in parent.named_children():
            if name in read or (fused and isinstance(child, nn.Linear)):
                found[child] = f"{type(parent).__name__} reads its weight directly"
    return found


@cache
def _weights_read_by(cls: type[nn.Module]) -> frozenset[str]:
    """The children of which a class reads ``self.child.weight`` outside of initialisation, going by its source.

    The feed-forward layer of T5 does so to learn a dtype, the head of MobileBERT to concatenate two weights.
    """
    read: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, function in vars(base).items():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is None or "init" in name or not {"self", "weight"} <= {*code.co_varnames, *code.co_names}:
                continue
            try:
                source = inspect.getsource(code)
            except OSError:  # typed at a prompt, or shipped without source
                continue
            read.update(re.findall(r"\bself\.(\w+)\.weight\b", source))
    return frozenset(read)


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The task heads by name, and the output embeddings, tied or not."""
    heads = {m for name, m in model.named_modules(remove_duplicate=False) if HEADS & set(name.split("."))}
    try:
        output = getattr(model, "get_output_embeddings", lambda: None)()
    except AttributeError:  # a model of transformers whose head was taken off
        output = None
    return heads | {output} if isinstance(output, nn.Module) else heads


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


@dataclass(frozen=True)
class MPOUnit:
    """One matrix after compression: the modules on its cores, each under all its names; a :class:`DenseUnit` before."""

    modules: tuple[MPOLayer, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0][0]

    @property
    def spec(self) -> ModuleSpec:
        """The structure now, of the first module."""
        return self.modules[0].spec

    @property
    def cores(self) -> tuple[Core, ...]:
        """The parameters and quantised cores, first site to last."""
        return tuple(self.modules[0].cores)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The cores as they are computed with, without gradients; those in bits are dequantised copies."""
        return tuple(core.detach() for core in self.modules[0].cores.forward())

    def replace(self, tensors: Sequence[torch.Tensor | QuantizedCore], bonds: Sequence[int]) -> None:
        """New cores for every module of the unit. See :meth:`~mpo_tn.torch.MPOLayer.replace_cores`."""
        for module in self.modules:
            module.replace_cores(tensors, bonds)
            tensors = self.cores  # which all of them share


def mpo_units(model: nn.Module, *, required: bool = True) -> dict[str, MPOUnit]:
    """Every MPO matrix of a model by the name of its first occurrence, in the order of the modules.

    Shared modules and modules tied by sharing cores are one unit. Only structure is looked at: cores may lie on the
    meta device or be sharded. Whoever changes them asks :func:`cuttable_units`.

    Raises:
        MPOError: no MPO module, if one is ``required``.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> layer = nn.Linear(8, 8)
    >>> model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(8, 8))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> {name: unit.names for name, unit in mpo_units(model).items()}
    {'0': (('0', '2'),), '3': (('3',),)}
    """
    grouped: dict[tuple[int, ...], list[MPOLayer]] = {}
    names = _mpo_modules(model)
    for module in names:
        grouped.setdefault(tuple(id(core) for core in module.cores), []).append(module)
    if required and not grouped:
        raise MPOError("the model has no MPO modules: compress it first, see mpo_tn.torch.compress")
    units = [MPOUnit(tuple(modules), tuple(tuple(names[m]) for m in modules)) for modules in grouped.values()]
    return {unit.name: unit for unit in units}


def cuttable_units(model: nn.Module, *, required: bool = True) -> dict[str, MPOUnit]:
    """The units of :func:`mpo_units`, if each of them may be given other cores.

    Raises:
        MPOError: as :func:`mpo_units`; cores without data, or sharded over processes, or shared one by one between
            matrices.
    """
    units = mpo_units(model, required=required)
    owners: dict[int, str] = {}
    for name, unit in units.items():
        for k, core in enumerate(unit.cores):
            if id(core) in owners:
                raise MPOError(
                    f"core {k} of {name} is also a core of {owners[id(core)]}, and their other cores differ: a cut of "
                    "one would break the other; give each its own"
                )
            _check_core(core, f"{name}.cores.{k}")
            owners[id(core)] = name
    return units


def _check_core(core: Core, name: str) -> None:
    for own, tensor in held_tensors(core, name).items():
        check_loaded(tensor, own)
    if hasattr(core, "placements") or core.ndim != 4:
        raise MPOError(
            f"{name} is sharded over processes, and a cut needs it whole: squeeze in one process, or without FSDP"
        )


def mpo_specs(model: nn.Module) -> dict[str, ModuleSpec]:
    """The structure of every MPO *module* by its first name, those that are tied to another included.

    It is what files list, and enough to build the modules empty.
    """
    return {names[0]: module.spec for module, names in _mpo_modules(model).items()}


def _mpo_modules(model: nn.Module) -> dict[MPOLayer, list[str]]:
    """Every MPO module once, with all its names, in order of first occurrence."""
    names: dict[MPOLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MPOLayer):
            names.setdefault(module, []).append(name)
    return names


def count_parameters(model: nn.Module) -> int:
    """Of the whole model, shared ones once, cores that are held in bits among them, and no scales of those."""
    plain = {p for p in model.parameters() if not is_lazy(p)} - {*trained_scales(model).values()}
    return sum(each.numel() for each in (*plain, *quantized_cores(model).values()))


def all_bonds(units: Mapping[str, MPOUnit]) -> dict[str, tuple[int, ...]]:
    """The bonds of every unit."""
    return {name: unit.spec.bonds for name, unit in units.items()}
