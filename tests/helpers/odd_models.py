"""Tiny random models whose weights are read in other ways than by calling plain layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 101,
        **more,
    }  # fmt: skip


def _short(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "vocab_size": 101, **more}


_MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 101, "max_position_embeddings": 40,
    "scale_embedding": True,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": 2, "vocab_size": 101}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8}
_JAMBA = {
    "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconForCausalLM", _short(num_hidden_layers=2, num_attention_heads=4)),
    "bloom": ("BloomForCausalLM", _short(n_layer=2, n_head=4)),
    "mamba": ("MambaForCausalLM", _short(num_hidden_layers=2, state_size=8)),
    "rwkv": ("RwkvForCausalLM", _short(num_hidden_layers=2, context_length=40)),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5 gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "deberta": ("DebertaForMaskedLM", _sizes(**_DEBERTA, legacy=False)),
    "deberta v2": ("DebertaV2ForMaskedLM", _sizes(**_DEBERTA, legacy=False, conv_kernel_size=3, conv_act="gelu")),
    "deberta v3": (
        "DebertaV2ForMaskedLM",
        _sizes(**_DEBERTA, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm"),
    ),
    "gemma 2": ("Gemma2ForCausalLM", _sizes(**_GEMMA)),
    "gemma 3": ("Gemma3ForCausalLM", _sizes(**_GEMMA)),
    "bart": ("BartForConditionalGeneration", _BART),
    "xlnet": ("XLNetLMHeadModel", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 101}),
    "mixtral": ("MixtralForCausalLM", _sizes(**_MOE, num_local_experts=4)),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        _sizes(**_MOE, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen3 moe": ("Qwen3MoeForCausalLM", _sizes(**_MOE, head_dim=8, num_experts=4, moe_intermediate_size=24)),
    "deepseek v2": ("DeepseekV2ForCausalLM", _sizes(**_DEEPSEEK)),
    "deepseek v3": ("DeepseekV3ForCausalLM", _sizes(**_DEEPSEEK)),
    "gpt-oss": ("GptOssForCausalLM", _sizes(**_MOE, head_dim=8, num_local_experts=4)),
    "granite moe": ("GraniteMoeForCausalLM", _sizes(**_MOE, num_local_experts=4)),
    "jamba": ("JambaForCausalLM", _sizes(**_MOE, **_JAMBA)),
    "llama 4": ("Llama4ForCausalLM", _sizes(**_MOE, head_dim=8, intermediate_size_mlp=48, num_local_experts=4)),
}
ODD = tuple(_MODELS)
IDS = torch.arange(3, 15).reshape(2, 6)


def odd(name: str) -> Any:
    """A model, ready to be looked at, no matrix of which is zero."""
    torch.manual_seed(0)
    kind, sizes = _MODELS[name]
    build: Any = getattr(transformers, kind)
    # Some classes name the configuration of the whole that they are the text part of.
    config = transformers.Llama4TextConfig if kind.startswith("Llama4") else build.config_class
    config = transformers.Gemma3TextConfig if kind.startswith("Gemma3") else config
    model = build(config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def called(model: Any, *, loss: bool = False) -> torch.Tensor:
    """The logits of two sequences, or the loss on them."""
    given = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    if loss:
        return model(**given, labels=IDS).loss
    with torch.no_grad():
        return model(**given).logits
