"""Model families with something odd, and what users do to a compressed model before and after saving it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from helpers.adapter import close, roundtrip, small
from helpers.tiny_models import VOCAB, outputs, settled, tiny, token_ids

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOEmbedding, MPOLayer, compress

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": VOCAB, "max_position_embeddings": 40,
}  # fmt: skip
IDS = token_ids()


def logits(model: Any) -> torch.Tensor:
    encoder_decoder = model.config.is_encoder_decoder
    with torch.no_grad():
        return settled(model)(input_ids=IDS, **({"decoder_input_ids": IDS} if encoder_decoder else {})).logits


def _t5(tied: bool) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart(tied: bool) -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _mobilebert(tied: bool) -> Any:
    config = transformers.MobileBertConfig(
        **SMALL, embedding_size=16, intra_bottleneck_size=16, tie_word_embeddings=tied
    )
    return transformers.MobileBertForMaskedLM(config)


BUILDERS = {
    "t5": _t5,
    "bart": _bart,
    "mobilebert": _mobilebert,
    "roberta": lambda tied: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**SMALL, tie_word_embeddings=tied)
    ),
    "electra": lambda tied: transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(**SMALL, embedding_size=16, tie_word_embeddings=tied)
    ),
    "qwen2": lambda tied: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    ),
}


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("target", ["all-linear", r".*"])
def test_odd_families_come_back_the_same(family: str, tied: bool, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BUILDERS[family](tied).eval()
    shared = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    report = compress(model, MPOConfig(target_modules=target, sites=3, bond=5))
    assert len(report.layers) > 8
    expected = logits(model)
    loaded = roundtrip(model, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after
    if shared:
        assert len(list(loaded.named_parameters(remove_duplicate=False))) > len(list(loaded.parameters()))


@pytest.mark.guarantee("computed-when-read")
def test_weights_that_t5_and_mobilebert_read_themselves_become_cores() -> None:
    for model in (_t5(tied=True).eval(), _mobilebert(tied=True).eval()):
        dense = logits(model)
        report = compress(model, MPOConfig(target_modules=r".*", sites=3))
        assert not [name for name in report.skipped if name.endswith((".wo", "predictions.dense", "word_embeddings"))]
        # Full bonds: what float32 rounds in a dozen layers.
        assert (logits(model) - dense).norm() <= 1e-4 * dense.norm()


def test_t5_shares_one_table_between_four_modules(tmp_path: Path) -> None:
    model = _t5(tied=True).eval()
    report = compress(model, MPOConfig(target_modules=["shared"], sites=3, bond=5))
    assert report.layers[0].names == ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    loaded = roundtrip(model, tmp_path)
    owners = [loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens, loaded.lm_head]
    assert all(owner.cores[1] is loaded.shared.cores[1] for owner in owners)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_with_and_without_the_cache(family: str) -> None:
    model = small(family)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        model.generate(IDS, use_cache=use, output_logits=True, return_dict_in_generate=True, **options)
        for use in (True, False)
    )
    assert cached.sequences.shape[1] > IDS.shape[1]
    for a, b in zip(cached.logits, plain.logits, strict=True):
        # One token at a time or all of them: other shapes, and perhaps another mode. Two layers of float32 round less.
        rounding = 1e-4 * a.norm(dim=1)
        assert ((a - b).norm(dim=1) <= rounding).all()
        first, second = a.topk(2).values.unbind(1)
        assert (first - second > rounding).all()  # so that it is the same token everywhere
    assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts(cast: str, tmp_path: Path) -> None:
    for model in (small(), roundtrip(small(), tmp_path / "before")):
        getattr(model, cast)()
        assert {p.dtype for p in model.parameters()} == {outputs(model).dtype}
        assert torch.equal(outputs(roundtrip(model, tmp_path / "after")), outputs(model))
        model.float()
        assert outputs(model).dtype == torch.float32


def test_loading_with_another_dtype_and_device_map(tmp_path: Path) -> None:
    model = small()
    loaded = roundtrip(model, tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_cores_are_fetched(place: str, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="cpu").eval()
    if place == "cpu":
        loaded = accelerate.cpu_offload(loaded, torch.device("cpu"))
    else:
        loaded = accelerate.disk_offload(loaded, str(tmp_path / "offload"), torch.device("cpu"))
    assert {core.device.type for core in loaded.get_input_embeddings().cores} == {"meta"}
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_activation_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = small(family)
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.Dropout)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.activation_checkpointing_enable()
    again = gradients()
    assert len(plain) == len(again) > 10
    everything = torch.cat([gradient.flatten() for gradient in plain])
    for a, b in zip(plain, again, strict=True):
        close(b, a, everything)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_compressed_table_is_not_resized(family: str) -> None:
    model = small(family)
    with pytest.raises(MPOError, match=r"resize.*dense model before"):
        model.resize_token_embeddings(VOCAB + 10)
    assert isinstance(model.get_input_embeddings(), MPOEmbedding)
    assert model.config.vocab_size == VOCAB
    assert outputs(model).isfinite().all()


def test_a_dense_table_beside_mpos_can_be_resized(tmp_path: Path) -> None:
    model = tiny("bert")
    compress(model, MPOConfig(sites=3, bond=5))
    model.resize_token_embeddings(VOCAB + 10)
    assert torch.equal(outputs(roundtrip(model, tmp_path)), outputs(model))


def test_two_compressed_models_and_a_dense_one_in_one_process(tmp_path: Path) -> None:
    models = {"five": small(bond=5), "two": small(bond=2), "dense": tiny("bert")}
    loaded = {name: roundtrip(model, tmp_path / name) for name, model in models.items()}
    loaded["five again"], models["five again"] = roundtrip(loaded["five"], tmp_path / "again"), models["five"]
    assert all(torch.equal(outputs(loaded[name]), outputs(model)) for name, model in models.items())
    assert not any(isinstance(module, MPOLayer) for module in loaded["dense"].modules())
    assert type(loaded["dense"])._keys_to_ignore_on_load_unexpected is None


def test_copies_states_and_configurations_travel(tmp_path: Path) -> None:
    model = small()
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings().cores[0] is twin.get_output_embeddings().cores[0]
    assert torch.equal(outputs(roundtrip(twin, tmp_path / "twin")), outputs(model))
    model.save_pretrained(tmp_path / "shards", max_shard_size="1KB", state_dict=model.state_dict())
    loaded = type(model).from_pretrained(tmp_path / "shards", config=model.config)
    assert torch.equal(outputs(loaded), outputs(model))
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(outputs(loaded.eval()), outputs(model))


def test_a_model_around_a_compressed_base_and_the_base_alone(tmp_path: Path) -> None:
    model = tiny("bert")
    compress(model.bert, MPOConfig(sites=3, bond=5))
    assert torch.equal(outputs(roundtrip(model, tmp_path / "around")), outputs(model))
    model = small()
    model.bert.save_pretrained(tmp_path / "base")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
    assert torch.equal(outputs(base), outputs(model.bert))


def test_another_head(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path / "lm")
    head = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3).eval()
    assert isinstance(head.classifier, torch.nn.Linear)
    with torch.no_grad():
        hidden = [settled(part.bert)(IDS).last_hidden_state for part in (head, model)]
        assert torch.equal(*hidden)
    assert torch.equal(outputs(roundtrip(head, tmp_path / "head")), outputs(head))


@pytest.mark.slow
def test_the_trainer_takes_a_step_and_what_it_saves_loads(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    compress(model, MPOConfig(target_modules=r".*(?<!position_embeddings)", sites=3, bond=5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(1)} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, save_steps=2, learning_rate=1e-2,
        dataloader_pin_memory=False, disable_tqdm=True, bf16=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("query.cores.1") for name in moved)
    trainer.save_model(str(tmp_path / "out"))
    for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-2"):
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        assert loaded.keys() == before.keys()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
