"""What PEFT is told of MPO modules as soon as it is imported: that LoRA goes on them, and what else does not.

PEFT has a door for layers it does not know, ``LoraConfig._register_custom_module``, on each configuration. It is opened
on every configuration, so that nobody has to know of it; what PEFT reads from a dense weight beside that (which layers
are linear, which module is the word table, on which device) is answered from the modules.
"""

# Doors with leading underscores, of a library without types.
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.layers.embedding import MPOEmbedding
from mpo_tn.torch.layers.layer import MPOLayer, MPOLinear
from mpo_tn.when_imported import wrap_once

_STARTS = ("gaussian",)
"""Of the ways to start an adapter that have a name, those that do not look at the dense weight."""


def open_door() -> None:
    """Have PEFT, which is imported, take MPO modules.

    Guarantee (peft-needs-nothing): importing ``mpo_tn.torch`` is enough, before PEFT or after it.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraConfig, LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    from mpo_tn.torch.hf.lora import MPOLoraEmbedding, MPOLoraLinear

    def registered(original: Callable[..., None]) -> Callable[..., None]:
        def post_init(self: Any) -> None:
            original(self)
            self._register_custom_module({MPOLinear: MPOLoraLinear, MPOEmbedding: MPOLoraEmbedding})

        return post_init

    wrap_once(LoraConfig, "__post_init__", registered)
    wrap_once(BaseTuner, "__init__", _explained)
    wrap_once(BaseTuner, "inject_adapter", _checked_injection)
    wrap_once(LoraModel, "_replace_module", _placed)
    wrap_once(LoraModel, "_check_merge_allowed", _checked_merge)
    wrap_once(PeftModel, "_setup_prompt_encoder", _with_table)


def _explained(original: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Some methods look for dense layers before they put anything anywhere."""
        try:
            original(self, model, peft_config, *args, **kwargs)
        except MPOError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            layers = [name for name, module in model.named_modules() if isinstance(module, MPOLayer)]
            if not layers or "LoraModel" in [cls.__name__ for cls in type(self).__mro__]:
                raise
            raise MPOError(
                f"{type(self).__name__} refused the model ({error}), in which {len(layers)} modules are held in cores, "
                f"for instance {layers[0]}: {_WORKS}"
            ) from error

    return init


_WORKS = (
    "use LoraConfig, which works on cores; or train the cores themselves, see mpo_tn.torch.freeze; or leave them out "
    "with exclude_modules"
)


def _checked_injection(original: Callable[..., Any]) -> Callable[..., Any]:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MPOLayer)}
        if layers:
            config = self.peft_config[adapter_name]
            _include_all_linear(config, model, layers)
            if kwargs.get("state_dict") is None:
                _check_adapter(self, config, model, layers)
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _include_all_linear(config: Any, model: Any, layers: Mapping[str, MPOLayer]) -> None:
    """``"all-linear"`` means linear layers in cores, too; PEFT would find those alone that are dense."""
    from peft.tuners import tuners_utils

    asked = getattr(config, "target_modules", None)
    if not isinstance(asked, str) or asked.lower() != "all-linear":
        return
    tuners = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, tuners_utils.BaseTunerLayer)
    )
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    own = {
        name for name, module in layers.items()
        if isinstance(module, MPOLinear) and module is not outputs and not name.startswith(tuners)
    }  # fmt: skip
    tuners_utils._maybe_include_all_linear_layers(config, model)  # which writes into it
    config.target_modules = {*(config.target_modules or ()), *own}


