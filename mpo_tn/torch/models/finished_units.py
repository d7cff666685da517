"""Units that are done, each from its file, put into a model on disk in the place of the dense ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mpo_tn.fit.metric import dense
from mpo_tn.linalg import widen
from mpo_tn.torch.layers.quantized import QuantizedCore
from mpo_tn.torch.models.compress import build
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.samples import replaced
from mpo_tn.torch.models.stream_unit import UnitRecord, raw_tensor, read_unit
from mpo_tn.torch.models.survey import DenseUnit, survey_named


class FinishedUnits:
    """What of a model on disk is done.

    Args:
        weights: of the model.
        names: of the units.
        file_of: where a unit is, by its name and whether it is fitted after those before it.
        task: a digest of the run.
    """

    def __init__(
        self, weights: WeightsOnDisk, names: Iterable[str], file_of: Callable[[str, bool], Path], task: str
    ) -> None:
        self.weights, self.file_of, self.task = weights, file_of, task
        self.units = {unit.name: unit for unit in survey_named(weights.model, set(names)).units}

    @contextmanager
    def put(self, names: Iterable[str], *, anchored: bool) -> Generator[None]:
        """With the matrices that the cores of units stand for, and the biases that moved, in the places of theirs.

        Of a unit that is not fitted after those before it, it is the one that is fitted on its own.

        Raises:
            MPOError: a file is missing or damaged.
        """
        with ExitStack() as stack:
            for name in names:
                unit = self.units[name]
                for module in unit.modules:
                    stack.enter_context(self.weights.loaded(module))
                path = self.file_of(name, anchored)
                path = path if path.exists() else self.file_of(name, False)
                record, tensors = read_unit(path, self.task)
                held = {key: raw_tensor(part) for key, part in tensors.items()}
                if record.dense is None:
                    weight = unit.modules[0].weight
                    assert isinstance(weight, nn.Parameter)
                    stack.enter_context(self._changed(replace(unit, weight=weight), record, held))
            yield

    @contextmanager
    def _changed(self, unit: DenseUnit, record: UnitRecord, held: dict[str, torch.Tensor]) -> Generator[None]:
        biases = {
            self.weights.model.get_parameter(key.removeprefix("bias.")): tensor
            for key, tensor in held.items()
            if key.startswith("bias.")
        }
        with replaced(unit, rebuilt(record, held, unit.weight.dtype)):
            before = {bias: bias.data for bias in biases}
            try:
                for bias, tensor in biases.items():
                    bias.data = tensor
                yield
            finally:
                for bias, data in before.items():
                    bias.data = data


def rebuilt(record: UnitRecord, held: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) that the cores in a file stand for, in double precision."""
    spec = record.layer.spec
    layer = build(spec, device="meta", dtype=dtype)
    layer.load_state_dict({k: t for k, t in held.items() if k.startswith("cores.")}, strict=False, assign=True)
    wide = [core.dequantize(torch.float64) if isinstance(core, QuantizedCore) else widen(core) for core in layer.cores]
    return dense([core.detach() for core in wide])[: spec.out_features, : spec.in_features]
