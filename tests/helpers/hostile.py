"""Model folders with something wrong in them, drawn by Hypothesis, and what becomes of them when they are loaded."""

from __future__ import annotations

import copy
import json
import signal
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from helpers.hostile_bytes import flipped
from helpers.tiny_models import outputs, tiny
from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf.folder import load_model

LONGEST = 20  # seconds an input may take, on a machine that is busy with other things


@dataclass(frozen=True)
class Folder:
    """A saved model: its files, and what the model computes."""

    family: str
    config: dict[str, Any]
    weights: bytes
    expected: torch.Tensor

    def loaders(self) -> dict[str, Callable[[Path], Any]]:
        auto = "AutoModelForMaskedLM" if self.family == "bert" else "AutoModelForCausalLM"
        return {"load_model": load_model, auto: getattr(transformers, auto).from_pretrained}


def folders() -> list[Folder]:
    """A tied table in chains, GPT-2's transposed layers, a Llama in bits with float cores between."""
    everything = r".*(?<!position_embeddings)(?<!wpe)"
    made = {
        "bert": MPOConfig(target_modules=everything, sites=3, bond=5),
        "gpt2": MPOConfig(target_modules=["c_attn", "c_fc", "c_proj", "wte", "lm_head"], sites=2, keep=0.7),
        "llama": MPOConfig(sites=3, bond=6, bits={"central": 3}, group=16),
    }
    return [_saved(family, config) for family, config in made.items()]


def _saved(family: str, config: MPOConfig) -> Folder:
    model = tiny(family)
    compress(model, config)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        settings = json.loads((Path(name) / "config.json").read_text())
        return Folder(family, settings, (Path(name) / "model.safetensors").read_bytes(), outputs(model))


@dataclass
class Files:
    """What is written to the folder that is loaded."""

    config: bytes
    weights: bytes | None
    others: dict[str, bytes]


# Of every type, of every size.
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 33, 2**31, 2**63, 10**30, 10**400, 0.5, float("nan"), float("inf"), "",
    "a", "linear", "conv1d", "embedding", "mpo", "x" * 5000, [], [1], [2, 3], [[1]], ["a"], [None], {},
    {"a": 1}, {"out": [1], "in": [1]},
    {"out": [10**9] * 40, "in": [10**9] * 40}, [10**18] * 3, ["AutoConfig"], ["__init__"], [5],
]  # fmt: skip
_ARCHITECTURES: list[Any] = [
    None, [], "BertForMaskedLM", ["AutoConfig"], ["pipeline"], ["__init__"], ["AutoModel"], ["PreTrainedModel"],
    ["BertModel"],
    ["GPT2Model"], ["LlamaModel"], ["BertConfig"], ["Trainer"], ["NoSuchModel"], [3], [None], [["BertModel"]],
    {"a": "b"},
    5,
    ["AutoConfig", "BertForMaskedLM"], ["BertForSequenceClassification"], ["logging"], ["models"], ["__version__"],
]  # fmt: skip
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "n_embd", "n_layer",
    "n_head",
    "num_key_value_heads", "head_dim", "layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon", "hidden_act",
    "activation_function", "n_inner", "type_vocab_size", "max_position_embeddings", "n_positions",
    "tie_word_embeddings",
)  # fmt: skip


def _one_of(draw: st.DrawFn, values: list[Any]) -> Any:
    """A copy, for what is put into a configuration may be changed there."""
    return copy.deepcopy(values[draw(st.integers(0, len(values) - 1))])


def _places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _put(values: Any, path: tuple[Any, ...], value: Any, *, delete: bool = False) -> None:
    for key in path[:-1]:
        values = values[key]
    if delete:
        del values[path[-1]]
    else:
        values[path[-1]] = value


def _near(draw: st.DrawFn, value: Any) -> Any:
    """A number close to one, a list in another order, a flag turned."""
    match value:
        case bool():
            return not value
        case int():
            return value + draw(st.sampled_from([-1, 1, 2, -value, value, 10**12]))
        case float():
            return draw(st.sampled_from([-value, value * 2, float("nan")]))
        case str():
            return draw(st.sampled_from([value[:-1], value + "x", value.upper(), "." + value, value.replace("0", "1")]))
        case list() if value:
            kind = draw(st.sampled_from(["reversed", "short", "long", "rotated"]))
            return {"reversed": value[::-1], "short": value[:-1], "long": [*value, value[-1]], "rotated": value[1:] + value[:1]}[kind]  # fmt: skip  # noqa: E501
        case _:
            return _one_of(draw, _VALUES)


