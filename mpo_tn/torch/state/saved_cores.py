"""save_cores and load_cores: only what was trained, in a small folder that belongs to one base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.storage.files import check_target, written_beside
from mpo_tn.storage.tensors import as_damaged, as_os_error
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.quantized import quantized_cores
from mpo_tn.torch.models.trainable import is_norm, occurrences
from mpo_tn.torch.models.units import mpo_specs, mpo_units
from mpo_tn.torch.state.host_values import host_copy, tensors_digest

CORES_VERSION = 1
_WEIGHTS, _DESCRIPTION = "cores.safetensors", "cores.json"
_WHICH = ("trainable", "auxiliary", "cores")
_LISTED = 3  # so many differences are spelled out


def save_cores(
    model: nn.Module, folder: str | Path, which: str = "trainable", *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write only what was trained, to be put back on the same base with :func:`load_cores`.

    Args:
        model: a model that was frozen with :func:`~mpo_tn.torch.freeze` and trained. The base is everything that is not
            written; save the compressed model itself once with ``save_pretrained`` to have it again.
        folder: gets ``cores.safetensors`` and ``cores.json``.
        which: ``"trainable"``: every trainable parameter, with the running statistics that some normalisations keep;
            ``"auxiliary"``: the cores but the central tensors; ``"cores"``: all cores.
        overwrite: replace an earlier result of this function.

    Returns:
        The names of what was written, shared tensors under the first of their names.

    Guarantee (cores-whole): the folder is there as a whole or not at all; if it raises, an earlier one is untouched.
    Guarantee (base-known): a digest of every frozen parameter, and of every core held in bits, that is not written goes
    along, so that a base where one has other bits is refused. What is neither frozen nor written
    (``which="auxiliary"``) may be anything on the base.

    Cost: one pass over the bytes of the model, one to two seconds for a GB.

    Raises:
        MPOError: nothing to write, a parameter without data, a folder that may not be written or replaced.

    >>> import tempfile, torch
    >>> from mpo_tn.torch import MPOConfig, compress, freeze
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 24))
    >>> _ = compress(model, MPOConfig(sites=3)), freeze(model)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     save_cores(model, place) == load_cores(model, place)
    True
    """
    if which not in _WHICH:
        raise MPOError(f"which={which!r} is not one of {', '.join(_WHICH)}")
    out = Path(folder)
    check_target(out, overwrite=overwrite, marker=_DESCRIPTION)
    present = _tensors(model)
    wanted = _wanted(model, which)
    if not wanted:
        raise MPOError(
            "nothing is trainable, so there is nothing to save: freeze sets what is"
            if which == "trainable"
            else f"the model has no MPO modules with cores for which={which!r}: compress it first"
        )
    statistics = _statistics(model)
    frozen = [
        name
        for name, tensor in present.items()
        if not tensor.requires_grad and name not in wanted and name not in statistics
    ]
    # Copies: safetensors refuses tensors that share memory, and a transposed one would be written with its strides.
    tensors = {name: host_copy(tensor) for name, tensor in present.items() if name in wanted}
    description = {
        "format": "mpo_tn.cores",
        "version": CORES_VERSION,
        "which": which,
        "base": str(getattr(model, "name_or_path", "")),
        "class": type(model).__name__,
        "modules": {name: spec.to_dict() for name, spec in _structure(model).items()},
        "saved": {name: _entry(tensor) for name, tensor in tensors.items()},
        "frozen": {name: _entry(present[name]) for name in frozen},
        "left_out": sorted(present.keys() - wanted - set(frozen)),
    }
    with written_beside(out) as temporary:
        with as_os_error():
            save_file(tensors, temporary / _WEIGHTS)
        (temporary / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return tuple(tensors)


def load_cores(model: nn.Module, folder: str | Path) -> tuple[str, ...]:
    """Put back what :func:`save_cores` wrote, on the base that it was trained on.

    Args:
        model: the compressed base: the same modules, bonds, dtypes and frozen numbers.
        folder: written by :func:`save_cores`.

    Returns:
        The names of what was put back.

    Guarantee (cores-bits): afterwards the written tensors are what they were, bit for bit; ``requires_grad`` is left as
    it is.
    Guarantee (cores-refused): if anything differs, or is damaged, the model is untouched.

    Cost: one pass over the bytes of the model, one to two seconds for a GB.

    Raises:
        MPOError: not such a folder, damaged, of a newer version; or another base, with what differs: other modules,
            other bonds (a model that was squeezed after it was saved), missing or further parameters, other shapes or
            dtypes, frozen parameters with other numbers.
    """
    place = Path(folder)
    description, tensors = _read(place)
    present = _tensors(model)
    # From cheap to dear, and what follows from a difference is not listed beside it.
    differences = (
        _other_modules(model, description["modules"])
        or _other_tensors(present, description)
        or [
            f"{name} is frozen and has other numbers"
            for name, entry in description["frozen"].items()
            if _entry(present[name]) != entry
        ]
    )
    if differences:
        more = len(differences) - _LISTED
        raise MPOError(
            f"{place} does not belong to this {type(model).__name__}: {'; '.join(differences[:_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}. It was saved from a {description['class']} on the base "
            f"{description['base'] or 'without a name'}: load it on that, with the same dtype"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            present[name].copy_(tensor)
    return tuple(description["saved"])


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by the first of their names, cores in bits, and the running statistics of normalisations."""
    found: dict[str, torch.Tensor] = {item.names[0]: item.parameter for item in occurrences(model)}
    for name, core in quantized_cores(model).items():
        found |= held_tensors(core, name)
    found |= _statistics(model)
    for name, tensor in found.items():
        check_loaded(tensor, name)
    return found


def _statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """What normalisations keep running."""
    found: dict[str, torch.Tensor] = {}
    kept = model.state_dict(keep_vars=True)
    for name, module in model.named_modules():
        if is_norm(module):
            buffers = {f"{name}.{own}".removeprefix("."): value for own, value in module.named_buffers(recurse=False)}
            found |= {full: value for full, value in buffers.items() if full in kept}
    return found


def _wanted(model: nn.Module, which: str) -> set[str]:
    items = occurrences(model)
    if which == "trainable":
        trainable = {item.names[0] for item in items if item.parameter.requires_grad}
        return trainable | _statistics(model).keys() if trainable else set()
    cores = {
        id(tensor)
        for unit in mpo_units(model, required=False).values()
        for k, core in enumerate(unit.cores)
        if which == "cores" or k != unit.spec.center
        for tensor in held_tensors(core, "").values()
    }
    return {name for name, tensor in _tensors(model).items() if id(tensor) in cores}


def _structure(model: nn.Module) -> dict[str, ModuleSpec]:
    """The specs of the MPO modules, without what was measured when they were made."""
    return {name: replace(spec, rel_error=None, exact=True) for name, spec in mpo_specs(model).items()}


def _other_modules(model: nn.Module, saved: Mapping[str, ModuleSpec]) -> list[str]:
    own = _structure(model)
    differences = [f"{name} is no MPO module in the model" for name in saved.keys() - own.keys()]
    differences += [f"{name} was not an MPO module" for name in own.keys() - saved.keys()]
    for name in saved.keys() & own.keys():
        a, b = own[name], saved[name]
        if a == b:
            continue
        if len(a.bonds) == len(b.bonds) and replace(a, bonds=b.bonds) == b:
            why = f"bonds {list(a.bonds)}, not {list(b.bonds)} (was the base squeezed since, or cut otherwise?)"
        else:
            changed = [key for key, value in a.to_dict().items() if value != b.to_dict()[key]]
            why = ", ".join(f"{key}={a.to_dict()[key]!r}, not {b.to_dict()[key]!r}" for key in changed)
        differences.append(f"{name} has {why}")
    return sorted(differences)


def _other_tensors(present: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> list[str]:
    known = {**description["saved"], **description["frozen"]}
    everything = {*known, *description["left_out"]}
    differences = [f"the model has no {name}" for name in sorted(everything - present.keys())]
    differences += [f"{name} was not in the model that was saved" for name in sorted(present.keys() - everything)]
    for name, (dtype, shape, _) in known.items():
        if name in present and (dtype, shape) != _kind(present[name]):
            own_dtype, own_shape = _kind(present[name])
            differences.append(f"{name} is {own_dtype} {own_shape} in the model, not {dtype} {shape}")
    return differences


def _kind(tensor: torch.Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _entry(tensor: torch.Tensor) -> list[Any]:
    """Dtype, shape, and a digest of the bytes."""
    return [*_kind(tensor), tensors_digest([tensor])]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The description and the tensors, checked against each other."""
    if not (folder / _DESCRIPTION).is_file():
        raise MPOError(f"{folder} has no {_DESCRIPTION}: name a folder that save_cores wrote")
    with as_damaged(folder, "save the cores again"):
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != "mpo_tn.cores":
            raise MPOError(f"{folder / _DESCRIPTION} is a {description['format']!r}, not mpo_tn.cores")
        if description["version"] != CORES_VERSION:
            raise MPOError(
                f"{folder} was written in version {description['version']!r} and this one reads {CORES_VERSION}: "
                "upgrade mpo-tn"
            )
        description["modules"] = {name: ModuleSpec.from_dict(values) for name, values in description["modules"].items()}
        saved: dict[str, Sequence[Any]] = description["saved"]
        for dtype, shape, digest in (*saved.values(), *description["frozen"].values()):
            if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(digest, str)):
                raise TypeError("an entry is not [dtype, shape, digest]")
        description |= {key: str(description[key]) for key in ("base", "class")}
        description["left_out"] = set(description["left_out"])
        tensors = load_file(folder / _WEIGHTS)
        damaged = sorted(tensors.keys() ^ saved.keys()) or [
            name for name, tensor in tensors.items() if _entry(tensor) != saved[name]
        ]
    if damaged:
        raise MPOError(f"{folder} is damaged: {damaged[0]} is not what was written; save the cores again")
    return description, tensors
