"""A transformers model with MPO modules anywhere, however they came there, is saved as it is or refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from helpers.adapter import small
from helpers.tiny_models import VOCAB, outputs, settled, tiny, token_ids
from torch import nn
from transformers.utils import hub

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOEmbedding, MPOLayer, compress, to_dense
from mpo_tn.torch.models.units import mpo_specs

ALL = MPOConfig(target_modules=".*", sites=3, keep=0.8)
LINEAR = MPOConfig(sites=3, keep=0.8)
BITS = MPOConfig(target_modules=".*", sites=1, bits=4, group=32)
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def encoder_decoder() -> Any:
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    encoder = transformers.BertModel(transformers.BertConfig(**BERT))
    return transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.BertLMHeadModel(config))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


def bart() -> Any:
    heads = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=32, **heads)
    )


def clip() -> Any:
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
        "vocab_size": VOCAB, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24))


def vision_and_text() -> Any:
    return transformers.VisionTextDualEncoderModel(
        vision_model=transformers.ViTModel(transformers.ViTConfig(**VISION)),
        text_model=transformers.BertModel(transformers.BertConfig(**BERT)),
    )


def llava() -> Any:
    text = transformers.LlamaConfig(**BERT, num_key_value_heads=2)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=text, vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=100
        )
    )


def bert() -> Any:
    return tiny("bert")


def classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def results(model: Any) -> torch.Tensor:
    """What the model computes, whichever inputs it takes."""
    inputs: dict[str, torch.Tensor] = {"input_ids": token_ids()}
    if hasattr(model, "vision_model"):
        inputs["pixel_values"] = torch.ones(2, 3, 16, 16) / torch.arange(1.0, 17.0)
    if getattr(model.config, "is_encoder_decoder", False) and not isinstance(model, transformers.T5EncoderModel):
        inputs["decoder_input_ids"] = token_ids()
    with torch.no_grad():
        found = settled(model.eval())(**inputs)
    return found[0]


def check(model: Any, folder: Path, run: Callable[[Any], torch.Tensor] = results) -> Any:
    """The model that comes back from a folder computes the same bits, and nothing was missing or left."""
    expected = run(model)
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(loaded.eval()), expected)
    assert mpo_specs(loaded) == mpo_specs(model)
    return loaded


PARTS: list[tuple[Callable[[], Any], str, MPOConfig]] = [
    (bert, "bert", ALL), (bert, "bert.encoder", LINEAR), (bert, "bert.encoder.layer.1", LINEAR),
    (bert, "bert.embeddings", ALL), (bert, "cls", ALL), (bert, "bert", BITS), (classifier, "bert.encoder", LINEAR),
    (t5, "", ALL), (t5, "encoder", ALL), (t5, "decoder.block", LINEAR), (bart, "", BITS),
    (bart, "model.encoder", LINEAR),
    (encoder_decoder, "", ALL), (encoder_decoder, "encoder", ALL), (encoder_decoder, "decoder", ALL),
    (clip, "", ALL), (clip, "text_model", ALL), (clip, "vision_model.encoder", LINEAR),
    (vision_and_text, "text_model", ALL), (llava, "model.language_model", ALL),
]  # fmt: skip


@pytest.mark.guarantee("saved-as-it-is")
@pytest.mark.parametrize(("build", "part", "config"), PARTS)
def test_a_model_compressed_in_part_comes_back(
    build: Callable[[], Any], part: str, config: MPOConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    compress(model.get_submodule(part), config)
    loaded = check(model, tmp_path / "once")
    assert loaded.config.quantization_config.config == config
    check(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "once/model.safetensors").read_bytes()
    check(copy.deepcopy(model), tmp_path / "copied")
    check(pickle.loads(pickle.dumps(model)), tmp_path / "unpickled")  # noqa: S301 - written a moment ago


def test_the_parts_of_a_saved_model_are_saved_as_they_are_too(tmp_path: Path) -> None:
    model = encoder_decoder().eval()
    compress(model.encoder, ALL)
    check(model, tmp_path / "whole")
    said = json.loads((tmp_path / "whole/config.json").read_text())
    assert "quantization_config" not in said["encoder"]  # of which the names would be wrong here
    check(model.encoder, tmp_path / "encoder")
    check(model.decoder, tmp_path / "decoder")  # dense, and tied as before
    assert "quantization_config" not in json.loads((tmp_path / "decoder/config.json").read_text())
    check(model, tmp_path / "again")


class Around(nn.Module):
    """No model of transformers, with two inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bert(), tiny("gpt2")


