"""Without this package a saved folder cannot be loaded; with it, what makes that so is not noticed."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import roundtrip, small
from helpers.tiny_models import outputs, tiny
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf.record import NAME
from mpo_tn.torch.hf.sentinel import GUARD

# In one process, for it is importing transformers that takes long.
_ATTEMPTS = """
import json, sys, transformers
for folder, names in json.loads(sys.argv[1]).items():
    for name in names:
        for options in ({}, {"ignore_mismatched_sizes": True, "trust_remote_code": True}, {"use_safetensors": False},
                        {"ignore_mismatched_sizes": True, "num_labels": 3, "variant": "fp16"}):
            try:
                getattr(transformers, name).from_pretrained(folder, **options)
            except Exception as error:
                print("ok" if "import mpo_tn.torch" in str(error) else f"WITHOUT A NAME {error}", folder, name, options)
            else:
                print("LOADED RANDOM WEIGHTS", folder, name, options)
"""
CLASSES = {
    "bert": ["AutoModel", "BertModel", "BertForMaskedLM", "AutoModelForSequenceClassification", "BertLMHeadModel"],
    "albert": ["AutoModelForMaskedLM", "AlbertModel"],
    "distilbert": ["AutoModel", "DistilBertForSequenceClassification"],
    "gpt2": ["AutoModelForCausalLM", "GPT2Model"],
    "llama": ["AutoModelForCausalLM", "LlamaForSequenceClassification"],
}


@pytest.mark.guarantee("loud-without-us")
@pytest.mark.slow
def test_loading_without_this_package_fails_loudly(tmp_path: Path) -> None:
    asked: dict[str, list[str]] = {}
    for family, names in CLASSES.items():
        model = tiny(family)
        compress(model, MPOConfig(target_modules=["re:.*(query|c_attn|q_proj|q_lin)"], sites=3, bond=4))
        model.save_pretrained(tmp_path / family, max_shard_size="30KB" if family == "gpt2" else "1GB")
        asked[str(tmp_path / family)] = names
    attempts = [sys.executable, "-c", _ATTEMPTS, json.dumps(asked)]
    done = subprocess.run(attempts, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok")] == []
    assert len(lines) == 4 * sum(map(len, CLASSES.values()))


@pytest.mark.parametrize("options", [{}, {"num_labels": 3}])
@pytest.mark.parametrize("name", ["AutoModelForSequenceClassification", "BertModel"])
@pytest.mark.guarantee("loud-without-us")
def test_the_guard_alone_and_the_sentinel_alone_stop_it(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is without this package: nobody registered, nothing known of the guard."""
    small().save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "mpo")
    monkeypatch.delattr(transformers.PreTrainedConfig, "transformers_weights")
    load = getattr(transformers, name).from_pretrained
    with pytest.raises(ValueError, match=r"import mpo_tn\.torch"):
        load(tmp_path, ignore_mismatched_sizes=True, **options)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("transformers_weights") == GUARD
    path.write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path, **options)


@pytest.mark.guarantee("reload-bits")
def test_with_it_nobody_notices(tmp_path: Path) -> None:
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = roundtrip(model, tmp_path / "one")
        third = roundtrip(again, tmp_path / "two", dtype=torch.float32)
    assert torch.equal(outputs(third), outputs(model))
    assert again.config.transformers_weights is None
    assert json.loads((tmp_path / "two" / "config.json").read_text())["transformers_weights"] == GUARD
    assert (
        load_file(tmp_path / "two" / "model.safetensors").keys()
        == load_file(tmp_path / "one" / "model.safetensors").keys()
    )
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_dense_model_has_no_guard(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "small")
    dense = tiny("bert")
    dense.config = model.config
    model.hf_quantizer.remove_quantization_config(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "transformers_weights" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(outputs(transformers.BertForMaskedLM.from_pretrained(tmp_path / "dense")), outputs(tiny("bert")))


def test_other_models_name_their_weights_as_they_did(tmp_path: Path) -> None:
    model = tiny("bert")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": "other.safetensors"}))
    assert torch.equal(outputs(transformers.BertForMaskedLM.from_pretrained(tmp_path)), outputs(model))
    assert not hasattr(transformers.BertConfig(), "transformers_weights")


def test_folders_of_before(tmp_path: Path) -> None:
    """An empty sentinel, no guard and no records."""
    model = small()
    model.save_pretrained(tmp_path)
    (tmp_path / NAME).unlink()
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    settings = json.loads(path.read_text())
    del settings["transformers_weights"]
    path.write_text(json.dumps(settings))
    state = load_file(weights)
    key = next(key for key, value in state.items() if value.dtype == torch.uint8)
    save_file({**state, key: torch.empty(0)}, weights, {"format": "pt"})
    loaded, info = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_guard_of_another_type(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": 5}))
    with pytest.raises(MPOError, match="no name of a file"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)
