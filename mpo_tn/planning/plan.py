"""Plan: what every matrix of a model becomes, decided before anything is done. Frozen, JSON, versioned.

Deciders make one (:func:`mpo_tn.torch.plan`), doers carry one out (:func:`mpo_tn.torch.compress`); in between it can be
printed, saved and edited. Nothing here looks at a weight.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.coverage import Coverage, DenseMatrix
from mpo_tn.planning.entries import ACTIVATION, Alternative, LeftDense, UnitPlan, check_keys
from mpo_tn.planning.patterns import folded, without_numbers
from mpo_tn.storage.files import checked_file, write_whole

PLAN_VERSION = 1
_FORMAT = "mpo_tn.plan"
_LARGEST = 2**28
"""Bytes of a file: a thousand times the largest plan."""


@dataclass(frozen=True)
class Plan:
    """What every matrix of a model becomes, and for everything that stays as it is the reason.

    Args:
        model: the class of the model, for messages.
        config: what the plan was made from; a compressed model carries it.
        units: the matrices, in the order in which they occur.
        left: the modules whose parameters stay as they are. Together the two name every module with parameters of its
            own, by which a plan of another model is told.
        considered: the plans it was compared with, the chosen one first, if a calibration chose it.
        calibration: what it was decided on, for whoever carries it out; not saved.

    Guarantee (plan-round-trip): ``Plan.load`` of what :meth:`save` wrote is equal to the plan, and saving that writes
    the same bytes.

    Raises:
        MPOError: a module that is planned twice.

    >>> from mpo_tn.planning.structure import structure
    >>> spec = structure("linear", 768, 3072, MPOConfig(bond=64))
    >>> plan = Plan("Model", MPOConfig(bond=64), (UnitPlan(("dense",), spec, "float32"),), ())
    >>> plan.parameters_before, plan.parameters_after, plan.bytes_after
    (2359296, 168336, 673344)
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    model: str
    config: MPOConfig
    units: tuple[UnitPlan, ...]
    left: tuple[LeftDense, ...]
    considered: tuple[Alternative, ...] = ()
    calibration: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in (*(name for unit in self.units for name in unit.names), *(part.name for part in self.left)):
            if name in seen:
                raise MPOError(f"the plan names {name or 'the model itself'} twice: leave one of the two")
            seen.add(name)

    @property
    def skipped(self) -> dict[str, str]:
        """What was asked for and cannot be, by name, with the reason."""
        return {part.name: part.reason for part in self.left if part.matched}

    @property
    def matrix_before(self) -> int:
        """Dense parameters of the planned matrices, bias apart."""
        return sum(unit.dense_parameters for unit in self.units)

    @property
    def matrix_after(self) -> int:
        """Parameters of their cores."""
        return sum(unit.parameters for unit in self.units)

    @property
    def kept(self) -> float:
        """The kept ratio of the planned matrices."""
        return self.matrix_after / self.matrix_before if self.matrix_before else 1.0

    @property
    def parameters_before(self) -> int:
        """Of the whole model, shared ones once."""
        return self.matrix_before + self._beside

    @property
    def parameters_after(self) -> int:
        """Of the whole model, shared ones once."""
        return self.matrix_after + self._beside

    @property
    def kept_model(self) -> float:
        """The kept ratio of the whole model."""
        return self.parameters_after / self.parameters_before if self.parameters_before else 1.0

    @property
    def bytes_before(self) -> int:
        """Of all parameters of the model."""
        return sum(unit.dense_parameters * unit.itemsize for unit in self.units) + self._bytes_beside

    @property
    def bytes_after(self) -> int:
        """Of all parameters of the model."""
        return sum(unit.bytes for unit in self.units) + self._bytes_beside

    @property
    def bits_per_weight(self) -> float:
        """Of the planned matrices: all bits that their cores take, scales included, over their dense weights."""
        return 8 * sum(unit.bytes for unit in self.units) / self.matrix_before if self.matrix_before else 0.0

    @property
    def has_bits(self) -> bool:
        """Whether any core is held in integers or in float16 whatever the dtype of its weight."""
        return any(unit.spec.bits for unit in self.units)

    @property
    def needs_calibration(self) -> bool:
        """Whether a matrix is to be fitted in the metric of its layer."""
        return any(unit.metric == ACTIVATION for unit in self.units)

    @property
    def is_exact(self) -> bool:
        """Whether the counts are what will come out; with a tolerance they are the most that can."""
        return all(unit.tolerance is None for unit in self.units)

    @property
    def coverage(self) -> Coverage | None:
        """What of the matrices will be in cores, and every other with the reason.

        None for a plan of a release that did not write down which parameters stay.
        """
        dense: list[DenseMatrix] = []
        for part in self.left:
            if part.matrices is None:
                return None
            dense += (DenseMatrix(f"{part.name}.{own}".lstrip("."), shape, part.reason) for own, shape in part.matrices)
        return Coverage(self.matrix_before, tuple(dense))

    @property
    def _beside(self) -> int:
        return sum(unit.bias for unit in self.units) + sum(part.parameters for part in self.left)

    @property
    def _bytes_beside(self) -> int:
        return sum(unit.bias_bytes or 0 for unit in self.units) + sum(part.bytes for part in self.left)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "format": _FORMAT,
            "version": PLAN_VERSION,
            "model": self.model,
            "config": self.config.to_dict(),
            "units": [unit.to_dict() for unit in self.units],
            "left": [part.to_dict() for part in self.left],
            **({"considered": [other.to_dict() for other in self.considered]} if self.considered else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: not a plan, of a newer version, or one that does not add up; the message names the unit.
        """
        if values.get("format") != _FORMAT:
            raise MPOError(f"its format is {values.get('format')!r}, not {_FORMAT}: it is no plan")
        version = whole_number(values.get("version"))
        if version is None or not 1 <= version <= PLAN_VERSION:
            raise MPOError(
                f"it has version {values.get('version')!r}, and this release of mpo-tn reads 1 to {PLAN_VERSION}: "
                "upgrade mpo-tn, or make the plan anew"
            )
        keys = {"format", "version", "model", "config", "units", "left"}
        check_keys("the plan", values, keys, keys | {"considered"})
        if not isinstance(values["model"], str):
            raise MPOError(f"model={values['model']!r} is not the name of a class")
        try:
            return cls(
                values["model"],
                MPOConfig.from_dict(values["config"]),
                tuple(UnitPlan.from_dict(unit) for unit in values["units"]),
                tuple(LeftDense.from_dict(part) for part in values["left"]),
                tuple(Alternative.from_dict(other) for other in values.get("considered", ())),
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise MPOError(f"it is damaged, something in it is of the wrong kind: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON to be read and edited; an earlier file is replaced, whole or not at all.

        Raises:
            MPOError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1)
        # Legs and bonds in one line each, as one edits them.
        text = re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
        write_whole(Path(path), f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote, edited or not.

        Raises:
            MPOError: no such file, no JSON, and as for :meth:`from_dict`; the message names the file.
        """
        file = checked_file(Path(path), "a plan, which mpo-tn plan writes", _LARGEST)
        try:
            values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
            if not isinstance(values, dict):
                raise MPOError("it is no JSON object, so it is no plan")
            return cls.from_dict(values)
        except OSError as error:
            raise MPOError(f"{path} could not be read ({error.strerror}): name a file that mpo-tn plan wrote") from None
        except MPOError as error:
            raise MPOError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise MPOError(f"{path}: it is no JSON ({error}): name a file that mpo-tn plan wrote") from error

    def rows(self) -> list[PlanRow]:
        """The units in lines, those that differ only in the numbers in their names taken together."""
        found: dict[tuple[Any, ...], list[UnitPlan]] = {}
        for unit in self.units:
            key = (without_numbers(unit.name), len(unit.names), unit.spec, unit.storage, unit.tolerance)
            found.setdefault(key, []).append(unit)
        return [PlanRow(folded([unit.name for unit in units]), tuple(units)) for units in found.values()]

    def reasons(self) -> dict[str, list[LeftDense]]:
        """What stays as it is by the reason why."""
        found: dict[str, list[LeftDense]] = {}
        for part in self.left:
            found.setdefault(part.reason, []).append(part)
        return found

    def __str__(self) -> str:
        most = "" if self.is_exact else "at most "
        bits = f", {most}{self.bits_per_weight:.2f} bits per weight" if self.has_bits else ""
        asked = f"; {len(self.skipped)} matched modules stay dense" if self.skipped else ""
        covers = "" if self.coverage is None else f"; {self.coverage}"
        return (
            f"{len(self.units)} matrices of {self.model}: {most}{self.kept:.3f} of their parameters{bits}, "
            f"{self.kept_model:.3f} of the whole model ({self.parameters_before} -> {self.parameters_after}, "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB){covers}{asked}"
        )


@dataclass(frozen=True)
class PlanRow:
    """Units of one structure: ``pattern`` is their name, a star where they differ."""

    pattern: str
    units: tuple[UnitPlan, ...]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MPOError(f'"{key}" stands twice in one object: leave one of the two')
        found[key] = value
    return found
