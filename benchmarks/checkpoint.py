"""A sharded checkpoint of any size: random numbers in the shape of a Llama, with a tokenizer.

Run with ``python benchmarks/checkpoint.py FOLDER --layers 20``. It is written shard by shard, one of which is in
memory; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpo_tn.storage.checkpoint import shard_names, write_index, write_shard
from mpo_tn.torch.models.stream_unit import raw

SPREAD = 0.02
"""Standard deviation of all matrices, as transformers initialises them."""


def write_checkpoint(folder: Path, config: LlamaConfig, *, shard_bytes: int, seed: int = 0) -> int:
    """Write a model folder of bfloat16 numbers; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    numbers = {name: number for number, name in enumerate(shapes)}
    shards = shard_names(sizes, shard_bytes)
    for file, names in shards.items():
        write_shard(
            folder / file,
            {name: raw(_random(shapes[name], seed * len(shapes) + numbers[name])) for name in names},
        )
    write_index(folder, shards, sum(sizes.values()))
    config.architectures, config.dtype = [LlamaForCausalLM.__name__], "bfloat16"
    config.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    return sum(sizes.values())


def _random(shape: torch.Size, seed: int) -> torch.Tensor:
    """Matrices of random numbers; of norms ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape).normal_(std=SPREAD, generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.bfloat16)


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A token a byte, so that any text can be written, and others up to ``words`` that only a model says."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<{number}>" for number in range(len(pieces), words)]
    found = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


def main() -> None:
    """The checkpoint that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=20, help="20 of the default width are 2 GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--shard-mb", type=float, default=400)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config = LlamaConfig(
        hidden_size=asked.hidden, intermediate_size=asked.inner, num_hidden_layers=asked.layers,
        num_attention_heads=asked.heads, num_key_value_heads=asked.kv_heads, vocab_size=asked.words,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    size = write_checkpoint(asked.folder, config, shard_bytes=round(asked.shard_mb * 1e6), seed=asked.seed)
    print(f"{asked.folder}: {size / 1e9:.2f} GB in {len(list(asked.folder.glob('*.safetensors')))} files")


if __name__ == "__main__":
    main()
