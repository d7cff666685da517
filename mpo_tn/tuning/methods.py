"""Ways to tune a model, each made ready for the same loop: what is compressed, what trains, and how fast."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.structure import structure
from mpo_tn.progress import Progress
from mpo_tn.storage.files import checked_file
from mpo_tn.torch import MPOConfig, MPOLayer, compress
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.trainable import GROUPS, check_policy, freeze, parameter_groups
from mpo_tn.torch.models.units import count_parameters, mpo_units
from mpo_tn.tuning.past_defaults import checked_version

Bonds = Mapping[str, Sequence[int]]
"""Bonds by module name."""


_LFA = (2e-4, 5e-4)
RATES = {
    "full": (5e-5, 5e-4), "last-layers": (5e-5, 5e-4), "lora": (5e-5, 5e-4), "low-rank": (2e-4, 1e-4),
    "lfa": _LFA, "one-shot": _LFA, "squeeze": _LFA,
}  # fmt: skip
"""The rates of a method, of dense parameters and of tensors; docs/results.md has the search that they are from."""
CENTRAL_LR = 5e-5
"""The rate of tensors where central ones train as well, which hold what is large in a matrix."""


@dataclass(frozen=True)
class Method:
    """How to tune: what becomes an MPO, what trains, at which rates.

    Args:
        name: ``"full"`` (dense, everything trains), ``"lfa"`` (compress, then train auxiliary tensors),
            ``"last-layers"`` (dense; the last ``layers`` blocks and the head), ``"lora"`` (PEFT, with as many
            parameters as LFA trains), ``"low-rank"`` (two factors per matrix, both trained), ``"one-shot"`` (truncate
            to given ``bonds`` at once, then as LFA), ``"squeeze"`` (LFA on full bonds, then cut and tune in turn).
        target: the modules to compress, or to put LoRA on; the grammar of :class:`~mpo_tn.torch.MPOConfig`.
        sites: the number of sites of LFA's chains.
        keep: the kept ratio per matrix for ``lfa``, ``low-rank`` and ``one-shot``; none is exact.
        policy: which cores ``lfa``, ``one-shot`` and ``squeeze`` train, as in :func:`~mpo_tn.torch.freeze`.
        bonds: bonds by module, for instance the last ones of a squeezing. ``low-rank`` takes the rank with the same
            number of parameters, matrix by matrix.
        train: patterns of more parameters to train.
        layers: how many blocks ``last-layers`` trains.
        rank: of LoRA; by default the one with the nearest number of parameters.
        lr, tensor_lr: of dense parameters, and of cores and LoRA's matrices; the scripts of the paper have two rates,
            too. By default those of :data:`RATES`; where central tensors train by ``policy``, :data:`CENTRAL_LR`.
        weight_decay: of dense matrices.
    """

    name: str = "lfa"
    target: str | tuple[str, ...] = "all-linear"
    sites: int | str = 5
    keep: float | None = None
    policy: str = "auxiliary"
    bonds: Bonds | None = None
    train: tuple[str, ...] = ()
    layers: int = 2
    rank: int | None = None
    lr: float | None = None
    tensor_lr: float | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise MPOError(f"unknown method {self.name!r}: there are {', '.join(METHODS)}")
        if self.bonds is not None and self.keep is not None:
            raise MPOError(f"keep={self.keep} and bonds are given together: use one of them")
        if self.name in ("one-shot", "low-rank") and self.bonds is None and self.keep is None:
            raise MPOError(f"the method {self.name} needs a size: give keep, or the bonds of a squeezing")
        if self.name == "squeeze" and (self.keep is not None or self.bonds is not None):
            raise MPOError("the method squeeze starts at full bonds: say in Squeezing(keep=...) how far it goes")
        check_policy(self.policy)  # before a model is read and compressed
        if self.policy != "auxiliary" and self.name not in ("lfa", "one-shot", "squeeze"):
            raise MPOError(f"policy={self.policy!r} is for lfa, one-shot and squeeze: leave it out with {self.name}")
        if self.name in ("full", "last-layers", "lora") and self.bonds is not None:
            raise MPOError(f"the method {self.name} has no bonds: leave them out")

    @property
    def rates(self) -> tuple[float, float]:
        """``lr`` and ``tensor_lr``, those of the method where none is given."""
        lr, tensor_lr = RATES[self.name]
        if self.policy in ("central", "cores"):
            tensor_lr = CENTRAL_LR
        return lr if self.lr is None else self.lr, tensor_lr if self.tensor_lr is None else self.tensor_lr


@dataclass(frozen=True)
class Prepared:
    """A model ready to train, its optimiser groups, and the counts that belong in a table.

    ``matrix_parameters`` are those of the targeted matrices before training, ``matrix_dense`` as they were when dense.
    ``finish`` turns the tuned model into the one to save; only LoRA has something to do there.
    """

    model: Any
    groups: list[dict[str, Any]]
    matrix_dense: int
    matrix_parameters: int
    matrix_trainable: int
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    finish: Callable[[Any], Any] = lambda model: model

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def total(self) -> int:
        """Numbers in the model, shared ones once."""
        return count_parameters(self.model)


def bonds_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The bonds that a squeezing ended in, by module, from the folder or the ``result.json`` it wrote.

    Raises:
        MPOError: no such result, or one of another method or of a newer version.
    """
    path = folder / "result.json" if folder.is_dir() else folder
    try:
        result = json.loads((checked_file(path, "a result") if path.exists() else path).read_text(encoding="utf-8"))
        checked_version(result, path)
        bonds = result["squeezing"]["bonds"]
        return {str(name): tuple(int(bond) for bond in part) for name, part in bonds.items()}
    except MPOError:
        raise
    except OSError as error:
        raise MPOError(f"{path} cannot be read ({error.strerror}): name the --out folder of a squeezed run") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MPOError(f"{path} is not the result of a squeezing, it holds no bonds") from None


