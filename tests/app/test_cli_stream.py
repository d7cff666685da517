from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.program import run
from helpers.streaming import contents, source_in
from helpers.task_folders import sentence, write_decoder, write_encoder

from mpo_tn.app import cli_stream, cluster

Run = Callable[..., tuple[int, str, str]]
HOW = ("--sites", "3", "--keep", "0.5")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return partial(run, monkeypatch=monkeypatch, capsys=capsys)


def test_streaming_is_said_verified_and_found_altered(tmp_path: Path, program: Run) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    code, said, _ = program("compress", source, out, *HOW, "--dry-run")
    assert code == 0
    assert "14 matrices, 0 of them done" in said
    assert not out.exists()
    code, said, _ = program("compress", source, out, *HOW, "--dry-run", "--json")
    assert json.loads(said)["units"] == 14
    code, said, _ = program("compress", source, out, *HOW, "--stream", "--shard-size", "20kB")
    assert code == 0
    assert "14 matrices: kept" in said
    assert len(list(out.glob("*.safetensors"))) > 1
    code, said, _ = program("verify", out, "--against", source)
    assert code == 0
    assert "is what it says" in said
    assert "14 errors computed again" in said
    (out / "tokenizer_config.json").write_text("{}")
    code, said, _ = program("verify", out)
    assert code == 1
    assert "differs: tokenizer_config.json was altered" in said
    code, said, _ = program("verify", out, "--json")
    assert code == 1
    assert json.loads(said)["differences"] == ["tokenizer_config.json was altered"]


def test_large_models_are_streamed_by_themselves(tmp_path: Path, program: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_in(tmp_path)
    assert program("compress", source, tmp_path / "memory", *HOW, "--json")[0] == 0
    monkeypatch.setattr(cli_stream, "_is_large", lambda _: True)
    assert program("compress", source, tmp_path / "streamed", *HOW, "--json")[0] == 0
    assert program("compress", source, tmp_path / "not", *HOW, "--json", "--no-stream")[0] == 0
    records = [json.loads((tmp_path / name / "mpo_record.json").read_text()) for name in ("memory", "streamed", "not")]
    assert [record["run"] is not None for record in records] == [False, True, False]
    assert records[0] == records[2]
    assert records[0]["tensors"] == records[1]["tensors"]
    one, other = contents(tmp_path / "memory"), contents(tmp_path / "not")
    assert one == other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--no-stream", "--workers", "2"), "--no-stream leaves nothing"),
        (("--workers", "2", "--scheduler", "tcp://127.0.0.1:1"), "leave one out"),
        (("--stream", "--refine"), "--refine trains blocks, which needs the whole model in memory"),
        (("--workers", "0"), "workers=0"),
        (("--stream", "--device", "cuda"), "--device cuda and streaming do not go together"),
        (("--shard-size", "much"), "is not a size"),
        (("--scheduler", "tcp://127.0.0.1:1"), "Dask"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, program: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE", 0.5)
    source = source_in(tmp_path)
    (tmp_path / "texts.txt").write_text("a\nb\n")
    given = [str(tmp_path / part) if part == "texts.txt" else part for part in options]
    code, _, err = program("compress", source, tmp_path / "out", *HOW, *given)
    assert code == 2
    assert said in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_encoder, write_decoder])
def test_text_is_run_through_a_model_that_is_streamed(
    tmp_path: Path, program: Run, write: Callable[[Path], Path]
) -> None:
    write(tmp_path / "source")
    source = random.Random(0)
    text = tmp_path / "own.txt"
    text.write_text("".join(f"{sentence(source)} .\n" for _ in range(40)), encoding="utf-8")
    given = ("--texts", text, "--max-length", "16", "--keep", "0.5", "--sites", "low-rank")
    code, said, _ = program("compress", tmp_path / "source", tmp_path / "out", *given, "--dry-run")
    assert code == 0
    assert "MB of moments and hidden states, at most" in said
    assert "and running the model on text" in said
    code, said, _ = program("compress", tmp_path / "source", tmp_path / "out", *given, "--stream", "--json")
    assert code == 0
    assert all(layer["metric"].startswith("activation") for layer in json.loads(said)["layers"])
    assert json.loads((tmp_path / "out" / "mpo_record.json").read_text())["run"]["calibration"]
    assert not (tmp_path / "out.work").exists()
    code, said, _ = program("compress", tmp_path / "source", tmp_path / "memory", *given, "--json")
    assert code == 0
    code, _, err = program("compress", tmp_path / "source", tmp_path / "no", *given[:4], "--size", "20kB", "--stream")
    assert code == 2
    assert "a budget is spent" in " ".join(err.split())


def test_verify_wants_a_dense_model_to_compare_outputs_with(tmp_path: Path, program: Run) -> None:
    (tmp_path / "texts.txt").write_text("a\nb\n")
    code, _, err = program("verify", tmp_path, "--texts", tmp_path / "texts.txt")
    assert code == 2
    assert "--against" in err
