"""Export: a compressed model as a folder that transformers loads without this package.

Matrices of one core in 2 to 8 bits keep their bits, in the layout of compressed-tensors; all others are multiplied out.
"""

# transformers keeps what a model is saved by in attributes with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import PARAMETER
from mpo_tn.torch.hf.folder import dense_like, save_model
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.packing import Packed, pack, unpack
from mpo_tn.torch.layers.parameter import dense_key
from mpo_tn.torch.layers.quantized import buffer_kinds
from mpo_tn.torch.models.dense import dense_weight
from mpo_tn.torch.models.units import MPOUnit, mpo_units

FORMATS = ("compressed-tensors",)
"""What a model can be exported to."""

_LAYOUT = "pack-quantized"


@dataclass(frozen=True)
class ExportedMatrix:
    """One matrix in the folder.

    Attributes:
        names: of the modules that use it, the first occurrence first.
        shape: (out, in).
        bits: of the integers that are kept; None if the matrix is multiplied out.
        group: columns that share a scale in the folder; None if it is multiplied out.
        dtype: of the scales in the files, or of the numbers of the dense matrix.
        bytes: that it takes, scales included.
        note: why it is multiplied out, or why its groups are narrower than they were; else empty.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    bits: int | None
    group: int | None
    dtype: torch.dtype
    bytes: int
    note: str = ""

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "name": self.name, "names": list(self.names), "shape": list(self.shape), "bits": self.bits,
            "group": self.group, "dtype": _spelled(self.dtype), "bytes": self.bytes, "note": self.note,
        }  # fmt: skip


@dataclass(frozen=True)
class Export:
    """What a folder will hold: every matrix that is a chain of cores now, and the bytes of everything else.

    ``dtype`` is that of the model. ``fused`` says that experts are written as transformers holds them, all in one
    tensor, and not one by one: beside packed weights it reads experts one by one only if they are packed, too (5.23).
    """

    form: str
    dtype: torch.dtype
    matrices: tuple[ExportedMatrix, ...]
    other_bytes: int
    fused: bool = False

    @property
    def bytes(self) -> int:
        """Of all tensors that will be written; their names and sizes add about 100 bytes a tensor."""
        return self.other_bytes + sum(matrix.bytes for matrix in self.matrices)

    @property
    def kept(self) -> tuple[ExportedMatrix, ...]:
        """The matrices that keep their bits."""
        return tuple(matrix for matrix in self.matrices if matrix.bits is not None)

    @property
    def multiplied_out(self) -> tuple[ExportedMatrix, ...]:
        """The matrices that become dense."""
        return tuple(matrix for matrix in self.matrices if matrix.bits is None)

    @property
    def loss(self) -> str:
        """What loading loses beside rounding, as a sentence; empty if nothing."""
        if self.kept and self.dtype == torch.bfloat16:
            return (
                "Loaded in bfloat16, scales are rounded from float16 to it, by up to 2^-8 of themselves; loaded with "
                "dtype=torch.float32 they are exact."
            )
        return ""

    @property
    def remark(self) -> str:
        """What other programs may stumble over, as a sentence; empty if nothing."""
        if self.fused:
            return (
                "All experts of a layer are in one tensor, as transformers holds them and reads them beside packed "
                "weights; what wants a tensor an expert, as other servers do, does not read this folder."
            )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "format": self.form, "bytes": self.bytes, "other_bytes": self.other_bytes,
            "kept": [matrix.to_dict() for matrix in self.kept],
            "multiplied_out": [matrix.to_dict() for matrix in self.multiplied_out], "loss": self.loss,
            "fused": self.fused,
        }  # fmt: skip


def check_format(form: str) -> None:
    """Refuse a format that there is not.

    Raises:
        MPOError: it is none of :data:`FORMATS`.
    """
    if form not in FORMATS:
        raise MPOError(f"there is no format {form!r} to export to: name one of {', '.join(FORMATS)}")


def plan_export(model: Any, form: str) -> Export:
    """What :func:`write_export` would write of a compressed transformers model; no matrix is built.

    A matrix keeps its bits if it is one core in 2 to 8 bits, in a module that compressed-tensors knows, that shares it
    with no other, and that transformers can load without a dense weight; a :class:`ExportedMatrix` that does not says
    what is in the way. compressed-tensors reads no group that is short at the end, so groups that do not divide the
    columns are split into equal ones with the scales repeated, if that takes fewer bytes than the dense matrix.

    Args:
        model: of transformers, with MPO modules.
        form: one of :data:`FORMATS`.

    Cost: the structure of the dense model is built on the meta device.

    Raises:
        MPOError: an unknown format, a model without MPO modules.
    """
    check_format(form)
    units = mpo_units(model)
    dense = dense_like(model)
    tied: Mapping[str, str] = dense.all_tied_weights_keys
    keys = {*tied.keys(), *tied.values()}
    planned = {name: _planned(unit, keys) for name, unit in units.items()}
    for name in _read_when_initialised(dense, [name for name, matrix in planned.items() if matrix.bits is not None]):
        kind = type(dense.get_submodule(name)).__name__
        note = f"transformers cannot load this {kind} without a dense weight"
        planned[name] = _multiplied_out(units[name], note)
    matrices = tuple(replace(matrix, bytes=matrix.bytes * len(_keys(matrix, tied))) for matrix in planned.values())
    others = {tensor.data_ptr(): tensor.nbytes for tensor in _other_tensors(model).values()}
    fused = any(matrix.bits is not None for matrix in matrices) and _is_fused_on_loading(dense)
    return Export(form, model.dtype, matrices, sum(others.values()), fused)


def write_export(model: Any, planned: Export, source: str | Path, out: Path, *, overwrite: bool = False) -> None:
    """Write a folder that ``from_pretrained`` of plain transformers reads, with what else ``source`` holds.

    Args:
        model: the one that ``planned`` is of; it stays as it is.
        planned: by :func:`plan_export`.
        source: the folder of the compressed model.
        out: the folder to write, whole or not at all.
        overwrite: replace an earlier result.

    Guarantee (export-exact): the weights that plain transformers and compressed-tensors read, in float16, float32 or
    float64, are those of the model: bit for bit where bits are kept, rounded once to the dtype where they are
    multiplied out.
    Cost: the matrices that are multiplied out are in memory all at once, each computed in double precision.

    Raises:
        MPOError: ``out`` may not be written, or the disk is full; then nothing is left of it.
    """
    dense, units = dense_like(model), mpo_units(model)
    tied: Mapping[str, str] = dense.all_tied_weights_keys
    state = _other_tensors(model)
    for matrix in planned.matrices:
        unit = units[matrix.name]
        if matrix.bits is not None and matrix.group is not None:
            found = _packed_tensors(unit.modules[0], matrix.group, matrix.dtype)
            state |= {f"{matrix.name}.{own}": tensor for own, tensor in found.items()}
            continue
        weight = dense_weight(unit.modules[0], matrix.dtype)
        for k, keys in enumerate(_keys(matrix, tied)):
            # What it does not tie transformers refuses to write under two names.
            state |= dict.fromkeys(keys, weight.clone() if k else weight)
    if planned.kept:
        dense.config.quantization_config = _quantization_config(dense, planned.kept)
    save_model(dense, source, out, overwrite=overwrite, state=state, original_names=not planned.fused)


def _is_fused_on_loading(dense: Any) -> bool:
    """Whether weights of this model are made of several tensors of its files, as fused experts are."""
    return any(
        isinstance(each, WeightConverter) and any(pattern.endswith(".weight") for pattern in each.source_patterns)
        for each in get_model_conversion_mapping(dense)
    )


def _planned(unit: MPOUnit, tied: Collection[str]) -> ExportedMatrix:
    spec, names = unit.spec, _names(unit)
    bits = spec.core_bits[0]
    if len(spec.sites) > 1:
        return _multiplied_out(unit, f"a chain of {len(spec.sites)} cores")
    if bits is None or bits == 16:
        held = "float16" if bits == 16 else _spelled(unit.cores[0].dtype)
        return _multiplied_out(unit, f"one core in {held}, not in integers")
    if spec.kind == "conv1d":
        return _multiplied_out(unit, "compressed-tensors knows no Conv1D")
    if spec.kind == PARAMETER:
        return _multiplied_out(unit, "compressed-tensors knows no parameter that is not the weight of a layer")
    if len(names) > 1 or dense_key(unit.name) in tied:
        return _multiplied_out(unit, "compressed-tensors shares no weight between modules")
    shape, own = _shape(unit), unit.cores[0].dtype
    dtype = torch.float16 if own.itemsize == 2 else torch.float32
    group = shape[1] if shape[1] <= spec.group else math.gcd(shape[1], spec.group)
    sizes = {name: math.prod(size) * kind.itemsize for name, (size, kind) in _kinds(shape, bits, group, dtype).items()}
    bytes_ = sum(sizes.values())
    uneven = f"groups of {spec.group} do not divide {shape[1]} columns"
    if bytes_ >= math.prod(shape) * own.itemsize:
        return _multiplied_out(unit, f"{uneven}, and in groups of {group} it would take more bytes than dense")
    note = f"{uneven}: in groups of {group}" if shape[1] > spec.group != group else ""
    return ExportedMatrix(names, shape, bits, group, dtype, bytes_, note)


def _multiplied_out(unit: MPOUnit, note: str) -> ExportedMatrix:
    shape, dtype = _shape(unit), unit.cores[0].dtype
    return ExportedMatrix(_names(unit), shape, None, None, dtype, math.prod(shape) * dtype.itemsize, note)


def _shape(unit: MPOUnit) -> tuple[int, int]:
    return unit.spec.out_features, unit.spec.in_features


def _names(unit: MPOUnit) -> tuple[str, ...]:
    return tuple(name for names in unit.names for name in names)


def _keys(matrix: ExportedMatrix, tied: Mapping[str, str]) -> list[list[str]]:
    """The keys of its dense weight, those together that transformers ties: it writes such a weight once."""
    found: dict[str, list[str]] = {}
    for key in map(dense_key, matrix.names):
        found.setdefault(tied.get(key, key), []).append(key)
    return list(found.values())


def _kinds(
    shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of compressed-tensors for a matrix, with their shapes and dtypes."""
    kinds = buffer_kinds((1, *shape, 1), bits, group)
    return {name: (size, dtype if name == "weight_scale" else kind) for name, (size, kind) in kinds.items()}


