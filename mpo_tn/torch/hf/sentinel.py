"""What makes a saved folder fail loudly where this package is not imported, and a record of what was saved.

Without ``import mpo_tn.torch`` transformers skips the unknown quantizer with a warning, and would go on with random
weights. Two entries stop it: a text in ``config.json`` where it reads the name of the weight file, and a tensor under a
dense key, of a shape that no dense model can take. The tensor is the record: as text, the names of what was saved, and
what of ``config.json`` the shapes of tensors do not show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_utils import unwrap_model

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.hf.quantization_config import is_ours
from mpo_tn.torch.layers.parameter import dense_key

_START = "this model is compressed by mpo-tn"
GUARD = (
    f"{_START}: `import mpo_tn.torch` before from_pretrained (pip install 'mpo-tn[torch]'), and load it whole; see its "
    "README.md"
)
"""Where transformers looks for the name of the weight file: it refuses one with another ending, and says the name."""

_KEY = "transformers_weights"
RECORD = "mpo_tn.record"
"""The key of the record where no dense key can hold it."""

_MAGIC = '{"mpo_tn":1,'
# Numbers and names in a configuration by which a model computes, and which change no shape of a weight, or none that
# is always there: heads, layers, sizes, epsilons, activations.
_COUNTED = re.compile(
    r"(^|_)(heads?|layers?|groups?|experts?)$|head_(dim|size)$|^(d_kv|d_model|n_embd|n_inner|hidden_size|intermediate_size)$"
    r"|vocab_size$"
    r"|eps(ilon)?$|(^|_)act(ivation)?(_fn|_function)?$|^feed_forward_proj$|^position_embedding_type$"
)


def is_guard(value: object) -> bool:
    """Whether it is :data:`GUARD`, of this version or another."""
    return isinstance(value, str) and value.startswith(_START)


class _WeightsName:
    """``transformers_weights`` of every configuration: as it is, but the guard of a model of ours is no file name.

    transformers keeps the entry among the attributes of a configuration, reads it when it looks for weights and takes
    it out when it saves; this lets the guard be there, be written, and not be read.
    """

    def __get__(self, config: Any, owner: Any = None) -> Any:
        if config is None:
            return self
        if _KEY not in vars(config):
            raise AttributeError(f"{type(config).__name__} has no attribute {_KEY}")
        value = vars(config)[_KEY]
        return None if is_ours(config) and is_guard(value) else value

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[_KEY] = value

    def __delete__(self, config: Any) -> None:
        if not (is_ours(config) and is_guard(vars(config).get(_KEY))):
            vars(config).pop(_KEY, None)
            for part in _parts(config):
                if part is not config and is_guard(vars(part).get(_KEY)) and not is_ours(part):
                    del vars(part)[_KEY]


def hide_guard() -> None:
    """Let configurations of ours have :data:`GUARD` without anybody reading it."""
    if not hasattr(PreTrainedConfig, _KEY):
        setattr(PreTrainedConfig, _KEY, _WeightsName())


def _parts(config: Any) -> Iterable[Any]:
    """The configuration and those inside it: of an encoder, a decoder, a text or a vision tower."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def guard(config: Any) -> None:
    """Let ``config.json`` be refused where this package is not imported, also by classes that read a part of it.

    Guarantee (loud-without-us): without ``import mpo_tn.torch``, ``from_pretrained`` of every class raises, whatever
    is passed to it (``ignore_mismatched_sizes``, ``trust_remote_code``, another head, ``variant``), and the message
    names mpo_tn. Only who brings a ``config`` of their own is stopped by the sentinel alone, which
    ``ignore_mismatched_sizes`` switches off.
    """
    for part in _parts(config):
        setattr(part, _KEY, GUARD)


def unguard(config: Any) -> None:
    """Take back :func:`guard`, of a configuration that says nothing of MPO modules any more."""
    delattr(config, _KEY)


def sentinel_key(modules: Mapping[str, ModuleSpec]) -> str:
    """The dense key under which the sentinel is written: of the first module by name that owns its cores.

    By name and not by position, because ``config.json`` sorts its keys.
    """
    return dense_key(_sentinel_name(modules))


def _sentinel_name(modules: Mapping[str, ModuleSpec]) -> str:
    own = {name: spec for name, spec in modules.items() if spec.tied_to not in modules}
    # What it writes of experts transformers renames and splits, and what it writes of a layer it leaves as it is.
    return min(own, key=lambda name: (own[name].kind == PARAMETER, name))


def unseen(spec: ModuleSpec) -> dict[str, Any]:
    """What of an entry may be told wrongly although all shapes and the dense model agree with it."""
    told = {"bias": spec.bias, "tied_to": spec.tied_to, "padding_idx": spec.padding_idx}
    return {key: value for key, value in told.items() if value is not None} | spec.bits_to_dict()


def numbers_of(config: Any) -> dict[str, list[dict[str, Any]]]:
    """By the kind of model, what a configuration and those inside it say that the shapes of weights do not show."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in _parts(config):
        own = {
            name: value
            for name, value in sorted(vars(part).items())
            if _COUNTED.search(name) and isinstance(value, (int, float, str))
        }
        if own and own not in found.setdefault(str(part.model_type), []):
            found[str(part.model_type)].append(own)
    return found


def sentinels(model: Any, modules: Mapping[str, ModuleSpec], tensors: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensor that no dense weight can take, by its key: the record of what is saved, as text in bytes.

    For a parameter it is an empty one with all axes but the last, by which transformers may split it, and the record
    goes beside it.

    Args:
        model: that is saved.
        modules: the entries of ``config.json``.
        tensors: the names of what is saved beside cores.
    """
    record = {
        "mpo_tn": 1,
        "architectures": [type(unwrap_model(model)).__name__.removeprefix("FSDP")],  # as transformers will write it
        "modules": {name: unseen(modules[name]) for name in sorted(modules)},
        "config": numbers_of(model.config),
        "tensors": sorted(tensors),
    }
    text = json.dumps(record, separators=(",", ":"))
    assert text.startswith(_MAGIC)
    written = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    spec = modules[_sentinel_name(modules)]
    if spec.kind != PARAMETER:
        return {sentinel_key(modules): written}
    return {sentinel_key(modules): torch.empty(*spec.shape[:-1], 0), RECORD: written}


def read_record(data: bytes) -> dict[str, Any] | None:
    """What :func:`sentinel` wrote; None for other bytes, such as the empty ones of earlier versions.

    Raises:
        MPOError: it begins as a record and is none.
    """
    if not data.startswith(_MAGIC.encode()):
        return None
    try:
        record = json.loads(data)
        lists = [record["modules"], record["config"], *record["modules"].values()]
        if not all(isinstance(each, dict) for each in lists) or not all(
            isinstance(record[name], list) for name in ("tensors", "architectures")
        ):
            raise TypeError("its parts are of other types")
        record["tensors"] = {str(name) for name in record["tensors"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MPOError(
            f"the record beside the weights is damaged ({type(error).__name__}): save the model again"
        ) from error
    return record
