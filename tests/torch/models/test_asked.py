"""What a user names and nothing is there, or stays dense; what several names share; where heads are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, calibrate, compress, freeze, plan, set_mode
from mpo_tn.torch.models.eligible import head_modules, kind_of

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_labels": 3, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 61}
SPEECH: dict[str, Any] = {
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
VISION: dict[str, Any] = {name: size for name, size in SIZES.items() if name != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.guarantee("overrides-count")
@pytest.mark.parametrize(
    ("key", "said"),
    [
        (".*word_embeddings", r"overrides\['\.\*word_embeddings'\].*'re:\.\*word_embeddings'"),
        ("word_embedings", r"did you mean word_embeddings"),
        ("key", r"only what stays dense: bert\.encoder\.layer\.0\.attention\.self\.key: target_modules does not match"),
        ("LayerNorm", r"only what stays dense: .*LayerNorm is not a linear layer"),
        ("encoder", r"only a BertEncoder, which holds no matrix itself"),
    ],
)
def test_an_override_that_means_no_matrix_says_why(key: str, said: str) -> None:
    model = tiny("bert")
    config = MPOConfig(target_modules=["word_embeddings", "query"], keep=0.9, overrides={key: {"bond": 2}})
    for decide in (plan, compress):
        with pytest.raises(MPOError, match=said):
            decide(model, config)


@pytest.mark.guarantee("overrides-count")
def test_an_override_behind_another_that_takes_all_of_it_is_refused() -> None:
    general, special = {"re:.*": {"bond": 2}}, {"query": {"bond": 4}}
    model = tiny("bert")
    with pytest.raises(MPOError, match=r"overrides\['query'\] never counts.*'re:\.\*' before it.*put it first"):
        plan(model, MPOConfig(overrides={**general, **special}))
    found = {unit.name: max(unit.spec.bonds) for unit in plan(model, MPOConfig(overrides={**special, **general})).units}
    assert {bond for name, bond in found.items() if name.endswith("query")} == {4}
    assert {bond for name, bond in found.items() if not name.endswith("query")} == {2}


@pytest.mark.guarantee("overrides-count")
@pytest.mark.parametrize("key", ["embed_tokens", "lm_head", "re:.*lm_head", "model.embed_tokens"])
def test_an_override_by_any_name_of_a_tied_matrix_counts(key: str) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    config = MPOConfig(target_modules=["lm_head"], keep=0.9, overrides={key: {"bond": 2}})
    (unit,) = plan(model, config).units
    assert unit.names == ("model.embed_tokens", "lm_head")
    assert max(unit.spec.bonds) == 2


def test_every_entry_has_to_mean_something() -> None:
    model = tiny("bert")
    for config, said in (
        (MPOConfig(target_modules=["query", "valeu"]), r"target_modules='valeu'.*value"),
        (MPOConfig(exclude_modules=["poolr"]), r"exclude_modules='poolr'"),
        (MPOConfig(exclude_modules=["all-linear"]), r"exclude_modules='all-linear' matches no module"),
        (MPOConfig(exclude_modules=["bert"]), r"leaves no module of target_modules='all-linear'"),
        (MPOConfig(target_modules=[]), r"target_modules=\[\] matches no module"),
    ):
        with pytest.raises(MPOError, match=said):
            compress(model, config)
    with pytest.raises(MPOError, match=r"target_modules='valeu'"):
        calibrate(model, [], target_modules=["query", "valeu"])


def test_all_linear_may_stand_beside_others_and_excludes_reach_below() -> None:
    model = tiny("llama")
    both = plan(model, MPOConfig(target_modules=["all-linear", "lm_head"]))
    alone = plan(model, MPOConfig())
    assert {unit.name for unit in both.units} - {unit.name for unit in alone.units} <= {"model.embed_tokens", "lm_head"}
    assert len(both.units) == len(alone.units) + 1
    left = plan(model, MPOConfig(exclude_modules=["model.layers.0"]))
    assert not any(unit.name.startswith("model.layers.0.") for unit in left.units)
    assert left.units


def test_a_mode_is_set_by_any_name_and_every_entry_counts() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential()
    model.add_module("first", shared)
    model.add_module("second", shared)
    compress(model, MPOConfig(sites=2))
    assert set_mode(model, "chain", ["second"]) == ["first"]
    with pytest.raises(MPOError, match=r"'secnd'.*second"):
        set_mode(model, "chain", ["first", "secnd"])


@pytest.mark.guarantee("heads-by-structure")
@pytest.mark.parametrize(
    ("name", "config", "heads"),
    [
        ("BartForSequenceClassification", transformers.BartConfig(**SEQ2SEQ), {"classification_head.dense"}),
        ("T5ForSequenceClassification", transformers.T5Config(**T5), {"classification_head.dense"}),
        ("T5ForQuestionAnswering", transformers.T5Config(**T5), {"qa_outputs"}),
        ("BertForMaskedLM", transformers.BertConfig(**SIZES), {"cls.predictions.transform.dense"}),
        ("ElectraForMultipleChoice", transformers.ElectraConfig(**SIZES), {"sequence_summary.summary"}),
        (
            "XLNetForSequenceClassification",
            transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=61),
            {"sequence_summary.summary", "logits_proj"},
        ),
        ("DebertaV2ForSequenceClassification", transformers.DebertaV2Config(**SIZES), {"pooler.dense", "classifier"}),
        ("DistilBertForSequenceClassification", transformers.DistilBertConfig(
            dim=32, n_layers=1, n_heads=4, hidden_dim=48, vocab_size=61), {"pre_classifier", "classifier"}),
        ("Wav2Vec2ForSequenceClassification", transformers.Wav2Vec2Config(**SIZES, **SPEECH), {"projector"}),
        ("ViTForImageClassification", transformers.ViTConfig(**VISION), {"classifier"}),
        (
            "CLIPForImageClassification",
            transformers.CLIPConfig(text_config=dict(SIZES), vision_config=dict(VISION), projection_dim=8),
            {"classifier"},
        ),
        ("LlamaForTokenClassification", transformers.LlamaConfig(**SIZES), {"score"}),
        ("GPT2ForSequenceClassification", transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=61),
         {"score"}),
    ],
)  # fmt: skip
def test_heads_stay_dense_and_train(name: str, config: Any, heads: set[str]) -> None:
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    found = {name for name, module in model.named_modules() if module in head_modules(model) and kind_of(module)}
    assert heads <= found
    parts = {part.name for part in plan(model, MPOConfig()).left}
    assert found <= parts
    wrapped = nn.ModuleDict({"inner": model})  # and in a wrapper
    assert {f"inner.{name}" for name in found} <= {part.name for part in plan(wrapped, MPOConfig()).left}
    freeze(model, "none", also="heads")
    for head in heads:
        assert all(parameter.requires_grad for parameter in model.get_submodule(head).parameters()), head
    base = getattr(model, model.base_model_prefix, None)
    if base is not None:
        inside = {parameter for part in base.children() for parameter in part.parameters()}
        assert not any(p.requires_grad for p in inside if "pooler" not in _name_of(model, p))


def _name_of(model: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, other in model.named_parameters() if other is parameter)


def test_a_base_model_and_a_plain_one_have_the_heads_that_names_tell() -> None:
    assert not any(kind_of(module) for module in head_modules(tiny("llama").model))
    plain = nn.Sequential()
    plain.add_module("body", nn.Linear(4, 4))
    plain.add_module("classifier", nn.Linear(4, 2))
    assert head_modules(plain) == {plain.classifier}
