"""Random tiny models of many architectures, with what they are called with; those of ``ODD`` read weights oddly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

_VOCAB = 101  # a prime, so that every embedding needs padding
_BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def _sizes(**more: Any) -> dict[str, Any]:
    return {**_BASE, "vocab_size": _VOCAB, **more}


def _short(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "vocab_size": _VOCAB, **more}


def _pixels(**more: Any) -> dict[str, Any]:
    return {**_BASE, "image_size": 16, "patch_size": 8, "num_labels": 5, **more}


def _bart(**more: Any) -> dict[str, Any]:
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": _VOCAB,
        "max_position_embeddings": 40,
        "scale_embedding": True,
        **more,
    }


def _waves(**more: Any) -> dict[str, Any]:
    return _sizes(
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        mask_time_length=2,
        **more,
    )


_GROUPED = {"num_key_value_heads": 2}
_MOE = {**_GROUPED, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    "num_layers": 2,
    "vocab_size": _VOCAB,
    "decoder_start_token_id": 0,
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
_JAMBA = {
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
_TEXT_AND_IMAGE = {
    "text_config": _sizes(max_position_embeddings=16),
    "vision_config": {**_BASE, "image_size": 16, "patch_size": 8},
}
_FEW_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, the sizes it is made with, and the kind of model that it is."""

    kind: str
    build: str
    sizes: dict[str, Any]


ENCODER, DECODER, EXPERTS, STATE = "encoder", "decoder", "experts", "state space"
BOTH, VISION, SPEECH, PAIR = "encoder-decoder", "vision", "speech", "text and image"

