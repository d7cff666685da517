"""mpo-tn eval as a user meets it, and what its numbers are."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.program import run
from helpers.task_folders import sentence, write_all
from scipy import stats

from mpo_tn import MPOError
from mpo_tn.app import terminal
from mpo_tn.app.cli_eval import print_evaluation
from mpo_tn.app.evaluate import EvalReport, Source, evaluate
from mpo_tn.app.fidelity import embed
from mpo_tn.torch import MPOConfig, compress
from mpo_tn.torch.hf.folder import dense_parameters, load_model, load_tokenizer, save_model, weight_bytes
from mpo_tn.torch.models.units import count_parameters
from mpo_tn.tuning import TaskData, load_task


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models dense and small, a tuned one, and text of every kind."""
    root = tmp_path_factory.mktemp("eval")
    found = write_all(root)
    for name in ("encoder", "decoder"):
        model = load_model(found[name])
        compress(model, MPOConfig(sites=3, keep=0.4))
        found[f"small-{name}"] = root / f"small-{name}"
        save_model(model, found[name], found[f"small-{name}"])
    torch.manual_seed(5)
    options: dict[str, Any] = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(found["encoder"], **options)
    found["tuned"] = root / "tuned"
    save_model(tuned, found["encoder"], found["tuned"])
    compress(tuned, MPOConfig(sites=3, keep=0.4))
    found["small-tuned"] = root / "small-tuned"
    save_model(tuned, found["encoder"], found["small-tuned"])
    source = random.Random(7)
    found["lines"] = root / "lines.txt"
    found["lines"].write_text("\n".join(sentence(source) for _ in range(30)) + "\n\n")
    found["table"] = root / "own.csv"
    with found["table"].open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("first", "second", "score", "verdict"))
        rows.writerows(
            (sentence(source), sentence(source), source.random(), source.choice(("yes", "no"))) for _ in range(20)
        )
    return found


def of(model: Path, source: Source, **options: Any) -> EvalReport:
    return evaluate([str(model)], source, **options)


def test_spearman_of_mean_pooled_cosines_by_hand(places: dict[str, Path]) -> None:
    report = of(places["small-encoder"], Source("STS-B", places["stsb"]), against=str(places["encoder"]), batch_size=5)
    data = load_task("STS-B", places["stsb"])
    assert isinstance(data, TaskData)
    tokenizer = load_tokenizer(places["encoder"])
    assert [row.is_reference for row in report.rows] == [True, False]
    values: list[float] = []
    for row, name in zip(report.rows, ("encoder", "small-encoder"), strict=True):
        model = load_model(places[name])
        cosines: list[float] = []
        with torch.no_grad():
            for pair in data.dev["dev"].texts:
                one, two = (model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in pair)
                cosines.append(float(torch.cosine_similarity(one, two, dim=0)))
        (score,) = row.scores
        assert score.value == pytest.approx(stats.spearmanr(cosines, data.dev["dev"].labels).statistic, abs=0.01)
        # Bonett and Wright's error of a rank correlation is for normal data and many pairs: here there are 16.
        value = score.value
        rough = (1 - value**2) * math.sqrt((1 + value**2 / 2) / (len(cosines) - 3))
        assert rough / 2 < score.error < 2 * rough
        values.append(value)
        assert row.bytes == weight_bytes(places[name])
        assert row.bits_per_weight == pytest.approx(8 * row.bytes / count_parameters(load_model(places["encoder"])))
        assert row.seconds > 0
    first, second = report.rows
    assert first.distance is None
    assert second.scores[0].change == pytest.approx(values[1] - values[0])
    assert second.distance is not None
    assert second.distance.sequences == 32
    assert second.fidelity is not None
    assert second.fidelity.worst_cosine <= second.fidelity.cosine < 1
    assert report.how[0] == "32 texts, cut at 32 tokens; embeddings are means over tokens."


