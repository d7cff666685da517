"""Language models to compress, and their text: stories260K from a folder, and a GPT that is trained here."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import struct
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # threads, before NumPy
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.convert_slow_tokenizer import generate_merges

SEED = 0
LENGTH = 256
"""Tokens of a window, the first one that of the beginning."""
WINDOWS, MEASURED = 128, 64
"""Windows to calibrate on, and at the most to measure on, of each text."""
PIECE, BYTE = 1, 6
"""Kinds of pieces of SentencePiece that text is made of."""

MANGLED = tuple(bytes((0xE2, 0x80, last)).decode("cp1252") for last in (0x9C, 0x99, 0x98, 0x93, 0x94))
"""Quotation marks and dashes in UTF-8, as Windows' code page reads them."""


@dataclass(frozen=True)
class Recipe:
    """How the GPT is made."""

    width: int = 256
    blocks: int = 3
    heads: int = 8
    words: int = 1024
    steps: int = 550
    windows: int = 8
    rate: float = 2e-3
    held_out: int = 10
    """Every so many-th module of the standard library is not trained on."""


@dataclass(frozen=True)
class Language:
    """A model with windows of text, none of which is in two places.

    Attributes:
        calibration: windows (count, LENGTH).
        measured: windows by name; first those of the kind that was calibrated on.
        unigram: nats a token of the first of them, by how often each word is in the calibration text.
    """

    name: str
    model: Any
    target: str
    calibration: torch.Tensor
    measured: dict[str, torch.Tensor]
    unigram: float


def stories(folder: Path) -> Language:
    """The Llama of 260 K parameters, on the stories that lie beside it."""
    here = folder / "stories260K"
    tokenizer = sentencepiece(here / "tok512.model")
    lines = _lines((here / "tinystories_minigpt.txt").read_text(encoding="utf-8"))
    half = len(lines) // 2
    known = set(lines[:half])
    sample = _lines((here / "tinystories_sample.txt").read_text(encoding="utf-8"))
    measured = {
        "other stories": openings(tokenizer, [line for line in lines[half:] if line not in known], 1),
        "five stories": openings(tokenizer, sample, 1),
        "WikiText-2": openings(tokenizer, _lines(_wikitext(folder)), 1),
    }
    model = LlamaForCausalLM.from_pretrained(here)
    return _language("stories260K", model, r".*layers\..*proj", openings(tokenizer, lines[:half], 1), measured)


def _lines(text: str) -> list[str]:
    """Paragraphs, with the quotation marks that they had before somebody took UTF-8 for Windows' code page."""
    for wrong in MANGLED:
        text = text.replace(wrong, wrong.encode("cp1252").decode())
    text = text.replace(MANGLED[0][:2], "\u201d")  # its third byte is no character there
    return [line.strip() for line in text.split("\n") if line.strip() and line.strip() != "<|endoftext|>"]


def gpt(folder: Path, cache: Path, recipe: Recipe = Recipe()) -> Language:
    """A GPT-2 on docstrings of the standard library, trained once in a folder of its own."""
    modules = list(docstrings())
    train = "\n\n".join(text for k, text in enumerate(modules) if k % recipe.held_out)
    other = "\n\n".join(text for k, text in enumerate(modules) if k % recipe.held_out == 0)
    made_of = json.dumps([vars(recipe), LENGTH, SEED, hashlib.sha256(train.encode()).hexdigest()])
    here = cache / f"gpt-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    if not (here / "model.safetensors").exists():
        here.mkdir(parents=True, exist_ok=True)
        tokenizer = _words(train, recipe.words)
        tokenizer.save(str(here / "tokenizer.json"))
        _trained(windows(tokenizer, train, 0), recipe).save_pretrained(here)
    tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
    found = windows(tokenizer, train, 0)
    measured = {"other modules": windows(tokenizer, other, 0), "WikiText-2": windows(tokenizer, _wikitext(folder), 0)}
    return _language("GPT", GPT2LMHeadModel.from_pretrained(here), r".*\.h\..*c_(attn|fc|proj)", found, measured)


