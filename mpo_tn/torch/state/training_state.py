"""The state of a training, in memory or in a folder: what it needs to go on with the same bits.

A folder holds ``tensors.safetensors`` and ``state.json``, and is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.linalg import check_loaded
from mpo_tn.storage.files import written_beside
from mpo_tn.storage.tensors import as_damaged, as_os_error, bytes_digest, file_digest
from mpo_tn.torch.layers.quantized import trained_scales
from mpo_tn.torch.models.moments import OptimizerLike, unwrapped
from mpo_tn.torch.models.units import MPOUnit, cuttable_units
from mpo_tn.torch.state.core_tensors import core_shapes, cores_among, kinds_of_cores
from mpo_tn.torch.state.damage import (
    MISFITS,
    check_alike,
    damaged,
    decoded,
    optional_part,
    part,
    read_json,
    shown,
    strings,
)
from mpo_tn.torch.state.generators import checked_random, random_state, restore_random
from mpo_tn.torch.state.host_values import host_copy, tensors_digest
from mpo_tn.torch.state.nested_values import decode, encode

FORMAT_VERSION = 1

_TENSORS, _VALUES = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class TrainingState:
    """A state: copies of tensors on the host, by key, and everything else as JSON can hold it."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]

    def model_digest(self) -> str:
        """A digest of the model's tensors, without the optimiser's and the random generators."""
        return tensors_digest(value for name, value in self.tensors.items() if name.startswith("model/"))


def capture(
    model: nn.Module,
    optimizer: OptimizerLike | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    which: str = "trainable",
) -> TrainingState:
    """Copy the state of a training to the host. See :func:`save_state` for the arguments."""
    if which not in ("trainable", "all"):
        raise MPOError(f'which={which!r} must be "trainable" (with all cores and buffers) or "all"')
    tensors: dict[str, torch.Tensor] = {}
    saved, left_out = _entries(model, which)
    for name, value in saved.items():
        tensors[f"model/{name}"] = host_copy(value)
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "which": which,
        "model": _structure(model),
        "saved": list(saved),
        "left_out": tensors_digest(left_out.values()),
        "units": {
            name: {"bonds": list(u.spec.bonds), "rel_error": u.spec.rel_error, "exact": u.spec.exact}
            for name, u in cuttable_units(model, required=False).items()
        },
        "random": random_state(tensors),
        "optimizer": None if optimizer is None else _optimizer_state(optimizer, model, tensors),
        "scheduler": None
        if scheduler is None
        else {"kind": type(scheduler).__name__, "state": encode(scheduler.state_dict(), "scheduler", tensors)},
        "extra": encode(dict(extra or {}), "extra", tensors),
    }
    return TrainingState(tensors, values)


def restore(
    state: TrainingState, model: nn.Module, optimizer: OptimizerLike | None = None, scheduler: Any = None
) -> dict[str, Any]:
    """Bring a training to a state: bit for bit, bonds included. Returns the ``extra`` that was saved with it.

    Raises:
        MPOError: as for :func:`load_state`, with the same guarantee.
    """
    values, tensors = state.values, state.tensors
    saved = _checked_model(values, tensors, model)
    units = cuttable_units(model, required=False)
    parts = _checked_units(values, tensors, units, saved)
    inner = None if optimizer is None else unwrapped(optimizer)
    if inner is not None:
        _check_optimizer(values, inner, model, tensors)
    generators, extra = checked_random(values.get("random"), tensors), saved_extra(state)
    if scheduler is not None:  # first of all, as there is no other way to see whether it takes its state
        _restore_scheduler(values, scheduler, tensors)

    for name, unit in units.items():
        bonds, rel_error, exact = parts[name]
        if bonds != unit.spec.bonds:
            unit.replace(cores_among(tensors, replace(unit.spec, bonds=bonds), f"model/{name}"), bonds)
        for module in unit.modules:
            module.spec = replace(module.spec, rel_error=rel_error, exact=exact)
    with torch.no_grad():
        for name, value in saved.items():
            value.copy_(tensors[f"model/{name}"])
    for parameter in model.parameters():
        parameter.grad = None
    if inner is not None:
        _restore_optimizer(values["optimizer"], inner, tensors)
    restore_random(generators)
    return extra