@st.composite
def hostile(draw: st.DrawFn, given: Folder) -> Files:
    """The files of a folder with one to three things wrong, in the configuration or in the weights."""
    config = copy.deepcopy(given.config)
    kinds = ["place", "entries", "field", "sizes", "text", "weights", "header", "record", "files"]
    kind = draw(st.sampled_from(kinds))
    weights: bytes | None = given.weights
    others: dict[str, bytes] = {}
    if kind == "place":
        for _ in range(draw(st.integers(1, 3))):
            places = [place for place in _places(config) if place[0] in _OURS] or [("architectures",)]
            place = draw(st.sampled_from(places))
            how = draw(st.sampled_from(["delete", "any", "near", "near"]))
            found: Any = config
            for key in place:
                found = found[key]
            _put(config, place, _one_of(draw, _VALUES) if how == "any" else _near(draw, found), delete=how == "delete")
    elif kind == "entries":
        for _ in range(draw(st.integers(1, 2))):
            _entries(draw, config)
    elif kind == "field":
        _field(draw, config)
    elif kind == "sizes":
        if draw(st.booleans()):
            config["architectures"] = _one_of(draw, _ARCHITECTURES)
        else:
            present = [name for name in _SIZES if name in config]
            name = draw(st.sampled_from(present))
            config[name] = _one_of(draw, _VALUES) if draw(st.booleans()) else _near(draw, config[name])
    text = json.dumps(config).encode()
    if kind == "text":
        text = _broken(draw, text)
    elif kind == "weights":
        weights = _tensors(draw, given)
    elif kind == "header":
        weights = _header(draw, given.weights)
    elif kind == "record":
        weights = _record(draw, given.weights)
    elif kind == "files":
        weights, others = _files(draw, given)
    return Files(text, weights, others)


# What this package writes; of the rest of config.json the sizes are tried.
_OURS = ("quantization_config", "architectures", "transformers_weights", "tie_word_embeddings")


def _entries(draw: st.DrawFn, config: dict[str, Any]) -> None:
    modules = config["quantization_config"]["modules"]
    names = sorted(modules)
    if len(names) < 2:
        return
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    how = draw(st.sampled_from(["drop", "rename", "swap", "copy", "invent", "again", "tie", "untie", "many", "all"]))
    invented = draw(
        st.sampled_from(
            ["bert.nowhere", "", ".", "a..b", "lm_head", "encoder", "cls", one + ".cores", one + "x", one[1:]]
        )
    )
    match how:
        case "drop":
            del modules[one]
        case "rename":
            modules[invented] = modules.pop(one)
        case "swap":
            modules[one], modules[other] = modules[other], modules[one]
        case "copy":
            modules[one] = copy.deepcopy(modules[other])
        case "invent":
            modules[invented] = copy.deepcopy(modules[one])
        case "again":  # the same module in another spelling
            prefix, _, rest = one.partition(".")
            modules[
                draw(st.sampled_from([rest, f"{prefix}.{one}", f"bert.{one}", f"model.{one}", f"transformer.{one}"]))
            ] = copy.deepcopy(modules[one])
        case "tie":
            modules[one]["tied_to"] = draw(st.sampled_from([other, one, "nowhere", invented]))
        case "untie":
            for entry in modules.values():
                entry["tied_to"] = None
        case "many":
            modules.update({f"module{k}": {} for k in range(20_000)})
        case _:
            modules.clear()


