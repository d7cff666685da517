"""A model in evaluation mode for a while; afterwards every module is in the mode it was in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

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