def saved_extra(state: TrainingState) -> dict[str, Any]:
    """What the caller had saved with a state.

    Raises:
        MPOError: it is damaged.
    """
    return decoded(state.values.get("extra"), state.tensors, "extra")


def saved_bonds(state: TrainingState) -> dict[str, tuple[int, ...]]:
    """The bonds of every unit in a state.

    Raises:
        MPOError: it is damaged.
    """
    units: dict[str, Any] = part(state.values, "units", dict)
    return {name: tuple(part(part(units, name, dict, "units/"), "bonds", list, f"units/{name}/")) for name in units}


def save_state(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: OptimizerLike | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    which: str = "trainable",
) -> None:
    """Write the state of a training to ``folder``; an earlier one there is replaced.

    Args:
        folder: to make.
        model: any module; with MPO modules their bonds are part of the state.
        optimizer: a torch optimiser; its options and the state of every parameter.
        scheduler: anything with ``state_dict`` and ``load_state_dict``.
        extra: what else the training needs, in numbers, strings, lists, tuples, dictionaries and tensors.
        which: ``"trainable"`` leaves out what is frozen, of which a digest is kept, except cores and buffers; ``"all"``
            leaves out nothing.

    The states of the random generators of Python, NumPy and torch (CPU, and every CUDA device) are part of it.
    Gradients are not: save between steps.

    Guarantee (state-whole): the folder is there as a whole or not at all; if it raises, an earlier one is untouched.

    Raises:
        MPOError: something that JSON and safetensors cannot hold, a disk that is full or may not be written to.
    """
    write_state(capture(model, optimizer, scheduler, extra, which=which), Path(folder))


def load_state(
    folder: str | Path, *, model: nn.Module, optimizer: OptimizerLike | None = None, scheduler: Any = None
) -> dict[str, Any]:
    """Read a folder of :func:`save_state` into a training that was built in the same way; returns its ``extra``.

    Guarantee (state-bits): every tensor, number and random generator has the bits it had, and every unit the bonds.
    What is ``None`` is not read.
    Guarantee (state-refused): a folder that is missing or of another version, whose tensors are not what was written,
    that was saved from another model, optimiser or scheduler, or whose ``state.json`` is damaged changes nothing. What
    is missing there, or of another kind than what was written, is damage, and is found before anything is changed.
    There is no digest of ``state.json`` itself: another number where there was a number is believed.

    Raises:
        MPOError: one of these.
    """
    return restore(read_state(Path(folder)), model, optimizer, scheduler)


def write_state(state: TrainingState, folder: Path) -> None:
    """Write a captured state. See :func:`save_state`."""
    with written_beside(folder) as temporary:
        file = temporary / _TENSORS
        with as_os_error():
            save_file(state.tensors, file)
        values = {**state.values, "tensors": file_digest(file)}
        (temporary / _VALUES).write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_state(folder: Path) -> TrainingState:
    """Read a captured state. See :func:`load_state`."""
    with as_damaged(folder, "name the folder of another state, or start afresh"):
        values = read_json(_present(folder / _VALUES))
        version = values["format_version"]
        if whole_number(version) != FORMAT_VERSION:
            raise MPOError(f"{folder} has format {version!r}, and this version reads {FORMAT_VERSION}: upgrade mpo-tn")
        file = _present(folder / _TENSORS)
        if values["tensors"] != file_digest(file):
            raise MPOError(f"{file} is damaged: it is not what {_VALUES} says was written")
        return TrainingState(load_file(file), values)