def _check_adapter(tuner: Any, config: Any, model: nn.Module, layers: Mapping[str, MPOLayer]) -> None:
    """Refuse before anything is changed what would need a dense weight.

    Raises:
        MPOError: it would; the message says of what, and what works instead.
    """
    from peft.tuners.adalora import AdaLoraModel
    from peft.tuners.lora import LoraModel

    if getattr(config, "trainable_token_indices", None) and any(isinstance(m, MPOEmbedding) for m in layers.values()):
        raise MPOError(
            "trainable_token_indices replaces rows of a word table, and this one is held in cores: leave it out, use "
            "LoRA on the table, or leave the table dense (exclude_modules)"
        )
    asked = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    if getattr(asked, "target_modules", None) is None:
        return
    found = [name for name in layers if tuner._check_target_module_exists(asked, name)]
    if not found:
        return
    what = f"{found[0]} and {len(found) - 1} more are" if len(found) > 1 else f"{found[0]} is"
    method = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(tuner, LoraModel) or isinstance(tuner, AdaLoraModel):
        raise MPOError(
            f"{method} computes with the dense weight of what it is put on, and {what} held in cores: {_WORKS}"
        )
    reached = next((name for name in found if not isinstance(layers[name], (MPOLinear, MPOEmbedding))), None)
    if reached is not None:
        raise MPOError(
            f"{reached} holds a weight in cores that its owner reads by itself, and an adapter cannot be put on it: "
            "leave it out with exclude_modules, or name modules that are called"
        )
    variants = [
        field.name for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]  # fmt: skip
    start = config.init_lora_weights
    if variants == ["use_dora"]:
        found = [name for name in found if not isinstance(layers[name], MPOLinear)]
        if found:
            raise MPOError(
                f"LoRA with use_dora works on linear layers in cores, and {found[0]} is a word table: leave it out of "
                "target_modules, or leave use_dora out"
            )
    elif variants:
        raise MPOError(
            f"LoRA with {variants[0]} computes with the dense weight, and {what} held in cores: leave {variants[0]} out"
        )
    if isinstance(start, str) and start not in _STARTS:
        raise MPOError(
            f"init_lora_weights={start!r} starts from the dense weight and changes it, and {what} held in cores: use "
            "True or 'gaussian'"
        )


def _placed(original: Callable[..., Any]) -> Callable[..., Any]:
    def replace_module(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MPOLayer):  # it has no weight to look for, and the adapter is on its device already
            setattr(parent, child_name, new_module)
        else:
            original(self, parent, child_name, new_module, child)

    return replace_module


def _checked_merge(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_merge_allowed(self: Any) -> None:
        """Refuse before the first layer is merged what some layer would refuse."""
        from mpo_tn.torch.hf.lora import INSTEAD, MPOLoraEmbedding, MPOLoraLinear, check_merge

        original(self)
        users: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, MPOLayer):
                users.setdefault(id(next(iter(module.cores))), []).append(name)
        for name, module in self.model.named_modules():
            base = getattr(module, "base_layer", None)
            if not isinstance(base, MPOLayer) or not hasattr(module, "active_adapters"):
                continue
            if not isinstance(module, (MPOLoraLinear, MPOLoraEmbedding)):
                raise MPOError(
                    f"{name} was compressed after the adapter was put on it, and cannot be merged: {INSTEAD}"
                )
            ranks = [module.r[own] for own in module.active_adapters if own in module.r]
            shared = users[id(next(iter(base.cores)))]
            if ranks and len(shared) > 1:
                raise MPOError(
                    f"{name} shares its cores with {next(own for own in shared if not own.startswith(name))}, which "
                    f"merging would change as well: {INSTEAD}"
                )
            if ranks:
                dora = any(module.use_dora.get(own, False) for own in module.active_adapters)
                check_merge(base, sum(ranks), name, dora=dora)

    return check_merge_allowed


def _with_table(original: Callable[..., Any]) -> Callable[..., Any]:
    def setup_prompt_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        """PEFT looks for the word table among weights by their shape, and asks it for its device."""
        with _tables_seen(self):
            result = original(self, *args, **kwargs)
        table = getattr(self, "word_embeddings", None)
        if isinstance(table, MPOEmbedding) and not hasattr(table, "weight"):
            self.word_embeddings = _Table(table)
        return result

    return setup_prompt_encoder


@contextmanager
def _tables_seen(model: nn.Module) -> Generator[None]:
    """Meanwhile tables in cores have a weight to be found by, of the right shape and device, without memory."""
    tables = [
        module for module in model.modules()
        if isinstance(module, MPOEmbedding) and "weight" not in module._parameters
    ]  # fmt: skip
    for table in tables:
        found_by = nn.Parameter(_stand_in(table), requires_grad=False)
        table._parameters["weight"], vars(table)["weight"] = found_by, found_by
    try:
        yield
    finally:
        for table in tables:
            del table._parameters["weight"], vars(table)["weight"]


def _stand_in(table: MPOEmbedding) -> torch.Tensor:
    """One number, looked at as a table."""
    core = table.cores.forward(packed=True)[0]
    one = torch.zeros(1, 1, device=core.device, dtype=core.dtype)
    return one.expand(table.num_embeddings, table.embedding_dim)


class _Table(nn.Module):
    """A table in cores, with a weight that tells its device and its size."""

    def __init__(self, table: MPOEmbedding) -> None:
        super().__init__()
        self._held = (table,)  # the model holds it already, under its own name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._held[0](ids)

    @property
    def weight(self) -> torch.Tensor:
        return _stand_in(self._held[0])
