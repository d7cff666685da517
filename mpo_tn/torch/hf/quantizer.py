"""The transformers hook: save_pretrained and from_pretrained for models with MPO modules.

transformers calls anything that replaces modules a quantizer; what is registered here under the name ``"mpo"`` builds
the MPO modules empty before the weights are read.
"""

# transformers types the hooks of its quantizers by their empty bodies, and keeps what they must touch in attributes
# with a leading underscore.
# pyright: reportPrivateUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import PARAMETER
from mpo_tn.torch.hf.checks import (
    Reading,
    check_count,
    check_entries,
    check_held,
    check_read,
    check_record,
    check_ties,
    listen,
    stop_listening,
)
from mpo_tn.torch.hf.held import CORE, Held, held_by
from mpo_tn.torch.hf.names import (
    local_names,
    owned_state,
    retie,
    spellings,
    tied_layers,
    transformers_models,
    untie,
)
from mpo_tn.torch.hf.on_load import Factorise, OnLoad
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig, is_ours
from mpo_tn.torch.hf.record import check_files
from mpo_tn.torch.hf.sentinel import RECORD, guard, sentinel_key, sentinels, unguard
from mpo_tn.torch.layers.cores import held_tensors
from mpo_tn.torch.layers.layer import MPOLayer
from mpo_tn.torch.layers.parameter import HELD, place_of
from mpo_tn.torch.layers.quantized import quantized_cores
from mpo_tn.torch.models.compress import build
from mpo_tn.torch.models.dense import to_dense
from mpo_tn.torch.models.places import put
from mpo_tn.torch.models.units import mpo_specs

# The tensors of a core in bits.
_IN_BITS = re.compile(r"\.cores\.\d+\.weight(_packed|_scale|_shape)?$")
_BIAS = re.compile(r"^(?P<module>.*)\.bias$")


