"""Which tensor of a checkpoint is which tensor of a model: by the names and conversions of transformers."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import Checkpoint, StoredTensor
from mpo_tn.storage.pieces import StoredPieces
from mpo_tn.torch.hf.conversions import pieces_of
from mpo_tn.torch.hf.folder import check_source
from mpo_tn.torch.layers.parameter import dense_key, held_name, place_of
from mpo_tn.torch.models.stream_unit import tensor_of

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def local_folder(source: str | Path) -> Path:
    """The folder of a model: itself, or where the files of a hub name lie once they are fetched.

    Raises:
        MPOError: no such folder, not a model, a name that cannot be fetched.
    """
    check_source(source)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:
        raise MPOError(f"{source} cannot be fetched ({str(error).splitlines()[0]}): give a folder") from error


@dataclass(frozen=True)
class Names:
    """The tensors of a checkpoint in terms of a model.

    Attributes:
        stored: tensor of the model to that of the checkpoint, where there is one for it.
        kept: what transformers makes tensors of the model of, by key of the checkpoint: it is copied as it is, unless
            what is made of it becomes something else.
        made: tensor of the model to the keys of what it is made of, each with the pattern that it matches, and
        pieces: to where they come in it, if they are only stacked, joined or transposed, as experts are. It is called
            what the checkpoint would call the whole.
        unused: keys of which the model has no use; transformers ignores them.
        dtypes: of the tensors of the model.
    """

    stored: Mapping[str, StoredTensor]
    kept: Mapping[str, StoredTensor]
    unused: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    made: Mapping[str, tuple[tuple[str, str], ...]]
    pieces: Mapping[str, StoredPieces]

    @property
    def whole(self) -> dict[str, StoredTensor | StoredPieces]:
        """Tensor of the model to what can be read as one, at once or in pieces."""
        return {**self.stored, **self.pieces}

    def readers(self, model: Any) -> dict[str, Callable[[], torch.Tensor]]:
        """What reads each tensor of the model, in its dtype, as ``from_pretrained`` makes it of the checkpoint."""
        found = {name: partial(tensor_of, stored, self.dtypes[name]) for name, stored in self.whole.items()}
        others = self.made.keys() - self.pieces.keys()
        return {**found, **{name: partial(self._make, model, name) for name in others}}

    def _make(self, model: Any, name: str) -> torch.Tensor:
        converters = {pattern: entry for entry in _conversions(model)[1] for pattern in entry.source_patterns}
        converter = deepcopy(converters[self.made[name][0][1]])
        for key, pattern in self.made[name]:
            read = partial(tensor_of, self.kept[key], self.dtypes[name])
            converter.add_tensor(name, key, pattern, read)  # pyright: ignore[reportArgumentType]
        found: Any = converter.convert(name, model=model, config=model.config)[name]
        return found[0] if isinstance(found, list) else found


def read_names(model: Any, checkpoint: Checkpoint) -> Names:
    """Match a checkpoint with a model on the meta device, as ``from_pretrained`` does.

    Raises:
        MPOError: a tensor of the model is missing, has another shape, is there twice, or is tied to another and there
            with other numbers.
    """
    state = model.state_dict()
    renamings, converters = _conversions(model)
    stored: dict[str, StoredTensor] = {}
    kept: dict[str, StoredTensor] = {}
    unused: list[str] = []
    made: dict[str, list[tuple[str, str]]] = {}
    for key, tensor in checkpoint.tensors.items():
        name, pattern = _renamed(model, key, state, renamings, converters)
        if name not in state:
            unused.append(key)
        elif pattern is not None:
            kept[key] = tensor
            for target in _targets(name, pattern, converters):
                made.setdefault(target, []).append((key, pattern))
        elif name in stored:
            raise MPOError(
                f"{key} and {stored[name].key} of {checkpoint.folder} are both {name} of {type(model).__name__}: "
                f"take one out"
            )
        else:
            if tuple(state[name].shape) != tensor.shape:
                raise MPOError(
                    f"{key} is {list(tensor.shape)} in {checkpoint.folder}, and {type(model).__name__} with this "
                    f"config.json has {list(state[name].shape)}: the two do not belong together"
                )
            if state[name].is_floating_point() and not getattr(torch, tensor.dtype).is_floating_point:
                raise MPOError(
                    f"{key} is {tensor.dtype} in {checkpoint.folder}, and {type(model).__name__} computes with it in "
                    f"{str(state[name].dtype).removeprefix('torch.')}: give the model before it was quantized"
                )
            stored[name] = tensor
    _settle_ties(model, stored)
    ordered = {name: tuple(sorted(parts, key=lambda part: dot_natural_key(part[0]))) for name, parts in made.items()}
    pieces = {name: _pieces(model, name, parts, checkpoint, converters) for name, parts in ordered.items()}
    known = {name: found for name, found in pieces.items() if found is not None}
    if len(known) == len(ordered):  # what others become is known only once it is done
        _check_complete(model, state, {**stored, **known}, checkpoint)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    return Names(stored, kept, tuple(unused), dtypes, ordered, known)


def _pieces(
    model: Any, name: str, parts: tuple[tuple[str, str], ...], checkpoint: Checkpoint, converters: list[WeightConverter]
) -> StoredPieces | None:
    converter = next(entry for entry in converters if parts[0][1] in entry.source_patterns)
    shape = tuple(model.state_dict()[name].shape) if name in model.state_dict() else ()
    found = pieces_of(converter, [(checkpoint.tensors[key], pattern) for key, pattern in parts], shape)
    if found is None:
        return None
    if found.shape != shape:
        raise MPOError(
            f"{name} of {type(model).__name__} is {list(shape)} by config.json, and the {len(parts)} tensors of "
            f"{checkpoint.folder} that it is made of ({parts[0][0]}) are {list(found.shape)} together: fetch or save "
            "the model again"
        )
    whole, pattern = apply_converters(parts[0][0], converters)
    return replace(found, key=whole if pattern is not None else name)


def _targets(name: str, pattern: str, converters: list[WeightConverter]) -> list[str]:
    """All tensors that are made together with the first of them."""
    (converter,) = (entry for entry in converters if pattern in entry.source_patterns)
    first = converter.target_patterns[0]
    return [name.replace(first, other) for other in converter.target_patterns]


def core_prefix(model: Any, name: str, stored: StoredTensor | StoredPieces) -> str:
    """What cores of module ``name`` are called in a file before ``cores.0``, so that they are found when it is read.

    That is the name of the weight in the checkpoint, if transformers makes of it what it made of the weight; else what
    ``save_pretrained`` calls them.

    Raises:
        MPOError: transformers would make another name of either.
    """
    renamings, converters = _conversions(model)
    state = dict.fromkeys(key for key in model.state_dict() if key != dense_key(name)) | {f"{name}.cores.0": True}
    owner, _, leaf = stored.key.rpartition(".")
    as_stored = held_name(owner, leaf) if place_of(name) else stored.key.removesuffix(".weight")
    for prefix in (as_stored, _saved_name(model, f"{name}.cores.0").removesuffix(".cores.0"), name):
        key = f"{prefix}.cores.0"
        if _renamed(model, key, state, renamings, converters) == (f"{name}.cores.0", None):
            return prefix
    raise MPOError(
        f"transformers renames {stored.key} while it reads the checkpoint, and would rename its cores to something "
        f"else: "
        "load the model and save it again, or compress it in memory"
    )


def _saved_name(model: Any, name: str) -> str:
    renamings = get_model_conversion_mapping(model, add_legacy=False)
    back = [entry.reverse_transform() for entry in renamings[::-1] if type(entry) is WeightRenaming]
    return apply_renamings(name, back)  # pyright: ignore[reportArgumentType]


def names_of_cores(model: Any, prefixes: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """Which module has the cores that a file calls ``<prefix>.cores``, as transformers renames them: module to prefix.

    Args:
        model: the dense model, on the meta device.
        prefixes: of the cores in files.
        modules: that have cores.
    """
    renamings, converters = _conversions(model)
    state = dict.fromkeys((*model.state_dict(), *(f"{name}.cores.0" for name in modules)), True)
    renamed = {prefix: _renamed(model, f"{prefix}.cores.0", state, renamings, converters)[0] for prefix in prefixes}
    return {name.removesuffix(".cores.0"): prefix for prefix, name in renamed.items()}


def _conversions(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    found = get_model_conversion_mapping(model)
    return (
        [entry for entry in found if isinstance(entry, WeightRenaming)],
        [entry for entry in found if isinstance(entry, WeightConverter)],
    )


def _renamed(
    model: Any, key: str, state: Mapping[str, Any], renamings: list[WeightRenaming], converters: list[WeightConverter]
) -> tuple[str, str | None]:
    """The name of a key in the model, as ``convert_and_load_state_dict_in_model`` finds it."""
    prefix, known = model.base_model_prefix, dict(state)
    name, pattern = rename_source_key(key, renamings, converters, prefix, known)
    if name not in known and key in known:
        name, pattern = rename_source_key(key, [], [], prefix, known)
    return name, pattern


def _settle_ties(model: Any, stored: dict[str, StoredTensor]) -> None:
    """Of tensors that are tied one is read; if both are there, they have to be equal."""
    for target, source in model.all_tied_weights_keys.items():
        if target not in stored:
            continue
        if source not in stored:
            stored[source] = stored.pop(target)
        elif _equal(stored[target], stored[source]):
            del stored[target]
        else:
            raise MPOError(
                f"{stored[target].key} and {stored[source].key} are tied by config.json, and the checkpoint has "
                f"both with "
                "other numbers: set tie_word_embeddings to false there, or take one of them out"
            )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    return one.dtype == other.dtype and bool((one.read() == other.read()).all())


def _check_complete(model: Any, state: Mapping[str, Any], stored: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    ignored = [*(model._keys_to_ignore_on_load_missing or ())]
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    there = {owners[name] for name in stored if name in owners}
    missing = [
        name
        for name in state
        if name not in stored
        and owners.get(name) not in there
        and name not in model.all_tied_weights_keys
        and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        raise MPOError(
            f"{checkpoint.folder} is incomplete: {len(missing)} tensors of {type(model).__name__} are missing, for "
            f"instance "
            f"{missing[0]}; fetch or save the model again"
        )
