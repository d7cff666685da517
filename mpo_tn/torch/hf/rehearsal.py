"""Whether a model that is about to be saved can be read again: its empty twin is built as it will be then."""

# transformers keeps what a model is saved and loaded by in attributes with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from mpo_tn.exceptions import MPOError, bounded_text
from mpo_tn.torch.hf.folder import dense_like
from mpo_tn.torch.hf.names import owned_state
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.hf.quantizer import MPOHfQuantizer

_WAY_OUT = "save it with torch.save, or make the MPO modules dense with mpo_tn.torch.to_dense first"


def rehearse(model: Any, config: MPOQuantizationConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model that would not come back from the files that are about to be written.

    Args:
        model: with MPO modules and a configuration that follows it.
        config: what ``config.json`` will say.
        state: the tensors that will be written, before transformers drops what it ties.

    A class that cannot be built of its configuration alone is warned of, once, and saved.

    Cost: the structure of the model is built on the meta device.

    Raises:
        MPOError: tensors that would be lost, or not found, or of another shape than the class has; tensors shared in a
            way that transformers cannot write.
    """
    written = _written(model, owned_state(model, state))
    try:
        again = dense_like(model)
    except Exception as error:  # a class that wants more than a configuration is loaded in ways unknown here
        _warn(type(model), error)
        return
    snapshot = MPOQuantizationConfig(config.config, dict(config.modules))
    try:
        MPOHfQuantizer(snapshot)._process_model_before_weight_loading(again, dtype=model.dtype)
    except MPOError as error:
        raise MPOError(f"this {type(model).__name__} could not be loaded again: {error}; {_WAY_OUT}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    lost = [name for name in written if name not in expected and _is_of_mpo(name, snapshot)]
    _refuse(
        model, lost, "is in MPO modules that a model of this class and configuration does not have, and would be lost",
        "take them out if they are not used, put them where the class has dense ones, merge adapters first "
        "(merge_and_unload), or save it with torch.save",
    )  # fmt: skip
    absent = [name for name in expected if name not in written and _is_due(model, again, name, written)]
    _refuse(
        model, absent, "is expected where this model holds something else, and would be drawn at random",
        f"put a module of that kind there, merge adapters first (merge_and_unload), or {_WAY_OUT}",
    )  # fmt: skip
    for name in written:
        if name in expected and expected[name] != written[name]:
            raise MPOError(
                f"{name} is {written[name]}, and the configuration of this {type(model).__name__} makes it "
                f"{expected[name]}: change model.config to say so (num_labels, vocab_size, ...), so that it can be "
                "loaded again"
            )


_warned: set[type] = set()


def _warn(cls: type, error: Exception) -> None:
    if cls not in _warned:
        _warned.add(cls)
        warnings.warn(
            f"a {cls.__name__} cannot be made of its configuration alone ({type(error).__name__}: "
            f"{bounded_text(str(error), 200)}), so whether it can be read again could not be tried before saving: load "
            "the folder once and compare",
            stacklevel=5,
        )


def _written(model: Any, state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of what transformers would write of a state."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        kept = remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        first = sorted(re.findall(r"'([^']+)'", str(error).partition("}")[0]))
        raise MPOError(
            f"modules of this {type(model).__name__} share tensors that its class does not tie, for instance "
            f"{' and '.join(first[:2])}: give each module its own with copy.deepcopy, so that it can be saved"
        ) from error
    return {name: shapes[name] for name in kept}


def _is_of_mpo(name: str, config: MPOQuantizationConfig) -> bool:
    return any(name.startswith(f"{module}.") for module in config.modules)


def _is_due(model: Any, again: Any, name: str, written: Mapping[str, Any]) -> bool:
    """Whether a tensor that is not written would be missing: not if a tie brings it back, or it was left out."""
    ignored: Iterable[str] = model._keys_to_ignore_on_load_missing or ()
    if any(re.search(pattern, name) for pattern in ignored):
        return False
    tied: Mapping[str, str] = again.all_tied_weights_keys
    source = tied.get(name, name)
    if any(other in written for other in (source, *(key for key, value in tied.items() if value == source))):
        return False
    return not _is_switched_off(model, name)


def _is_switched_off(model: Any, name: str) -> bool:
    """Whether a module on the way to a tensor is None: left out by whoever built the model, as poolers are.

    transformers draws it at random when the model is loaded, and says so; nothing that is there depends on it.
    """
    found = model
    for part in name.split(".")[:-1]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
        if found is None:
            return True
    return False


def _refuse(model: Any, names: list[str], why: str, way_out: str) -> None:
    if names:
        raise MPOError(f"{names[0]} {why} ({len(names)} tensors of this {type(model).__name__}): {way_out}")
