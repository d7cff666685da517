"""Model folders: read one with the right class, write one whole or not at all, and list what is inside."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers.utils.hub import cached_file

from mpo_tn.exceptions import MPOError, bounded_text, clipped
from mpo_tn.storage.files import check_target, written_beside
from mpo_tn.storage.places import recover
from mpo_tn.storage.tensors import as_os_error
from mpo_tn.torch.hf.companions import check_folder, check_still_there, copy_companions, refuse_pickled
from mpo_tn.torch.models.units import count_parameters

_FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def load_model(source: str | Path) -> Any:
    """The model of a folder or a hub name, as the class that ``config.json`` names, in evaluation mode.

    Raises:
        MPOError: no such folder, not a model, damaged or incomplete files.
    """
    check_source(source)
    model, missing = _read(source)
    if missing:
        raise MPOError(
            f"{source} is incomplete: {len(missing)} tensors of {type(model).__name__} are missing, for instance "
            f"{missing[0]}; fetch or save the model again"
        )
    return model.eval()


def empty_model(source: str | Path) -> Any:
    """The dense model that a folder or hub name describes, on the meta device: its structure without its weights.

    Raises:
        MPOError: no such folder, not a model, or one that is compressed or quantized already.
    """
    return _empty(source, lambda: torch.device("meta"))


def hollow_model(source: str | Path) -> Any:
    """The same, with the data of its buffers, in evaluation mode: once its parameters are filled in it can be run.

    Raises:
        MPOError: as :func:`empty_model`.
    """
    model = _empty(source, _without_parameters)
    if any(buffer.is_meta for buffer in model.buffers()):  # made by torch.empty, and filled in
        model = _empty(source, lambda: init_empty_weights(include_buffers=False))
    model.tie_weights()  # which the context takes apart
    return model.eval()


class _WithoutRoom(TorchFunctionMode):
    """``torch.empty`` takes no memory: not even for the moment until accelerate has put a parameter elsewhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def _without_parameters() -> Generator[None]:
    with init_empty_weights(include_buffers=False), _WithoutRoom():
        yield


def _empty(source: str | Path, without_data: Callable[[], AbstractContextManager[Any]]) -> Any:
    check_source(source)
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source)
        if getattr(config, "quantization_config", None) is not None:
            raise MPOError(f"{source} is compressed or quantized already: name the dense model")
        dtype = config.dtype or _stored_dtype(source)
        model = _built_empty(config, dtype, without_data)
        for pattern, other in model._get_dtype_plan(dtype).items():
            for name, parameter in model.named_parameters():
                if re.search(pattern.replace("*", ".*"), name):
                    parameter.data = parameter.data.to(other)
        return model


def check_compressed(source: str | Path) -> None:
    """Refuse a folder or hub name whose model has no MPO modules, by its configuration alone.

    Raises:
        MPOError: no such folder, not a model, or one that was not compressed by this package.
    """
    compressed_config(source)


def compressed_config(source: str | Path) -> Any:
    """The configuration of a model with MPO modules; ``quantization_config`` is as ``config.json`` has it.

    Raises:
        MPOError: as :func:`check_compressed`.
    """
    check_source(source)
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source)
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if method != "mpo":
        is_what = "dense" if quantized is None else f"quantized by {method}"
        raise MPOError(f"{source} is {is_what}, not compressed by mpo-tn: compress it first, see mpo-tn compress")
    return config


def dense_parameters(source: str | Path) -> int:
    """How many numbers the dense model has that a folder or hub name describes, compressed or not.

    Raises:
        MPOError: no such folder, not a model.
    """
    return count_parameters(model_before(source))


def model_before(source: str | Path) -> Any:
    """The dense model on the meta device that a folder or hub name was, compressed by now or not, in float32.

    Raises:
        MPOError: no such folder, not a model.
    """
    check_source(source)
    with _readable(source):
        config = transformers.AutoConfig.from_pretrained(source)
        vars(config).pop("quantization_config", None)
        return _built_empty(config, torch.float32)


def _built_empty(
    config: Any, dtype: Any, without_data: Callable[[], AbstractContextManager[Any]] = lambda: torch.device("meta")
) -> Any:
    cls = _class_of(config)
    build = cls.from_config if cls is transformers.AutoModel else cls._from_config
    with without_data():
        return build(config, dtype=dtype)


