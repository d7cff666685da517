"""Which parameters train: freeze, what is trainable, and the groups that an optimiser takes."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.patterns import HEADS, check_matched, is_bias, matches, prefixes
from mpo_tn.torch.layers.cores import Cores
from mpo_tn.torch.layers.quantized import SCALE_LOGS, QuantizedCore, quantized_cores
from mpo_tn.torch.models.eligible import head_modules
from mpo_tn.torch.models.units import count_parameters, mpo_units

POLICIES = ("auxiliary", "central", "cores", "none")
GROUPS = ("heads", "norms", "biases")
SCALES = "scales"


@dataclass(frozen=True)
class Occurrence:
    """One parameter, under all its names, and the modules that own it by each of them."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]

    @property
    def is_core(self) -> bool:
        """Whether it is a core of an MPO module."""
        return any(isinstance(owner, Cores) for owner in self.owners)

    @property
    def is_scale(self) -> bool:
        """Whether it is the scales of a core in bits."""
        return any(isinstance(owner, QuantizedCore) for owner in self.owners)


def occurrences(model: nn.Module) -> list[Occurrence]:
    """Every parameter of ``model`` once, in order of first occurrence."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    return [
        Occurrence(parameter, tuple(names), tuple(modules[name.rpartition(".")[0]] for name in names))
        for parameter, names in found.items()
    ]


@dataclass(frozen=True)
class FreezeReport:
    """What :func:`freeze` left trainable. Shared parameters count once.

    ``by_group`` holds trainable parameters under ``"cores"``, the groups of ``also`` (``"rest"`` for ``also="all"``)
    and ``"train"``; each parameter counts in the first that made it trainable, so that they add up to ``trainable``.
    """

    trainable: int
    total: int
    by_group: dict[str, int]

    def __str__(self) -> str:
        groups = ", ".join(f"{name} {count:,d}" for name, count in self.by_group.items() if count)
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,d} of {self.total:,d} parameters train ({share:.2f} %): {groups or 'none'}"


def freeze(
    model: nn.Module,
    policy: str = "auxiliary",
    *,
    also: str | Sequence[str] = GROUPS,
    train: str | Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
) -> FreezeReport:
    """Choose what trains: some cores of every MPO module, and what else is named; all the rest takes no gradient.

    Args:
        model: a model with MPO modules; with ``policy="none"`` any model.
        policy: the cores that stay trainable. ``"auxiliary"``, all but the central tensor, is the lightweight
            fine-tuning of the paper; ``"central"`` is the opposite, ``"cores"`` all, ``"none"`` none. What cores hold
            in bits never trains.
        also: what trains outside the cores. ``"heads"``: modules named like a task head or a pooler, and the output
            embeddings; not a weight that a module elsewhere uses too, as a tied output table is. ``"norms"``: the
            parameters of every module whose class, or a base of it, is named ``...Norm``. ``"biases"``: every
            parameter named ``bias``, ``..._bias`` or ``bias_...``. ``"all"``: everything outside the cores.
            ``"scales"``: those of all cores in integers, as parameters in float32, which are there until another
            ``freeze`` leaves ``"scales"`` out and in no ``state_dict``.
        train: more of it by pattern, in the grammar of :class:`~mpo_tn.torch.MPOConfig`, on names of parameters or of
            modules with all that is below them. Cores follow ``policy`` and ``overrides`` only.
        overrides: pattern of MPO modules to the policy they get instead; the first match wins. Modules that share
            their cores are one: an override of one of them is one of all.

    Returns:
        How many parameters train, and of which groups.

    Guarantee (last-freeze-holds): no number changes, only ``requires_grad`` does, that of every parameter is set, and
    cores in integers have their scales as parameters or not: the last call holds, whatever was set before.
    Guarantee (freeze-refused): if anything is wrong nothing changes.
    Build the optimiser afterwards, see :func:`parameter_groups`.

    Raises:
        MPOError: an unknown policy or group, a pattern that matches nothing, overrides that contradict each other on
            modules with shared cores, a model without MPO modules and a policy other than ``"none"``.

    Source: lightweight fine-tuning in Liu, Gao et al., ACL 2021, section 4.1.

    >>> import torch
    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.LayerNorm(24), torch.nn.Linear(24, 16))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> print(freeze(model))
    192 of 960 parameters train (20.00 %): cores 104, norms 48, biases 40
    """
    for given in (policy, *(overrides or {}).values()):
        check_policy(given)
    groups = (also,) if isinstance(also, str) else tuple(also)
    unknown = [group for group in groups if group not in (*GROUPS, SCALES, "all")]
    if unknown:
        raise MPOError(
            f"also={unknown[0]!r} is not one of {', '.join(GROUPS)}, {SCALES}, all; name other parameters in train"
        )
    cores = _trainable_cores(model, policy, overrides or {})
    parameters = [item for item in occurrences(model) if not item.is_scale]
    named = _named_by(parameters, train)
    outputs = head_modules(model)

    reasons: list[str | None] = []
    for item in parameters:
        reason = next((group for group in groups if group != "all" and _belongs(item, group, outputs)), None)
        if item.is_core:
            reason = "cores" if cores[item.parameter] else None
        elif not item.parameter.is_floating_point():  # quantized weights and the like cannot take a gradient
            reason = None
        elif reason is None:
            reason = "train" if item.parameter in named else "rest" if "all" in groups else None
        reasons.append(reason)
    by_group = dict.fromkeys(("cores", *groups, *(("train",) if train else ())), 0)
    if "all" in groups:
        by_group["rest"] = by_group.pop("all")
    for item, reason in zip(parameters, reasons, strict=True):
        item.parameter.requires_grad_(reason is not None)
        if reason is not None:
            by_group[reason] += item.parameter.numel()
    for core in quantized_cores(model).values():
        core.train_scales(SCALES in groups)
        if core.scale_logs is not None:
            core.scale_logs.requires_grad_(True)
            by_group[SCALES] += core.scale_logs.numel()
    return FreezeReport(*count_trainable(model), by_group)


def check_policy(policy: str) -> None:
    """Refuse what is no policy of :func:`freeze`."""
    if policy not in POLICIES:
        raise MPOError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")


def _trainable_cores(model: nn.Module, policy: str, overrides: Mapping[str, str]) -> dict[nn.Parameter, bool]:
    """Whether each core trains."""
    units = mpo_units(model, required=False)
    if not units and (policy != "none" or overrides):
        raise MPOError(
            f"the model has no MPO modules, so policy={policy!r} means nothing: compress it first, or pass "
            'policy="none" to freeze all but what also and train name'
        )
    names = {unit.name: [name for own in unit.names for name in own] for unit in units.values()}
    everywhere = [name for unit_names in names.values() for name in unit_names]
    for pattern in overrides:
        check_matched("overrides[{}]", (pattern,), everywhere, "MPO module")

    trainable: dict[nn.Parameter, bool] = {}
    for unit in units.values():
        chosen: dict[str, str] = {}
        for name in names[unit.name]:
            pattern = next((pattern for pattern in overrides if matches(name, (pattern,))), None)
            if pattern is not None:
                chosen.setdefault(overrides[pattern], name)
        if len(chosen) > 1:
            (first, a), (second, b) = list(chosen.items())[:2]
            raise MPOError(f"overrides give {a} {first!r} and {b} {second!r}, but they share their cores: give one")
        own = next(iter(chosen), policy)
        center = unit.spec.center
        for k, core in enumerate(unit.cores):
            if isinstance(core, QuantizedCore):  # which takes no gradient, whatever the policy
                continue
            trains = own == "cores" or (own == "central" and k == center) or (own == "auxiliary" and k != center)
            if trainable.setdefault(core, trains) != trains:  # modules may share some cores and not others
                raise MPOError(f"core {k} of {unit.name} trains there and not in another module that shares it")
    return trainable


def _named_by(parameters: Sequence[Occurrence], train: str | Sequence[str]) -> set[nn.Parameter]:
    """The parameters outside the cores that the patterns mean."""
    if isinstance(train, str):
        train = (f"re:{train.removeprefix('re:')}",)
    found: set[nn.Parameter] = set()
    for pattern in train:
        matched = [
            item
            for item in parameters
            if any(matches(prefix, (pattern,)) for name in item.names for prefix in prefixes(name))
        ]
        outside = [item for item in matched if not item.is_core and item.parameter.is_floating_point()]
        if not outside:
            if any(item.is_core for item in matched):
                raise MPOError(
                    f"train={pattern!r} matches only cores, which follow the policy: use overrides={{{pattern!r}: "
                    '"cores"} for them'
                )
            known = [prefix for item in parameters for name in item.names for prefix in prefixes(name)]
            check_matched("train={}", (pattern,), known, "parameter or module that could train")
            raise MPOError(f"train={pattern!r} matches only {matched[0].names[0]}, which takes no gradient")
        found.update(item.parameter for item in outside)
    return found


def _belongs(item: Occurrence, group: str, outputs: set[nn.Module]) -> bool:
    if group == SCALES:
        return False
    if group == "norms":
        return any(is_norm(owner) for owner in item.owners)
    if group == "biases":
        return any(is_bias(name) for name in item.names)
    return all(
        owner in outputs or not {*HEADS, "pooler"}.isdisjoint(name.split("."))
        for name, owner in zip(item.names, item.owners, strict=True)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, going by the name of its class and of the bases: LayerNorm, RMSNorm, NoNorm, ..."""
    return any(cls.__name__.endswith("Norm") for cls in type(module).__mro__)