def prepare(model: Any, method: Method, *, seed: int = 0, progress: Progress | None = None) -> Prepared:
    """Compress the model in place as the method wants, choose what trains, and group it for an optimiser.

    A model that holds MPO modules already is taken as it is by ``lfa`` and ``squeeze``, and refused by the others.

    Raises:
        MPOError: a target that matches nothing, a model of the wrong kind.
    """
    compressed = any(isinstance(module, MPOLayer) for module in model.modules())
    if compressed and method.name not in ("lfa", "squeeze"):
        raise MPOError(f"the method {method.name} starts from a dense model, and this one is compressed already")
    if compressed and (method.keep is not None or method.bonds is not None):
        raise MPOError("the model is compressed already: leave keep and bonds out")
    return METHODS[method.name](model, method, seed, progress, compressed)


def _full(model: Any, method: Method, seed: int, progress: Progress | None, compressed: bool) -> Prepared:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    dense = sum(unit.matrix().numel() for unit in find_units(model, method.target)[0])
    groups = parameter_groups(model, *method.rates, method.weight_decay)
    return Prepared(model, groups, dense, dense, dense)


def _last_layers(model: Any, method: Method, seed: int, progress: Progress | None, compressed: bool) -> Prepared:
    blocks = _blocks(model)
    if not 1 <= method.layers <= len(blocks):
        raise MPOError(f"layers={method.layers}: the model has {len(blocks)} blocks, give 1 to {len(blocks)}")
    chosen = blocks[-method.layers :]
    freeze(model, "none", also=("heads",), train=(*chosen, *method.train))
    units = find_units(model, method.target)[0]
    dense = sum(unit.matrix().numel() for unit in units)
    trains = sum(unit.weight.numel() for unit in units if unit.weight.requires_grad)
    groups = parameter_groups(model, *method.rates, method.weight_decay)
    return Prepared(model, groups, dense, dense, trains, {"blocks trained": chosen})


