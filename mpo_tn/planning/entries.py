"""UnitPlan and LeftDense: what a plan says of one matrix, and of one module that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, whole_number
from mpo_tn.planning.spec import ModuleSpec, sites_from_json, sites_to_json
from mpo_tn.truncate.quantize import GROUP

FROBENIUS, ACTIVATION = "frobenius", "activation"
"""In what the error of a matrix is made small: its entries, or what it does to the outputs on calibration text."""

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
"""Bytes a number, by storage."""


@dataclass(frozen=True)
class UnitPlan:
    """What one matrix becomes. ``names`` are all the modules that use it; the first names the unit.

    Args:
        names: see above.
        spec: kind, sizes, legs, and bonds; the bonds are the widest that come out, narrower where a ``tolerance`` is
            met by less. What the modules have besides the matrix (a bias, ties) is read from them.
        storage: the dtype of the cores that are not in bits, that of the weight.
        tolerance: the relative Frobenius error up to which bonds may be cut further, if there is one.
        bias: numbers that the modules hold beside the matrix.
        bias_bytes: and what they take; those of the storage if not given.
        metric: in what its error is made small, ``"frobenius"``, or ``"activation"``, which takes a calibration.

    Raises:
        MPOError: an unknown storage, a tolerance out of range, legs that multiply to more than twice a side, or bonds
            that are no whole numbers from 1 to the full bonds.
    """

    names: tuple[str, ...]
    spec: ModuleSpec
    storage: str
    tolerance: float | None = None
    bias: int = 0
    bias_bytes: int | None = None
    metric: str = FROBENIUS

    def __post_init__(self) -> None:
        if not self.names or not all(isinstance(name, str) and name for name in self.names):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(f"names={self.names!r} are not the names of the modules that use a matrix")
        if self.storage not in ITEMSIZES:
            raise MPOError(f"storage={self.storage!r} is not one of {', '.join(ITEMSIZES)}")
        if self.spec.bits and self.storage.startswith("complex"):
            raise MPOError(f"bits={list(self.spec.bits)} for a matrix in {self.storage}: only real ones have bits")
        if self.tolerance is not None and not (is_real(self.tolerance) and 0 < self.tolerance < 1):
            raise MPOError(f"tolerance={self.tolerance!r} must be a number above 0 and below 1, or null")
        if self.tolerance is not None:  # of whatever library, JSON takes it
            object.__setattr__(self, "tolerance", float(self.tolerance))
        if self.metric not in (FROBENIUS, ACTIVATION):
            raise MPOError(f"metric={self.metric!r} is neither {FROBENIUS} nor {ACTIVATION}")
        if self.metric == ACTIVATION and self.tolerance is not None:
            raise MPOError("a tolerance is a Frobenius error: leave it out, or set the metric to frobenius")
        _check_count("bias", self.bias)
        if self.bias_bytes is None:
            object.__setattr__(self, "bias_bytes", self.bias * self.itemsize)
        _check_count("bias_bytes", self.bias_bytes)
        sides = (self.spec.out_features, self.spec.in_features)
        for size, side in zip(self.spec.sites.shape, sides, strict=True):
            if size > 2 * side:
                raise MPOError(
                    f"legs multiply to {' x '.join(map(str, self.spec.sites.shape))} for a matrix of {sides[0]} x "
                    f"{sides[1]}: more than half of it would be padding"
                )
        for k, (bond, full) in enumerate(zip(self.spec.bonds, self.spec.sites.full_bonds, strict=True)):
            if whole_number(bond) is None or not 1 <= bond <= full:
                raise MPOError(
                    f"bond {k} is {bond!r}, and with legs out={self.spec.sites.out}, in_={self.spec.sites.in_} it can "
                    f"be from 1 to {full}"
                )

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0]

    @property
    def dense_parameters(self) -> int:
        """How many numbers the matrix has, bias apart."""
        return self.spec.out_features * self.spec.in_features

    @property
    def parameters(self) -> int:
        """How many numbers the cores will hold; with a tolerance at most."""
        return self.spec.num_parameters

    @property
    def itemsize(self) -> int:
        """Bytes a number."""
        return ITEMSIZES[self.storage]

    @property
    def bytes(self) -> int:
        """How many bytes the cores will take; with a tolerance at most."""
        return self.spec.bytes(self.itemsize)

    @property
    def bits_per_weight(self) -> float:
        """All bits that the cores will take, scales included, over the number of weights; with a tolerance at most."""
        return self.spec.bits_per_weight(self.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "names": list(self.names),
            "kind": self.spec.kind,
            "out_features": self.spec.out_features,
            "in_features": self.spec.in_features,
            "sites": sites_to_json(self.spec.sites),
            "bonds": list(self.spec.bonds),
            **self.spec.bits_to_dict(),
            "storage": self.storage,
            "tolerance": self.tolerance,
            **({} if self.metric == FROBENIUS else {"metric": self.metric}),
            "bias": self.bias,
            "bias_bytes": self.bias_bytes,
            "parameters": self.parameters,
            "bytes": self.bytes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnitPlan:
        """The inverse of :meth:`to_dict`. The counts may be left out; if they stand there they have to be right.

        Raises:
            MPOError: something is missing, unknown, or does not add up; it names the unit.
        """
        if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(f"a unit is {values!r} and no object with names, kind, sites, bonds, ...")
        names = values.get("names")
        if not isinstance(names, (list, tuple)) or not names:
            raise MPOError(f"a unit has names={names!r}: give a list of the modules that use the matrix")
        name = str(names[0])
        keys = {"names", "kind", "out_features", "in_features", "sites", "bonds", "storage", "bias"}
        check_keys(
            f"unit {name}",
            values,
            keys,
            keys | {"tolerance", "bits", "group", "metric", "bias_bytes", "parameters", "bytes"},
        )
        try:
            spec = ModuleSpec(
                values["kind"],
                sites_from_json(values["sites"]),
                tuple(values["bonds"]),
                values["out_features"],
                values["in_features"],
                bits=tuple(values.get("bits", ())),
                group=values.get("group", GROUP),
            )
            beside = values["bias"], values.get("bias_bytes"), values.get("metric", FROBENIUS)
            unit = cls(tuple(names), spec, values["storage"], values.get("tolerance"), *beside)
        except MPOError as error:
            raise MPOError(f"{name}: {error}") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise MPOError(f"{name}: something in its entry is of the wrong kind: {error}") from error
        for key, what in (("parameters", "numbers"), ("bytes", "bytes")):
            stated, counted = values.get(key), getattr(unit, key)
            if stated is not None and stated != counted:
                raise MPOError(
                    f'{name}: "{key}" is {stated}, and with these legs, bonds, bits and storage the cores hold '
                    f"{counted} {what}: correct it, or leave it out"
                )
        return unit


@dataclass(frozen=True)
class LeftDense:
    """A module whose own parameters stay as they are, and why.

    ``parameters`` counts those that no module before it holds; ``matched`` says that the configuration asked for it,
    and ``reason`` then why it cannot be. ``matrices`` are the parameters among them that are like matrices, by name and
    shape; None where that is not known.
    """

    name: str
    parameters: int
    bytes: int
    reason: str
    matched: bool = False
    matrices: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    def __post_init__(self) -> None:
        for what, kind, call in (
            ("name", str, "a string"),
            ("reason", str, "a string"),
            ("matched", bool, "a boolean"),
        ):
            if not isinstance(getattr(self, what), kind):
                raise MPOError(f"left, {self.name!r}: {what}={getattr(self, what)!r} must be {call}")
        for what in ("parameters", "bytes"):
            try:
                _check_count(what, getattr(self, what))
            except MPOError as error:
                raise MPOError(f"left, {self.name or 'the model itself'}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "reason": self.reason,
            "matched": self.matched,
            **({} if self.matrices is None else {"matrices": {own: list(shape) for own, shape in self.matrices}}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LeftDense:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: something is missing or unknown.
        """
        if not isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(f"an entry of left is {values!r} and no object with name, parameters, bytes and reason")
        keys = {"name", "parameters", "bytes", "reason"}
        check_keys(f"left {values.get('name', 'without a name')}", values, keys, keys | {"matched", "matrices"})
        matrices = values.get("matrices")
        if matrices is not None:
            values = {**values, "matrices": _read_matrices(values["name"], matrices)}
        return cls(**values)


