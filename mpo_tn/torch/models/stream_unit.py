"""One matrix of a checkpoint, from its bytes to a file with its cores: the unit of work, wherever it is done."""

from __future__ import annotations

import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.storage.checkpoint import RawTensor, StoredTensor
from mpo_tn.storage.pieces import StoredPieces
from mpo_tn.storage.tensors import bytes_digest, read_tensors, write_tensors
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.models.allocator import give_back_large_blocks
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.torch.models.compress import factorise, fitted, outgrows, specs_of
from mpo_tn.torch.models.fitting import fit_matrix
from mpo_tn.torch.models.report import LayerReport
from mpo_tn.torch.models.samples import is_biased
from mpo_tn.torch.models.survey import DenseUnit
from mpo_tn.truncation import Report

FORMAT = "mpo_tn.unit"
VERSION = 1
MOMENTS_FORMAT = "mpo_tn.moments"
_CARRIED = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""What NumPy has no name for, and what carries its bits."""


@dataclass(frozen=True)
class UnitTask:
    """All that is needed to do one unit, in any process that sees the folders.

    Attributes:
        planned: what it becomes.
        unit: the modules, on the meta device.
        weight: where its numbers lie.
        biases: where those of its biases lie and in which dtype they are computed with, by parameter name of the model;
            needed where moments may move them.
        file: where the result goes.
        moments: files of :func:`write_moments`, which hold together what its layer is given; None for the Frobenius
            norm.
        versions: of the libraries that must do it.
        task: a digest of the plan and source that it belongs to.
        anchor: see :func:`~mpo_tn.torch.models.fitting.metric_of`, and
        rounds: :func:`~mpo_tn.torch.models.fitting.fit_matrix`.
    """

    planned: UnitPlan
    unit: DenseUnit
    weight: StoredTensor | StoredPieces
    biases: Mapping[str, tuple[StoredTensor | StoredPieces, str]]
    file: str
    moments: tuple[str, ...] | None
    versions: Mapping[str, str]
    task: str
    anchor: float = 0.0
    rounds: int = 1

    @property
    def name(self) -> str:
        """Of the unit."""
        return self.unit.name


@dataclass(frozen=True)
class UnitRecord:
    """What a unit became.

    Attributes:
        layer: its report.
        specs: the structure of every module that uses it, by first name.
        tensors: dtype, shape and size in bytes of what is in its file: ``cores.*``, and biases that moved, by ``bias.``
            and their name.
        source: digest of the bytes of the dense weight, put together if it lies in pieces.
        dense: why it stays dense, if its cores would not be smaller; then ``layer`` says what they would have been, and
            none are in its file.
    """

    layer: LayerReport
    specs: Mapping[str, ModuleSpec]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    source: str
    dense: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        layer = self.layer
        return {
            "name": layer.name,
            "names": list(layer.names),
            "specs": {name: spec.to_dict() for name, spec in self.specs.items()},
            "error": layer.error,
            "norm": layer.norm,
            "floor": layer.report.floor,
            "storage": layer.storage,
            "metric": layer.metric,
            "weighted": layer.weighted,
            "tensors": {key: [dtype, list(shape), size] for key, (dtype, shape, size) in self.tensors.items()},
            "source": self.source,
            "dense": self.dense,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnitRecord:
        """The inverse of :meth:`to_dict`."""
        specs = {name: ModuleSpec.from_dict(spec) for name, spec in values["specs"].items()}
        report = Report(values["error"], values["norm"], (), None, None, values["floor"])
        layer = LayerReport(
            tuple(values["names"]), specs[values["name"]], values["error"], values["norm"], report, values["storage"],
            values["metric"], values["weighted"],
        )  # fmt: skip
        tensors = {key: (dtype, tuple(shape), int(size)) for key, (dtype, shape, size) in values["tensors"].items()}
        return cls(layer, specs, tensors, values["source"], values["dense"])


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    try:
        own = metadata.version("mpo-tn")
    except metadata.PackageNotFoundError:  # used from a checkout
        own = "unknown"
    return {"mpo-tn": own, "torch": torch.__version__, "numpy": np.__version__}


def seen_from_here(folders: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The versions of this process, and which of the folders it does not see."""
    return versions(), [folder for folder in folders if not Path(folder).is_dir()]


@contextmanager
def one_thread() -> Generator[None]:
    """BLAS in one thread: sums come in one order, whatever the machine and whoever else works beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def do_unit(task: UnitTask) -> str:
    """Read the weight, make its cores, write them with the report; returns the name of the unit.

    Guarantee (unit-whole): the file is there complete or not at all.

    Raises:
        MPOError: the weight has values that are not finite, changed, or cannot be seen here; other versions here; the
            disk is full. The message names the unit.
    """
    here = versions()
    if here != dict(task.versions):
        asked, own = (", ".join(f"{k} {v}" for k, v in own.items()) for own in (task.versions, here))
        raise MPOError(
            f"{task.name}: the worker on {socket.gethostname()} has {own}, and the run was started with {asked}: their "
            "last digits may differ; install the same versions everywhere"
        )
    if not Path(task.file).parent.is_dir():
        raise MPOError(
            f"{task.name}: the worker on {socket.gethostname()} does not see {Path(task.file).parent}: every worker "
            "needs the folders of source and result under the same paths"
        )
    if _is_done(task):  # by a worker that died before its answer was heard
        return task.name
    give_back_large_blocks()
    try:
        with one_thread(), torch.no_grad():
            _do(task)
    except MPOError as error:
        raise MPOError(f"{task.name}: {error}".replace(f"{task.name}: {task.name}: ", f"{task.name}: ")) from error
    except MemoryError as error:
        raise MPOError(f"{task.name}: no memory is left for it: use fewer workers") from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise MPOError(f"{task.name}: no memory is left for it: use fewer workers ({error})") from error
    return task.name


def _is_done(task: UnitTask) -> bool:
    try:
        return Path(task.file).exists() and read_unit(Path(task.file), task.task)[0].layer.name == task.name
    except MPOError:
        return False


def tensor_of(stored: StoredTensor | StoredPieces, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor itself, on the host; cast if it is floating point."""
    return as_tensor(stored.dtype, stored.shape, stored.read(), dtype)


