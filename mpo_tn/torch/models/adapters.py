"""What PEFT has put into a model: the parts of its adapters, which stay as they are, and how it renames the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Children of PEFT's modules in which the model itself goes on; whatever else hangs below one is an adapter.
_BASE = frozenset({"base_layer", "original_module", "base_model", "model"})


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, or derived from one."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def adapter_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that are parts of adapters, or of copies that train in place of a module.

    Guarantee (adapters-told): what can be reached without going through an adapter belongs to the model.

    >>> adapter_modules(nn.Sequential(nn.Linear(2, 2)))
    set()
    """
    own: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in own:
            continue
        own.add(module)
        peft = is_of_peft(module)
        waiting += [child for name, child in module.named_children() if not peft or name in _BASE]
    return set(model.modules()) - own


def adapted_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that adapters are added to by name (``target_parameters``), which have to stay parameters."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        name = getattr(module, "parameter_name", None)
        if not is_of_peft(module) or not isinstance(name, str):
            continue
        base = module
        while is_of_peft(base) and isinstance(inner := getattr(base, "base_layer", None), nn.Module):
            base = inner
        found.update(parameter for own, parameter in base.named_parameters(recurse=False) if own == name)
    return found


def asked_names(names: Iterable[str]) -> list[str]:
    """The names a module answers to: its own, and those it had before PEFT wrapped the model or the module.

    >>> asked_names(["base_model.model.layers.0.q_proj.base_layer"])
    ['base_model.model.layers.0.q_proj.base_layer', 'layers.0.q_proj']
    """
    known = list(names)
    before = [
        ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer")
        for name in known
    ]
    return list(dict.fromkeys((*known, *before)))
