"""A model in evaluation mode for a while; afterwards every module is in the mode it was in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode within; a model that is in it already is not touched, so that what layers keep is kept.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> [module.training for module in model]
    [True, False]
    """
    flags = training_flags(model)
    if any(flags.values()):
        model.eval()
    try:
        yield
    finally:
        if any(flags.values()):
            set_training(flags)


def training_flags(model: nn.Module) -> dict[nn.Module, bool]:
    """Which modules are in training mode, outer ones first."""
    return {module: module.training for module in model.modules()}


def set_training(flags: dict[nn.Module, bool]) -> None:
    """Bring modules back to their modes, through ``train``, which some override."""
    for module, training in flags.items():
        module.train(training)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is run: where its first parameter is that has data; those without are filled in on the way.

    >>> device_of(nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1)))
    device(type='cpu')
    """
    found = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(found, torch.device("cpu"))
