"""Classes of anybody's with ``PyTorchModelHubMixin``: their folders, when they hold MPO modules.

The mixin writes the tensors of a model and the arguments that it was made with; when it reads them again it makes a
dense model, and takes of the file what happens to fit, without a word. So the structure goes with the tensors, in one
more of them, under the key of a dense weight and of a shape that no weight has: without this package loading fails.
"""

# safetensors has no types for what it is handed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mpo_tn.exceptions import MPOError, clipped
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.hf.sentinel import sentinel_key
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.parameter import place_of
from mpo_tn.torch.models.compress import build
from mpo_tn.torch.models.places import put
from mpo_tn.torch.models.units import mpo_specs

_START = '{"mpo_tn.mixin":1,'
_DAMAGED = "the file is damaged, or it is not of this class and these arguments: save the model again"


def saving(original: Callable[..., Any]) -> Callable[..., Any]:
    """``PyTorchModelHubMixin._save_pretrained``, with the structure of the MPO modules that are there.

    Guarantee (mixin-as-it-is): ``save_pretrained`` and ``from_pretrained`` of a class with this mixin give the tensors,
    the ties and the outputs back, bit for bit, or raise; without ``import mpo_tn.torch`` loading raises.
    """

    def _save_pretrained(self: Any, save_directory: Path) -> Any:
        model: nn.Module = self.module if hasattr(self, "module") else self  # as the mixin has it
        modules = mpo_specs(model)
        if not modules:
            return original(self, save_directory)
        told = {"mpo_tn.mixin": 1, "modules": {name: spec.to_dict() for name, spec in modules.items()}}
        text = json.dumps(told, separators=(",", ":"))
        assert text.startswith(_START)
        key = sentinel_key(modules)

        def adding(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, _: Any) -> None:
            if prefix == "":
                state[key] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

        handle = model.register_state_dict_post_hook(adding)
        try:
            return original(self, save_directory)
        finally:
            handle.remove()

    return _save_pretrained


def loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """``PyTorchModelHubMixin._load_as_safetensor``, into the MPO modules that the file tells of. See :func:`saving`."""

    def _load_as_safetensor(cls: Any, model: nn.Module, model_file: str, *args: Any, **kwargs: Any) -> Any:
        found = _told(model_file)
        if found is None:
            return original(cls, model, model_file, *args, **kwargs)
        key, modules, shapes = found
        _place(model, modules)
        _check(model, shapes)

        def taking(_: nn.Module, state: dict[str, torch.Tensor], *__: Any) -> None:
            state.pop(key, None)

        handle = model.register_load_state_dict_pre_hook(taking)
        try:
            return original(cls, model, model_file, *args, **kwargs)
        finally:
            handle.remove()

    return _load_as_safetensor


def _told(path: str) -> tuple[str, dict[str, ModuleSpec], dict[str, tuple[int, ...]]] | None:
    """What a file tells of MPO modules, and under which key, with the shapes of its tensors; None if it does not."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            for key, shape in shapes.items():
                if len(shape) == 1 and file.get_slice(key).get_dtype() == "U8":
                    text = file.get_tensor(key).numpy().tobytes()
                    if text.startswith(_START.encode()):
                        listed = json.loads(text)["modules"]
                        return key, {name: ModuleSpec.from_dict(spec) for name, spec in listed.items()}, shapes
    except SafetensorError:
        return None  # the mixin says what it thinks of it
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise MPOError(f"{path} tells wrongly of its MPO modules ({clipped(str(error))}): {_DAMAGED}") from error
    return None


def _place(model: nn.Module, modules: dict[str, ModuleSpec]) -> None:
    """Put empty MPO modules where the file has them."""
    built: dict[str, MPOLayer] = {}
    names = dict(model.named_modules(remove_duplicate=False))
    for name, spec in modules.items():
        place = place_of(name)
        owner = names.get(name if place is None else place[0])
        weight = None if owner is None else owner._parameters.get("weight" if place is None else place[1])  # pyright: ignore[reportPrivateUsage]
        if owner is None or weight is None or (spec.kind == PARAMETER) != (place is not None):
            raise MPOError(f"{clipped(name)} is held in cores in the file, and {type(model).__name__} has no such "
                           f"weight: {_DAMAGED}")  # fmt: skip
        cores = list(built[spec.tied_to].cores) if spec.tied_to in built else None
        built[name] = build(spec, cores, device=weight.device, dtype=weight.dtype)
        same = [name] if place is not None else [other for other, module in names.items() if module is owner]
        put(model, dict.fromkeys(same, built[name]))


def _check(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a file without a core of the model, under any of the names of it, or with one of another shape."""
    state = model.state_dict(keep_vars=True)
    read = {id(tensor) for key, tensor in state.items() if shapes.get(key) == tuple(tensor.shape)}
    for key, tensor in state.items():
        owner = key.split(".cores.")[0]
        if ".cores." in key and id(tensor) not in read and _is_layer(model, owner):
            raise MPOError(f"{clipped(key)} is not in the file, or of another shape: {_DAMAGED}")


def _is_layer(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name), MPOLayer)
    except AttributeError:
        return False