def _field(draw: st.DrawFn, config: dict[str, Any]) -> None:
    """One field of an entry, consistent with itself: legs that multiply to the same, another number of cores."""
    modules = config["quantization_config"]["modules"]
    entry = modules[draw(st.sampled_from(sorted(modules)))]
    out, in_, bonds = entry["sites"]["out"], entry["sites"]["in"], entry["bonds"]
    how = draw(
        st.sampled_from(
            ["legs", "in", "one more", "one less", "bonds", "bits", "group", "bias", "padding", "kind", "size"]
        )
    )
    match how:
        case "legs":
            out.reverse()
        case "in":
            in_.reverse()
        case "one more":
            out.append(1), in_.append(1), bonds.append(1)
        case "one less" if len(out) > 1:
            entry["sites"] = {"out": [*out[:-2], out[-2] * out[-1]], "in": [*in_[:-2], in_[-2] * in_[-1]]}
            entry["bonds"] = bonds[:-1]
        case "bonds":
            entry["bonds"] = [max(1, bond + draw(st.integers(-2, 2))) for bond in bonds]
        case "bits":
            entry["bits"] = [draw(st.sampled_from([None, 2, 3, 4, 5, 8, 16])) for _ in out]
        case "group":
            entry["group"] = draw(st.sampled_from([1, 8, 15, 17, 32, 64, 100, 128, 10**9]))
        case "bias":
            entry["bias"] = not entry["bias"]
        case "padding":
            entry["padding_idx"] = draw(st.sampled_from([0, 1, 5, None]))
        case "kind":
            entry["kind"] = draw(st.sampled_from(["linear", "conv1d", "embedding"]))
        case _:
            entry["out_features"], entry["in_features"] = entry["in_features"], entry["out_features"]


def _broken(draw: st.DrawFn, text: bytes) -> bytes:
    how = draw(st.sampled_from(["cut", "flip", "insert", "empty", "deep", "long", "list", "twice", "zeros", "bom"]))
    at = draw(st.integers(0, len(text) - 1))
    match how:
        case "cut":
            return text[:at]
        case "flip":
            # Within what this package writes: a letter of another setting may well be another setting.
            start = text.index(b'"quantization_config"')
            at = start + at % (text.index(b'"transformers_version"', start) - start) if b'"transformers_version"' in text[start:] else start  # fmt: skip  # noqa: E501
            return text[:at] + bytes([text[at] ^ draw(st.integers(1, 127))]) + text[at + 1 :]
        case "insert":
            return text[:at] + draw(st.binary(min_size=1, max_size=8)) + text[at:]
        case "empty":
            return b""
        case "deep":
            depth = draw(st.sampled_from([100, 1000, 100_000]))
            return text.replace(b'"config": {', b'"config": ' + b"[" * depth + b"]" * depth + b', "x": {', 1)
        case "long":
            return text.replace(b'"linear"', b'"' + b"x" * 10**6 + b'"').replace(
                b'"embedding"', b'"' + b"y" * 10**5 + b'"'
            )
        case "list":
            return draw(st.sampled_from([b"[]", b"1", b"null", b'"a"', b"[" + text + b"]", b"{}"]))
        case "twice":
            return text[:-1] + b', "quantization_config": {"quant_method": "mpo"}}'
        case "zeros":
            return b"\0" * len(text)
        case _:
            return b"\xef\xbb\xbf" + text


def _tensors(draw: st.DrawFn, given: Folder) -> bytes:
    state = load(given.weights)
    # Of all of its own shape, or moving numbers around would be a model with other numbers.
    names = sorted(name for name, value in state.items() if value.dtype != torch.uint8)
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    how = draw(
        st.sampled_from(
            ["drop", "rename", "swap", "reshape", "longer", "wider", "integers", "extra", "core", "sentinel", "bool"]
        )
    )
    match how:
        case "drop":
            del state[one]
        case "rename":
            state[draw(st.sampled_from([one + "x", "x." + one, one.replace("0", "7"), one.removeprefix("bert.")]))] = (
                state.pop(one)
            )
        case "swap" if state[one].shape != state[other].shape:
            state[one], state[other] = state[other], state[one]
        case "reshape":
            state[one] = state[one].reshape(-1)
        case "longer":
            state[one] = torch.cat([state[one], state[one]])
        case "wider" if state[one].is_floating_point():
            state[one] = state[one].double()
        case "integers":
            state[one] = state[one].to(torch.int32)
        case "bool":
            state[one] = state[one].bool()
        case "extra":
            state["nothing.of.interest"] = torch.zeros(3)
        case "core":
            name = draw(
                st.sampled_from(["nowhere.cores.0", one.partition(".cores.")[0] + ".cores.9", "lm_head.cores.0"])
            )
            state.setdefault(name, torch.zeros(1, 2, 2, 1))
        case _:
            state = {name: value for name, value in state.items() if value.dtype != torch.uint8}
    return save(state, {"format": "pt"})


