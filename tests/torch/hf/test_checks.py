"""What config.json says is held against the model, the files and the record. See also test_hostile_folders.py."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import small
from helpers.tiny_models import outputs
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig
from mpo_tn.torch.hf.folder import load_model

QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key"))
Entries = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small(bits={"central": 3}, group=16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[Entries], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def without_record(folder: Path) -> None:
    """As earlier versions wrote it."""
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(
        {name: torch.empty(0) if t.dtype == torch.uint8 else t for name, t in state.items()}, path, {"format": "pt"}
    )


def refused(folder: Path, match: str) -> None:
    for load in (load_model, transformers.AutoModelForMaskedLM.from_pretrained, transformers.BertModel.from_pretrained):
        with pytest.raises(MPOError, match=match):
            load(folder)


def modules(config: Entries) -> Entries:
    return config["quantization_config"]["modules"]


def swap(entries: Entries, one: str, other: str) -> None:
    entries[one], entries[other] = entries[other], entries[one]


LIES: dict[str, tuple[Callable[[Entries], Any], str]] = {
    "missing": (lambda c: modules(c).pop(QUERY), f"{QUERY}.*does not list it|does not list {QUERY}"),
    "renamed": (lambda c: modules(c).update({"bert.x": modules(c).pop(QUERY)}), r"bert\.x.*no cores were saved"),
    "swapped": (lambda c: swap(modules(c), QUERY, "bert.encoder.layer.0.output.dense"), "in the files and"),
    "twice": (lambda c: modules(c).update({QUERY[5:]: modules(c)[QUERY]}), "cores.0.* is not in the files"),
    "out_features": (lambda c: modules(c)[QUERY].update(out_features=31), "out_features=31.* has 32"),
    "bias": (lambda c: modules(c)[QUERY].update(bias=False), "bias=False"),
    "shared bias": (lambda c: modules(c)["cls.predictions.decoder"].update(bias=False), "bias=False"),
    "kind": (lambda c: modules(c)[QUERY].update(kind="conv1d"), "kind=conv1d"),
    "bits": (lambda c: modules(c)[QUERY].update(bits=[None, 2, None]), "bits=.*was saved with|in the files and"),
    "group": (lambda c: modules(c)[QUERY].update(group=17), "group=17.*was saved with 16|in the files and"),
    "tie": (lambda c: modules(c)[KEY].update(tied_to=QUERY), "tied_to=.*was saved with"),
    "no tie": (lambda c: modules(c)["cls.predictions.decoder"].update(tied_to=None), "is not in the files"),
    "circle": (lambda c: modules(c)[KEY].update(tied_to=KEY), "none of its own"),
    "heads": (lambda c: c.update(num_attention_heads=2), "num_attention_heads=2.*saved with num_attention_heads=4"),
    "layers": (lambda c: c.update(num_hidden_layers=3), "num_hidden_layers=3"),
    "a billion layers": (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "class": (lambda c: c.update(architectures=["BertForPreTraining"]), "architectures=.*was saved as"),
    "method": (lambda c: c["quantization_config"].update(quant_method="fp8"), "quant_method='fp8'"),
    "no method": (lambda c: c["quantization_config"].pop("quant_method"), "quant_method=None"),
    "nothing": (lambda c: c.pop("quantization_config"), "NoneType, no dictionary"),
    "text": (lambda c: c.update(quantization_config="mpo"), "is a str, no dictionary"),
    "unknown": (lambda c: c["quantization_config"].update(load_in_8bit=True), "unknown entry load_in_8bit"),
    "modules": (lambda c: c["quantization_config"].update(modules=[1]), "modules.*a list"),
    "entry": (lambda c: modules(c).update({QUERY: [1]}), f"{QUERY}: it is a list"),
    "bonds": (lambda c: modules(c)[QUERY].update(bonds=["a", None]), "bonds=.*whole numbers"),
    "sites": (lambda c: modules(c)[QUERY].update(sites={"out": 5}), QUERY),
    "padding": (lambda c: modules(c)[QUERY].update(padding_idx="0"), "padding_idx='0'"),
    "exact": (lambda c: modules(c)[QUERY].update(exact="yes"), "exact='yes'"),
    "config": (lambda c: c["quantization_config"].update(config={"overrides": 5}), "quantization_config.config"),
    "huge text": (lambda c: modules(c)[QUERY].update(kind="x" * 10**5), r"kind='x+ \[\.\.\. [\d,]+ bytes \.\.\.\]"),
    "far too many": (lambda c: modules(c).update({f"{k}": {} for k in range(9000)}), "9016 compressed modules"),
}


@pytest.mark.guarantee("config-lies")
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie: str, folder: Path) -> None:
    change, message = LIES[lie]
    edit(folder, change)
    refused(folder, message)


NEEDS_THE_RECORD = {"heads", "class", "bits", "group"}


@pytest.mark.guarantee("config-lies")
@pytest.mark.parametrize("lie", sorted(set(LIES) - NEEDS_THE_RECORD))
def test_a_lie_about_a_folder_of_before(lie: str, folder: Path) -> None:
    without_record(folder)
    edit(folder, LIES[lie][0])
    for load in (load_model, transformers.AutoModelForMaskedLM.from_pretrained):
        with pytest.raises(MPOError):
            load(folder)


@pytest.mark.guarantee("no-random-cores")
@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("key", ["LayerNorm.weight", "query.bias", "output.dense.bias"])
def test_a_tensor_that_other_layers_have(key: str, record: bool, folder: Path) -> None:
    if not record:
        without_record(folder)
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del state[next(name for name in state if "layer.1" in name and name.endswith(key))]
    save_file(state, path, {"format": "pt"})
    refused(folder, f"{key} .*is not in the files")


@pytest.mark.guarantee("config-cost")
def test_what_an_absurd_configuration_costs(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text()
    before = '"modules": {'
    assert before in good
    many, deep = "".join(f'"{k}":{{}},' for k in range(10**6)), '"a":' + "[" * 10**5 + "]" * 10**5 + ","
    for more in (many, deep, f'"{"x" * 10**7}":1,'):
        path.write_text(good.replace(before, before + more))
        for load in (load_model, transformers.AutoModel.from_pretrained):
            tracemalloc.start()
            try:
                with pytest.raises(MPOError):
                    load(folder)
                assert tracemalloc.get_traced_memory()[1] < 100e6
            finally:
                tracemalloc.stop()


NAMED = [["AutoConfig"], ["pipeline"], ["__init__"], ["NoSuchModel"], [5], 5, {"a": 1}, "BertConfig", [["BertModel"]]]


@pytest.mark.parametrize("named", NAMED)
def test_architectures_name_model_classes(named: Any, tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)).save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(architectures=named))
    with pytest.raises(MPOError, match=r"cannot be read as a model|names no model class"):
        load_model(tmp_path)


def test_what_may_change(folder: Path) -> None:
    """What is told for the record, and settings by which a model is used rather than made."""
    model = small(bits={"central": 3}, group=16)

    def change(config: Entries) -> None:
        config.update(use_cache=False, hidden_dropout_prob=0.5, id2label={"0": "a"}, label2id={"a": 0}, pad_token_id=1)
        modules(config)[QUERY].update(rel_error=0.5, exact=False)
        config["quantization_config"]["config"] = MPOConfig(keep=0.1).to_dict()

    edit(folder, change)
    for load in (load_model, transformers.AutoModelForMaskedLM.from_pretrained):
        assert torch.equal(outputs(load(folder)), outputs(model))
