"""What ``config.json`` says of modules, held against the model, the files and the record that was saved with them.

Guarantee (config-lies): an entry that is missing, renamed, added or swapped, and a size, bias, tie, number of cores,
leg, bond, kind, number of bits or group that is not the one of the model or of the files is refused with one
:class:`~mpo_tn.MPOError`, whichever way the folder is loaded; or it changes nothing.
"""

# transformers tells of what it has read in methods with a leading underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError, clipped
from mpo_tn.planning.spec import PARAMETER, ModuleSpec
from mpo_tn.torch.hf.held import CORE, Held, Shapes
from mpo_tn.torch.hf.names import has_module, spellings
from mpo_tn.torch.hf.sentinel import numbers_of, unseen
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.quantized import QuantizedCore, buffer_kinds
from mpo_tn.torch.models.eligible import kind_of

_MOST_ENTRIES = 1000
_DAMAGED = "the folder is damaged, or config.json is of another model: save the model again"


def check_count(model: nn.Module, number: int) -> None:
    """Refuse more entries than a model can have modules, before any of them is looked at.

    Raises:
        MPOError: there are.
    """
    most = _MOST_ENTRIES + 4 * sum(1 for _ in model.modules())
    if number > most:
        raise MPOError(
            f"config.json lists {number} compressed modules, and no {type(model).__name__} has so many: {_DAMAGED}"
        )


def check_ties(modules: Mapping[str, ModuleSpec]) -> None:
    """Refuse an entry on the cores of one that has none of its own, or has others.

    On those of one that is not listed it is alone, and they are its own: the other module was replaced by a dense one.

    Raises:
        MPOError: there is one.
    """
    for name, spec in modules.items():
        if spec.tied_to is None or (owner := modules.get(spec.tied_to)) is None:
            continue
        if owner.tied_to in modules:
            raise MPOError(
                f"{clipped(name)} is on the cores of {clipped(spec.tied_to)}, which has none of its own in "
                f"config.json: {_DAMAGED}"
            )
        if (owner.core_shapes, owner.bits, owner.group) != (spec.core_shapes, spec.bits, spec.group):
            raise MPOError(
                f"{clipped(name)} is on the cores of {clipped(spec.tied_to)}, which have other shapes: {_DAMAGED}"
            )


def check_entries(model: nn.Module, specs: Mapping[str, ModuleSpec]) -> None:
    """Hold entries, by the names that the model has, against the dense modules that are still in their places.

    Raises:
        MPOError: a module of another kind or size, without a bias that others share with it, or with two entries.
    """
    seen: dict[nn.Module, str] = {}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    shared = {*tied, *tied.values()}
    for name, spec in specs.items():
        if spec.kind == PARAMETER:  # which is looked for when it is put there
            continue
        module = model.get_submodule(name)
        if module in seen:
            raise MPOError(
                f"config.json lists the module {clipped(name)} twice, as {clipped(seen[module])} too: {_DAMAGED}"
            )
        seen[module] = name
        kind = kind_of(module)
        if kind is None:
            raise MPOError(
                f"config.json lists {clipped(name)} as compressed, which is a {type(module).__name__}: {_DAMAGED}"
            )
        weight: Any = module.weight
        rows, columns = weight.shape[::-1] if kind == "conv1d" else weight.shape
        for what, told, is_so in (
            ("kind", spec.kind, kind),
            ("out_features", spec.out_features, int(rows)),
            ("in_features", spec.in_features, int(columns)),
        ):
            if told != is_so:
                raise MPOError(
                    f"{clipped(name)} has {what}={told} where config.json lists it, and the {type(model).__name__} "
                    f"that config.json describes has {is_so} there: change the configuration (num_labels, vocab_size, "
                    f"...) to what was saved; else {_DAMAGED}"
                )

        # One that is shared is in the files under another name, and nobody would miss it here.
        if not spec.bias and f"{name}.bias" in shared:
            raise MPOError(f"{clipped(name)} has bias=False in config.json, and shares the bias of another: {_DAMAGED}")


