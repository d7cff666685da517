"""Folders of models whose weights are reached through parameters: the same bits back, a loud sentinel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ODD, called, tiny_model
from safetensors import safe_open

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOParameter, compress
from mpo_tn.torch.hf.export import plan_export, write_export
from mpo_tn.torch.layers.parameter import dense_key


def compressed(name: str, **policy: Any) -> Any:
    model = tiny_model(name)
    compress(model, MPOConfig(**{"target_modules": r".*", "sites": 3, "bond": 6, **policy}))
    return model


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("name", ODD)
def test_the_same_bits_come_back(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    logits = called(model)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Other memory may round otherwise; the cores are the same bits.
    assert (called(loaded.eval()) - logits).norm() <= 1e-6 * logits.norm()
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    shared = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    assert len(list(loaded.named_parameters(remove_duplicate=False))) - len(list(loaded.parameters())) == shared


def test_keys_and_entries_are_those_of_the_format(tmp_path: Path) -> None:
    compressed("qwen3 moe", sites="low-rank").save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    entry = modules["model.layers.0.mlp.experts.mpo.down_proj"]
    assert (entry["kind"], entry["shape"]) == ("parameter", [4, 32, 24])
    assert (entry["out_features"], entry["in_features"]) == (128, 24)
    assert "shape" not in modules["model.layers.0.self_attn.q_proj"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {f"model.layers.0.mlp.experts.mpo.down_proj.cores.{k}" for k in range(2)} <= keys


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gemma 3"])
def test_cores_in_bits_come_back(name: str, tmp_path: Path) -> None:
    model = compressed(name, sites=1, bits=4, bond=None)
    logits = called(model)
    model.save_pretrained(tmp_path)
    assert (called(type(model).from_pretrained(tmp_path).eval()) - logits).norm() <= 1e-6 * logits.norm()


@pytest.mark.guarantee("reload-bits")
def test_scaled_tables_on_one_chain_in_bits_come_back_with_their_scales(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": 101, "head_dim": 8}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    encoder = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    model = transformers.T5Gemma2ForConditionalGeneration(transformers.T5Gemma2Config(encoder=encoder, decoder=text))
    compress(model.eval(), MPOConfig(target_modules=[r"re:.*embed_tokens"], sites=1, bits=4))
    ids = torch.arange(3, 13).reshape(2, 5)
    logits = model(input_ids=ids, decoder_input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, logits)


def test_a_lying_shape_is_refused(tmp_path: Path) -> None:
    model = compressed("mixtral", target_modules=["down_proj"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["quantization_config"]["modules"]["model.layers.0.mlp.experts.mpo.down_proj"]
    entry["shape"] = [2, 64, 48]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MPOError, match=r"shape \(2, 64, 48\), and the model has one of shape \(4, 32, 48\)"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.guarantee("loud-without-us")
@pytest.mark.parametrize(("name", "target"), [("mixtral", ["experts"]), ("gpt-oss", ["experts"]), ("falcon", r".*")])
def test_plain_transformers_fails_loudly(name: str, target: Any, tmp_path: Path) -> None:
    compressed(name, target_modules=target).save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode
    assert "import mpo_tn.torch" in run.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.guarantee("export-exact")
@pytest.mark.parametrize("name", ["gemma 3", "gpt-oss"])
def test_an_export_multiplies_parameters_out(name: str, tmp_path: Path) -> None:
    model = compressed(name, sites=1, bits=8, bond=None)
    (tmp_path / "small").mkdir()
    model.save_pretrained(tmp_path / "small")
    planned = plan_export(model, "compressed-tensors")
    assert all("parameter" in m.note for m in planned.matrices if ".mpo." in m.name)
    write_export(model, planned, tmp_path / "small", tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain").eval()
    dense = dict(plain.named_parameters())
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MPOParameter):
            assert torch.equal(dense[dense_key(layer_name)], layer.stored_weight())