MODELS: dict[str, Architecture] = {
    "bert": Architecture(ENCODER, "BertForMaskedLM", _sizes()),
    "roberta": Architecture(ENCODER, "RobertaForMaskedLM", _sizes(max_position_embeddings=40)),
    "distilbert": Architecture(
        ENCODER, "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 101}
    ),
    "albert": Architecture(ENCODER, "AlbertForMaskedLM", _sizes(embedding_size=16)),
    "electra": Architecture(ENCODER, "ElectraForMaskedLM", _sizes(embedding_size=16)),
    "deberta": Architecture(ENCODER, "DebertaForMaskedLM", _sizes(**_DEBERTA, legacy=False)),
    "deberta v2": Architecture(
        ENCODER, "DebertaV2ForMaskedLM", _sizes(**_DEBERTA, legacy=False, conv_kernel_size=3, conv_act="gelu")
    ),
    "deberta v3": Architecture(
        ENCODER,
        "DebertaV2ForMaskedLM",
        _sizes(**_DEBERTA, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm"),
    ),
    "xlnet": Architecture(
        ENCODER, "XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": _VOCAB}
    ),
    "mpnet": Architecture(ENCODER, "MPNetForMaskedLM", _sizes(max_position_embeddings=40)),
    "modernbert": Architecture(ENCODER, "ModernBertForMaskedLM", _sizes(**_FEW_IDS, cls_token_id=1, sep_token_id=2)),
    "mobilebert": Architecture(
        ENCODER, "MobileBertForMaskedLM", _sizes(embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16)
    ),
    "convbert": Architecture(ENCODER, "ConvBertForMaskedLM", _sizes(embedding_size=32)),
    "funnel": Architecture(
        ENCODER,
        "FunnelForMaskedLM",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "vocab_size": _VOCAB},
    ),
    "fnet": Architecture(ENCODER, "FNetForMaskedLM", _sizes()),
    "gpt2": Architecture(DECODER, "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": _VOCAB}),
    "gpt-neo": Architecture(
        DECODER,
        "GPTNeoForCausalLM",
        _short(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=40),
    ),
    "gptj": Architecture(
        DECODER, "GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": _VOCAB}
    ),
    "gpt-neox": Architecture(DECODER, "GPTNeoXForCausalLM", _sizes()),
    "opt": Architecture(
        DECODER,
        "OPTForCausalLM",
        _short(num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16),
    ),
    "bloom": Architecture(DECODER, "BloomForCausalLM", _short(n_layer=2, n_head=4)),
    "falcon": Architecture(DECODER, "FalconForCausalLM", _short(num_hidden_layers=2, num_attention_heads=4)),
    "mpt": Architecture(DECODER, "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": _VOCAB}),
    "llama": Architecture(DECODER, "LlamaForCausalLM", _sizes(**_GROUPED)),
    "mistral": Architecture(DECODER, "MistralForCausalLM", _sizes(**_GROUPED)),
    "qwen2": Architecture(DECODER, "Qwen2ForCausalLM", _sizes(**_GROUPED)),
    "qwen3": Architecture(DECODER, "Qwen3ForCausalLM", _sizes(**_GROUPED, head_dim=8)),
    "gemma": Architecture(DECODER, "GemmaForCausalLM", _sizes(**_GEMMA)),
    "gemma 2": Architecture(DECODER, "Gemma2ForCausalLM", _sizes(**_GEMMA)),
    "gemma 3": Architecture(DECODER, "Gemma3ForCausalLM", _sizes(**_GEMMA)),
    "phi": Architecture(DECODER, "PhiForCausalLM", _sizes()),
    "phi 3": Architecture(DECODER, "Phi3ForCausalLM", _sizes(**_GROUPED, **_FEW_IDS)),
    "stablelm": Architecture(DECODER, "StableLmForCausalLM", _sizes(num_key_value_heads=4)),
    "olmo 2": Architecture(DECODER, "Olmo2ForCausalLM", _sizes(**_GROUPED)),
    "cohere": Architecture(DECODER, "CohereForCausalLM", _sizes(**_GROUPED, **_FEW_IDS)),
    "starcoder 2": Architecture(DECODER, "Starcoder2ForCausalLM", _sizes(**_GROUPED)),
    "smollm 3": Architecture(DECODER, "SmolLM3ForCausalLM", _sizes(**_GROUPED, **_FEW_IDS)),
    "granite": Architecture(DECODER, "GraniteForCausalLM", _sizes(**_GROUPED)),
    "mixtral": Architecture(EXPERTS, "MixtralForCausalLM", _sizes(**_MOE, num_local_experts=4)),
    "qwen2 moe": Architecture(
        EXPERTS,
        "Qwen2MoeForCausalLM",
        _sizes(**_MOE, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen3 moe": Architecture(
        EXPERTS, "Qwen3MoeForCausalLM", _sizes(**_MOE, head_dim=8, num_experts=4, moe_intermediate_size=24)
    ),
    "deepseek v2": Architecture(EXPERTS, "DeepseekV2ForCausalLM", _sizes(**_DEEPSEEK)),
    "deepseek v3": Architecture(EXPERTS, "DeepseekV3ForCausalLM", _sizes(**_DEEPSEEK)),
    "gpt-oss": Architecture(EXPERTS, "GptOssForCausalLM", _sizes(**_MOE, head_dim=8, num_local_experts=4)),
    "granite moe": Architecture(EXPERTS, "GraniteMoeForCausalLM", _sizes(**_MOE, num_local_experts=4)),
    "olmoe": Architecture(EXPERTS, "OlmoeForCausalLM", _sizes(**_MOE, num_experts=4)),
    "llama 4": Architecture(
        EXPERTS, "Llama4ForCausalLM", _sizes(**_MOE, head_dim=8, intermediate_size_mlp=48, num_local_experts=4)
    ),
    "phi moe": Architecture(EXPERTS, "PhimoeForCausalLM", _sizes(**_MOE, num_local_experts=4)),
    "switch": Architecture(
        EXPERTS,
        "SwitchTransformersForConditionalGeneration",
        {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "jamba": Architecture(STATE, "JambaForCausalLM", _sizes(**_MOE, **_JAMBA)),
    "mamba": Architecture(STATE, "MambaForCausalLM", _short(num_hidden_layers=2, state_size=8)),
    "mamba 2": Architecture(
        STATE,
        "Mamba2ForCausalLM",
        _short(num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    ),
    "falcon mamba": Architecture(STATE, "FalconMambaForCausalLM", _short(num_hidden_layers=2, state_size=8)),
    "rwkv": Architecture(STATE, "RwkvForCausalLM", _short(num_hidden_layers=2, context_length=40)),
    "lfm 2": Architecture(
        STATE, "Lfm2ForCausalLM", _sizes(**_GROUPED, layer_types=["conv", "full_attention"], block_multiple_of=8)
    ),
    "recurrent gemma": Architecture(
        STATE,
        "RecurrentGemmaForCausalLM",
        _sizes(**_GROUPED, lru_width=32, attention_window_size=16, num_hidden_layers=3),
    ),
    "t5": Architecture(BOTH, "T5ForConditionalGeneration", _T5),
    "t5 gated": Architecture(
        BOTH,
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": Architecture(BOTH, "BartForConditionalGeneration", _bart()),
    "pegasus": Architecture(BOTH, "PegasusForConditionalGeneration", _bart()),
    "m2m": Architecture(BOTH, "M2M100ForConditionalGeneration", _bart()),
    "marian": Architecture(
        BOTH, "MarianMTModel", _bart(pad_token_id=0, decoder_start_token_id=0, max_position_embeddings=24)
    ),
    "blenderbot": Architecture(BOTH, "BlenderbotForConditionalGeneration", _bart()),
    "prophetnet": Architecture(
        BOTH,
        "ProphetNetForConditionalGeneration",
        _short(
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=40,
        ),
    ),
    "vit": Architecture(VISION, "ViTForImageClassification", _pixels()),
    "deit": Architecture(VISION, "DeiTForImageClassification", _pixels()),
    "beit": Architecture(VISION, "BeitForImageClassification", _pixels(use_relative_position_bias=True)),
    "dinov2": Architecture(VISION, "Dinov2ForImageClassification", _pixels()),
    "swin": Architecture(
        VISION,
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2, 1],
            "num_heads": [2, 4],
            "window_size": 4,
            "num_labels": 5,
        },
    ),
    "convnext": Architecture(
        VISION,
        "ConvNextForImageClassification",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
    ),
    "segformer": Architecture(
        VISION,
        "SegformerForImageClassification",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_labels": 5,
        },
    ),
    "resnet": Architecture(
        VISION,
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5},
    ),
    "whisper": Architecture(
        SPEECH,
        "WhisperForConditionalGeneration",
        _bart(
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=40,
            **_FEW_IDS,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    ),
    "wav2vec2": Architecture(SPEECH, "Wav2Vec2ForCTC", _waves()),
    "hubert": Architecture(SPEECH, "HubertForCTC", _waves()),
    "wavlm": Architecture(SPEECH, "WavLMForCTC", _waves(num_buckets=8)),
    "speecht5": Architecture(
        SPEECH,
        "SpeechT5ForSpeechToText",
        {
            **{key: value for key, value in _waves().items() if not key.startswith("num_hidden")},
            **_FEW_IDS,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_speech_positions": 40,
            "max_text_positions": 40,
            "decoder_start_token_id": 1,
        },
    ),
    "ast": Architecture(
        SPEECH,
        "ASTForAudioClassification",
        {**_BASE, "patch_size": 4, "max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
    ),
    "clip": Architecture(PAIR, "CLIPModel", {**_TEXT_AND_IMAGE, "projection_dim": 16}),
    "siglip": Architecture(PAIR, "SiglipModel", _TEXT_AND_IMAGE),
    "chinese clip": Architecture(PAIR, "ChineseCLIPModel", {**_TEXT_AND_IMAGE, "projection_dim": 16}),
    "blip": Architecture(
        PAIR,
        "BlipModel",
        {
            "text_config": _sizes(max_position_embeddings=16, encoder_hidden_size=32),
            "vision_config": {**_BASE, "image_size": 16, "patch_size": 8},
            "projection_dim": 16,
        },
    ),
}
ODD = (
    "falcon",
    "bloom",
    "mamba",
    "rwkv",
    "t5",
    "t5 gated",
    "deberta",
    "deberta v2",
    "deberta v3",
    "gemma 2",
    "gemma 3",
    "bart",
    "xlnet",
    "mixtral",
    "qwen2 moe",
    "qwen3 moe",
    "deepseek v2",
    "deepseek v3",
    "gpt-oss",
    "granite moe",
    "jamba",
    "llama 4",
)
IDS = torch.arange(3, 15).reshape(2, 6)

# Some classes name the configuration of the whole that they are the text part of.
_CONFIGS = {"Llama4ForCausalLM": "Llama4TextConfig", "Gemma3ForCausalLM": "Gemma3TextConfig"}


def tiny_model(name: str) -> Any:
    """A model, ready to be looked at, no matrix of which is zero, nor a bias, which could be lost then unseen."""
    torch.manual_seed(0)
    of = MODELS[name]
    build: Any = getattr(transformers, of.build)
    config: Any = getattr(transformers, _CONFIGS[of.build]) if of.build in _CONFIGS else build.config_class
    model = build(config(**of.sizes)).eval()
    unsaved = set(model._keys_to_ignore_on_save or ())  # tables of sines, which are made anew
    with torch.no_grad():
        for parameter in (p for own, p in model.named_parameters() if own not in unsaved):
            parameter += (0.02 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    without_padding(model)
    return model


def without_padding(model: torch.nn.Module) -> None:
    """Set the rows of padding to zero, as some models (Chinese CLIP) do whenever they are loaded."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0


def given(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What two texts, images or sounds are for a model."""
    config, rng = model.config, torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=rng).to(dtype)

    wanted: dict[str, torch.Tensor] = {}
    main = model.main_input_name
    if main == "pixel_values" or hasattr(config, "vision_config"):
        wanted["pixel_values"] = random(3, 16, 16)
    if main == "input_ids":
        wanted["input_ids"] = IDS
    if main == "input_features":
        wanted[main] = random(config.num_mel_bins, 2 * config.max_source_positions)
    if main == "input_values":
        # Sound itself, or its spectrum.
        wanted[main] = random(config.max_length, config.num_mel_bins) if hasattr(config, "time_stride") else random(400)
    if config.is_encoder_decoder:
        wanted["decoder_input_ids"] = IDS
    return wanted


def called(model: Any, *, loss: bool = False) -> torch.Tensor:
    """The logits of two texts, images or sounds, or the loss on two texts."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    if loss:
        return model(**given(model, dtype), labels=IDS).loss
    with torch.no_grad():
        return scores(model(**given(model, dtype)))


def scores(output: Any) -> torch.Tensor:
    """Of what a model gave, the tensor that people look at."""
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(output[name] for name in names if name in output)
