"""Random tiny models of the families the adapter is tested on, and the inputs they take."""

from __future__ import annotations

import itertools

import torch
import transformers

VOCAB = 101  # a prime, so that every embedding needs padding

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}


def tiny(family: str, *, tied: bool = True) -> transformers.PreTrainedModel:
    """A freshly seeded model in evaluation mode."""
    torch.manual_seed(0)
    model = _BUILDERS[family](tied)
    # Zero biases and unit norms would hide a lost or swapped parameter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _bert(tied: bool) -> transformers.PreTrainedModel:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**_SMALL, max_position_embeddings=32, tie_word_embeddings=tied)
    )


def _albert(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.AlbertConfig(
        **_SMALL, embedding_size=16, max_position_embeddings=32, tie_word_embeddings=tied
    )
    return transformers.AlbertForMaskedLM(config)


def _distilbert(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.DistilBertForMaskedLM(config)


def _gpt2(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **_SMALL, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


_BUILDERS = {"bert": _bert, "albert": _albert, "distilbert": _distilbert, "gpt2": _gpt2, "llama": _llama}
FAMILIES = tuple(_BUILDERS)
EMBEDDINGS = {
    "bert": "word_embeddings",
    "albert": "word_embeddings",
    "distilbert": "word_embeddings",
    "gpt2": "wte",
    "llama": "embed_tokens",
}


def token_ids() -> torch.Tensor:
    """Two sequences that use the first and the last id."""
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 0], ids[1, 3] = 0, VOCAB - 1
    return ids


def settled(model: torch.nn.Module) -> torch.nn.Module:
    """The model, every tensor in memory of its own.

    What is loaded lies where it lay in the file, and a matrix product may round by where its operands lie.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()
    return model


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Logits, or hidden states for a model without a head; of equal models the same bits."""
    with torch.no_grad():
        result = settled(model)(token_ids())
    return result.logits if "logits" in result else result.last_hidden_state
