"""What four models hold at their true sizes, as MPOs of full bonds: the tables of ``docs/model_sizes.md``.

Run with ``python benchmarks/model_sizes.py``. Nothing is downloaded or factorised: the models are built by hand on the
meta device, and every bond is full or capped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from mpo_tn import Sites
from mpo_tn.torch import ModuleSpec, MPOConfig, freeze
from mpo_tn.torch.models.compress import compress_empty

# What the published code decomposes: word table, attention, feed-forward, pooler; for MobileBERT also the bottlenecks.
TARGETS = {
    "ALBERT-base-v2": r".*(word_embeddings|query|key|value|attention\.dense|ffn|ffn_output|pooler)",
    "BERT-base": r".*(word_embeddings|encoder\..*(query|key|value|dense)|pooler\.dense)",
    "DistilBERT": r".*(word_embeddings|(q|k|v|out)_lin|lin[12])",
    "MobileBERT": r".*(word_embeddings|embedding_transformation|encoder\..*|pooler\.dense)",
}
# The attention legs of the published scripts, which are not those of the supplement.
SCRIPT_LEGS = {"sites": Sites((4, 4, 4, 4, 3), (4, 4, 4, 4, 3))}
_TABLE = "word_embeddings"
_CAPPED = {
    "supplement, full bonds": {},
    "scripts, full bonds": {"re:.*(attention|pooler).*": SCRIPT_LEGS},
    "scripts, word table capped at 240": {_TABLE: {"bond": 240}, "re:.*(attention|pooler).*": SCRIPT_LEGS},
    "scripts, word table 75, feed-forward 82, query, key and value 45": {
        _TABLE: {"bond": 75},
        "re:.*ffn.*": {"bond": 82},
        "re:.*(query|key|value)": {"bond": 45, **SCRIPT_LEGS},
        "re:.*(attention|pooler).*": SCRIPT_LEGS,
    },
}


def dense(name: str) -> Any:
    """A model with a head of two classes, without data."""
    with torch.device("meta"):
        if name == "ALBERT-base-v2":
            config = transformers.AlbertConfig(
                hidden_size=768, embedding_size=128, num_hidden_layers=12, num_attention_heads=12,
                intermediate_size=3072, vocab_size=30000, num_labels=2,
            )  # fmt: skip
            return transformers.AlbertForSequenceClassification(config)
        if name == "BERT-base":
            return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
        if name == "DistilBERT":
            return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(num_labels=2))
        return transformers.MobileBertForSequenceClassification(transformers.MobileBertConfig(num_labels=2))


def count(name: str, **config: Any) -> tuple[dict[str, int], dict[str, ModuleSpec]]:
    """Parameters of a model before and after, and the specifications of its matrices."""
    model = dense(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    specs = compress_empty(model, MPOConfig(**{"target_modules": TARGETS[name], **config}))
    counts = {
        "dense": before,
        "mpo": sum(parameter.numel() for parameter in model.parameters()),
        "matrices": sum(spec.out_features * spec.in_features for spec in specs.values()),
        "cores": sum(spec.num_parameters for spec in specs.values()),
        "central": sum(math.prod(spec.core_shapes[spec.center]) for spec in specs.values()),
        "paper": freeze(model, also="all").trainable,
        "default": freeze(model).trainable,
    }
    return counts, specs


def tables() -> Iterator[str]:
    yield "| model | dense | as MPO, full bonds | LFA as in the paper | LFA by default | central tensors |"
    yield "| --- | --- | --- | --- | --- | --- |"
    shapes: dict[tuple[int, int], ModuleSpec] = {}
    used: dict[tuple[int, int], list[str]] = {}
    for name in TARGETS:
        n, specs = count(name)
        cells = " | ".join(f"{n[key]:,d}" for key in ("dense", "mpo", "paper", "default"))
        yield f"| {name} | {cells} | {n['central'] / n['cores']:.1%} of the cores |"
        for spec in specs.values():
            shape = (spec.out_features, spec.in_features)
            shapes.setdefault(shape, spec)
            used.setdefault(shape, [])
            used[shape] += [name] * (name not in used[shape])
    yield ""
    yield "| ALBERT-base-v2, legs and caps | all parameters | LFA as in the paper |"
    yield "| --- | --- | --- |"
    for label, overrides in _CAPPED.items():
        n, _ = count("ALBERT-base-v2", overrides=overrides)
        yield f"| {label} | {n['mpo']:,d} | {n['paper']:,d} |"
    n, _ = count("ALBERT-base-v2", target_modules=[_TABLE], bond=240)
    yield f"| word table alone as MPO, capped at 240 | {n['mpo']:,d} | {n['paper']:,d} |"
    yield ""
    yield "| matrix (out, in) | out legs | in legs | full bonds | cores / dense | central | in |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (out, in_), spec in sorted(shapes.items(), key=lambda item: -math.prod(item[0])):
        legs = [", ".join(map(str, numbers)) for numbers in (spec.sites.out, spec.sites.in_, spec.bonds)]
        central = math.prod(spec.core_shapes[spec.center]) / spec.num_parameters
        models = ", ".join(used[out, in_])
        yield f"| {out} x {in_} | {' | '.join(legs)} | {spec.kept:.3f} | {central:.1%} | {models} |"


if __name__ == "__main__":
    print("\n".join(tables()))