def _present(file: Path) -> Path:
    if not file.is_file():
        raise MPOError(f"{file.parent} is not the folder of a state: {file} is missing")
    return file


def _all_entries(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, each once under its first name, and scales that train."""
    entries: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            check_loaded(value, name)
            seen.add(id(value))
            entries[name] = value
    return {**entries, **trained_scales(model)}


def _entries(model: nn.Module, which: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is saved, and what is left out."""
    cores = kinds_of_cores(model)
    saved: dict[str, torch.Tensor] = {}
    left_out: dict[str, torch.Tensor] = {}
    for name, value in _all_entries(model).items():
        frozen = isinstance(value, nn.Parameter) and not value.requires_grad and id(value) not in cores
        (left_out if frozen and which == "trainable" else saved)[name] = value
    return saved, left_out


def _structure(model: nn.Module) -> dict[str, Any]:
    """Name to dtype and shape of every tensor, to tell models apart; of a core the legs and bits alone count."""
    kinds = kinds_of_cores(model)
    entries = _all_entries(model)
    return {name: [str(value.dtype), kinds.get(id(value), list(value.shape))] for name, value in entries.items()}


def _checked_model(
    values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """What of the model the state holds."""
    structure, here = part(values, "model", dict), _structure(model)
    which, names, digest = part(values, "which", str), strings(values, "saved"), part(values, "left_out", str)
    if which not in ("trainable", "all"):
        raise damaged(f"which is {shown(which)}")
    for name in [*structure, *here]:
        if structure.get(name) != here.get(name):
            raise MPOError(
                f"the state is of another model: {name} is {structure.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; build the model in the same way, with the same MPOConfig"
            )
    saved, left_out = _entries(model, which)
    if different := sorted(set(saved) ^ set(names)):
        raise MPOError(
            f"the state was saved with other parameters frozen, for instance {different[0]}: freeze the same"
        )
    if tensors_digest(left_out.values()) != digest:
        raise MPOError(
            f"the state is of another model: the {len(left_out)} frozen tensors that it does not hold have other "
            "values; start from the same pre-trained model"
        )
    missing = [name for name in saved if f"model/{name}" not in tensors]
    if missing:
        raise damaged(f"it has no {missing[0]}")
    return saved


def _checked_units(
    values: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    units: Mapping[str, MPOUnit],
    saved: Mapping[str, torch.Tensor],
) -> dict[str, tuple[tuple[int, ...], float | None, bool]]:
    """Bonds, error and exactness of every unit; they fit the saved cores, and every saved tensor fits its place."""
    parts: dict[str, Any] = part(values, "units", dict)
    if parts.keys() != units.keys():
        raise damaged(f"units has {shown(sorted(parts))}, and the model {shown(sorted(units))}")
    checked: dict[str, tuple[tuple[int, ...], float | None, bool]] = {}
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    for name, unit in units.items():
        where = f"units/{name}/"
        entry: dict[str, Any] = part(parts, name, dict, "units/")
        bonds = [whole_number(bond) or 0 for bond in part(entry, "bonds", list, where)]
        if len(bonds) != len(unit.spec.bonds) or min(bonds, default=1) < 1:
            raise damaged(f"{where}bonds is {shown(entry['bonds'])}")
        error: Any = part(entry, "rel_error", object, where)
        if error is not None and not is_real(error):
            raise damaged(f"{where}rel_error is {shown(error)}")
        checked[name] = tuple(bonds), error, part(entry, "exact", bool, where)
        shapes |= core_shapes(replace(unit.spec, bonds=tuple(bonds)), name)
    for name, shape in shapes.items():
        tensor = tensors[f"model/{name}"]
        if tuple(tensor.shape) != shape or tensor.dtype != saved[name].dtype:
            raise damaged(f"{name} is {tensor.dtype} {list(tensor.shape)} where {list(shape)} is due")
    return checked


def _optimizer_state(optimizer: OptimizerLike, model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    inner = unwrapped(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    for number, group in enumerate(inner.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise MPOError(
                    f"{type(inner).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's: make it part of the model, or the state would lose it"
                )
            if parameter in inner.state:
                name = names[id(parameter)]
                states[name] = encode(dict(inner.state[parameter]), f"optimizer/{name}", tensors)
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "parameters": [names[id(parameter)] for parameter in group["params"]],
                "options": encode(options, f"optimizer/group {number}", tensors),
            }
        )
    return {"kind": type(inner).__name__, "groups": groups, "states": states}


def _check_optimizer(
    values: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    kind = type(optimizer).__name__
    saved: dict[str, Any] = optional_part(values, "optimizer") or {}
    there = part(saved, "kind", str, "optimizer/") if values["optimizer"] is not None else "no optimiser"
    if there != kind:
        raise MPOError(f"the state was saved with {there} and is read into {kind}: use the same optimiser")
    groups: list[Any] = part(saved, "groups", list, "optimizer/")
    if not all(isinstance(group, dict) for group in groups):
        raise damaged(f"optimizer/groups is {shown(groups)}")
    held = [strings(group, "parameters", "optimizer/groups/") for group in groups]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    here = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    if here != held:
        raise MPOError(
            f"the state was saved with {sum(map(len, held))} parameters in {len(held)} groups and {kind} has "
            f"{sum(map(len, here))} in {len(here)}, or others: make the same groups in the same order"
        )
    # Decoded as a trial with nothing in the tensors: a second copy of all moments may not fit on the device.
    empty = {key: torch.empty(0) for key in tensors}
    for number, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        where = f"group {number} of the optimiser"
        options = decoded(group.get("options"), empty, where)
        due = [key for key, value in optimizer.defaults.items() if isinstance(value, (float, tuple, torch.Tensor))]
        if missing := [key for key in due if key not in options]:
            raise damaged(f"{where} has no {missing[0]}")
        if "params" in options:
            raise damaged(f"{where} has params among its options")
        check_alike(options, own, where)
    states: dict[str, Any] = part(saved, "states", dict, "optimizer/")
    for name, state in states.items():
        decoded(state, empty, f"the optimiser's state of {name}")


def _restore_scheduler(values: Mapping[str, Any], scheduler: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Bring a scheduler to its saved state, or leave it as it is and raise."""
    kind = type(scheduler).__name__
    saved: dict[str, Any] = optional_part(values, "scheduler") or {}
    there = part(saved, "kind", str, "scheduler/") if values["scheduler"] is not None else "no scheduler"
    if there != kind:
        raise MPOError(f"the state was saved with {there} and is read into {kind}: use the same")
    state, before = decoded(saved.get("state"), tensors, "scheduler/state"), scheduler.state_dict()
    # What begins with an underscore may differ between versions of torch.
    if missing := [key for key in before if not str(key).startswith("_") and key not in state]:
        raise damaged(f"scheduler/state has no {missing[0]}")
    check_alike(state, before, "scheduler/state")
    try:
        scheduler.load_state_dict(state)
    except MISFITS as error:
        scheduler.load_state_dict(before)
        raise damaged(f"{kind} does not take its state ({type(error).__name__}: {error})") from error


def _restore_optimizer(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    for group, entry in zip(optimizer.param_groups, saved["groups"], strict=True):
        device = group["params"][0].device if group["params"] else None
        group.update(decode(entry["options"], tensors, device))
        for parameter, name in zip(group["params"], entry["parameters"], strict=True):
            optimizer.state.pop(parameter, None)
            if name in saved["states"]:
                optimizer.state[parameter] = decode(saved["states"][name], tensors, parameter.device)


def random_digest() -> str:
    """A digest of the states of all random generators."""
    tensors: dict[str, torch.Tensor] = {}
    values = json.dumps(random_state(tensors))
    return bytes_digest([values.encode(), tensors_digest(tensors.values()).encode()])
