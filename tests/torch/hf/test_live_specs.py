"""The specs that are saved are those of the modules, whatever happened to the model since and whoever was told."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import roundtrip, small
from helpers.tiny_models import outputs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from mpo_tn.torch import ModuleSpec, MPOConfig, MPOLayer, compress, cut_model
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.models.units import all_bonds, mpo_specs, mpo_units


def head_around() -> Any:
    """A classifier whose base alone was compressed; the two share one configuration, and only the base has a hook."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config).eval()
    compress(model.bert, MPOConfig(target_modules=r".*(query|word_embeddings)", sites=3, bond=5))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "bert": small,
    "albert, shared layers": lambda: small("albert"),
    "a head around a compressed base": head_around,
}


def listed(model: Any) -> dict[str, ModuleSpec]:
    """What config.json would hold now."""
    return model.config.quantization_config.modules


def actual(model: Any) -> dict[str, ModuleSpec]:
    """The specs of the modules, under the names of the model that was compressed."""
    return mpo_specs(model if hasattr(model, "hf_quantizer") else model.bert)


def cut(model: Any, by: int = 1) -> None:
    """Every bond that can be, a little smaller."""
    cut_model(model, {name: [max(1, b - by) for b in bonds] for name, bonds in all_bonds(mpo_units(model)).items()})


def check_saved(model: Any, folder: Path) -> Any:
    """A saved model loads again, to the same bits and bonds."""
    loaded = roundtrip(model, folder)
    assert torch.equal(outputs(loaded), outputs(model))
    assert all_bonds(mpo_units(loaded)) == all_bonds(mpo_units(model))
    return loaded


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - written a moment ago