def _header(draw: st.DrawFn, weights: bytes) -> bytes:
    length = int.from_bytes(weights[:8], "little")
    how = draw(st.sampled_from(["flip", "cut", "length", "empty", "tail", "zero"]))
    match how:
        case "flip":
            return flipped(draw, weights, 0, length + 8)
        case "cut":
            return weights[: draw(st.integers(0, len(weights) - 1))]
        case "length":
            return (
                draw(st.sampled_from([0, 1, length - 1, length + 1, 2**40, 2**63])).to_bytes(8, "little") + weights[8:]
            )
        case "empty":
            return b""
        case "tail":
            return weights + b"\0" * draw(st.integers(1, 100))
        case _:
            return b"\0" * len(weights)


def _record(draw: st.DrawFn, weights: bytes) -> bytes:
    """The tensor that tells what was saved, with other bytes in it."""
    at = weights.index(b'{"mpo_tn":1,')
    end = weights.rindex(b"]}", at) + 2
    return flipped(draw, weights, at, end)


def _files(draw: st.DrawFn, given: Folder) -> tuple[bytes | None, dict[str, bytes]]:
    state = load(given.weights)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    others = {file: save({name: state[name] for name in own}, {"format": "pt"}) for file, own in shards.items()}
    index = {name: file for file, own in shards.items() for name in own}
    how = draw(st.sampled_from(["none", "shards", "no shard", "index", "same shard", "bin", "types"]))
    match how:
        case "none":
            return None, {}
        case "no shard":
            others.popitem()
        case "index":  # one shard is not in it
            index = {name: file for name, file in index.items() if "00001" in file}
        case "same shard":
            others["model-00002-of-00002.safetensors"] = others["model-00001-of-00002.safetensors"]
        case "bin":
            return None, {"pytorch_model.bin": given.weights}
        case "types":
            text = draw(
                st.sampled_from(
                    [b"[]", b"{}", b'{"weight_map": 5}', b'{"metadata": {}, "weight_map": {"a": "../../x"}}']
                )
            )
            return None, {**others, "model.safetensors.index.json": text}
        case _:
            pass
    return None, {**others, "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


class Hang(BaseException):
    """It took too long."""


@contextmanager
def within(seconds: int) -> Generator[None]:
    """Raise :class:`Hang` in a block that takes longer."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fate(given: Folder, files: Files, load_it: Callable[[Path], Any], *, own: bool) -> tuple[str, str]:
    """``refused``, ``equal``, ``crash``, ``hang`` or ``different``, and what was said.

    transformers says in its own words what is wrong with what is its own, before and after it asks this package.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(files.config)
        parts = {**files.others, **({} if files.weights is None else {"model.safetensors": files.weights})}
        for file, content in parts.items():
            (folder / file).write_bytes(content)
        try:
            with within(LONGEST):
                model = load_it(folder)
                same = torch.equal(outputs(model.eval()), given.expected)
        except Hang:
            return "hang", ""
        except MPOError as error:
            return ("refused", str(error)) if len(str(error)) < 3000 else ("crash", f"{len(str(error))} characters")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = any("mpo_tn/torch/hf/" in frame.filename and frame.name != "_dict_from_json_file" for frame in where)
            theirs = (
                isinstance(error, (OSError, ValueError, SafetensorError)) or "StrictDataclass" in type(error).__name__
            )
            theirs = theirs or "ignore_mismatched_sizes" in str(error) or where[-1].name == "get_checkpoint_shard_files"
            last = "".join(traceback.format_exception(error)[-3:])[-800:]
            return ("refused" if theirs and not ours and not own else "crash"), f"{type(error).__name__}: {last}"
        return ("equal" if same else "different"), ""
