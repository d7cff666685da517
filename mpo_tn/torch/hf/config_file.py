"""``config.json`` of a compressed model, looked at before transformers makes anything of it.

transformers reads it, copies it and prints it before it asks for a quantizer: a million entries would take half a
minute and half a gigabyte, and an entry of another type would end somewhere inside of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, clipped, count_text
from mpo_tn.torch.hf.checks import check_numbers
from mpo_tn.torch.hf.held import held_by
from mpo_tn.torch.hf.quantization_config import ENTRIES
from mpo_tn.torch.hf.sentinel import is_guard

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
"""How the names of weight files end, in any format."""

_LONGEST = 2**18
_OURS = re.compile(rb'"quant_method"\s*:\s*"mpo"')
# What there may be of anything by its name: what is built one by one, what is listed, what are lengths of tensors.
_MOST = (
    (re.compile(r"(^|_)(layers?|blocks?|stages?|depth)$"), 2**10),
    (re.compile(r"(^|_)(experts?|groups?)$"), 2**14),
    (re.compile(r"num_labels$"), 2**18),
    (re.compile(r"(size|dim|heads?|embd|inner|model|positions|position_embeddings|features|channels|ctx)$"), 2**28),
)
_DAMAGED = "it is damaged, save the model again"


def check_length(path: Path) -> None:
    """Refuse a configuration out of all proportion to the weights beside it: read, it takes thirty times as much.

    Guarantee (config-cost): what is wrong with the configuration of a compressed model is said within two seconds and
    100 MB, whatever it holds.

    Raises:
        MPOError: it is.
    """
    length = path.stat().st_size
    if length > _LONGEST:
        weights = sum(file.stat().st_size for file in path.parent.iterdir() if file.name.endswith(WEIGHTS))
        if length > weights // 4:
            raise MPOError(f"{path} has {length} bytes, more than the weights beside it call for: {_DAMAGED}")


def check_types(path: Path, values: Any) -> None:
    """Refuse what transformers would stumble over on its way to the quantizer.

    Raises:
        MPOError: no dictionary, a quantization that is none, or an entry of ours that does not say so.
    """
    if not isinstance(values, dict):
        raise MPOError(f"{path} holds a {type(values).__name__}, no dictionary: {_DAMAGED}")
    found: Any = values.get("quantization_config")
    guarded = is_guard(values.get("transformers_weights"))
    if found is None and not guarded:
        return
    if not isinstance(found, dict):
        raise MPOError(f"quantization_config in {path} is a {type(found).__name__}, no dictionary: {_DAMAGED}")
    method: Any = found.get("quant_method")
    if not isinstance(method, str | None) or (guarded and method != "mpo"):
        raise MPOError(f"quant_method={clipped(repr(method))} in {path} is not the one it was saved with: {_DAMAGED}")
    if method != "mpo":
        return
    name: Any = values.get("transformers_weights")
    if not isinstance(name, str | None):
        raise MPOError(f"transformers_weights={clipped(repr(name))} in {path} is no name of a file: {_DAMAGED}")
    if unknown := sorted(set(found) - ENTRIES):
        raise MPOError(
            f"quantization_config in {path} has the unknown entry {clipped(unknown[0])}: it is damaged or from a newer "
            "version"
        )


def check_sizes(path: Path, values: Any) -> None:
    """Refuse sizes that are not those of the weights beside the file, before a model is made of such a size.

    Raises:
        MPOError: there are some.
    """
    if not (isinstance(values, dict) and isinstance(found := values.get("quantization_config"), dict)):
        return
    if found.get("quant_method") != "mpo":
        return
    paths = [str(file) for file in sorted(path.parent.glob("*.safetensors"))]
    try:
        record = held_by(paths).record
    except MPOError:  # which is said when weights are read
        record = None
    for part in _dictionaries(values):
        kind = part.get("model_type")
        if record is not None and isinstance(kind, str) and (saved := record["config"].get(kind)):
            check_numbers(kind, part, saved)
        for name, value in part.items():
            if isinstance(value, int) and any(what.search(name) and abs(value) > most for what, most in _MOST):
                raise MPOError(f"{name}={count_text(value)} in {path} is beyond any model: {_DAMAGED}")


def _dictionaries(values: Any) -> Iterator[dict[str, Any]]:
    """The configuration and those inside of it."""
    if isinstance(values, dict):
        yield values
        for name, value in values.items():
            if name != "quantization_config":
                yield from _dictionaries(value)


def _is_ours(path: Path) -> bool:
    """Whether the text of a configuration names our method; read in pieces, for it may be of any length."""
    tail = b""
    with path.open("rb") as file:
        while piece := file.read(2**20):
            if _OURS.search(tail + piece):
                return True
            tail = piece[-64:]
    return False


def looking(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``PreTrainedConfig._dict_from_json_file``, which looks at what it reads before and after."""

    def _dict_from_json_file(cls: Any, json_file: Any) -> Any:
        path = Path(json_file)
        if path.is_file() and path.stat().st_size > _LONGEST and _is_ours(path):
            check_length(path)
        try:
            values = original(cls, json_file)
        except RecursionError as error:
            raise MPOError(f"{path} is nested too deeply: {_DAMAGED}") from error
        check_types(path, values)
        check_sizes(path, values)
        return values

    return _dict_from_json_file