def _packed_tensors(layer: MPOLayer, group: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix in the layout of compressed-tensors, without padding."""
    (core,) = layer.cores.forward(packed=True)
    assert isinstance(core, Packed)
    packed, scales = core.tensors
    rows, columns = layer.spec.out_features, layer.spec.in_features
    if (rows, columns) != layer.spec.sites.shape:
        packed = pack(unpack(packed, core.form.bits, core.form.columns)[:rows, :columns], core.form.bits)
    # Each group lies in one of the groups before, because its size divides theirs or there is only one.
    before = torch.arange(0, columns, group, device=scales.device) // core.form.group
    return {
        "weight_packed": packed,
        "weight_scale": scales[:rows, before].to(dtype),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _other_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model without its cores."""
    layers = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, MPOLayer)]
    inside = {f"{name}.cores" for name in layers}
    return {
        key: tensor for key, tensor in model.state_dict().items() if key.split(".cores.")[0] + ".cores" not in inside
    }


def _read_when_initialised(dense: Any, names: Iterable[str]) -> list[str]:
    """Of modules that will have no ``weight`` when they are loaded, those that transformers cannot load so.

    It initialises every module once weights are loaded. For most families it looks whether a linear layer has a weight,
    and it never looks whether an embedding has one.
    """
    weights = {name: dense.get_submodule(name)._parameters.pop("weight") for name in names}
    found: list[str] = []
    owners: dict[str, Any] = {}
    for name, module in dense.named_modules():
        is_model = isinstance(module, transformers.PreTrainedModel)
        owners[name] = owner = module if is_model else owners[name.rpartition(".")[0]]
        while True:
            try:
                with torch.no_grad():
                    owner._init_weights(module)
                break
            except AttributeError:
                inside = [other for other in weights if other == name or other.startswith(f"{name}." if name else "")]
                near = [other for other in inside if other == name or other.rpartition(".")[0] == name]
                if not inside:
                    break
                for other in near or inside:
                    dense.get_submodule(other)._parameters["weight"] = weights.pop(other)
                    found.append(other)
    return found