class MPOHfQuantizer(HfQuantizer):
    """Builds MPO modules before loading; compresses while loading when the files are dense.

    Guarantee (reload-bits): what ``save_pretrained`` wrote comes back bit for bit, with every tie and shared module.
    Guarantee (no-random-cores): a folder from which a core is missing is refused.
    """

    quantization_config: Any  # an MPOQuantizationConfig
    given: Mapping[str, torch.Tensor] | None = None  # the tensors that are to be saved in place of the model's own
    _unready: list[Any]
    _held: Held
    _files: list[str]
    _reading: Reading
    _on_load: OnLoad | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the model as well, which they have in hand already, because it holds this quantizer."""
        return {**self.__dict__, "model": self.quantization_config.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the configuration of the copy follow the copy of the model."""
        model = state.pop("model")
        vars(self).update(state)
        if model is not None:
            self.quantization_config.follow(model)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._on_load = OnLoad(model, self.quantization_config.config, model.config.dtype)
            return
        dtype = kwargs.get("dtype")
        check_count(model, self.quantization_config.listed)
        modules = self.quantization_config.modules
        check_ties(modules)
        files = kwargs.get("checkpoint_files")
        self._files = list(files or ())
        self._held = Held() if files is None else held_by(files)
        if files is not None:
            check_held(self._held, modules)
        check_record(self._held, modules, model.config)
        specs = local_names(model, modules)
        check_entries(model, specs)
        built: dict[str, MPOLayer] = {}
        owners = dict(model.named_modules(remove_duplicate=False))
        for name, spec in specs.items():
            cores = list(built[spec.tied_to].cores) if spec.tied_to in built else None
            built[name] = build(spec, cores, device="meta", dtype=dtype)
            if spec.kind == PARAMETER:
                put(model, {name: built[name]})
                continue
            old = owners[name]
            for alias in [alias for alias, module in owners.items() if module is old]:
                model.set_submodule(alias, built[name])
                _nothing_to_initialise(model, alias)
        retie(model)
        self._unready = []
        tied = {name for name, spec in specs.items() if spec.tied_to in specs}
        for name in tied:
            for k in (without := quantized_cores(built[name].cores)):  # put back once loaded: there is nothing to read
                del built[name].cores._modules[k]
            if without and (place := place_of(name)) is not None:  # whose weight cannot be computed until then
                self._unready.append(model.get_submodule(place[0]))
        for owner in self._unready:
            owner._is_hf_initialized = True
        # The key may carry the prefix of another head or none.
        ignored = {f"(^|\\.){re.escape(key)}$" for key in spellings(model, sentinel_key(modules))}
        ignored.add(f"^{re.escape(RECORD)}$")
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        self._reading = listen(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            modules = self.quantization_config.modules
            specs = local_names(model, modules)
            for tied, source in tied_layers(model, specs).items():
                for k, core in quantized_cores(source.cores).items():
                    tied.cores[int(k)] = core
            for owner in self._unready:  # what it holds beside the weight: the scale of a table
                owner._is_hf_initialized = False
                model._init_weights(owner)
            del self._unready
            stop_listening(model)
            _require_complete(model)
            check_read(model, modules, self._held, self._reading)
            check_files(self._files)
            del self._held, self._reading, self._files
            # Names as this class knows them, so that saving it again writes them right.
            attach(model, self.quantization_config.config)
        elif self._on_load is not None:
            made, self._on_load = self._on_load, None  # or the model would hold what it is compressed from
            made.finish(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The state dict and one tensor under the name of a dense weight, see :mod:`mpo_tn.torch.hf.sentinel`."""
        if self.given is not None and not self.given:  # the state of a process that writes nothing
            return {}, {}
        modules = self.quantization_config.modules
        state = owned_state(model, model.state_dict() if self.given is None else self.given)
        guard(model.config)
        unsaved: set[str] = set(model._keys_to_ignore_on_save or ())
        beside = [name for name in state if name not in unsaved and not CORE.match(name)]
        state |= sentinels(model, modules, beside)
        # No metadata of our own: safetensors writes two entries in random order, and equal models give equal files.
        return state, {}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the model's own, which would say nothing of what to do instead.

        Raises:
            MPOError: the word table is held as cores.
        """
        model = self.quantization_config.model
        if _has_mpo_table(model):
            raise MPOError(
                "the word table is held as cores, which have its number of rows: resize the dense model before "
                "compressing it"
            )
        return type(model).resize_token_embeddings(model, *args, **kwargs)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Give the modules their dense weights back, in the dtype that they have, or the whole model in another.

        Guarantee (dequantize): it is what :func:`~mpo_tn.torch.to_dense` gives, and ``save_pretrained`` writes a plain
        dense folder afterwards.
        """
        to_dense(model)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Save the model, and what is inside of it, as dense from now on where there are no MPO modules any more."""
        detach(model)

    def is_serializable(self) -> bool:
        """Always: the cores are ordinary parameters and buffers."""
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Yes for cores and their biases: shapes are then looked at once all is read, and the error names them.

        Of a dense model for what becomes cores as soon as it is read.
        """
        if self._on_load is not None:
            return self._on_load.takes(param_name)
        return _is_of_mpo(model, param_name)

    def get_quantize_ops(self) -> Factorise:
        """What makes cores of a weight that was just read."""
        assert self._on_load is not None
        return Factorise(self._on_load)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, which is as it is in the file, for what holds cores in bits, whatever the model is loaded in."""
        if all(_IN_BITS.search(name) for name in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    @property
    def is_trainable(self) -> bool:
        """Cores are ordinary parameters, so Trainer may train them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without this Trainer asks for adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers hold plain tensor operations."""
        return True


def attach(model: Any, config: MPOConfig) -> None:
    """Make plain ``model.save_pretrained`` write what :class:`MPOHfQuantizer` reads; all of it or nothing."""
    hf_config = MPOQuantizationConfig(config, mpo_specs(model))
    quantizer = MPOHfQuantizer(hf_config, pre_quantized=True)
    model.hf_quantizer = quantizer
    if _has_mpo_table(model):
        model.resize_token_embeddings = quantizer.resize_token_embeddings
    lead(model)
    # As transformers does when it loads one, and some models then compute in another way (Jamba, in other bits).
    for part in transformers_models(model):
        part.config._is_quantized = True
    # Cores are ordinary parameters: half() and float() may cast them, which they refuse to quantized models.
    model.is_quantized = False
    model.quantization_method = hf_config.quant_method


def lead(model: Any) -> None:
    """Let the configuration of a model and its ties be those of its own modules as they are now.

    The configuration may have come to follow another model: one object may be shared by the models inside of each
    other, and a shallow copy of a model shares everything.
    """
    hf_config = model.hf_quantizer.quantization_config
    hf_config.follow(model)
    # In place: the model around a compressed base model has the same object.
    model.config.quantization_config = hf_config
    retie(model)


def detach(model: nn.Module) -> None:
    """Take back :func:`attach`, of a model and of those inside of it, where there are no MPO modules any more."""
    parts = transformers_models(model)
    compressed = [part for part in parts if any(isinstance(module, MPOLayer) for module in part.modules())]
    others = [part for part in parts if not isinstance(getattr(part, "hf_quantizer", None), MPOHfQuantizer | None)]
    for part in parts:
        if part in compressed:
            continue
        untie(part)
        if isinstance(getattr(part, "hf_quantizer", None), MPOHfQuantizer):
            del part.hf_quantizer, part.quantization_method
            vars(part).pop("resize_token_embeddings", None)
        if any(part.config is other.config for other in compressed):
            continue
        if not others:
            vars(part.config).pop("_is_quantized", None)
        if is_ours(part.config):
            del vars(part.config)["quantization_config"]
            unguard(part.config)


def _has_mpo_table(model: Any) -> bool:
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # a model of images, or one that a part was taken off
        return False
    return isinstance(table, nn.Module) and (isinstance(table, MPOLayer) or hasattr(table, HELD))


def _require_complete(model: nn.Module) -> None:
    """Refuse cores that no file held: unlike a fresh head they cannot start from random numbers.

    transformers marks every tensor that it read, and only warns of the others.
    """
    unread = [
        name
        for name, parameter in (*model.named_parameters(), *_buffers_of_cores(model))
        if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False)
    ]
    for name in sorted(unread, key=lambda name: CORE.match(name) is None):  # the core of a module before its bias
        if _is_of_mpo(model, name):
            raise MPOError(
                f"{name} is not in the files: the folder is incomplete, or it is not the model that config.json "
                "describes (tie_word_embeddings changed, or a configuration shared with a compressed model)"
            )


def _buffers_of_cores(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [item for name, core in quantized_cores(model).items() for item in held_tensors(core, name).items()]


def _is_of_mpo(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name is a core of an MPO module, a part of one, or its bias."""
    found = CORE.match(name) or _BIAS.match(name)
    return found is not None and isinstance(model.get_submodule(found["module"]), MPOLayer)


def _nothing_to_initialise(model: Any, name: str) -> None:
    """Keep ``_init_weights`` of GPT-2, T5 and their like away from ``parent.c_proj.weight``.

    They are asked to initialise the parent of every layer. A parent that owns no tensor has nothing to initialise.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in (*parent.parameters(recurse=False), *parent.buffers(recurse=False))):
        parent._is_hf_initialized = True
