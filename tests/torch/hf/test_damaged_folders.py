"""Folders that are incomplete or contradict themselves are refused: nothing starts from random cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.adapter import roundtrip, small
from helpers.tiny_models import outputs, tiny
from safetensors.torch import load, save_file

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, compress


@pytest.mark.guarantee("no-random-cores")
def test_ties_that_the_flag_denies(tmp_path: Path) -> None:
    """Dense transformers then starts the head from random numbers and warns; cores have no such start."""
    model = tiny("bert", tied=False)
    model.config.tie_word_embeddings = True
    compress(model, MPOConfig(target_modules=["word_embeddings", "decoder"], sites=3, bond=5))
    assert torch.equal(outputs(roundtrip(model, tmp_path / "claimed")), outputs(model))
    small().save_pretrained(tmp_path / "denied")
    with pytest.raises(MPOError, match=r"decoder\.cores\.0.*tie_word_embeddings"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "denied", tie_word_embeddings=False)


@pytest.mark.guarantee("no-random-cores")
def test_incomplete_and_contradicting_folders(tmp_path: Path) -> None:
    model, from_pretrained = small(), transformers.BertForMaskedLM.from_pretrained
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    model.save_pretrained(tmp_path)
    good, settings = weights.read_bytes(), json.loads(config.read_text())
    state = load(good)

    weights.write_bytes(good[:-1000])
    with pytest.raises(MPOError, match="not fully covered"):
        from_pretrained(tmp_path)

    lost = next(key for key in state if key.endswith("query.cores.1"))
    save_file({key: value for key, value in state.items() if key != lost}, weights, {"format": "pt"})
    with pytest.raises(MPOError, match=f"{lost}.*incomplete"):
        from_pretrained(tmp_path)
    weights.write_bytes(good)

    modules = settings["quantization_config"]["modules"]
    name = next(key for key in modules if key.endswith("1.output.dense"))
    modules["bert.nowhere"] = modules.pop(name)
    config.write_text(json.dumps(settings))
    with pytest.raises(MPOError, match=r"bert\.nowhere.*damaged"):
        from_pretrained(tmp_path)

    settings["quantization_config"]["modules"] = {}
    config.write_text(json.dumps(settings))
    with pytest.raises(MPOError, match=r"config\.json does not list it"):
        from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    with pytest.raises(MPOError, match="BertForMaskedLM"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("model-*"))[1].unlink()
    with pytest.raises(MPOError, match=r"model-00002.*No such file"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.guarantee("no-random-cores")
def test_dense_weights_under_the_configuration_of_a_compressed_model(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    said = (tmp_path / "config.json").read_text()
    tiny("bert").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(said)
    with pytest.raises(MPOError, match=r"configuration (is )?shared with a compressed model"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)