def _quantization_config(dense: Any, kept: Iterable[ExportedMatrix]) -> Any:
    """What ``config.json`` says of the matrices that keep their bits."""
    schemes: dict[tuple[int, int], list[str]] = {}
    for matrix in kept:
        assert matrix.bits is not None
        assert matrix.group is not None
        schemes.setdefault((matrix.bits, matrix.group), []).append(matrix.name)
    named = {name for names in schemes.values() for name in names}
    ignored = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and name not in named
    ]
    groups = {
        f"group_{k}": {
            "targets": targets(names, dense.base_model_prefix),
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
                "dynamic": False,
            },
            "format": _LAYOUT,
        }
        # The most bits first: asked to dequantize, transformers 5 reads all by the first group, and fails rather than
        # reads too few bits.
        for k, ((bits, group), names) in enumerate(sorted(schemes.items(), reverse=True))
    }  # fmt: skip
    return transformers.CompressedTensorsConfig(
        config_groups=groups,  # pyright: ignore[reportArgumentType]
        format=_LAYOUT,
        quantization_status="compressed",  # pyright: ignore[reportArgumentType]
        ignore=targets(ignored, dense.base_model_prefix),
    )


def targets(names: Iterable[str], prefix: str) -> list[str]:
    r"""Regular expressions for modules, as compressed-tensors reads them, one for all layers of a model.

    They hold for the base model as well as for a model with a head, whose modules have a prefix more.

    >>> targets(["bert.encoder.0.query", "bert.encoder.1.query", "pooler"], "bert")
    ['re:(bert\\.)?encoder\\.(0|1)\\.query$', 're:(bert\\.)?pooler$']
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        head, *rest = re.split(r"(?<=\.)(\d+)(?=\.)", name.removeprefix(f"{prefix}."), maxsplit=1)
        found.setdefault((head, *rest[1:]), []).extend(rest[:1])
    optional = rf"({re.escape(prefix)}\.)?" if prefix else ""
    patterns: list[str] = []
    for parts, numbers in found.items():
        between = f"({'|'.join(numbers)})" if len(numbers) > 1 else "".join(numbers)
        patterns.append(f"re:{optional}{between.join(map(re.escape, parts))}$")
    return patterns


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
