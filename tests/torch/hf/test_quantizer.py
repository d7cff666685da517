"""save_pretrained, then AutoModel.from_pretrained: the same bits, ties and sharing, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny_models import EMBEDDINGS, FAMILIES, VOCAB, outputs, tiny
from safetensors import safe_open

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOEmbedding, MPOLinear, compress
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig


def auto_class(model: transformers.PreTrainedModel) -> type:
    causal = type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM


def reloaded(model: transformers.PreTrainedModel, folder: Path, **kwargs: object) -> transformers.PreTrainedModel:
    model.save_pretrained(folder, **kwargs)
    loaded, info = auto_class(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_embedding", [True, False])
def test_reload_gives_the_same_bits(family: str, tied: bool, with_embedding: bool, tmp_path: Path) -> None:
    model = tiny(family, tied=tied)
    linear = r".*(query|key|value|dense|ffn|ffn_output|lin\d|[qkv]_lin|out_lin|c_attn|c_proj|c_fc|\w_proj)"
    target = rf"{linear}|.*{EMBEDDINGS[family]}" if with_embedding else "all-linear"
    report = compress(model, MPOConfig(target_modules=target, sites=3, keep=0.7))
    assert report.kept <= 0.7
    expected = outputs(model)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(outputs(loaded), expected)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert any(isinstance(m, MPOLinear) for m in loaded.modules())
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, MPOEmbedding) == with_embedding
    head = loaded.get_output_embeddings()
    if with_embedding and tied:
        assert isinstance(head, MPOLinear)
        assert all(a is b for a, b in zip(head.cores, embedding.cores, strict=True))
    elif tied:
        assert head.weight is embedding.weight
    else:
        assert isinstance(head, torch.nn.Linear)
    # What was loaded can be saved again, to the same bytes.
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("family", FAMILIES)
def test_shards(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compress(model, MPOConfig(target_modules=["re:.*(query|c_attn|q_proj|q_lin)", EMBEDDINGS[family]], sites=3, bond=6))
    expected = outputs(model)
    loaded = reloaded(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_table_is_stored_once(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    compress(model, MPOConfig(target_modules=[EMBEDDINGS[family]], sites=3, bond=4))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        first_cores = [key for key in file.keys() if key.endswith(".cores.0")]  # noqa: SIM118 - not a dict
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        stored = sum(tensor.numel() for tensor in tensors if tensor.dtype != torch.uint8)  # the sentinel
    assert len(first_cores) == 1
    buffers = sum(b.numel() for n, b in model.named_buffers() if n in model.state_dict())
    assert stored == sum(p.numel() for p in model.parameters()) + buffers


def test_bfloat16(tmp_path: Path) -> None:
    # Read as bfloat16 rather than cast: a cast would round the rotary frequencies too, which loading does not.
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    compress(model, MPOConfig(target_modules="all-linear", sites=3, keep=0.8))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = outputs(model)
    assert torch.equal(outputs(reloaded(model, tmp_path / "small")), expected)


def test_base_model_loads_into_a_head_and_back(tmp_path: Path) -> None:
    base = tiny("bert").bert
    base = transformers.BertModel(base.config).eval()
    compress(base, MPOConfig(sites=3, keep=0.7))
    expected = outputs(base)
    base.save_pretrained(tmp_path / "base")
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    assert torch.equal(outputs(head.bert), expected)
    assert isinstance(head.classifier, torch.nn.Linear)
    assert torch.isfinite(head.classifier.weight).all()
    head.save_pretrained(tmp_path / "head")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert torch.equal(outputs(again), outputs(head))
    stripped = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(outputs(stripped), expected)


def test_compress_while_loading_matches_compress_after_loading(tmp_path: Path) -> None:
    model = tiny("bert")
    model.save_pretrained(tmp_path / "dense")
    config = MPOConfig(sites=3, keep=0.6)
    on_load = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", quantization_config=config.to_hf())
    compress(model, config)
    assert torch.equal(outputs(on_load), outputs(model))
    assert torch.equal(outputs(reloaded(on_load, tmp_path / "small")), outputs(model))
    for loaded in (on_load, model):
        assert isinstance(loaded.config.quantization_config, MPOQuantizationConfig)
        assert loaded.config.quantization_config.config == config
    assert on_load.config.quantization_config.modules == model.config.quantization_config.modules
    with pytest.raises(
        ValueError, match="quantized with MPOQuantizationConfig"
    ):  # what is compressed is not compressed again
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small", quantization_config=config.to_hf())


def test_albert_shares_its_layers_after_reloading(tmp_path: Path) -> None:
    model = tiny("albert")
    shared = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention.query
    compress(model, MPOConfig(sites=3, keep=0.7))
    report_names = [n for n, m in model.named_modules() if isinstance(m, MPOLinear)]
    assert len([n for n in report_names if n.endswith("query")]) == 1
    assert isinstance(shared, torch.nn.Linear)
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


def test_a_dense_model_can_still_be_saved_beside(tmp_path: Path) -> None:
    dense, small = tiny("bert"), tiny("bert")
    compress(small, MPOConfig(sites=3, keep=0.5))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_newer_and_damaged_formats_are_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    compress(model, MPOConfig(sites=3, keep=0.5))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())

    newer = {**good, "quantization_config": {**good["quantization_config"], "format_version": 99}}
    path.write_text(json.dumps(newer))
    with pytest.raises(MPOError, match="99"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)

    lost = json.loads(json.dumps(good))
    name = next(iter(lost["quantization_config"]["modules"]))
    del lost["quantization_config"]["modules"][name]["bonds"]
    path.write_text(json.dumps(lost))
    with pytest.raises(MPOError, match="bonds"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_vocabulary_needs_padding() -> None:
    model = tiny("bert")
    report = compress(model, MPOConfig(target_modules=["word_embeddings"], sites=3))
    assert report.layers[0].spec.sites.shape[0] > VOCAB
