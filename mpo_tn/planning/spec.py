"""ModuleSpec: the structure of one compressed module, and what several keep together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, list_text, whole_number
from mpo_tn.sites import Sites
from mpo_tn.truncate.quantize import GROUP, check_bits, packed_bytes

_LARGEST = 2**63 - 1
PARAMETER = "parameter"
"""The kind of a weight that is reached through its parameter, because its module computes with it in its own way."""


def matrix_shapes(shape: Sequence[int]) -> list[tuple[int, int]]:
    """The matrices that a tensor of this shape can be looked at as, its first axes being the rows.

    >>> matrix_shapes((8, 3, 5))
    [(8, 15), (24, 5)]
    """
    return [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape))]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """That of these matrices which is nearest to a square one; of two that are as near, the one with more rows.

    Experts (8, 14336, 4096) are rows of one matrix with 4096 columns, so that they share what is beside the rows.

    >>> matrix_shape((8, 14336, 4096)), matrix_shape((1024, 16, 64)), matrix_shape((768, 3, 16, 16))
    ((114688, 4096), (1024, 1024), (768, 768))
    """
    return max(matrix_shapes(shape), key=lambda sides: (min(sides), sides[0]))


def sites_to_json(value: Any) -> Any:
    """Legs as JSON can hold them; anything else as it is."""
    return {"out": list(value.out), "in": list(value.in_)} if isinstance(value, Sites) else value


def sites_from_json(value: Any) -> Any:
    """The inverse of :func:`sites_to_json`."""
    return Sites(tuple(value["out"]), tuple(value["in"])) if isinstance(value, Mapping) else value


def check_core_bits(bits: object, group: object) -> tuple[int, int]:
    """Bits that a core can be held in, integers of 2 to 8 or 16 for float16, and a group of columns.

    Raises:
        MPOError: out of range.
    """
    if whole_number(bits) == 16:
        return 16, check_bits(8, group)[1]
    try:
        return check_bits(bits, group)
    except MPOError as error:
        raise MPOError(f"{error}, or 16 for float16") if "bits=" in str(error) else error from None


@dataclass(frozen=True)
class ModuleSpec:
    """The structure of one compressed module, enough to build it empty, and the error that was made.

    ``kind`` is ``"linear"``, ``"conv1d"`` (GPT-2's transposed linear), ``"embedding"``, or ``"parameter"``: a weight
    that the module which owns it reads by itself, as fused experts are. ``out_features`` and ``in_features`` are the
    sizes the module had; the legs may multiply to more (zero padding, cropped again). For an embedding they are the
    number of ids and the width. A parameter has any ``shape``, whose first axes together are the rows and whose last
    ones the columns. ``tied_to`` names the module whose cores are used.

    ``bits`` says for each core how it is held: 2 to 8, integers with a scale in float16 for every ``group`` columns of
    its matrix (left out, in right); 16, float16; None, the dtype of the weight. Empty stands for None throughout.

    >>> spec = ModuleSpec("linear", Sites((384,), (1536,)), (), 384, 1536, bits=(4,))
    >>> spec.bytes(itemsize=4), spec.bits_per_weight(itemsize=4)
    (304144, 4.125...)
    """

    kind: str
    sites: Sites
    bonds: tuple[int, ...]
    out_features: int
    in_features: int
    bias: bool = False
    padding_idx: int | None = None
    tied_to: str | None = None
    rel_error: float | None = None
    exact: bool = True
    bits: tuple[int | None, ...] = ()
    group: int = GROUP
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "conv1d", "embedding", PARAMETER):
            raise MPOError(f"kind={self.kind!r} is not linear, conv1d, embedding or parameter")
        self._check_types()
        rows, columns = self.sites.shape
        if len(self.bonds) != len(self.sites) - 1:
            raise MPOError(f"bonds={list_text(self.bonds)} do not fit {len(self.sites)} sites")
        if self.out_features > rows or self.in_features > columns:
            raise MPOError(f"legs multiply to {rows} x {columns}, less than {self.out_features} x {self.in_features}")
        if self.bits and len(self.bits) != len(self.sites):
            raise MPOError(f"bits={self.bits} are not one for each of {len(self.sites)} cores")
        if self.shape and (
            self.kind != PARAMETER or (self.out_features, self.in_features) not in matrix_shapes(self.shape)
        ):
            raise MPOError(
                f"a {self.kind} of {self.out_features} x {self.in_features} has no shape {self.shape}: only a "
                "parameter has one, whose first axes multiply to the rows and whose others to the columns"
            )
        held = [None if bits is None else check_core_bits(bits, self.group)[0] for bits in self.bits]
        object.__setattr__(self, "bits", tuple(held) if any(held) else ())
        object.__setattr__(self, "group", check_core_bits(16, self.group)[1] if self.bits else GROUP)

    def _check_types(self) -> None:
        for legs in (self.sites.out, self.sites.in_):
            size = 1
            for leg in legs:  # before they are multiplied as whole numbers of any length
                size *= leg
                if size > _LARGEST:
                    raise MPOError(f"{self.sites!r} multiply to more than a tensor can hold")
        for name in ("out_features", "in_features"):
            if (whole_number(getattr(self, name)) or 0) < 1:
                raise MPOError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        if not all((whole_number(bond) or 0) >= 1 for bond in self.bonds):
            raise MPOError(f"bonds={list_text(self.bonds)} must be whole numbers of at least 1")
        for name in ("bias", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise MPOError(f"{name}={getattr(self, name)!r} is neither true nor false")
        padding = None if self.padding_idx is None else whole_number(self.padding_idx)
        if self.padding_idx is not None and (padding is None or not 0 <= padding < self.out_features):
            raise MPOError(f"padding_idx={self.padding_idx!r} is none of the {self.out_features} ids")
        if not isinstance(self.tied_to, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(f"tied_to={self.tied_to!r} is no name of a module")
        if self.rel_error is not None and not (is_real(self.rel_error) and not self.rel_error < 0):
            raise MPOError(f"rel_error={self.rel_error!r} is no error")

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The shapes of the cores."""
        around = (1, *self.bonds, 1)
        return tuple((around[k], out, in_, around[k + 1]) for k, (out, in_) in enumerate(self.sites))

    @cached_property
    def center(self) -> int:
        """The index of the central tensor, the core with the most entries; the others are the auxiliary tensors.

        Of several largest cores it is the middle one of an odd number of sites if that is among them, else the first.
        It follows from the bonds, so cutting them far enough can move it.

        >>> ModuleSpec("linear", Sites((2, 3, 2), (2, 2, 2)), (4, 4), out_features=12, in_features=8).center
        1
        """
        entries = [math.prod(shape) for shape in self.core_shapes]
        middle = len(entries) // 2
        if len(entries) % 2 and entries[middle] == max(entries):
            return middle
        return entries.index(max(entries))

    @property
    def num_parameters(self) -> int:
        """How many numbers the cores hold."""
        return self.sites.num_parameters(self.bonds)

    @property
    def auxiliary_parameters(self) -> int:
        """How many numbers the auxiliary tensors hold."""
        return self.num_parameters - math.prod(self.core_shapes[self.center])

    def bytes(self, itemsize: int) -> int:
        """Bytes that the cores take, scales included, where a number of the weight's dtype takes ``itemsize``."""
        total = 0
        for (left, out, in_, right), bits in zip(self.core_shapes, self.core_bits, strict=True):
            rows, columns = left * out, in_ * right
            if bits is None or bits == 16:
                total += rows * columns * (itemsize if bits is None else 2)
            else:
                total += packed_bytes(rows, columns, bits, self.group)
        return total

    def bits_per_weight(self, itemsize: int) -> float:
        """All bits that the cores take over the number of weights of the matrix."""
        return 8 * self.bytes(itemsize) / (self.out_features * self.in_features)

    @property
    def core_bits(self) -> tuple[int | None, ...]:
        """``bits``, one for each core in any case."""
        return self.bits or (None,) * len(self.sites)

    @property
    def kept(self) -> float:
        """The kept ratio of this matrix, bias apart."""
        return self.num_parameters / (self.out_features * self.in_features)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; of bits it speaks where there are any."""
        plain = {**asdict(self), "sites": sites_to_json(self.sites), "bonds": list(self.bonds)}
        del plain["bits"], plain["group"], plain["shape"]
        return plain | self.bits_to_dict() | ({"shape": list(self.shape)} if self.shape else {})

    def bits_to_dict(self) -> dict[str, Any]:
        """``bits`` and ``group`` where there are any."""
        return {"bits": list(self.bits), "group": self.group} if self.bits else {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModuleSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: a key this version does not know, or one that is missing.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        missing = sorted({"kind", "sites", "bonds", "out_features", "in_features"} - set(values))
        if unknown or missing:
            raise MPOError(
                f"a module entry has unknown keys {unknown} and lacks {missing}: the file is damaged or from a newer "
                "version"
            )
        plain = dict(values)
        plain["sites"] = sites_from_json(values["sites"])
        for name in ("bonds", "bits", "shape"):
            plain[name] = tuple(values.get(name, ()))
        return cls(**plain)


def kept_ratio(specs: Iterable[ModuleSpec]) -> float:
    """Parameters of the cores over those of the dense matrices, bias apart; one spec for each matrix.

    >>> half, tenth = (ModuleSpec("linear", Sites((20, 1), (1, 20)), (bond,), 20, 20) for bond in (5, 1))
    >>> half.kept, tenth.kept, kept_ratio([half, tenth])
    (0.5, 0.1, 0.3)
    """
    given = list(specs)
    return sum(spec.num_parameters for spec in given) / sum(spec.out_features * spec.in_features for spec in given)