def is_scale(name: str) -> bool:
    """Whether a tensor is the scales of a core in integers while they train, going by its name."""
    return name.rpartition(".")[2] == SCALE_LOGS


@contextmanager
def scales_kept(model: nn.Module) -> Generator[None]:
    """Afterwards cores in integers have their scales as parameters only if they had them before."""
    before = [(core, core.scale_logs is not None) for core in quantized_cores(model).values()]
    try:
        yield
    finally:
        for core, trained in before:
            core.train_scales(trained)


def count_trainable(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trainable, and how many there are; shared ones count once, those in bits as numbers."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, count_parameters(model)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, in PEFT's words; shared ones count once, cores in bits as the numbers they hold.

    >>> import torch
    >>> print_trainable_parameters(torch.nn.Linear(9, 100))
    trainable params: 1,000 || all params: 1,000 || trainable%: 100.0000
    """
    trainable, total = count_trainable(model)
    share = 100 * trainable / max(total, 1)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


def parameter_groups(
    model: nn.Module,
    lr: float = 2e-4,
    tensor_lr: float = 5e-4,
    weight_decay: float = 0.01,
    *,
    tensor_weight_decay: float = 0.0,
    scale_lr: float = 2e-2,
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for a torch optimiser, with a learning rate of their own for cores.

    Args:
        model: after :func:`freeze`.
        lr: of everything but cores.
        tensor_lr: of cores. The scripts of the paper have two rates, too; these two are the best of those tried for
            auxiliary tensors on held-out parts of two tasks (docs/results.md). Where dense matrices train, 5e-5 is
            the usual ``lr``.
        weight_decay: of dense weights; biases and norms have none.
        tensor_weight_decay: of cores. None by default: the matrix is a *product* of the cores, so decay of each would
            shrink it by the product of the factors, and by amounts that depend on how its norm happens to be spread
            over the cores (the gauge), which means nothing.
        scale_lr: of the scales of cores in integers, relative to each: what trains is their logarithms. No decay.

    Returns:
        Dictionaries with ``name`` (``"tensors"``, ``"decay"``, ``"no_decay"`` or ``"scales"``), ``params``, ``lr``,
        ``weight_decay``; empty groups are left out.

    Guarantee (one-group-each): every trainable parameter is in exactly one, in order of first occurrence.

    Raises:
        MPOError: nothing is trainable, or a rate or decay is negative or not finite.

    >>> import torch
    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24))
    >>> _ = compress(model, MPOConfig(sites=3)), freeze(model)
    >>> [(group["name"], len(group["params"]), group["lr"]) for group in parameter_groups(model)]
    [('tensors', 2, 0.0005), ('no_decay', 1, 0.0002)]
    """
    rates = {
        "lr": lr, "tensor_lr": tensor_lr, "weight_decay": weight_decay, "tensor_weight_decay": tensor_weight_decay,
        "scale_lr": scale_lr,
    }  # fmt: skip
    for name, value in rates.items():
        if not 0 <= value < float("inf"):
            raise MPOError(f"{name}={value!r} must be a finite number of at least 0")
    groups: list[dict[str, Any]] = [
        {"name": "tensors", "params": [], "lr": tensor_lr, "weight_decay": tensor_weight_decay},
        {"name": "decay", "params": [], "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": [], "lr": lr, "weight_decay": 0.0},
        {"name": SCALES, "params": [], "lr": scale_lr, "weight_decay": 0.0},
    ]
    tensors, decay, no_decay, scales = groups
    for item in occurrences(model):
        if item.parameter.requires_grad:
            plain = _belongs(item, "norms", set()) or _belongs(item, "biases", set())
            group = tensors if item.is_core else scales if item.is_scale else no_decay if plain else decay
            group["params"].append(item.parameter)
    filled = [group for group in groups if group["params"]]
    if not filled:
        raise MPOError("nothing is trainable: call freeze with a policy or with train patterns that leave something")
    return filled
