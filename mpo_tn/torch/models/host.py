"""The port to a host library, which saves and loads models."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mpo_tn.planning.config import MPOConfig

after_compress: list[Callable[[nn.Module, MPOConfig], None]] = []


def on_compressed(callback: Callable[[nn.Module, MPOConfig], None]) -> None:
    """Call ``callback(model, config)`` after every :func:`compress`; the transformers hook attaches itself here."""
    after_compress.append(callback)


_after_cut: list[Callable[[nn.Module], None]] = []


def on_cut(callback: Callable[[nn.Module], None]) -> None:
    """Call ``callback(model)`` when bonds have changed; the transformers hook renews its copies of the specs."""
    _after_cut.append(callback)


def specs_changed(model: nn.Module) -> None:
    """Tell those who keep copies of the specs."""
    for callback in _after_cut:
        callback(model)
