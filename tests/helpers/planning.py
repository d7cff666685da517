"""What tests of plans for a budget share: models, text, and what a model takes in files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from helpers.calibrating import Batch, padded_batches
from helpers.tiny_models import EMBEDDINGS, tiny
from mpo_tn.planning.options import Option, options
from mpo_tn.progress import silent
from mpo_tn.torch import MPOConfig, Plan, plan
from mpo_tn.torch.models.calibrate import calibrate
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.torch.models.fitting import fit_matrix
from mpo_tn.torch.models.samples import Judge, Samples, is_biased, replaced
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.tradeoffs import Tradeoff, tradeoffs

TEXT = padded_batches(6)
LINEAR = r".*(query|key|value|dense|c_attn|c_proj|c_fc|_proj|_lin|lin1|lin2|ffn|ffn_output)"


def with_table(family: str) -> str:
    """A pattern for the linear layers and the word table, which the output embeddings share."""
    return rf"{LINEAR}|.*{EMBEDDINGS[family]}"


class Chain(nn.Module):
    """Layers one after another; those beyond ``used`` are never reached."""

    def __init__(self, layers: int = 3, used: int = 2, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.used = used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in list(self.layers)[: self.used]:
            x = torch.tanh(layer(x))
        return x


def vectors(count: int = 6, width: int = 24) -> list[Batch]:
    """Inputs of a :class:`Chain` whose mean is not zero, as is usual within a model."""
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(8, width, generator=generator) + 0.5} for _ in range(count)]


def planned(family: str = "bert", text: Any = None, **config: Any) -> tuple[Any, Plan]:
    """A tiny model and a plan of it."""
    model = tiny(family)
    given = {"bits_per_weight": 4.0, **config} if not {"size", "bits_per_weight"} & set(config) else config
    return model, plan(model, MPOConfig(**given), calibration=TEXT if text is None else text)


def bytes_in_files(model: Any, folder: Path) -> int:
    """Of all tensors that the folder of a model holds, without the headers of the files and the record of names."""
    model.save_pretrained(folder)
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - not a dictionary
        total += sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.uint8)  # no weight: the record
    return total


def measured(
    model: nn.Module, text: object, *, judged: bool = True, first: int | None = None, **choice: Any
) -> list[Tradeoff]:
    """The tradeoffs of all linear layers of a model, or of the first of them; ``choice`` goes to ``options``."""
    samples = Samples.of(text)  # type: ignore[arg-type]
    units = find_units(model, "all-linear")[0][:first]
    choices = [options(unit.kinds[0], *unit.matrix().shape, itemsize=4, **choice) for unit in units]
    known = calibrate(model, samples.batches, gradients=True)
    judge = Judge(model, samples.held_back) if judged else None
    return tradeoffs(units, choices, known, judge, 128, silent)


def log_ratios(model: nn.Module, found: Sequence[Tradeoff], tried: Callable[[Option], bool]) -> list[float]:
    """Of the options that are tried, in powers of two: what is expected of them over what they cost."""
    samples = Samples.of(TEXT)
    known, judge = calibrate(model, samples.batches, gradients=True), Judge(model, samples.held_back)
    ratios: list[float] = []
    for each in found:
        for option in each.options:
            if option.spec is not None and tried(option):
                own = known.of(each.unit.name) or Moments(0)
                fitted = fit_matrix(each.unit.matrix(), option.spec, own, biased=is_biased(each.unit), rounds=1)
                with replaced(each.unit, fitted.rebuilt(), fitted.shift):
                    ratios.append(math.log2(each.cost(option) / judge()))
    return ratios
