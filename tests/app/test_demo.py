"""The embedded default model, from decomposition to the HTML page, on little text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.app.demo import ENCODER, demo_model, run_demo
from mpo_tn.app.fidelity import fidelity, sample_sentences
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf.folder import load_model, save_model

# Exact decomposition in float32: c * eps, of the norm of each matrix.
ROUND_TRIP = 8 * float(torch.finfo(torch.float32).eps)


LAYERS, WORDS = 1, 6000
"""Of the six layers and 30,522 words of the embedded model: planning all of it takes a tenth of the time of tests."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory):
    seen: list[tuple[int, int, str]] = []
    home = tmp_path_factory.mktemp("demo")
    model = load_model(demo_model())
    model.encoder.layer = model.encoder.layer[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight[:WORDS].detach()))
    model.config.vocab_size = WORDS
    save_model(model, demo_model(), home / "model")
    tokenizer = json.loads((home / "model" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: k for word, k in tokenizer["model"]["vocab"].items() if k < WORDS}
    (home / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    folder = home / "out"
    result = run_demo(
        folder, source=home / "model", sentences=24, heal_steps=2, progress=lambda *step: seen.append(step)
    )
    return folder, result, seen


@pytest.mark.slow
def test_what_the_demo_measures(outcome) -> None:
    folder, result, seen = outcome
    assert result.matrices == 6 * LAYERS
    assert result.round_trip_error < ROUND_TRIP
    assert result.round_trip_cosine > 0.9999
    assert result.reloaded_equal
    assert [row.name for row in result.rows] == [
        "dense", "int8", "int4", "int2", "low-rank", "mpo", "planned", "planned", "healed"
    ]  # fmt: skip
    dense, *small = result.rows
    assert dense.distance == 0
    assert dense.fidelity.neighbours == 1
    # A file has a header, of names and shapes, beside its numbers.
    assert 0 < result.bytes_dense / 1e6 - dense.size_mb < 0.02
    assert 0 < result.bytes_saved / 1e6 - result.rows[-1].size_mb < 0.05
    assert all(row.bits_per_weight == pytest.approx(8e6 * row.size_mb / result.parameters) for row in result.rows)
    by_name = {row.name: row for row in result.rows}
    int4, int2, larger, smaller = (by_name["int4"], by_name["int2"], *small[5:7])
    for planned, uniform in ((larger, int4), (smaller, int2)):
        assert planned.size_mb <= uniform.size_mb
        assert planned.distance < uniform.distance
    assert by_name["low-rank"].size_mb <= int4.size_mb * 1.01
    assert larger.distance < by_name["low-rank"].distance
    assert by_name["healed"].size_mb == smaller.size_mb
    assert {name for name, _ in result.phases} <= {what.split(":")[0] for _, _, what in seen} | {"heal"}
    assert result.seconds == pytest.approx(sum(seconds for _, seconds in result.phases))
    assert sorted(path.name for path in folder.iterdir()) == ["model", "report.html", "result.json"]
    assert json.loads((folder / "result.json").read_text())["matrices"] == 6 * LAYERS


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing_else(outcome) -> None:
    folder, result, _ = outcome
    page = (folder / "report.html").read_text(encoding="utf-8")

    class Checker(HTMLParser):
        outside: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag != "script"
            self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    checker = Checker()
    checker.feed(page)
    assert [link for link in checker.outside if not link.startswith("data:")] == []
    assert page.count("<svg") >= 3
    for row in result.rows:
        assert f"{row.fidelity.cosine:.4f}" in page
    assert f"encoder.layer.{LAYERS - 1}.output.dense" in page
    assert not re.search(r"\{(title|body)\}", page)


@pytest.mark.slow
def test_an_earlier_result_is_not_replaced_unasked(outcome) -> None:
    folder, _, _ = outcome
    before = (folder / "result.json").read_bytes()
    with pytest.raises(MPOError, match="--overwrite"):
        run_demo(folder, sentences=24)
    assert (folder / "result.json").read_bytes() == before


def test_the_low_rank_error_is_that_of_the_svd() -> None:
    model = load_model(demo_model())
    weight = model.encoder.layer[0].attention.self.query.weight.detach().double().numpy()
    report = compress(
        model, MPOConfig(target_modules=["encoder.layer.0.attention.self.query"], sites="low-rank", keep=0.5)
    )
    layer = report.layers[0]
    (rank,) = layer.spec.bonds
    values = np.linalg.svd(weight, compute_uv=False)
    # c * eps * sqrt(min(size)) * norm, c = 4: the values come from data with 24 bits.
    tolerance = 4 * 2**-23 * np.sqrt(384) * layer.norm
    assert abs(layer.error - np.linalg.norm(values[rank:])) <= tolerance
    assert rank == int(0.5 * 384 * 384 // (384 + 384))


def test_the_encoder_pattern_means_its_36_linears() -> None:
    report = compress(load_model(demo_model()), MPOConfig(target_modules=ENCODER, bond=1))
    assert len(report.layers) == 36
    assert all(layer.name.startswith("encoder.layer.") for layer in report.layers)


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_fidelity_of_perturbed_embeddings(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((15, 6))
    other = rows + noise * rng.standard_normal(rows.shape)
    rows, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, other))
    found = fidelity(rows, other)
    rounding = 16 * 2**-52
    assert found.worst_cosine <= found.cosine + rounding
    assert -1 - rounding <= found.worst_cosine <= 1 + rounding
    assert 0 <= found.neighbours <= 1
    assert -1 - rounding <= found.rank_correlation <= 1 + rounding
    if noise == 0:
        assert found.neighbours == 1
    # Rotating both changes nothing that is measured.
    q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    turned = fidelity(rows @ q, other @ q)
    assert abs(turned.cosine - found.cosine) <= 100 * rounding


def test_sentences_are_many_distinct_and_the_same_each_time() -> None:
    sentences = sample_sentences(300)
    assert len(set(sentences)) == 300
    assert sentences == sample_sentences(300)
    assert all(40 <= len(sentence) <= 300 for sentence in sentences)