def as_tensor(dtype: str, shape: tuple[int, ...], data: np.ndarray, cast: torch.dtype | None = None) -> torch.Tensor:
    """Bytes as a tensor on the same memory, cast if it is floating point and of another dtype."""
    own = getattr(torch, dtype)
    found = torch.from_numpy(data).view(own).reshape(shape) if data.size else torch.empty(shape, dtype=own)
    return found.to(cast) if cast is not None and found.is_floating_point() else found


def raw_tensor(part: RawTensor) -> torch.Tensor:
    """What :func:`raw` was made of, on the same memory."""
    return as_tensor(part.dtype, part.shape, part.data)


def raw(tensor: torch.Tensor) -> RawTensor:
    """A tensor as bytes, on the same memory if it is contiguous."""
    name = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return RawTensor(name, tuple(tensor.shape), data)


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array of its shape, which carries the bits where NumPy has no such dtype."""
    return _carried(raw(tensor))


def _carried(part: RawTensor) -> np.ndarray:
    return part.data.view(_CARRIED.get(part.dtype, part.dtype)).reshape(part.shape)


def _do(task: UnitTask) -> None:
    data = task.weight.read()
    source = bytes_digest([data.data])
    weight = as_tensor(task.weight.dtype, task.weight.shape, data, task.unit.weight.dtype)
    del data
    unit = replace(task.unit, weight=nn.Parameter(weight, requires_grad=False))
    shift: torch.Tensor | None = None
    if task.moments is None:
        layer, cores = factorise(task.planned, unit)
    else:
        known = read_moments(task.moments)
        fit = fit_matrix(
            unit.matrix(), task.planned.spec, known, anchor=task.anchor, biased=is_biased(unit), rounds=task.rounds
        )
        layer, cores, shift = fitted(task.planned, unit, fit)
    dense = outgrows(task.planned, layer)
    if dense is not None:
        cores, shift = [], None
    held = {key: tensor for k, core in enumerate(cores) for key, tensor in held_tensors(core, f"cores.{k}").items()}
    if shift is not None:
        for name, (stored, dtype) in task.biases.items():
            bias = tensor_of(stored, getattr(torch, dtype))
            held[f"bias.{name}"] = (bias + shift).to(bias.dtype)
    raws = {key: raw(tensor) for key, tensor in held.items()}
    found = UnitRecord(
        layer,
        {names[0]: spec for names, spec in zip(unit.names, specs_of(unit, layer.spec), strict=True)},
        {key: (part.dtype, part.shape, part.data.nbytes) for key, part in raws.items()},
        source,
        dense,
    )
    record = {"format": FORMAT, "version": VERSION, "task": task.task, **found.to_dict()}
    write_tensors(Path(task.file), {key: _carried(part) for key, part in raws.items()}, record)


def read_unit(path: Path, task: str) -> tuple[UnitRecord, dict[str, RawTensor]]:
    """What :func:`do_unit` wrote.

    Raises:
        MPOError: no such file, damaged, or of another run.
    """
    arrays, record = read_tensors(path, FORMAT, VERSION)
    if record["task"] != task:
        raise MPOError(f"{path} belongs to another run")
    found = UnitRecord.from_dict(record)
    raws = {
        key: RawTensor(dtype, shape, arrays[key].reshape(-1).view(np.uint8))
        for key, (dtype, shape, _) in found.tensors.items()
    }
    return found, raws


_KINDS = ("second", "cross", "outer", "rows", "mean", "dense_mean")


def write_moments(path: Path, known: Moments) -> None:
    """Write what is known of one layer, float64, for whoever fits its matrix."""
    found: dict[str, Any] = {kind: getattr(known, kind) for kind in _KINDS}
    arrays = {kind: tensor.numpy() for kind, tensor in found.items() if tensor is not None}
    write_tensors(path, arrays, {"format": MOMENTS_FORMAT, "version": VERSION, "tokens": known.tokens})


def read_moments(paths: Sequence[str]) -> Moments:
    """What :func:`write_moments` wrote to several files, together: what a unit shares with others, and its own.

    Raises:
        MPOError: no such file, or damaged.
    """
    tokens, found = list[int](), dict[str, torch.Tensor]()
    for path in paths:
        arrays, record = read_tensors(Path(path), MOMENTS_FORMAT, VERSION)
        tokens.append(record["tokens"])
        found |= {kind: torch.from_numpy(array) for kind, array in arrays.items()}
    return Moments(tokens[0], **found)