def _blocks(model: nn.Module) -> list[str]:
    """The names of the model's blocks: the children of its largest list of modules."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise MPOError(f"{type(model).__name__} holds no list of blocks, so there are no last ones")
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{largest}.{k}" for k in range(len(lists[largest]))]


def _compressed(model: Any, method: Method, seed: int, progress: Progress | None, compressed: bool) -> Prepared:
    notes: dict[str, Any] = {}
    if not compressed:
        report = compress(model, mpo_config(model, method), progress=progress)
        notes = {"kept": report.kept, "kept_model": report.kept_model, "rel_error": report.rel_error}
    policy = "cores" if method.name == "low-rank" else method.policy
    frozen = freeze(model, policy, also=GROUPS, train=method.train)
    specs = [unit.spec for unit in mpo_units(model).values()]
    dense = sum(spec.out_features * spec.in_features for spec in specs)
    now = sum(spec.num_parameters for spec in specs)
    groups = parameter_groups(model, *method.rates, method.weight_decay)
    return Prepared(model, groups, dense, now, frozen.by_group["cores"], notes)


def mpo_config(model: nn.Module, method: Method) -> MPOConfig:
    """The compression that a method starts with."""
    sites = "low-rank" if method.name == "low-rank" else method.sites
    if method.bonds is None:
        return MPOConfig(target_modules=method.target, sites=sites, keep=method.keep)
    exactly = {name: f"re:{re.escape(name)}" for name in method.bonds}  # a bare name would mean every suffix, too
    present = {name for name, _ in model.named_modules()}
    there = [pattern for name, pattern in exactly.items() if name in present]
    units = {unit.name: unit for unit in find_units(model, there)[0]} if there else {}
    unknown = sorted(set(method.bonds) - set(units))
    if unknown:
        raise MPOError(f"bonds are given for {unknown[0]}, which is no matrix of the model: is it another model's log?")
    overrides: dict[str, dict[str, Any]] = {}
    for name, bonds in method.bonds.items():
        caps: int | tuple[int, ...] = tuple(bonds)
        if method.name == "low-rank":
            out, in_ = (int(size) for size in units[name].matrix().shape)
            size = structure(
                units[name].kinds[0], out, in_, MPOConfig(sites=method.sites), units[name].blocks
            ).sites.num_parameters(caps)
            caps = max(1, min(round(size / (out + in_)), out, in_))
        overrides[exactly[name]] = {"bond": caps}
    return MPOConfig(target_modules=list(exactly.values()), sites=sites, overrides=overrides)


def _lora(model: Any, method: Method, seed: int, progress: Progress | None, compressed: bool) -> Prepared:
    try:
        import peft
    except ImportError:
        raise MPOError("the method lora needs PEFT: pip install peft") from None
    units = find_units(model, method.target)[0]
    dense = sum(unit.matrix().numel() for unit in units)
    wanted = auxiliary_parameters(units, method)
    per_rank = sum(sum(unit.matrix().shape) for unit in units)
    rank = method.rank or max(1, round(wanted / per_rank))
    names = [name for unit in units for group in unit.names for name in group]
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="|".join(map(re.escape, names)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
        wrapped = peft.get_peft_model(model, config)
    # What LFA trains besides its tensors trains here as well, so that the runs differ in the matrices alone.
    freeze(wrapped, "none", also=GROUPS, train=(r"re:.*\.lora_[AB]\..*", *method.train))
    lora: list[nn.Parameter] = []
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            lora.append(parameter)
        elif name.endswith(".base_layer.weight"):
            parameter.requires_grad_(False)
    own = set(lora)
    groups = parameter_groups(wrapped, *method.rates, method.weight_decay)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in own]
    groups = [{"name": "tensors", "params": lora, "lr": method.rates[1], "weight_decay": 0.0}, *groups]
    trains = sum(parameter.numel() for parameter in lora)
    notes = {"rank": rank, "lfa would train": wanted, "lora trains": trains}
    kept = [group for group in groups if group["params"]]
    return Prepared(wrapped, kept, dense, dense + trains, trains, notes, lambda m: m.merge_and_unload())


def auxiliary_parameters(units: Sequence[Any], method: Method) -> int:
    """How many numbers the auxiliary tensors of the units would hold, without decomposing anything."""
    config = MPOConfig(sites=method.sites, keep=method.keep)
    count = 0
    for unit in units:
        out, in_ = (int(size) for size in unit.matrix().shape)
        count += structure(unit.kinds[0], out, in_, config, unit.blocks).auxiliary_parameters
    return count


METHODS: dict[str, Callable[..., Prepared]] = {
    "full": _full,
    "lfa": _compressed,
    "last-layers": _last_layers,
    "lora": _lora,
    "low-rank": _compressed,
    "one-shot": _compressed,
    "squeeze": _compressed,
}
"""The ways to tune, by name."""