def _language(
    name: str, model: Any, target: str, calibration: torch.Tensor, measured: dict[str, torch.Tensor]
) -> Language:
    first = next(iter(measured.values()))[:MEASURED, 1:]
    words = model.config.vocab_size
    seen = torch.bincount(calibration[:, 1:].reshape(-1), minlength=words).double() + 1
    unigram = -float((seen / seen.sum()).log()[first.reshape(-1)].mean())
    drawn = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(SEED))[:WINDOWS]
    kept = {key: value[:MEASURED] for key, value in measured.items()}
    return Language(name, model.eval(), target, calibration[drawn], kept, unigram)


def _wikitext(folder: Path) -> str:
    """The beginning of the test set."""
    return (folder / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[: 8 * LENGTH * MEASURED]


def openings(tokenizer: Tokenizer, lines: Sequence[str], begin: int) -> torch.Tensor:
    """As ``windows``, each of which starts with a line: a model of stories is at a loss in the middle of one."""
    newline = tokenizer.token_to_id("<0x0A>")
    found: list[list[int]] = []
    at = 0
    while True:
        ids = tokenizer.encode("\n".join(lines[at : at + LENGTH])).ids[: LENGTH - 1]
        if len(ids) < LENGTH - 1:
            return torch.tensor(found)
        found.append([begin, *ids])
        at += 1 + ids.count(newline)


def windows(tokenizer: Tokenizer, text: str, begin: int) -> torch.Tensor:
    """Token ids (count, LENGTH), each window opened by the token of the beginning; the rest is left out."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    count = len(ids) // (LENGTH - 1)
    body = ids[: count * (LENGTH - 1)].view(count, LENGTH - 1)
    return torch.cat([torch.full((count, 1), begin), body], dim=1)


def sentencepiece(file: Path) -> Tokenizer:
    """A BPE model of SentencePiece (with byte fallback) without its library: its file holds pieces and scores.

    Raises:
        ValueError: some text does not come back.
    """
    pieces: list[tuple[str, float, int]] = []
    for number, value in _fields(file.read_bytes()):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, PIECE)))
    vocabulary = {piece: k for k, (piece, _, _) in enumerate(pieces)}
    merges = generate_merges(vocabulary, [(piece, score) for piece, score, kind in pieces if kind == PIECE])
    found = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    text = "Once upon a time, \n in  Ørsted's ☃ land"
    if found.decode(found.encode(text).ids) != text:
        raise ValueError(f"{file} is not a BPE model with byte fallback: {text!r} does not come back")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: numbers, or bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        yield key >> 3, data[at : at + size]
        at += size


def docstrings() -> Iterator[str]:
    """All docstrings of a module of the standard library, module after module; its tests are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    away = {"test", "tests", "site-packages", "idle_test", "lib2to3"}
    for file in sorted(root.rglob("*.py")):
        if away & set(file.relative_to(root).parts):
            continue
        tree = ast.parse(file.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        if found:
            yield "\n\n".join(found)


def _words(text: str, count: int) -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=count, special_tokens=["<|begin|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([text], trainer)
    return found


def _trained(text: torch.Tensor, recipe: Recipe) -> GPT2LMHeadModel:
    """AdamW, by a rate that rises for a tenth of the steps and then falls to a tenth along a cosine."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=recipe.words, n_positions=LENGTH, n_embd=recipe.width, n_layer=recipe.blocks,
            n_head=recipe.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, recipe))
    draws = torch.Generator().manual_seed(SEED)
    began = common.clock()
    for step in range(recipe.steps):
        batch = text[torch.randint(len(text), (recipe.windows,), generator=draws)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"training: step {step}, loss {loss.item():.3f}, {common.clock() - began:.0f} s", flush=True)
    return model


def _share(step: int, recipe: Recipe) -> float:
    rising = recipe.steps // 10
    if step < rising:
        return (step + 1) / rising
    return 0.55 + 0.45 * math.cos(math.pi * (step - rising) / (recipe.steps - rising))
