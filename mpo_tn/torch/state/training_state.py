"""The state of a training, in memory or in a folder: what it needs to go on with the same bits.

A folder holds ``tensors.safetensors`` and ``state.json``, and is there whole or not at all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.storage.files import written_beside
from mpo_tn.storage.tensors import as_damaged, as_os_error, bytes_digest, file_digest
from mpo_tn.torch.models.moments import OptimizerLike, unwrapped
from mpo_tn.torch.models.units import cuttable_units
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
        "random": _random_state(tensors),
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
    inner = None if optimizer is None else unwrapped(optimizer)
    if inner is not None:
        _check_optimizer(values["optimizer"], inner, model)
    if scheduler is not None and (values["scheduler"] or {}).get("kind") != type(scheduler).__name__:
        kind = (values["scheduler"] or {"kind": "no scheduler"})["kind"]
        raise MPOError(f"the state was saved with {kind} and is read into {type(scheduler).__name__}: use the same")

    units = cuttable_units(model, required=False)
    for name, unit in units.items():
        part = values["units"][name]
        if tuple(part["bonds"]) != unit.spec.bonds:
            cores = [tensors[f"model/{name}.cores.{k}"] for k in range(len(unit.cores))]
            unit.replace(cores, part["bonds"])
        for module in unit.modules:
            module.spec = replace(module.spec, rel_error=part["rel_error"], exact=part["exact"])
    with torch.no_grad():
        for name, value in saved.items():
            value.copy_(tensors[f"model/{name}"])
    for parameter in model.parameters():
        parameter.grad = None
    if inner is not None:
        _restore_optimizer(values["optimizer"], inner, tensors)
    if scheduler is not None:
        scheduler.load_state_dict(decode(values["scheduler"]["state"], tensors))
    _restore_random(values["random"], tensors)
    return decode(values["extra"], tensors)


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
    or that was saved from another model, optimiser or scheduler changes nothing. ``state.json`` itself is not checked
    by a digest: what somebody else writes there is believed, and what somebody leaves out is missed halfway.

    Raises:
        MPOError: one of these; ``state.json`` is no JSON.
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
        values = json.loads(_present(folder / _VALUES).read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
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
    """Parameters and persistent buffers, each once under its first name."""
    entries: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and id(value) not in seen:
            check_loaded(value, name)
            seen.add(id(value))
            entries[name] = value
    return entries


def _entries(model: nn.Module, which: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is saved, and what is left out."""
    cores = {id(core) for unit in cuttable_units(model, required=False).values() for core in unit.cores}
    saved: dict[str, torch.Tensor] = {}
    left_out: dict[str, torch.Tensor] = {}
    for name, value in _all_entries(model).items():
        frozen = isinstance(value, nn.Parameter) and not value.requires_grad and id(value) not in cores
        (left_out if frozen and which == "trainable" else saved)[name] = value
    return saved, left_out


def _structure(model: nn.Module) -> dict[str, Any]:
    """Name to dtype and shape of every tensor, to tell one model from another; of a core the legs alone count."""
    cores = {id(core) for unit in cuttable_units(model, required=False).values() for core in unit.cores}
    return {
        name: [str(value.dtype), list(value.shape[1:3] if id(value) in cores else value.shape)]
        for name, value in _all_entries(model).items()
    }


def _checked_model(
    values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], model: nn.Module
) -> dict[str, torch.Tensor]:
    """What of the model the state holds."""
    structure, here = values["model"], _structure(model)
    for name in [*structure, *here]:
        if structure.get(name) != here.get(name):
            raise MPOError(
                f"the state is of another model: {name} is {structure.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here; build the model in the same way, with the same MPOConfig"
            )
    saved, left_out = _entries(model, values["which"])
    if list(saved) != values["saved"]:
        different = sorted(set(saved) ^ set(values["saved"]))[0]
        raise MPOError(f"the state was saved with other parameters frozen, for instance {different}: freeze the same")
    if tensors_digest(left_out.values()) != values["left_out"]:
        raise MPOError(
            f"the state is of another model: the {len(left_out)} frozen tensors that it does not hold have other "
            "values; start from the same pre-trained model"
        )
    missing = [name for name in saved if f"model/{name}" not in tensors]
    if missing:
        raise MPOError(f"the state is damaged: it has no {missing[0]}")
    return saved


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


def _check_optimizer(saved: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    kind = type(optimizer).__name__
    if saved is None or saved["kind"] != kind:
        raise MPOError(
            f"the state was saved with {saved['kind'] if saved else 'no optimiser'} and is read into {kind}: use the "
            "same optimiser"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    here = [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    if here != [group["parameters"] for group in saved["groups"]]:
        raise MPOError(
            f"the state was saved with {sum(len(g['parameters']) for g in saved['groups'])} parameters in "
            f"{len(saved['groups'])} groups and {kind} has {sum(map(len, here))} in {len(here)}, or others: make the "
            "same groups in the same order"
        )


def _restore_optimizer(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    for group, part in zip(optimizer.param_groups, saved["groups"], strict=True):
        device = group["params"][0].device if group["params"] else None
        group.update(decode(part["options"], tensors, device))
        for parameter, name in zip(group["params"], part["parameters"], strict=True):
            optimizer.state.pop(parameter, None)
            if name in saved["states"]:
                optimizer.state[parameter] = decode(saved["states"][name], tensors, parameter.device)


def _random_state(tensors: dict[str, torch.Tensor]) -> Any:
    legacy: Any = np.random.get_state()  # noqa: NPY002  # whoever draws from the old global generator needs it
    parts: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": tuple(
            torch.from_numpy(part.astype(np.int64)) if isinstance(part, np.ndarray) else part for part in legacy
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    version, numbers, gauss = parts["python"]
    parts["python"] = (version, torch.tensor(numbers), gauss)
    return encode(parts, "random", tensors)


def random_digest() -> str:
    """A digest of the states of all random generators."""
    tensors: dict[str, torch.Tensor] = {}
    values = json.dumps(_random_state(tensors))
    return bytes_digest([values.encode(), tensors_digest(tensors.values()).encode()])


def _restore_random(saved: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    parts = decode(saved, tensors)
    version, numbers, gauss = parts["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    legacy: Any = tuple(
        part.numpy().astype(np.uint32) if isinstance(part, torch.Tensor) else part for part in parts["numpy"]
    )
    np.random.set_state(legacy)  # noqa: NPY002
    torch.set_rng_state(parts["torch"])
    if parts["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(parts["cuda"][: torch.cuda.device_count()])