def check_held(held: Held, modules: Mapping[str, ModuleSpec]) -> None:
    """Hold entries against the headers of the files: the number, the shapes and the owners of all cores.

    The names of a file may differ from those of modules, as transformers renames some. So an entry without cores of its
    name has to find some of its shapes that no other entry is the name of.

    Raises:
        MPOError: cores that are missing or of other shapes.
    """
    spare = Counter(_frozen(chain) for name, chain in held.chains.items() if name not in modules)
    for name, spec in modules.items():
        chain = held.chains.get(name)
        if spec.tied_to in modules and chain is None:
            continue  # or they were written under both names, from a state that somebody gave
        due = _due(spec)
        if chain is None:
            if spare[_frozen(due)] < 1:
                raise MPOError(
                    f"{clipped(name)}.cores.0 is not in the files, the folder is incomplete, or its configuration is "
                    f"shared with a compressed model: {_DAMAGED}"
                )
            spare[_frozen(due)] -= 1
        elif chain != due:
            raise MPOError(f"{clipped(name)}.cores{_difference(chain, due)}: {_DAMAGED}")


def _frozen(chain: Shapes) -> tuple[tuple[tuple[int, str], tuple[int, ...]], ...]:
    return tuple(sorted(chain.items()))


def _due(spec: ModuleSpec) -> Shapes:
    due: Shapes = {}
    for k, (shape, bits) in enumerate(zip(spec.core_shapes, spec.core_bits, strict=True)):
        if bits is None:
            due[k, ""] = shape
        else:
            due |= {(k, part): size for part, (size, _) in buffer_kinds(shape, bits, spec.group).items()}
    return due


def _difference(chain: Shapes, due: Shapes) -> str:
    for k, part in sorted({*chain, *due}):
        name = f".{k}.{part}" if part else f".{k}"
        if (k, part) not in chain:
            return f"{name} is not in the files, the folder is incomplete"
        if (k, part) not in due:
            return f"{name} is in the files, and config.json does not list it"
        if chain[k, part] != due[k, part]:
            return f"{name} is {chain[k, part]} in the files and {due[k, part]} by config.json"
    raise AssertionError("they are the same")


def check_record(held: Held, modules: Mapping[str, ModuleSpec], config: Any) -> None:
    """Hold entries and configuration against what was written down beside the weights; earlier versions wrote nothing.

    It is what tells of bits, groups, ties, heads and epsilons, which may change without changing a shape.

    Raises:
        MPOError: one of them differs.
    """
    if held.record is None:
        return
    saved: dict[str, Any] = held.record["modules"]
    for name in sorted({*saved} ^ {*modules}, key=lambda name: (name in saved, name)):
        what = "does not list it" if name in saved else "lists it, and no cores were saved for it"
        raise MPOError(f"{clipped(name)}: config.json {what}: {_DAMAGED}")
    for name, spec in modules.items():
        now, then = unseen(spec), saved[name]
        for key in sorted({*now, *then}):
            if now.get(key) != then.get(key):
                raise MPOError(
                    f"{clipped(name)} has {key}={clipped(str(now.get(key)))} in config.json and was saved with "
                    f"{clipped(str(then.get(key)))}: {_DAMAGED}"
                )
    if config.architectures != held.record["architectures"]:
        raise MPOError(
            f"config.json says architectures={clipped(repr(config.architectures))}, and the model was saved as "
            f"{clipped(repr(held.record['architectures']))}: {_DAMAGED}"
        )
    for kind, own in numbers_of(config).items():
        for numbers in own:
            check_numbers(kind, numbers, held.record["config"].get(kind) or [numbers])


def check_numbers(kind: str, numbers: Mapping[str, Any], saved: list[Mapping[str, Any]]) -> None:
    """One of what was saved for a kind of model, of which there may be several, has to agree in all that both have.

    Raises:
        MPOError: none does.
    """
    first: tuple[str, Any] | None = None
    for then in saved:
        wrong = [(name, then[name]) for name, value in numbers.items() if name in then and then[name] != value]
        if not wrong:
            return
        first = first or wrong[0]
    assert first is not None
    name, value = first
    raise MPOError(
        f"{name}={clipped(str(numbers[name]))} in the configuration of {clipped(kind)}, and the model was saved with "
        f"{name}={clipped(str(value))}: {_DAMAGED}"
    )


