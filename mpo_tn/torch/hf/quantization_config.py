"""What ``config.json`` says of a compressed model, read from its modules whenever it is asked for."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from mpo_tn.exceptions import MPOError, clipped
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.models.units import mpo_specs

FORMAT_VERSION = 1
ENTRIES = frozenset({"quant_method", "format_version", "config", "modules"})
"""The entries of ``quantization_config``."""


# What torch puts between the names of modules where it wraps them in place: it takes the first two out of state dicts
# again, and whoever saves has to take out the third.
WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")


_DAMAGED = "config.json is damaged, save the model again"


def _read(name: str, read: Callable[[Any], Any], values: Any) -> Any:
    """What a dictionary of ``config.json`` stands for; whatever is wrong with it is said in one way, and shortly."""
    try:
        if not isinstance(values, dict | None):
            raise TypeError(f"it is a {type(values).__name__}, no dictionary")
        return read(values or {})
    except Exception as error:
        raise MPOError(f"quantization_config.{clipped(name)}: {clipped(str(error))}: {_DAMAGED}") from error


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
        if isinstance(format_version, bool) or format_version != FORMAT_VERSION:
            raise MPOError(
                f"the model was written in format {clipped(repr(format_version))} and this version reads "
                f"{FORMAT_VERSION}: upgrade mpo-tn"
            )
        self.quant_method: Any = quant_method
        self.config = config if isinstance(config, MPOConfig) else _read("config", MPOConfig.from_dict, config)
        if not isinstance(modules, dict | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise MPOError(f"modules of quantization_config are a {type(modules).__name__}, no dictionary: {_DAMAGED}")
        # Read when they are asked for: whoever knows the model can say before whether there are far too many.
        self._modules: dict[str, Any] = dict(modules or {})
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
        elif not all(isinstance(spec, ModuleSpec) for spec in self._modules.values()):
            self._modules = {
                name: spec if isinstance(spec, ModuleSpec) else _read(name, ModuleSpec.from_dict, spec)
                for name, spec in self._modules.items()
            }
        return self._modules

    @property
    def listed(self) -> int:
        """How many modules there are entries for."""
        return len(self._modules)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:  # fmt: skip
        """What ``config.json`` says.

        Raises:
            MPOError: an entry that this version does not know, or one of another type than it should have.
        """
        unknown = sorted(set(config_dict) - ENTRIES)
        if unknown:
            raise MPOError(
                f"quantization_config has the unknown entry {clipped(unknown[0])}: it is damaged or from a newer "
                "version"
            )
        found = cls(**config_dict)
        return (found, kwargs) if return_unused_kwargs else found

    def follow(self, model: nn.Module) -> None:
        """Read ``modules`` from ``model`` from now on, which need not be built to the end yet.

        The reference is weak: a configuration that somebody keeps would otherwise keep the weights in memory.
        """
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: a snapshot. The quantizer, which a model carries along, makes it follow the copy."""
        return {**self.__dict__, "_modules": self.modules if self._model else self._modules, "_model": None}

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