def dense_like(model: Any) -> Any:
    """The dense model of the same class and configuration, on the meta device."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        dense = type(model)._from_config(config, dtype=model.dtype)
    if model.can_generate():
        dense.generation_config = model.generation_config
    if hasattr(model, "_weight_conversions"):  # by which the names in its files differ from those of its modules
        dense._weight_conversions = model._weight_conversions
    return dense


def _stored_dtype(source: str | Path) -> torch.dtype:
    """The dtype in which a folder without one in its configuration is loaded: the first that can be computed in."""
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                found = _FLOATING.get(file.get_slice(key).get_dtype())
                if found is not None:
                    return found
    return torch.float32


def _read(source: str | Path, cls: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """The model, by default as the class that its configuration names, and the tensors that its files lack."""
    with _readable(source):
        cls = cls or _class_of(transformers.AutoConfig.from_pretrained(source))
        model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    return model, sorted(info["missing_keys"])


@contextmanager
def _readable(source: str | Path) -> Generator[None]:
    """Whatever goes wrong while a model is read is said in one way."""
    try:
        yield
    except MPOError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # what transformers makes of a damaged file has no one type
        refuse_pickled(source, error)
        raise MPOError(f"{source} cannot be read as a model: {bounded_text(_first_line(error), 500)}") from error


def _class_of(config: Any) -> Any:
    """The class that a configuration names; without one, the bare model of its kind.

    Raises:
        MPOError: what it names is no model class of transformers.
    """
    named = config.architectures
    if named is None or named == []:
        return transformers.AutoModel
    first = named[0] if isinstance(named, list | tuple) else named
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise MPOError(
            f"config.json says architectures={clipped(repr(named))}, which names no model class of transformers "
            f"{transformers.__version__}: it is damaged, or of a newer version"
        )
    return found


def check_source(source: str | Path) -> None:
    """Refuse what is neither a model folder nor can be a name on the hub.

    Raises:
        MPOError: no such folder, one that holds no model, or one with a configuration of absurd length.
    """
    path = Path(source)
    recover(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise MPOError(f"{source} is not a model folder: it has no config.json")
    if not path.is_dir() and (path.exists() or path.is_absolute() or str(source).startswith((".", "~"))):
        raise MPOError(f"there is no model folder {source}: give a folder with config.json and weights, or a hub name")
    if path.is_dir():
        check_folder(path)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        MPOError: there is none, or no such folder.
    """
    check_source(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise MPOError(f"{source} has no tokenizer that can be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def save_model(
    model: Any, source: str | Path, out: Path, *, overwrite: bool = False, files: Mapping[str, str] | None = None,
    state: Mapping[str, torch.Tensor] | None = None, original_names: bool = True,
) -> None:  # fmt: skip
    """Write the model and what else ``source`` holds (tokenizer, pooling, ...) to ``out``, whole or not at all.

    ``files`` are texts to write beside it, by name; ``state`` are tensors to write in place of the model's own. With
    ``original_names`` transformers gives them the names, and splits them into the tensors, that its files have had.

    Raises:
        MPOError: ``out`` may not be written, or the disk is full; then nothing is left of it.
    """
    check_model_target(out, source, overwrite=overwrite)
    _write_model(model, source, out, files or {}, state, original_names)


def replace_model(model: Any, folder: Path, *, files: Mapping[str, str] | None = None) -> None:
    """Write the model over the folder that it was read from, of which all but the weights stay. See :func:`save_model`.

    Raises:
        MPOError: it is no model folder, or the disk is full; then it is as it was.
    """
    check_target(folder, overwrite=True, marker="config.json")
    _write_model(model, folder, folder, files or {})


def _write_model(
    model: Any, source: str | Path, out: Path, files: Mapping[str, str],
    state: Mapping[str, torch.Tensor] | None = None, original_names: bool = True,
) -> None:  # fmt: skip
    if getattr(model, "name_or_path", None) == str(source):  # it was read from there
        check_still_there(source)
    with written_beside(out) as temporary:
        if Path(source).is_dir():
            copy_companions(Path(source), temporary)
        with as_os_error():
            model.save_pretrained(
                temporary, state_dict=None if state is None else dict(state), save_original_format=original_names
            )
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")


def check_model_target(out: Path, source: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder early. See :func:`mpo_tn.storage.files.check_target`."""
    check_target(out, overwrite=overwrite, marker="config.json", keep=Path(source))


def weight_bytes(source: str | Path) -> int:
    """The size of the weight files of a model folder, or of a model from the hub that was loaded before.

    Raises:
        MPOError: it has none.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(str(cached_file(str(source), "config.json", local_files_only=True))).parent
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        found = sum(path.stat().st_size for path in folder.glob(pattern))
        if found:
            return found
    raise MPOError(f"{source} has no weight files: give a folder with .safetensors files")


def load_for_task(source: str | Path, num_labels: int | None, seed: int) -> Any:
    """The model with a head of ``num_labels`` outputs (``None``: a language model), freshly drawn if it had none.

    Raises:
        MPOError: not a model, or more is missing than a head.
    """
    torch.manual_seed(seed)
    name = "AutoModelForCausalLM" if num_labels is None else "AutoModelForSequenceClassification"
    options = {} if num_labels is None else {"num_labels": num_labels}
    model, absent = _read(source, getattr(transformers, name), dtype=torch.float32, **options)
    body = getattr(model, model.base_model_prefix, model)
    inside = {f"{model.base_model_prefix}.{key}" for key in body.state_dict()} if body is not model else set[str]()
    missing = [key for key in absent if key in inside and "pooler" not in key]
    if missing or (num_labels is None and absent):
        first = (missing or absent)[0]
        raise MPOError(f"{source} is incomplete as a {type(model).__name__}: {first} is missing among others")
    return model