@dataclass
class Reading:
    """What transformers says it has read into a model: names of tensors that were missing, and of those left over."""

    missing: set[str] = field(default_factory=set[str])
    unexpected: set[str] = field(default_factory=set[str])


_LISTENED = "_adjust_missing_and_unexpected_keys"


def listen(model: Any) -> Reading:
    """Take down, once weights have been read, what was missing and what was left over. See :func:`stop_listening`."""
    reading = Reading()
    original = getattr(model, _LISTENED)

    def adjust(info: Any) -> Any:
        reading.unexpected = set(info.unexpected_keys)
        result = original(info)
        reading.missing = set(info.missing_keys)
        return result

    vars(model)[_LISTENED] = adjust
    return reading


def stop_listening(model: Any) -> None:
    """Take back :func:`listen`."""
    vars(model).pop(_LISTENED, None)


def check_read(model: Any, modules: Mapping[str, ModuleSpec], held: Held, reading: Reading) -> None:
    """Hold what was read against the entries, after loading.

    Raises:
        MPOError: cores of another shape; cores left over that belong to a module of this model, or to none that is
            listed; entries that neither the model nor the files have; a tensor that was saved and is not there, or
            that other layers of the same list have.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, MPOLayer):
            _check_layer(name, layer)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise MPOError(f"{name} is {parameter.dtype} in the files: {_DAMAGED}")
    for name in sorted(reading.unexpected):
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and has_module(model, owner) and isinstance(model.get_submodule(owner), MPOLayer):
            raise MPOError(f"the files hold {name}, and config.json says bias=False: {_DAMAGED}")
    left = {found["module"] for key in reading.unexpected if (found := CORE.match(key)) is not None}
    for name in sorted(left):
        here = spellings(model, name)
        if any(has_module(model, spelling) for spelling in here):
            raise MPOError(
                f"the files hold {clipped(name)}.cores.0, and config.json does not list {clipped(name)}: {_DAMAGED}"
            )
        if not any(spelling in modules for spelling in here):
            raise MPOError(
                f"the files hold {clipped(name)}.cores.0, which is of no module that config.json lists: {_DAMAGED}"
            )
    for name, spec in modules.items():
        here = spellings(model, name)
        absent = spec.tied_to not in modules and not any(has_module(model, spelling) for spelling in here)
        if absent and not any(spelling in left or spelling in held.chains for spelling in here):
            raise MPOError(
                f"config.json lists {clipped(name)} as compressed, which neither {type(model).__name__} nor the files "
                f"have: {_DAMAGED}"
            )
    saved = set() if held.record is None else held.record["tensors"]
    for name in sorted(reading.missing):
        if any(spelling in saved for spelling in spellings(model, name)):
            raise MPOError(f"{name} was saved and is not in the files: the folder is incomplete: {_DAMAGED}")
    for name in _missing_among_others(model, reading.missing):
        raise MPOError(f"{name} is not in the files, which hold it for other layers: {_DAMAGED}")


def _check_layer(name: str, layer: MPOLayer) -> None:
    for k, (core, shape) in enumerate(zip(layer.cores, layer.spec.core_shapes, strict=True)):
        if isinstance(core, QuantizedCore):
            core.check(f"{name}.cores.{k}")
        elif tuple(core.shape) != shape or not core.is_floating_point():
            raise MPOError(f"{name}.cores.{k} is {core.dtype} {tuple(core.shape)} where {shape} is due: {_DAMAGED}")
    bias = getattr(layer, "bias", None)
    if bias is not None and tuple(bias.shape) != (layer.spec.out_features,):
        raise MPOError(f"{name}.bias is {bias.dtype} {tuple(bias.shape)}: {_DAMAGED}")


def _missing_among_others(model: nn.Module, missing: set[str]) -> Iterator[str]:
    """Tensors that were not read where those of the same name in other elements of a list were."""
    if any(re.search(r"\.\d+\.", name) for name in missing):
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
        read = {_in_any(name) for name in names if name not in missing}
        yield from (name for name in sorted(missing) if "*" in _in_any(name) and _in_any(name) in read)


def _in_any(name: str) -> str:
    """The name with a star for the number of every element of a list but that of a core."""
    head, cores, tail = name.partition(".cores.")
    return re.sub(r"\.\d+(?=\.|$)", ".*", head) + cores + tail
