"""The port to a host library, which saves and loads models: what it is told, and who is told."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig


class Host(Protocol):
    """A library that saves and loads models.

    It is told once of each model. Structure changes afterwards (cuts, new cores) and is read from the modules when it
    is needed, so that nobody has to announce a change.
    """

    def attach(self, model: nn.Module, config: MPOConfig) -> None:
        """``model`` was just compressed by ``config``: from now on it is to be saved with its MPO modules.

        Whoever raises has changed nothing, because the modules are put back then.
        """

    def detach(self, model: nn.Module) -> None:
        """MPO modules of ``model`` were just replaced by dense ones; some may be left."""

    def conv1d(self, in_features: int, out_features: int) -> nn.Module:
        """A module of the kind ``"conv1d"``, the transposed linear layer of GPT-2; its parameters will be replaced."""
        ...


class NoHost:
    """Plain torch, where whoever holds a state dict keeps the structure, too."""

    def attach(self, model: nn.Module, config: MPOConfig) -> None:
        """Nothing is to be done."""

    def detach(self, model: nn.Module) -> None:
        """Nothing is to be done."""

    def conv1d(self, in_features: int, out_features: int) -> nn.Module:
        """There is none.

        Raises:
            MPOError: always.
        """
        raise MPOError("a Conv1D is a module of transformers, which is not installed: pip install transformers")


_host: Host = NoHost()


def current_host() -> Host:
    """The one that :func:`~mpo_tn.torch.compress` tells."""
    return _host


def use_host(host: Host) -> Host:
    """Tell ``host`` from now on. Returns the one before, to be put back.

    >>> mine = NoHost()
    >>> before = use_host(mine)
    >>> current_host() is mine, use_host(before) is mine
    (True, True)
    """
    global _host
    before, _host = _host, host
    return before
