"""What ``config.json`` says of a compressed model, read from its modules whenever it is asked for."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.models.units import mpo_specs

FORMAT_VERSION = 1


# What torch puts between the names of modules where it wraps them in place: it takes the first two out of state dicts
# again, and whoever saves has to take out the third.
WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")


class MPOQuantizationConfig(QuantizationConfigMixin):
    """What ``config.json`` holds under ``quantization_config``.

    The configuration of a model reads ``modules`` from it whenever they are asked for (see :meth:`follow`), so bonds
    that change need no announcement. One without a model, from a file, pickled or copied alone, holds what is given.

    Args:
        config: the policy, an :class:`~mpo_tn.torch.MPOConfig` or its dictionary.
        modules: module name to :class:`~mpo_tn.planning.spec.ModuleSpec` or its dictionary; empty before compression.
        format_version: of this dictionary and of the names of the tensors.

    Raises:
        MPOError: written by a newer version, or damaged.
    """

    def __init__(
        self,
        config: MPOConfig | dict[str, Any] | None = None,
        modules: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "mpo",
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise MPOError(
                f"the model was written in format {format_version!r} and this version reads {FORMAT_VERSION}: upgrade "
                "mpo-tn"
            )
        self.quant_method: Any = quant_method
        self.config = config if isinstance(config, MPOConfig) else MPOConfig.from_dict(config or {})
        self._modules = {
            name: spec if isinstance(spec, ModuleSpec) else ModuleSpec.from_dict(spec)
            for name, spec in (modules or {}).items()
        }
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def model(self) -> nn.Module | None:
        """The model that ``modules`` are read from; None if there is none, or none any more."""
        return None if self._model is None else self._model()

    @property
    def modules(self) -> dict[str, ModuleSpec]:
        """The specs by name of the module: of the model as it is now; once it is gone, as they were read last."""
        model = self.model
        if model is not None:
            self._modules = {WRAPPED.sub("", name): spec for name, spec in mpo_specs(model).items()}
        return self._modules

    def follow(self, model: nn.Module) -> None:
        """Read ``modules`` from ``model`` from now on, which need not be built to the end yet.

        The reference is weak: a configuration that somebody keeps would otherwise keep the weights in memory.
        """
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: a snapshot. The quantizer, which a model carries along, makes it follow the copy."""
        return {**self.__dict__, "_modules": self.modules, "_model": None}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """So that ``dict(config)`` gives what :meth:`to_dict` gives; transformers' own lists the attributes."""
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """Like a dictionary's: transformers asks so when the configuration of a loaded model is passed on."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {
            "quant_method": "mpo",
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "modules": {name: spec.to_dict() for name, spec in self.modules.items()},
        }


def is_ours(config: Any) -> bool:
    """Whether a configuration of transformers says that its model has MPO modules."""
    found = vars(config).get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return method == "mpo"