@pytest.mark.parametrize("kind", MODELS)
def test_a_cut_is_seen_at_once_and_saved(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = listed(model)
    cut(model)
    assert listed(model) == actual(model) != before
    loaded = check_saved(model, tmp_path)
    cut(loaded)
    assert listed(loaded) == actual(loaded)
    check_saved(loaded, tmp_path / "again")


def test_cores_and_specs_that_were_set_by_hand_are_saved(tmp_path: Path) -> None:
    model = small("gpt2", tied=False)
    units = mpo_units(model)
    first, second = list(units.values())[:2]
    layer = first.modules[0]
    layer.replace_cores([core[:1, ..., :1] for core in layer.cores], [1, 1])
    other = second.modules[0]
    bonds = (2, other.spec.bonds[1])
    for core, shape in zip(other.cores, replace(other.spec, bonds=bonds).core_shapes, strict=True):
        core.data = core.data[: shape[0], ..., : shape[3]].contiguous()
    other.spec = replace(other.spec, bonds=bonds)
    assert (listed(model)[first.name].bonds, listed(model)[second.name].bonds) == ((1, 1), bonds)
    check_saved(model, tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_a_deep_copy_has_a_configuration_of_its_own(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = listed(model)
    copied = copy.deepcopy(model)
    cut(copied)
    assert listed(copied) == actual(copied) != before
    assert listed(model) == actual(model) == before
    check_saved(copied, tmp_path / "copy")
    check_saved(model, tmp_path / "original")
    cut(model, 2)
    assert listed(copied) == actual(copied) != listed(model)
    # The copy does not lean on the original.
    specs = listed(copied)
    del model
    gc.collect()
    cut(copied)
    assert listed(copied) == actual(copied) != specs


@pytest.mark.parametrize("kind", MODELS)
def test_an_unpickled_model_follows_its_own_modules(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    cut(model)
    again = unpickled(model)
    assert listed(again) == actual(again) == listed(model)
    cut(again)
    assert listed(again) == actual(again) != listed(model)
    assert listed(model) == actual(model)
    check_saved(again, tmp_path)


def test_a_configuration_alone_is_copied_as_a_snapshot_without_the_model() -> None:
    model = small()
    config = model.config.quantization_config
    cut(model)
    before = actual(model)  # and nobody has asked the configuration yet
    copies = [copy.deepcopy(config), copy.copy(config), unpickled(config)]
    copies += [copy.deepcopy(model.config).quantization_config]
    assert len(pickle.dumps(config)) < sum(p.nbytes for p in model.parameters())
    cut(model)
    assert config.modules == actual(model) != before
    for copied in copies:
        assert isinstance(copied, MPOQuantizationConfig)
        assert (copied.modules, copied.config, copied.model) == (before, config.config, None)
        assert MPOQuantizationConfig(**dict(copied)).to_dict() == copied.to_dict()


def test_of_a_model_that_is_gone_the_configuration_keeps_what_was_read_last(tmp_path: Path) -> None:
    model = small()
    config, seen = model.config.quantization_config, weakref.ref(model)
    cut(model)
    model.save_pretrained(tmp_path)
    wanted = actual(model)
    del model
    gc.collect()
    assert seen() is None  # the configuration holds no weights
    assert config.modules == wanted
    assert (
        json.loads(config.to_json_string()) == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    unread = small().config.quantization_config  # its model is gone before anybody asked
    gc.collect()
    assert unread.modules.keys() == wanted.keys()
    assert "5" in repr(unread)


def test_two_models_of_one_configuration_are_saved_each_with_its_own(tmp_path: Path) -> None:
    dense = tiny("bert")
    models = [dense, transformers.BertForMaskedLM(dense.config).eval()]
    for bond, model in zip((5, 3), models, strict=True):
        compress(model, MPOConfig(sites=3, bond=bond))
    assert models[0].config is models[1].config
    for k, model in enumerate(models):
        check_saved(model, tmp_path / str(k))


def test_a_shallow_copy_saves_what_it_shares(tmp_path: Path) -> None:
    model = small()
    copied = copy.copy(model)
    cut(copied)
    assert listed(model) == listed(copied) == actual(model)
    del model
    gc.collect()
    cut(copied)
    check_saved(copied, tmp_path)
    assert listed(copied) == actual(copied)


def test_names_are_those_of_the_files_where_torch_wraps_modules(tmp_path: Path) -> None:
    model = small()
    names = set(listed(model))
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "BertLayer")
    assert set(listed(model)) == names != set(mpo_specs(model))
    assert torch.equal(outputs(roundtrip(model, tmp_path)), outputs(model))


def densified(layer: MPOLayer) -> nn.Linear:
    dense = nn.Linear(layer.spec.in_features, layer.spec.out_features)
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        dense.bias.copy_(layer.bias)
    return dense


def test_modules_that_were_replaced_are_not_listed_any_more(tmp_path: Path) -> None:
    model = small(target_modules=r".*(query|key)")
    names = list(mpo_units(model))
    model.set_submodule(names[0], densified(model.get_submodule(names[0])))
    assert list(listed(model)) == names[1:]
    check_saved(model, tmp_path / "some")
    for name in names[1:]:
        model.set_submodule(name, densified(model.get_submodule(name)))
    loaded = roundtrip(model, tmp_path / "all")
    assert "quantization_config" not in json.loads((tmp_path / "all" / "config.json").read_text())
    assert torch.equal(outputs(loaded), outputs(model))


def copied_after_its_configuration(model: Any) -> Any:
    return copy.deepcopy((model.config, model))[1]


COPIES = {function.__name__: function for function in (copy.deepcopy, unpickled, copied_after_its_configuration)}


@pytest.mark.slow
@settings(max_examples=20)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    steps=st.lists(st.sampled_from(["cut", "save", *COPIES]), max_size=6),
)
def test_whatever_becomes_of_a_model_its_configuration_says_what_it_is(kind: str, steps: list[str]) -> None:
    model = MODELS[kind]()
    with tempfile.TemporaryDirectory() as place:
        for k, step in enumerate([*steps, "cut", "save"]):
            if step == "cut":
                cut(model)
            elif step == "save":
                model = check_saved(model, Path(place) / str(k))
            else:
                model = COPIES[step](model)
            assert listed(model) == actual(model)


def test_a_tied_head_is_saved_without_the_table_that_had_its_cores(tmp_path: Path) -> None:
    model = small("bert", target_modules=["word_embeddings"])
    table, head = listed(model)
    dense = nn.Embedding(*model.get_submodule(table).dense_weight().shape)
    model.set_submodule(table, dense)
    assert list(listed(model)) == [head]
    loaded = check_saved(model, tmp_path)
    assert isinstance(loaded.get_input_embeddings(), nn.Embedding)
    assert listed(loaded)[head].tied_to is None
