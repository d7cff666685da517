"""Counts of four models at their true sizes. Built on the meta device: nothing is allocated or factorised."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import pytest
import torch
from helpers.adapter import Snapshot
from helpers.paths import ROOT
from helpers.tiny_models import FAMILIES, tiny
from torch import nn
from transformers import MobileBertConfig, MobileBertForMaskedLM

from mpo_tn import MPOError, Sites
from mpo_tn.torch import MPOConfig, MPOLayer, compress, freeze
from mpo_tn.torch.models.compress import compress_empty
from mpo_tn.torch.models.survey import find_units


@cache
def script() -> Any:
    spec = importlib.util.spec_from_file_location("model_sizes", ROOT / "benchmarks" / "model_sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def million(count: int) -> str:
    return f"{count / 1e6:.2f}"


def test_albert_has_the_counts_of_the_paper() -> None:
    """Table 3 of the paper: 12.7 in all and 1.2 fine-tuned, untruncated (MPOP_full+LFA); 11.685 M dense."""
    n, specs = script().count("ALBERT-base-v2")
    assert (n["dense"], n["mpo"], n["paper"]) == (11_685_122, 12_695_286, 1_187_574)
    assert (million(n["mpo"]), million(n["paper"])) == ("12.70", "1.19")
    # By hand: the legs and full bonds that the supplement prints (Tables 1 and 2).
    printed = {
        (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2), (10, 200, 480, 12)),
        (768, 3072): ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (12, 192, 384, 16)),
        (3072, 768): ((4, 4, 8, 6, 4), (3, 4, 4, 4, 4), (12, 192, 384, 16)),
        (768, 768): ((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), (12, 192, 192, 12)),
    }
    cores = central = 0
    for copies, shape in ((1, (30000, 128)), (1, (3072, 768)), (1, (768, 3072)), (5, (768, 768))):
        out, in_, bonds = printed[shape]
        ends = (1, *bonds, 1)
        sizes = [ends[k] * out[k] * in_[k] * ends[k + 1] for k in range(5)]
        cores, central = cores + copies * sum(sizes), central + copies * sizes[2]
    assert cores == n["cores"]
    assert n["mpo"] - central == n["paper"]
    assert n["dense"] - n["matrices"] + cores == n["mpo"]
    assert {(s.out_features, s.in_features): (s.sites.out, s.sites.in_, s.bonds) for s in specs.values()} == printed
    assert len(specs) == 8
    assert n["default"] < n["paper"]  # tables of positions and the projection of the word table stay frozen


@pytest.mark.parametrize(
    ("label", "total", "trained"),
    [
        ("scripts, full bonds", "12.76", "1.25"),
        ("scripts, word table capped at 240", "10.72", "1.14"),
        ("scripts, word table 75, feed-forward 82, query, key and value 45", "2.48", "0.55"),
    ],
)
def test_albert_with_the_legs_and_caps_of_the_published_scripts(label: str, total: str, trained: str) -> None:
    n, _ = script().count("ALBERT-base-v2", overrides=script()._CAPPED[label])
    assert (million(n["mpo"]), million(n["paper"])) == (total, trained)


def test_with_the_word_table_alone_as_an_mpo_most_of_albert_trains() -> None:
    n, _ = script().count("ALBERT-base-v2", target_modules=["word_embeddings"], bond=240)
    assert (million(n["mpo"]), million(n["paper"])) == ("9.92", "8.00")


@pytest.mark.parametrize(("name", "dense"), [("BERT-base", "109.48"), ("DistilBERT", "66.96"), ("MobileBERT", "24.85")])
def test_counts_of_the_other_models_add_up(name: str, dense: str) -> None:
    n, specs = script().count(name)
    assert million(n["dense"]) == dense
    assert n["mpo"] - n["cores"] == n["dense"] - n["matrices"]
    assert n["paper"] == n["mpo"] - n["central"]
    assert n["central"] / n["cores"] > 0.9
    assert all(spec.bonds == spec.sites.full_bonds and spec.center == 2 for spec in specs.values())


@pytest.mark.slow
def test_the_page_holds_the_tables_of_the_script() -> None:
    page = (ROOT / "docs" / "model_sizes.md").read_text(encoding="utf-8").splitlines()
    assert set(script().tables()) <= set(page)


def test_the_embedding_row_that_the_paper_prints_for_bert_cannot_be_right() -> None:
    row = Sites((5, 10, 10, 10, 6), (2, 2, 4, 4, 2))
    assert row.shape == (30000, 128)
    with pytest.raises(MPOError, match=r"\(30000, 128\) and the matrix is \(30522, 768\)"):
        script().count("BERT-base", overrides={"word_embeddings": {"sites": row}})


def test_the_word_table_of_mobilebert_is_one_with_what_its_head_reads() -> None:
    with torch.device("meta"):
        model = MobileBertForMaskedLM(MobileBertConfig())
    units, _ = find_units(model, r".*(word_embeddings|predictions\..*)")
    names = {name for unit in units for name in unit.all_names}
    assert names >= {"mobilebert.embeddings.word_embeddings", "cls.predictions.decoder", "cls.predictions.dense"}


CONFIGS: list[dict[str, Any]] = [
    {},
    {"sites": 3, "bond": 5},
    {"keep": 0.6},
    {"sites": "low-rank", "bond": 3},
    {"sites": 4, "bond": 6, "overrides": {r"re:.*(word_embeddings|wte|embed_tokens)": {"bond": 2}}},
    {"target_modules": "all-linear", "sites": 3, "bond": 3},
]


@pytest.mark.guarantee("empty-same-structure")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_compression_has_the_structure_of_a_real_one(family: str, config: dict[str, Any]) -> None:
    settings = MPOConfig(**{"target_modules": r".*(?<!position_embeddings)", **config})
    real, empty = tiny(family), tiny(family)
    with torch.device("meta"):
        nowhere = tiny(family)
    for model in (real, empty, nowhere):
        model.bfloat16().train().get_input_embeddings().requires_grad_(False)
    layers = compress(real, settings).layers
    expected = {layer.name: layer.spec.to_dict() | {"rel_error": None, "exact": True} for layer in layers}
    wanted = structure(real)
    for model in (empty, nowhere):
        specs = compress_empty(model, settings)
        assert {name: spec.to_dict() for name, spec in specs.items()} == expected
        assert structure(model) == wanted
        assert freeze(model) == freeze(real)
    assert all(core.is_meta for m in empty.modules() if isinstance(m, MPOLayer) for core in m.cores)


def structure(model: nn.Module) -> list[Any]:
    """Names, shapes, dtypes and flags of all parameters, which of them are one, and every specification."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    first: dict[nn.Parameter, str] = {}
    for name, parameter in parameters:
        first.setdefault(parameter, name)
    found: list[Any] = [(n, first[p], p.shape, p.dtype, p.requires_grad) for n, p in parameters]
    for name, module in model.named_modules(remove_duplicate=False):
        own = module.spec.to_dict() | {"rel_error": None, "exact": True} if isinstance(module, MPOLayer) else None
        found.append((name, type(module), own, module.training))
    return found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tolerance": 0.1}, r"query: the bonds that meet tolerance=0\.1"),
        ({"overrides": {"layer.1.attention.self.query": {"tolerance": 0.2}}}, r"layer\.1.*tolerance=0\.2"),
        ({"keep": 0.001}, r"query: .*keep more"),
        ({"sites": Sites((2, 2), (3, 3))}, r"query: legs"),
        ({"target_modules": "nothing"}, "matches no module"),
    ],
)
def test_an_empty_compression_that_fails_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = tiny("bert")
    snapshot = Snapshot(model)
    with pytest.raises(MPOError, match=message):
        compress_empty(model, MPOConfig(**{"target_modules": ["query"], **config}))
    snapshot.assert_same(model)
    compress_empty(model, MPOConfig(bond=2))
    with pytest.raises(MPOError, match="already"):
        compress_empty(model, MPOConfig(bond=2))


def test_a_dense_model_of_true_size_is_where_it_says() -> None:
    """All on the meta device, so that this file needs no memory."""
    for name in script().TARGETS:
        model = script().dense(name)
        assert all(p.is_meta for p in model.parameters())
        assert math.prod(model.get_input_embeddings().weight.shape) > 1e6
