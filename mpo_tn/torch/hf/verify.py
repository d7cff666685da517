"""verify: whether a compressed folder is what it says, and what the model that it was made of made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import frobenius_norm
from mpo_tn.planning.entries import ITEMSIZES
from mpo_tn.planning.spec import PARAMETER, ModuleSpec, matrix_shape
from mpo_tn.progress import Progress, silent
from mpo_tn.storage.checkpoint import Checkpoint, StoredTensor, notes_of, open_checkpoint
from mpo_tn.storage.pieces import StoredPieces
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.hf.checks import check_record
from mpo_tn.torch.hf.folder import check_compressed, compressed_config, empty_model, model_before
from mpo_tn.torch.hf.held import held_by
from mpo_tn.torch.hf.record import NAME as RECORD_NAME
from mpo_tn.torch.hf.record import RECORD_NOTE, altered, read_record
from mpo_tn.torch.hf.snapshot import Names, local_folder, names_of_cores, read_names
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.parameter import dense_key
from mpo_tn.torch.models.compress import build, missed_norm
from mpo_tn.torch.models.stream_unit import UnitRecord, one_thread, tensor_of
from mpo_tn.truncate.spectra import float_floor

_FLOORS = 4.0
"""So many times what rounding the cores usually adds may an error be off."""

_CHANCE = 8.0
"""So many standard deviations may rounding point into the direction of the error."""

_WORK = 1e-6
"""Of the norm, what computing in other orders may change."""


@dataclass
class Verification:
    """What :func:`verify_folder` found.

    Attributes:
        differences: what is not as it should be, a phrase each.
        notes: what could not be looked at, and why.
        tensors: how many were looked at.
        errors: unit to the relative error recorded and the one found, where they were compared.
    """

    differences: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    tensors: int = 0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    @property
    def is_good(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "good": self.is_good,
            "differences": self.differences,
            "notes": self.notes,
            "tensors": self.tensors,
            "errors": {name: {"recorded": was, "found": found} for name, (was, found) in self.errors.items()},
        }


def verify_folder(
    out: str | Path, against: str | Path | None = None, *, progress: Progress | None = None
) -> Verification:
    """Compare a compressed folder with what is recorded of it and, if it is given, with the dense model.

    Looked at: the digest of every tensor, of ``config.json`` and of the record itself, and of all files if the folder
    was streamed; names, shapes, dtypes and bits of the cores by ``config.json``; against the dense model the error of
    every matrix, rebuilt and in double precision, beside the one that is recorded, and every tensor that stayed dense.

    Args:
        out: the compressed folder.
        against: the dense model that it was made of.
        progress: told of every matrix.

    Guarantee (verify-any-bit): of a streamed folder, any bit that is changed in any file is a difference; of one that
    ``save_pretrained`` wrote, in its weights, their index, ``config.json`` and the record.
    Guarantee (verify-errors): an error is a difference if ``|error**2 - recorded**2|`` is more than
    ``(4 floor)**2 + (8 floor / sqrt(size) + 1e-6 norm) error``, ``floor`` being what the storage dtype usually adds; so
    are dense tensors with other numbers than the model has.

    Cost: one tensor in memory at a time, one matrix in double precision; every byte is read.

    Raises:
        MPOError: no compressed folder at all, or no dense model to compare with.
    """
    folder = Path(out)
    found, tell = Verification(), progress or silent
    is_compressed = not _is_all_dense(folder)
    try:
        if is_compressed:
            check_compressed(folder)
    except MPOError as error:
        if not (folder / RECORD_NAME).is_file():
            raise
        found.differences.append(str(error))  # it was compressed once
        _check_record(folder, found)
        return found
    modules = _modules(folder, found) if is_compressed else {}
    try:
        there = open_checkpoint(folder)
    except MPOError as error:
        found.differences.append(str(error))
        return found
    found.tensors = len(there.tensors)
    tell(0, 1, "reading every byte")
    record = _check_record(folder, found)
    layers = _check_structure(there, modules, _prefixes(folder, there, modules), found)
    if modules:
        _check_saved(folder, there, modules, found)
    if record is not None:
        _check_plan(record, modules, found)
    if against is not None:
        with one_thread(), torch.no_grad():
            _check_against(there, layers, modules, record, against, found, tell)
    return found


def _is_all_dense(folder: Path) -> bool:
    """Whether of a streamed folder every matrix stayed dense."""
    try:
        if not (folder / RECORD_NAME).is_file():
            return False
        record = read_record(folder)
        return record["run"] is not None and all(unit["dense"] is not None for unit in record["units"])
    except MPOError:  # which is said when it is read
        return False


def _modules(folder: Path, found: Verification) -> dict[str, ModuleSpec]:
    try:
        listed = compressed_config(folder).quantization_config["modules"]
        return {name: ModuleSpec.from_dict(spec) for name, spec in listed.items()}
    except (MPOError, LookupError, TypeError, AttributeError, ValueError) as error:
        found.differences.append(f"config.json does not say what the modules are: {error}")
        return {}


def _check_record(folder: Path, found: Verification) -> dict[str, Any] | None:
    if not (folder / RECORD_NAME).is_file():
        named = {notes_of(path).get(RECORD_NOTE) for path in folder.glob("*.safetensors")} - {None}
        if named:
            found.differences.append(f"{RECORD_NAME} is missing: the weights say that it was written beside them")
        else:
            found.notes.append(f"{folder} has no {RECORD_NAME}, so nothing is known of its digests: save it again")
        return None
    try:
        record = read_record(folder)
    except MPOError as error:
        found.differences.append(str(error))
        return None
    try:
        found.differences += altered(folder, record)
    except MPOError as error:
        found.differences.append(str(error))
    return record


def _check_structure(
    there: Checkpoint, modules: Mapping[str, ModuleSpec], prefixes: Mapping[str, str], found: Verification
) -> dict[str, tuple[str, ModuleSpec]]:
    """The owners of cores, with what their tensors are called in the file before ``cores``."""
    layers: dict[str, tuple[str, ModuleSpec]] = {}
    seen: set[str] = set()
    for name, spec in modules.items():
        if spec.tied_to in modules:
            continue
        prefix = prefixes.get(name)
        if prefix is None:
            found.differences.append(f"{name} has no cores in the files")
            continue
        layers[name] = prefix, spec
        wanted = {
            f"{prefix}.{key}": tensor for key, tensor in _held(spec, there.tensors[_first(there, prefix)].dtype).items()
        }
        own = {key: stored for key, stored in there.tensors.items() if key.startswith(f"{prefix}.cores.")}
        seen |= own.keys()
        for key in sorted({*wanted, *own}):
            if key not in own:
                found.differences.append(f"{key} is missing: config.json says that {name} has it")
            elif key not in wanted:
                found.differences.append(f"{key} is in the files, and config.json does not say so")
            elif tuple(wanted[key].shape) != own[key].shape:
                found.differences.append(
                    f"{key} has the shape {list(own[key].shape)}, and by config.json {list(wanted[key].shape)}"
                )
            elif not _same_dtype(wanted[key], own[key], spec):
                dtype = str(wanted[key].dtype).removeprefix("torch.")
                found.differences.append(f"{key} is {own[key].dtype}, and by its bits {dtype}")
    found.differences += [
        f"{key} is a core of no module of config.json" for key in there.tensors if ".cores." in key and key not in seen
    ]
    return layers


def _check_saved(folder: Path, there: Checkpoint, modules: Mapping[str, ModuleSpec], found: Verification) -> None:
    """What was written beside the weights when they were saved: ties, bits and groups that shapes do not show."""
    try:
        held = held_by(sorted({stored.file for stored in there.tensors.values()}))
        check_record(held, modules, compressed_config(folder))
    except MPOError as error:
        found.differences.append(str(error))


def _held(spec: ModuleSpec, dtype: str) -> dict[str, torch.Tensor]:
    layer = build(spec, device="meta", dtype=getattr(torch, dtype) if dtype in ITEMSIZES else torch.float32)
    return {
        key: tensor for k, core in enumerate(layer.cores) for key, tensor in held_tensors(core, f"cores.{k}").items()
    }


def _same_dtype(wanted: torch.Tensor, own: StoredTensor, spec: ModuleSpec) -> bool:
    if wanted.is_floating_point() and not any(spec.core_bits):
        return own.dtype in ITEMSIZES
    return own.dtype == str(wanted.dtype).removeprefix("torch.") or (
        wanted.dtype == torch.float32 and own.dtype in ITEMSIZES
    )


def _first(there: Checkpoint, prefix: str) -> str:
    return next(key for key in there.tensors if key.startswith(f"{prefix}.cores."))


def _prefixes(folder: Path, there: Checkpoint, modules: Mapping[str, ModuleSpec]) -> dict[str, str]:
    """What the cores of modules are called in the files: as they are, or as transformers renames them."""
    before = {key.split(".cores.")[0] for key in there.tensors if ".cores." in key}
    found = {name: prefix for name in modules if (prefix := _prefix(before, name)) is not None}
    if all(name in found or spec.tied_to in modules for name, spec in modules.items()):
        return found
    try:
        model = model_before(folder)
    except MPOError:  # a configuration that is damaged beside what is looked at here
        return found
    return names_of_cores(model, sorted(before - {*found.values()}), modules) | found


def _prefix(before: set[str], name: str) -> str | None:
    """Among those of the files: as it is, or with or without the prefix of the base model."""
    if name in before:
        return name
    longer = [prefix for prefix in before if prefix.endswith(f".{name}")]
    shorter = name.partition(".")[2]
    return longer[0] if longer else shorter if shorter in before else None


def _check_plan(record: Mapping[str, Any], modules: Mapping[str, ModuleSpec], found: Verification) -> None:
    """What was recorded of the units is what ``config.json`` says."""
    for unit in record["units"]:
        if unit["dense"] is not None:
            continue
        for name, spec in unit["specs"].items():
            if name not in modules or modules[name] != ModuleSpec.from_dict(spec):
                found.differences.append(f"config.json says something else of {name} than was made of it")


def _check_against(
    there: Checkpoint, layers: Mapping[str, tuple[str, ModuleSpec]], modules: Mapping[str, ModuleSpec],
    record: Mapping[str, Any] | None, against: str | Path, found: Verification, tell: Progress,
) -> None:  # fmt: skip
    folder = local_folder(against)
    dense = open_checkpoint(folder)
    model = empty_model(folder)
    names = read_names(model, dense)
    run = None if record is None else record["run"]
    if run is not None and dense.fingerprint() != run["source"]:
        found.differences.append(
            f"{folder} is not the model that it was made of: its fingerprint is {dense.fingerprint()}, and "
            f"{run['source']} is recorded"
        )
    whole = names.whole
    units = {} if record is None else {u["name"]: UnitRecord.from_dict(u) for u in record["units"]}
    for done, (name, (prefix, spec)) in enumerate(layers.items()):
        tell(done, len(layers), f"rebuilding {name}")
        same = [name, *(other for other, own in modules.items() if own.tied_to == name)]
        stored = next((whole[dense_key(own)] for own in same if dense_key(own) in whole), None)
        if stored is None:
            found.differences.append(f"{name} is no matrix of {folder}")
            continue
        try:
            _check_error(there, name, prefix, spec, stored, names.dtypes[dense_key(name)], units.get(name), found)
        except (MPOError, RuntimeError, ValueError) as error:
            found.differences.append(f"{name} cannot be rebuilt: {str(error).splitlines()[0]}")
    _check_dense(there, layers, modules, names, units, found)


def _check_error(
    there: Checkpoint, name: str, prefix: str, spec: ModuleSpec, stored: StoredTensor | StoredPieces,
    dtype: torch.dtype,
    unit: UnitRecord | None, found: Verification,
) -> None:  # fmt: skip
    data = stored.read()
    if unit is not None and bytes_digest([data.data]) != unit.source:
        found.differences.append(f"{stored.key} is not the matrix that {name} was made of")
    del data
    weight = tensor_of(stored, dtype)
    matrix = weight.T if spec.kind == "conv1d" else weight
    if spec.kind == PARAMETER:
        matrix = weight.reshape(matrix_shape(weight.shape))
    if tuple(matrix.shape) != (spec.out_features, spec.in_features):
        found.differences.append(
            f"{name} is {spec.out_features} x {spec.in_features} by config.json, and {stored.key} is "
            f"{list(weight.shape)}"
        )
        return
    layer = build(spec, device="meta", dtype=dtype)
    parts = [key for k, core in enumerate(layer.cores) for key in held_tensors(core, f"cores.{k}")]
    held = {key: tensor_of(there.tensors[f"{prefix}.{key}"]) for key in parts}
    missing, unexpected = layer.load_state_dict(held, strict=False, assign=True)
    if [key for key in missing if key.startswith("cores.")] or unexpected:
        raise MPOError(f"its cores are {', '.join(held)}")
    error, norm = (
        missed_norm(matrix, list(layer.cores), (spec.out_features, spec.in_features))[0],
        frobenius_norm(matrix),
    )
    recorded = spec.rel_error if unit is None else unit.layer.error / norm if norm > 0 else 0.0
    again = error / norm if norm > 0 else 0.0
    if recorded is None:
        found.notes.append(f"{name}: its error is {again:.6g}, and none is recorded")
        return
    found.errors[name] = recorded, again
    floor = float_floor(str(dtype).removeprefix("torch."), len(spec.sites), norm)
    exact = spec.exact or again > recorded
    if not math.isfinite(again) or (exact and _off(error, recorded * norm, norm, floor, matrix.numel())):
        found.differences.append(f"{name} has an error of {again:.6g}, and {recorded:.6g} is recorded")


def _off(found: float, recorded: float, norm: float, floor: float, size: int) -> bool:
    """Whether two errors differ by more than the rounding of cores can do, whose square adds to that of the cut.

    The two are at right angles but for chance, which is ``1 / sqrt(size)``.
    """
    larger = max(found, recorded)
    chance = _CHANCE * floor / math.sqrt(size) + _WORK * norm
    return abs(found - recorded) * (found + recorded) > (_FLOORS * floor) ** 2 + chance * larger


def _check_dense(
    there: Checkpoint, layers: Mapping[str, tuple[str, ModuleSpec]], modules: Mapping[str, ModuleSpec], names: Names,
    units: Mapping[str, UnitRecord], found: Verification,
) -> None:  # fmt: skip
    """What stayed dense has the numbers of the model."""
    compressed = {dense_key(name) for name in modules}
    moved = {key.removeprefix("bias.") for unit in units.values() for key in unit.tensors if key.startswith("bias.")}
    in_cores = {key for name, parts in names.made.items() if name in compressed for key, _ in parts}
    pieces = {key: stored for key, stored in names.kept.items() if key not in in_cores}
    for name, stored in {**names.stored, **pieces}.items():
        if name in compressed or name in moved:
            continue
        own = there.tensors.get(stored.key) or there.tensors.get(name)
        if own is None:
            found.differences.append(f"{stored.key} is missing")
        elif own.shape != stored.shape or not torch.equal(
            _bits(tensor_of(own)), _bits(tensor_of(stored, getattr(torch, own.dtype)))
        ):
            found.differences.append(f"{own.key} has other numbers than the dense model")
    if not units:
        found.notes.append("biases that a fit has moved cannot be told from altered ones: it was not streamed")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """To compare NaN with NaN."""
    return tensor.reshape(-1).view(torch.uint8)
