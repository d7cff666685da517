"""Task folders, a tokenizer and model folders that tests of training write for themselves."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers

WORDS = ("red", "blue", "green", "dog", "cat", "bird", "runs", "sleeps", "sings", "now", "here", "often")


def write_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer that knows the words above."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "."]
    (folder / "vocab.txt").write_text("\n".join(names) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)


def write_encoder(folder: Path, *, dropout: float = 0.1) -> Path:
    """A tiny BERT without a head, and its tokenizer."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=20,
        max_position_embeddings=32, initializer_range=0.2, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    write_tokenizer(folder)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_decoder(folder: Path) -> Path:
    """A tiny Llama with the same tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
        vocab_size=20, max_position_embeddings=32, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    write_tokenizer(folder)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentence(source: random.Random) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(3, 9)))


def write_mrpc(folder: Path, *, train: int = 48, dev: int = 24) -> Path:
    """Pairs whose label says whether they are the same sentence; the dev file starts with a byte-order mark."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    for name, count, mark in (("train", train, ""), ("dev", dev, "\ufeff")):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for k in range(count):
            first, same = sentence(source), source.random() < 0.6
            lines.append(f'{int(same)}\t{k}\t{k}\t{first} "\t{first if same else sentence(source)} .')
        (folder / f"{name}.tsv").write_text(mark + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_sst2(folder: Path, *, train: int = 64, dev: int = 24) -> Path:
    """Sentences whose label says whether there is a dog: easy enough for a model of two layers."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(3)
    for name, count in (("train", train), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for k in range(count):
            words = [source.choice([word for word in WORDS if word != "dog"]) for _ in range(source.randint(3, 9))]
            if k % 2:
                words[source.randrange(len(words))] = "dog"
            lines.append(f"{' '.join(words)} \t{k % 2}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_stsb(folder: Path, *, train: int = 32, dev: int = 16) -> Path:
    """Pairs scored by the share of common words."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(1)
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    for name, count in (("train", train), ("dev", dev)):
        lines = [head]
        for k in range(count):
            first, second = sentence(source), sentence(source)
            a, b = set(first.split()), set(second.split())
            lines.append(f"{k}\tg\tf\t2012\t0\tx\ty\t{first}\t{second}\t{5 * len(a & b) / len(a | b):.3f}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_text(folder: Path, *, valid: bool = True) -> Path:
    """Text with a pattern that a model can learn."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(2)
    line = "red dog runs . blue cat sleeps . green bird sings ."
    (folder / "train_a.txt").write_text("\n".join(line for _ in range(30)))
    (folder / "train_b.txt").write_text("\n".join(sentence(source) for _ in range(10)))
    if valid:
        (folder / "valid.txt").write_text("\n".join(line for _ in range(5)))
    return folder


def write_all(root: Path) -> dict[str, Path]:
    """Two models and a folder for every kind of task, by name."""
    writers = {
        "encoder": write_encoder, "decoder": write_decoder, "mrpc": write_mrpc, "stsb": write_stsb, "sst2": write_sst2,
        "text": write_text,
    }  # fmt: skip
    return {name: write(root / name) for name, write in writers.items()}
