"""What compressing a model did: per unit, and in all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mpo_tn.planning.coverage import Coverage
from mpo_tn.planning.entries import FROBENIUS, ITEMSIZES
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.truncation import Report


@dataclass(frozen=True)
class LayerReport:
    """What one unit became. ``names`` are all the modules that use it; the first names the unit.

    ``report`` is the core's report on the padded matrix, of the truncation alone; ``error`` is also of the rounding of
    cores that are held in bits, measured on what they stand for. ``storage`` is the dtype of the other cores.
    Where the matrix was fitted to what its layer is given, ``metric`` says how and ``weighted`` is the relative error
    there; ``error`` is Frobenius in any case.

    Guarantee (used-part): ``error`` and ``norm`` are Frobenius norms of the weight as the module uses it, padding not
    counted, to ``4 eps(dtype) sqrt(size) norm``.
    """

    names: tuple[str, ...]
    spec: ModuleSpec
    error: float
    norm: float
    report: Report
    storage: str = "float32"
    metric: str = FROBENIUS
    weighted: float | None = None

    @property
    def name(self) -> str:
        """The name of the first occurrence."""
        return self.names[0]

    @property
    def bytes(self) -> int:
        """Bytes that the cores take."""
        return self.spec.bytes(ITEMSIZES[self.storage])

    @property
    def bits_per_weight(self) -> float:
        """All bits that the cores take over the number of weights."""
        return self.spec.bits_per_weight(ITEMSIZES[self.storage])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "name": self.name,
            "names": list(self.names),
            **self.spec.to_dict(),
            "kept": self.spec.kept,
            "parameters": self.spec.num_parameters,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "norm": self.norm,
            "floor": self.report.floor,
            "metric": self.metric,
            "weighted_error": self.weighted,
        }


@dataclass(frozen=True)
class RefinedBlock:
    """A block that was trained, and on held-back text its relative squared distance from the dense one's outputs.

    ``epoch`` is the one that was kept; after 0 of them nothing was.
    """

    name: str
    before: float
    after: float
    epoch: int


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`compress` did. Parameters count shared ones once.

    The errors of ``layers`` are those of the fits, before blocks were ``refined``. ``coverage`` names every parameter
    like a matrix that stays dense, of any module, with the reason, and says how much of all of them is in cores.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    parameters_before: int
    parameters_after: int
    refined: tuple[RefinedBlock, ...] = ()
    coverage: Coverage = field(default_factory=lambda: Coverage(0, ()))

    @property
    def matrix_before(self) -> int:
        """Dense parameters of the compressed matrices, bias apart."""
        return sum(layer.spec.out_features * layer.spec.in_features for layer in self.layers)

    @property
    def matrix_after(self) -> int:
        """Parameters of their cores."""
        return sum(layer.spec.num_parameters for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the compressed matrices: all bits that their cores take, scales included, over their dense weights."""
        return 8 * sum(layer.bytes for layer in self.layers) / self.matrix_before if self.matrix_before else 0.0

    @property
    def has_bits(self) -> bool:
        """Whether any core is held in bits."""
        return any(layer.spec.bits for layer in self.layers)

    @property
    def kept(self) -> float:
        """The kept ratio of the compressed matrices."""
        return self.matrix_after / self.matrix_before if self.matrix_before else 1.0

    @property
    def kept_model(self) -> float:
        """The kept ratio of the whole model."""
        return self.parameters_after / self.parameters_before

    @property
    def rel_error(self) -> float:
        """The error of all compressed matrices together, relative to their norm together."""
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error for layer in self.layers)) / norm if norm > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": self.skipped,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "kept": self.kept,
            "kept_model": self.kept_model,
            "bits_per_weight": self.bits_per_weight,
            "rel_error": self.rel_error,
            "coverage": self.coverage.to_dict(),
            **({"refined": [asdict(block) for block in self.refined]} if self.refined else {}),
        }

    def __str__(self) -> str:
        bits = f", {self.bits_per_weight:.2f} bits per weight" if self.has_bits else ""
        skipped = f"; {len(self.skipped)} matched modules skipped" if self.skipped else ""
        refined = ""
        if self.refined:
            before, after = (sum(values) / len(self.refined) for values in self._distances())
            refined = f"; {len(self.refined)} blocks refined, {before:.4g} -> {after:.4g} of their outputs on average"
        return (
            f"{len(self.layers)} matrices: kept {self.kept:.3f} of their parameters, {self.kept_model:.3f} of the "
            f"whole model ({self.parameters_before} -> {self.parameters_after}){bits}, relative error "
            f"{self.rel_error:.4f}; {self.coverage}{skipped}{refined}"
        )

    def _distances(self) -> tuple[list[float], list[float]]:
        return [block.before for block in self.refined], [block.after for block in self.refined]