def _read_matrices(name: object, matrices: object) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of parameters, as JSON holds them."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for own, shape in matrices.items() if isinstance(matrices, Mapping) else [(matrices, None)]:
        sizes = [whole_number(size) for size in shape] if isinstance(shape, (list, tuple)) else [None]
        if not isinstance(own, str) or any(size is None or size < 0 for size in sizes):
            raise MPOError(f"left, {name!r}: matrices={matrices!r} must have a list of sizes for each parameter")
        found.append((own, tuple(size for size in sizes if size is not None)))
    return tuple(found)


def check_keys(what: str, values: Mapping[str, Any], needed: Iterable[str], known: Iterable[str]) -> None:
    """Refuse an object of JSON without a key that it needs, or with one that this version does not know.

    Raises:
        MPOError: it is so.
    """
    missing, unknown = sorted(set(needed) - set(values)), sorted(set(values) - set(known))
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else ""
        has = f"has {', '.join(unknown)}, which this version does not know" if unknown else ""
        raise MPOError(f"{what} {lacks}{' and ' if lacks and has else ''}{has}")


def _check_count(what: str, value: object) -> None:
    number = whole_number(value)
    if number is None or number < 0:
        raise MPOError(f"{what}={value!r} must be a whole number of at least 0")


@dataclass(frozen=True)
class Alternative:
    """A plan that was compared with the one that was chosen.

    Args:
        name: what it is: ``"joint"``, ``"dense in 4 bits"``, ``"low rank in 3 bits"``, ...
        bytes: of the planned matrices.
        distance: D on held-back text once it is carried out; None if it was not, or gave what is no number.
        expected: what it was expected to be; None if nothing was.
    """

    name: str
    bytes: int
    distance: float | None = None
    expected: float | None = None

    def __post_init__(self) -> None:
        _check_count("bytes", self.bytes)
        for name in ("distance", "expected"):
            value = getattr(self, name)
            if value is not None and not (is_real(value) and math.isfinite(value)):
                raise MPOError(f"{name}={value!r} of the alternative {self.name!r} is no finite number")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"name": self.name, "bytes": self.bytes, "distance": self.distance, "expected": self.expected}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Alternative:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: something is missing, unknown or no number.
        """
        keys = {"name", "bytes", "distance", "expected"}
        check_keys("an alternative", values, keys, keys)
        return cls(str(values["name"]), values["bytes"], values["distance"], values["expected"])