@pytest.mark.guarantee("saved-as-it-is")
def test_models_inside_of_other_modules(tmp_path: Path) -> None:
    around = Around()
    compress(around, LINEAR)
    for k, model in enumerate((around.first, around.second, copy.deepcopy(around).second)):
        assert model.hf_quantizer.quantization_config.config == LINEAR
        check(model, tmp_path / str(k))
    around = Around()
    compress(around, MPOConfig(target_modules=["c_attn"], sites=3, keep=0.5))
    check(around.first, tmp_path / "dense")
    check(around.second, tmp_path / "compressed")


def test_a_dense_model_that_shares_a_configuration_is_saved_dense(tmp_path: Path) -> None:
    dense = tiny("bert")
    compressed = transformers.BertForMaskedLM(dense.config).eval()
    compress(compressed, ALL)
    check(dense, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    check(compressed, tmp_path / "compressed")


def replaced_by_a_compressed_one(model: Any) -> None:
    inner = transformers.BertModel(model.config, add_pooling_layer=False).eval()
    compress(inner, LINEAR)
    model.bert = inner


def another_table(model: Any) -> None:
    model.set_input_embeddings(small(target_modules=["word_embeddings"]).get_input_embeddings())


def new_table_and_head(model: Any) -> None:
    model.set_input_embeddings(nn.Embedding(VOCAB, 32))
    model.set_output_embeddings(nn.Linear(32, VOCAB))


def moved(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.value, attention.query = attention.query, nn.Linear(32, 32)


def without_a_bias(model: Any) -> None:
    model.bert.encoder.layer[0].attention.self.query.bias = None


def one_layer_less(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    model.config.num_hidden_layers = 1


def one_layer_dense(model: Any) -> None:
    to_dense(model, ["layer.0.attention.self.query", "decoder"])


def one_layer_compiled(model: Any) -> None:
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")


CHANGES = (replaced_by_a_compressed_one, another_table, new_table_and_head, moved, without_a_bias, one_layer_less,
           one_layer_dense)  # fmt: skip


@pytest.mark.guarantee("saved-as-it-is")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_by_hand_is_saved_as_it_is(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = small("bert", target_modules=".*")
    change(model)
    check(model, tmp_path)


@pytest.mark.guarantee("saved-as-it-is")
def test_names_of_a_compiled_layer_are_those_of_the_class(tmp_path: Path) -> None:
    model = small()
    one_layer_compiled(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(transformers.BertForMaskedLM.from_pretrained(tmp_path)), outputs(model))


@pytest.mark.guarantee("saved-as-it-is")
def test_a_new_head_needs_a_configuration_that_says_so(tmp_path: Path) -> None:
    model = classifier().eval()
    compress(model, LINEAR)
    model.classifier = nn.Linear(32, 5)
    with pytest.raises(MPOError, match=r"classifier\.weight is \(5, 32\).*num_labels"):
        model.save_pretrained(tmp_path / "refused")
    assert not list(tmp_path.iterdir())
    model.config.num_labels = 5
    check(model, tmp_path / "said")


def shared_by_hand(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.value = attention.query


def an_mpo_module_too_many(model: Any) -> None:
    model.extra = copy.deepcopy(model.bert.encoder.layer[0].attention.self.query)


def a_layer_less_unsaid(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def an_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["value"]))


def another_quantizer(model: Any) -> None:
    model.bert.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.guarantee("saved-as-it-is")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shared_by_hand, "share tensors that its class does not tie.*copy.deepcopy"),
        (an_mpo_module_too_many, r"extra\.bias is in MPO modules.*would be lost.*take them out"),
        (a_layer_less_unsaid, r"layer\.1\..*at random"),
        (an_adapter, r"value\.weight is expected.*merge_and_unload"),
        (another_quantizer, "quantized by bitsandbytes as well.*to_dense"),
    ],
)
def test_what_could_not_be_read_again_is_refused(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    model = tiny("bert")
    compress(model.bert.encoder, MPOConfig(target_modules=["query", "key"], sites=3, keep=0.8))
    change(model)
    with pytest.raises(MPOError, match=said):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_pooler_that_was_left_out_is_not_asked_for(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False).eval()
    compress(model, ALL)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(transformers.BertModel.from_pretrained(tmp_path)), outputs(model))


@pytest.mark.guarantee("saved-as-it-is")
@pytest.mark.parametrize("config", [ALL, BITS])
def test_a_state_that_is_given_is_what_is_written(config: MPOConfig, tmp_path: Path) -> None:
    """Tied cores, which are gathered apart, are written once."""
    model = tiny("bert")
    compress(model, config)
    state = {name: value / 2 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    del state["bert.encoder.layer.0.output.dense.bias"]
    with pytest.raises(MPOError, match=r"output\.dense\.bias is expected"):
        model.save_pretrained(tmp_path / "part", state_dict=state)
    if config is ALL:
        state["cls.predictions.decoder.cores.0"] = torch.ones_like(state["cls.predictions.decoder.cores.0"])
        with pytest.raises(MPOError, match=r"other numbers for cls.*decoder\.cores\.0"):
            model.save_pretrained(tmp_path / "two", state_dict=state)


def test_push_to_hub_saves_in_the_same_way() -> None:
    model = tiny("bert")
    compress(model.bert.encoder, LINEAR)
    seen: list[bool] = []

    def uploaded(folder: str, *_: Any, **__: Any) -> None:
        seen.append("quantization_config" in json.loads((Path(folder) / "config.json").read_text()))

    with (
        mock.patch.object(hub, "hf_api"), mock.patch.object(hub, "create_and_tag_model_card"),
        mock.patch.object(transformers.PreTrainedModel, "_upload_modified_files", side_effect=uploaded),
    ):  # fmt: skip
        model.push_to_hub("somebody/something")
    assert seen == [True]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:The PEFT config:UserWarning")
def test_adapters_alone_are_written_beside_a_compressed_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["value"], init_lora_weights=False)
    model = small("bert", target_modules=["query", "key"])
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(lora)
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(outputs(again.eval()), outputs(model.eval()))
    around = peft.get_peft_model(tiny("bert"), lora)
    compress(around, MPOConfig(target_modules=["query", "key"], sites=3, keep=0.8))
    check(around.merge_and_unload().eval(), tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.guarantee("card-stays")
def test_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + k) for k in range(26))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path / "dense")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    for part in ("", "0.model.encoder"):
        model = library.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
        compress(model.get_submodule(part), LINEAR)
        assert any(isinstance(module, MPOLayer) for module in model.modules())
        expected = torch.as_tensor(model.encode(["a b c", "d"]))
        model.save_pretrained(str(tmp_path / f"out{part}"))
        again = library.SentenceTransformer(str(tmp_path / f"out{part}"), device="cpu")
        assert torch.equal(torch.as_tensor(again.encode(["a b c", "d"])), expected)
        again.save_pretrained(str(tmp_path / f"again{part}"))
        for name in ("out", "again"):  # theirs, below ours
            card = (tmp_path / f"{name}{part}" / "README.md").read_text()
            assert card.index("compressed by mpo-tn") < card.index("import mpo_tn.torch") < card.index("# Sentence")
            assert card.count("compressed by mpo-tn") == 1
            assert "library_name: sentence-transformers\n" in card.split("---\n")[1]