def test_a_model_beside_itself_loses_nothing(places: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    save_model(load_model(places["encoder"]), places["encoder"], again)
    report = evaluate([str(again)], Source(texts=places["lines"]), against=str(places["encoder"]), sample=20)
    row = report.rows[1]
    assert row.distance is not None
    assert row.fidelity is not None
    # Hidden states of a few units, rounded to 6e-8; what lies elsewhere in memory may round otherwise.
    assert row.distance.value < 1e-10
    assert row.distance.sequences == 20
    assert row.fidelity.neighbours == 1
    assert row.scores == ()


def test_perplexity_is_that_of_finetune_and_blocks_are_said(places: dict[str, Path], tmp_path: Path) -> None:
    from mpo_tn.tuning import Method, Settings, load_files, start

    (tmp_path / "a.txt").write_text("\n".join(sentence(random.Random(k)) for k in range(40)))
    model = places["decoder"]
    report = of(model, Source(texts=tmp_path / "a.txt"), max_length=16)
    run_ = start(model, load_files(tmp_path / "a.txt", tmp_path / "a.txt"), Method("full"), Settings(max_length=16))
    expected = run_.evaluate()
    assert {score.name: score.value for score in report.rows[0].scores} == pytest.approx(expected, rel=1e-4)
    tokens = len(load_tokenizer(model)((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"]) - 1
    blocks = math.ceil(tokens / 15)
    assert report.how == (
        f"{tokens} tokens in {blocks} blocks of 16 that share one token (a stride of 15): each is scored once, from "
        "what is before it in its block. Nothing is put before a text.",
    )
    assert 0 < report.rows[0].scores[0].error < report.rows[0].scores[0].value


def test_a_tuned_model_on_its_task_and_on_labels_of_ones_own(places: dict[str, Path]) -> None:
    dense, small = places["tuned"], places["small-tuned"]
    report = of(small, Source("MRPC", places["mrpc"]), against=str(dense))
    assert report.kind == "classifier"
    assert [score.name for score in report.rows[1].scores] == ["accuracy", "f1"]
    assert report.rows[1].distance is not None
    assert report.rows[1].distance.measure == "logits"
    own = of(dense, Source(texts=places["table"], text="first", label="verdict"))
    with places["table"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    model, tokenizer = load_model(dense), load_tokenizer(dense)
    with torch.no_grad():
        right = [
            model.config.id2label[int(model(**tokenizer(row["first"], return_tensors="pt")).logits.argmax())]
            == row["verdict"]
            for row in rows
        ]
    assert own.rows[0].scores[0].value == pytest.approx(100 * np.mean(right), abs=5.1)  # one may be too close to call


def test_pairs_of_ones_own(places: dict[str, Path]) -> None:
    report = of(places["encoder"], Source(texts=places["table"], text="first,second", label="score"))
    assert report.rows[0].scores[0].name == "spearman"
    assert report.data == f"{places['table']}: first,second -> score"


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "tuned"])
def test_the_table_fits(
    kind: str, width: int, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source("STS-B", places["stsb"]) if kind == "encoder" else Source(texts=places["lines"])
    report = of(places[f"small-{kind}"], source, against=str(places[kind]))
    monkeypatch.setattr(terminal.out, "_width", width)
    print_evaluation(report)
    lines = capsys.readouterr().out.splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, lines)) <= width
    assert any(line.startswith(kind) for line in table)
    assert any(line.startswith(f"small-{kind}") for line in table)
    size = report.rows[1].bytes / 1e6
    assert any(f"{size:.3g}" in line for line in table)
    assert report.rows[1].distance is not None
    assert any(f"{report.rows[1].distance.value:.3g}" in line for line in table)
    assert "thread" in lines[-1] + lines[-2] + lines[-3]


def test_json(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(
        "eval", places["small-decoder"], "--against", places["decoder"], "--texts", places["lines"], "--json",
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    assert code == 0
    document = json.loads(printed)
    assert document["kind"] == "language model"
    assert document["threads"] == torch.get_num_threads()
    assert document["rows"][1]["distance"]["measure"] == "logits"
    assert document["rows"][0]["scores"][0]["change"] is None


BAD = {
    "nothing asked": ((), "give one of --task and --texts FILE"),
    "both asked": (("--task", "STS-B", "--texts", "lines"), "give one of --task and --texts FILE"),
    "a column of nothing": (("--task", "STS-B", "--text", "a"), "--text and --label name columns of the file"),
    "a folder of nothing": (("--texts", "lines", "--data-dir", "stsb"), "--data-dir is the folder of a task"),
    "nothing to score": (("--texts", "lines"), "on text alone an encoder has no score: name the dense model"),
    "no head": (("--task", "MRPC", "--data-dir", "mrpc"), "a model without a head is measured on pairs with a score"),
    "no pair": (("--texts", "table", "--text", "first", "--label", "score"), "without a head is measured on pairs"),
    "another kind": (("decoder", "--task", "STS-B", "--data-dir", "stsb"), "a language model: measure them apart"),
    "no model": (("none/here/at/all", "--texts", "lines", "--against", "encoder"), "cannot be read as a model"),
    "no sample": (("--texts", "lines", "--sample", "0"), "sample=0 leaves nothing"),
    "no column": (("--texts", "table", "--text", "third", "--against", "encoder"), "has no column 'third'"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_arguments(
    mistake: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked, message = BAD[mistake]
    words = [places.get(word, word) for word in asked]
    code, _, error = run("eval", places["encoder"], *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert message in " ".join(error.split())


@pytest.mark.parametrize("kind", ["encoder", "decoder", "tuned"])
def test_a_model_that_gives_no_numbers_is_said_to(
    kind: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(places[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    save_model(model, places[kind], tmp_path / "broken")
    source = {
        "encoder": Source("STS-B", places["stsb"]), "decoder": Source(texts=places["lines"]),
        "tuned": Source("MRPC", places["mrpc"]),
    }[kind]  # fmt: skip
    report = of(tmp_path / "broken", source, against=str(places[kind]))
    row = report.rows[1]
    assert row.distance is not None
    assert row.distance.value == math.inf
    assert kind == "tuned" or not math.isfinite(row.scores[0].value)
    print_evaluation(report)
    assert "inf" in capsys.readouterr().out
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][1]["distance"]["value"] is None


def test_models_that_do_not_fit_the_dense_one(places: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = load_model(places["tuned"])
    config = transformers.AutoConfig.from_pretrained(places["tuned"], num_labels=3)
    three = type(model)(config)
    save_model(three, places["tuned"], other)
    with pytest.raises(MPOError, match="other: its head has 3 outputs, and MRPC needs 2"):
        of(other, Source("MRPC", places["mrpc"]), against=str(places["tuned"]))
    with pytest.raises(MPOError, match="a language model has no head for MRPC"):
        of(places["decoder"], Source("MRPC", places["mrpc"]))
    letters = tmp_path / "letters"
    save_model(load_model(places["encoder"]), places["encoder"], letters)
    tokenizer = json.loads((letters / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["red"], vocab["dog"] = vocab["dog"], vocab["red"]
    (letters / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MPOError, match="letters: its tokenizer reads the text otherwise"):
        of(letters, Source(texts=places["lines"]), against=str(places["encoder"]))


@pytest.mark.parametrize("kind", ["encoder", "decoder", "tuned"])
def test_dense_parameters_are_those_before_compression(kind: str, places: dict[str, Path]) -> None:
    expected = count_parameters(load_model(places[kind]))
    assert dense_parameters(places[kind]) == dense_parameters(places[f"small-{kind}"]) == expected


def test_a_folder_without_weights_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(MPOError, match="has no weight files"):
        weight_bytes(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"1234")
    assert weight_bytes(tmp_path) == 4


@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mpo_tn.app.demo import demo_model

    texts = ["A man is eating.", "It rains.", "Nothing else is like a long sentence about sentences, is it?"] * 3
    theirs = sentence_transformers.SentenceTransformer(str(demo_model()), device="cpu").encode(texts)
    ours = embed(load_model(demo_model()), load_tokenizer(demo_model()), texts, batch_size=4)
    # Unit vectors of 384 numbers, in other batches: rounding of float32 through six layers.
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
