"""Compressing while a dense model is loaded: of each weight cores are made as soon as it is read, and it is dropped."""

# transformers types what it hands to operations by Any; the tables of a module have names with a leading underscore.
# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.torch.layers.cores import Core
from mpo_tn.torch.models.compress import Made, factorise, outgrows, put_made
from mpo_tn.torch.models.decide import plan, units_of_plan
from mpo_tn.torch.models.report import CompressionReport, LayerReport
from mpo_tn.torch.models.survey import DenseUnit


@dataclass(frozen=True)
class _Done:
    """What became of a weight; ``place`` is in its place until all is loaded, unless it stays dense."""

    planned: UnitPlan
    layer: LayerReport
    cores: list[Core]
    place: nn.Parameter | None


class OnLoad:
    """The matrices of a model that is being loaded, and what became of those that were read.

    A weight that is done is replaced by one number that is as large as it to whoever asks for its shape: transformers
    ties it, moves it and finds it loaded like any other. It stays dense, and is done in :meth:`finish`, where the
    operations of transformers make more than one weight of a tensor, where the files hold it under several tied names,
    and where it is loaded in another shape, dtype or place than the model has.

    Args:
        model: dense, on the meta device.
        config: as for :func:`mpo_tn.torch.compress`.
        dtype: in which the model is loaded; a weight that the model has in another by itself is done in :meth:`finish`.

    Guarantee (on-load-same-model): the model is bit for bit what :func:`mpo_tn.torch.compress` makes of the loaded
    dense one, in as many threads.
    Guarantee (on-load-memory): beside the cores, and what stays dense, there is one dense weight at a time and what
    making cores of it takes.

    Raises:
        MPOError: as :func:`mpo_tn.torch.plan`, before anything is read.
    """

    def __init__(self, model: Any, config: MPOConfig, dtype: torch.dtype | None) -> None:
        self._config = config
        with _tied(model):
            owned = {unit.weight: (planned, unit) for planned, unit in units_of_plan(model, plan(model, config))}
            self._units = {
                name: owned[parameter]
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter in owned and parameter.dtype == dtype
            }
        self._asked: dict[str, set[str]] = {}
        self._done: dict[str, _Done] = {}
        self._failed: Exception | None = None

    def takes(self, name: str) -> bool:
        """Whether cores are made of the parameter of this name when it is read; asked of all before one is read."""
        if name not in self._units:
            return False
        self._asked.setdefault(self._units[name][1].name, set()).add(name)
        return True

    def read(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What is put into the place of a weight that was read."""
        if name not in self._units:
            return weight
        planned, unit = self._units[name]
        as_planned = weight.shape == unit.weight.shape and weight.dtype == unit.weight.dtype
        if not as_planned or self._asked[unit.name] != {name}:
            del self._units[name]  # so that its shape is looked at
            return weight
        if self._failed is None:
            try:
                done = self._make(planned, unit, weight)
            except Exception as error:  # transformers would make a line of its report of it, and go on
                self._failed = error
            else:
                self._done[unit.name] = done
                return weight if done.place is None else done.place
        return _stand_in(weight, unit.weight.requires_grad)

    def finish(self, model: nn.Module) -> CompressionReport:
        """Put the cores into the model that was loaded, and make those that are still missing.

        Raises:
            MPOError: as :func:`mpo_tn.torch.compress`; the model tied weights otherwise than its configuration says.
        """
        if self._failed is not None:
            raise self._failed
        decided = plan(model, self._config)

        def make(planned: UnitPlan, unit: DenseUnit) -> Made:
            done = self._done.pop(unit.name, None)
            if done is None or (done.place is not None and done.place is not unit.weight):
                return *factorise(planned, unit), None
            if done.planned != planned:
                raise MPOError(
                    "its weights are tied otherwise once they are loaded than the configuration says: load the model "
                    "without quantization_config, and compress it then"
                )
            return done.layer, done.cores, None

        return put_made(model, decided, units_of_plan(model, decided), make)

    def _make(self, planned: UnitPlan, unit: DenseUnit, weight: torch.Tensor) -> _Done:
        needs_grad = unit.weight.requires_grad
        try:
            with torch.no_grad():
                layer, cores = factorise(planned, replace(unit, weight=nn.Parameter(weight, requires_grad=needs_grad)))
        except MPOError as error:
            raise MPOError(f"{unit.name}: {error}") from error
        if outgrows(planned, layer) is not None:
            return _Done(planned, layer, [], None)
        return _Done(planned, layer, cores, _stand_in(weight, needs_grad))


@contextmanager
def _tied(model: Any) -> Generator[None]:
    """With the ties that it will have: transformers makes them once all is read."""
    before: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None]] = []
    for target, source in model.all_tied_weights_keys.items():
        (owner, _, name), (source_owner, _, source_name) = target.rpartition("."), source.rpartition(".")
        own, lent = (model.get_submodule(path)._parameters for path in (owner, source_owner))
        if own.get(name) is not None and lent.get(source_name) is not None:  # a head may be taken off
            before.append((own, name, own[name]))
            own[name] = lent[source_name]
    try:
        yield
    finally:
        for own, name, parameter in reversed(before):
            own[name] = parameter


def _stand_in(weight: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """As large as a weight, and one number."""
    return nn.Parameter(weight.new_zeros(()).expand(weight.shape), requires_grad=requires_grad)


class Factorise(ConversionOps):
    """What transformers calls with each weight that is to become cores, once it is read."""

    def __init__(self, on_load: OnLoad) -> None:
        self._on_load = on_load

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """The same names, with what is put in the places of their weights."""
        found: dict[str, Any] = {}
        for name in tuple(input_dict):
            value = input_dict.pop(name)  # nobody else holds it
            found[name] = self._on_load.read(name, value[0] if isinstance(value, list) else value)
        return found