@pytest.mark.guarantee("dequantize")
@pytest.mark.parametrize("config", [ALL, BITS])
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "llama"])
def test_dequantize_gives_a_plain_model(family: str, config: MPOConfig, tmp_path: Path) -> None:
    model, dense = tiny(family), tiny(family)
    compress(model, config)
    expected = outputs(model)
    assert model.dequantize() is model
    assert [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)] == [
        (name, type(module)) for name, module in dense.named_modules(remove_duplicate=False)
    ]
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is table.weight
    assert (model._tied_weights_keys, model.all_tied_weights_keys) == (
        dense._tied_weights_keys, dense.all_tied_weights_keys,
    )  # fmt: skip
    assert not hasattr(model, "hf_quantizer")
    loaded = check(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.guarantee("dequantize")
def test_dequantize_of_parts_and_in_another_dtype(tmp_path: Path) -> None:
    model = tiny("bert")
    compress(model.bert.encoder, LINEAR)
    assert model.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    check(model, tmp_path)
    half = small("bert", target_modules=".*").half()
    half.dequantize()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="first quantize"):
        tiny("bert").dequantize()
    inner = small("bert", target_modules=["query", "word_embeddings"])
    inner.bert.dequantize()
    assert isinstance(inner.get_input_embeddings(), nn.Embedding)
    assert not isinstance(inner.get_input_embeddings(), MPOEmbedding)
    check(inner, tmp_path / "head")  # whose head still has the cores


class WantsMore(transformers.BertModel):
    """Cannot be made of its configuration alone."""

    def __init__(self, config: Any, extra: int) -> None:
        super().__init__(config)
        self.extra = extra


@pytest.mark.guarantee("saved-as-it-is")
def test_what_cannot_be_rehearsed_is_said_once(tmp_path: Path) -> None:
    model = WantsMore(transformers.BertConfig(**BERT), 3)
    compress(model, LINEAR)
    with pytest.warns(UserWarning, match=r"WantsMore cannot be made of its configuration alone \(TypeError.*compare"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = WantsMore.from_pretrained(tmp_path, extra=3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
