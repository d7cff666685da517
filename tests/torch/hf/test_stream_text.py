"""Folders compressed on text without ever loading the model: what comes is what compress gives of the loaded one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.calibrating import padded_batches
from helpers.paths import ROOT
from helpers.streaming import SOAKING, contents, kills_of_runs, source_in
from helpers.tiny_models import tiny

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import open_checkpoint
from mpo_tn.torch import MPOConfig, calibrate, compress, plan
from mpo_tn.torch.hf import stream_text
from mpo_tn.torch.hf.folder import empty_model, load_model, save_model
from mpo_tn.torch.hf.stream import compress_folder, dry_run
from mpo_tn.torch.hf.verify import verify_folder
from mpo_tn.torch.models import stream
from mpo_tn.torch.models.distance import distance
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.stream_unit import one_thread, tensor_of

LOW_RANK = MPOConfig(sites="low-rank", bond=8, target_modules="all-matrices")
BITS = MPOConfig(sites="low-rank", bond=8, bits=4, group=16)


def batches(seed: int = 1) -> list[Any]:
    return padded_batches(6, seed)


def near(one: Path, other: Path, within: float = 1e-7) -> None:
    """All tensors, of models in double precision: what is fitted follows the last digits of moments."""
    a, b = open_checkpoint(one).tensors, open_checkpoint(other).tensors
    assert a.keys() == b.keys()
    for key in a:
        x, y = tensor_of(a[key]), tensor_of(b[key])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), key
        if x.is_floating_point():
            assert float((x.double() - y.double()).norm()) <= within * float(y.double().norm()), key
        else:
            assert torch.equal(x, y), key


def same_report(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same_report(one[key], other[key])
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-7)
    else:
        assert type(one) is type(other)
        assert one == other or isinstance(one, list)
        for mine, there in zip(one, other, strict=True) if isinstance(one, list) else ():
            same_report(mine, there)


@pytest.mark.guarantee("stream-same-model", "anchored-same-fits")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("config", [LOW_RANK, BITS], ids=["low rank, tables too", "bits"])
def test_a_folder_compressed_on_text_is_what_compress_gives(tmp_path: Path, family: str, config: MPOConfig) -> None:
    source, out = source_in(tmp_path, family, dtype=torch.float64), tmp_path / "out"
    for anchored in (None, False):
        with one_thread():
            model = load_model(source)
            wanted = compress(model, config, calibration=batches(), anchored=anchored)
            save_model(model, source, tmp_path / "memory", overwrite=True)
            found = compress_folder(
                source, out, config, calibration=batches(), anchored=anchored, overwrite=anchored is False
            )  # fmt: skip
        same_report(found.to_dict(), wanted.to_dict())
        near(tmp_path / "memory", out)
        assert not (tmp_path / "out.work").exists()
    verified = verify_folder(out, source)
    assert verified.is_good, verified.differences


@pytest.mark.guarantee("stream-same-model")
@pytest.mark.slow
def test_text_runs_through_experts_that_are_fused_while_they_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=128, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    how = MPOConfig(sites="low-rank", bond=4)
    with one_thread():
        model = load_model(tmp_path / "source")
        wanted = compress(model, how, calibration=batches(), anchored=False)
        found = compress_folder(tmp_path / "source", tmp_path / "out", how, calibration=batches(), anchored=False)
    # Single precision, the widest that kernels of experts take; the ridge of a metric is 1e-3 of it.
    for mine, there in zip(found.layers, wanted.layers, strict=True):
        assert mine.names == there.names
        if there.weighted is None:  # experts, whose inputs are not listened to
            assert (mine.weighted, mine.error) == (None, there.error)
        else:
            assert mine.weighted == pytest.approx(there.weighted, rel=1e-2)
    assert any(layer.spec.kind == "parameter" for layer in found.layers)
    assert open_checkpoint(tmp_path / "out").nbytes < open_checkpoint(tmp_path / "source").nbytes


@pytest.mark.guarantee("anchored-same-fits")
@pytest.mark.slow
def test_held_back_text_decides_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_in(tmp_path, "llama", dtype=torch.float64)
    seen: list[dict[bool, float]] = []
    inner = stream_text.distances

    def turned(*args: Any) -> dict[bool, float]:
        found = inner(*args)
        seen.append(found)
        return {False: found[True], True: found[False]}

    compress_folder(source, tmp_path / "best", BITS, calibration=batches())
    monkeypatch.setattr(stream_text, "distances", turned)
    compress_folder(source, tmp_path / "worst", BITS, calibration=batches())
    monkeypatch.undo()
    compress_folder(source, tmp_path / "alone", BITS, calibration=batches(), anchored=False)
    dense, samples = load_model(source), Samples.of(batches())
    for name, anchored in (("alone", False), ("best", True)):
        model = load_model(tmp_path / name)
        own = float(distance(model, dense, samples.held_back))
        assert own == pytest.approx(seen[0][anchored], rel=1e-6)
    assert seen[0][True] < seen[0][False]
    assert open_checkpoint(tmp_path / "worst").tensors.keys() == open_checkpoint(tmp_path / "alone").tensors.keys()
    near(tmp_path / "worst", tmp_path / "alone", within=0)


@pytest.mark.guarantee("stream-any-workers")
@pytest.mark.slow
def test_workers_give_the_same_bytes(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    with one_thread():
        compress_folder(source, tmp_path / "one", BITS, calibration=batches())
        compress_folder(source, tmp_path / "two", BITS, calibration=batches(), workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


class StoppedError(Exception):
    pass


def stopped(source: Path, out: Path, at: str, **options: Any) -> None:
    def tell(_done: int, _total: int, what: str) -> None:
        if what.startswith(at):
            raise StoppedError

    with pytest.raises(StoppedError):
        compress_folder(source, out, BITS, calibration=batches(), progress=tell, **options)


@pytest.mark.guarantee("stream-resumes")
@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_damaged_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    compress_folder(source, tmp_path / "wanted", BITS, calibration=batches())
    done: list[str] = []
    inner = stream.do_unit
    monkeypatch.setattr(stream, "do_unit", lambda task: (done.append(task.name), inner(task))[1])
    stopped(source, out, "moments model.layers.0")
    assert len(done) == 7
    assert all(name.startswith("model.layers.1.") for name in done)
    assert dry_run(source, out, BITS, calibration=batches()).done == 7
    stopped(source, out, "layer after layer model.layers.1")
    assert sorted(done[7:14]) == sorted(name.replace("layers.1", "layers.0") for name in done[:7])
    after = len(done)
    for damaged in ("units/000009.safetensors", "walk/given/0002-000001.safetensors"):
        path = tmp_path / "out.work" / damaged
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        stopped(source, out, "layer after layer model.layers.1")
    assert len(done) - after <= 2 + 7  # the unit that was damaged; and those after others, where they were begun
    compress_folder(source, out, BITS, calibration=batches())
    assert contents(out) == contents(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "wanted"]


@pytest.mark.guarantee("stream-resumes", "stream-any-workers")
@pytest.mark.slow
def test_a_run_on_text_killed_anywhere_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    assert kills_of_runs(tmp_path, 5 if SOAKING else 130, "text") >= (30 if SOAKING else 4)


@pytest.mark.guarantee("stream-resumes")
def test_other_text_or_another_way_of_fitting_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    stopped(source, out, "moments")
    known = json.loads((tmp_path / "out.work" / "run.json").read_text())["calibration"]
    match = f"the calibration of that run is {known} and that of this one [0-9a-f]+"
    with pytest.raises(MPOError, match=match):
        compress_folder(source, out, BITS, calibration=batches(2))
    with pytest.raises(MPOError, match=match):
        compress_folder(source, out, BITS, calibration=batches(), anchored=False)
    moments = calibrate(load_model(source), batches(), gradients=True)
    with pytest.raises(MPOError, match=match):
        compress_folder(source, out, BITS, calibration=moments)
    with pytest.raises(MPOError, match="give batches, not moments alone"):
        compress_folder(source, tmp_path / "other", BITS, calibration=moments, anchored=True)


def test_text_is_asked_for_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    decided = plan(empty_model(source), BITS, calibration=Samples.of(batches()))
    with pytest.raises(MPOError, match="nothing is known of that: give text"):
        compress_folder(source, out, decided)
    with pytest.raises(MPOError, match="a budget is spent"):
        compress_folder(source, out, MPOConfig(size="20kB", target_modules="all-matrices"), calibration=batches())
    tiny("albert").save_pretrained(tmp_path / "albert")
    with pytest.raises(MPOError, match=r"has no blocks.*--calibration FILE"):
        compress_folder(tmp_path / "albert", out, BITS, calibration=batches())
    assert not out.exists()


def test_a_dry_run_tells_what_waits_in_files(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    alone, anchored = (dry_run(source, out, BITS, calibration=batches(), anchored=way) for way in (False, True))
    most = 0

    def look(_done: int, _total: int, _what: str) -> None:
        nonlocal most
        walk = tmp_path / "out.work" / "walk"
        here = [path for path in walk.rglob("*.safetensors") if path.parent.name != "anchored"]
        most = max(most, sum(open_checkpoint_bytes(path) for path in here))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    compress_folder(source, out, BITS, calibration=batches(), anchored=False, progress=look)
    assert 0 < most <= alone.bytes_meanwhile < anchored.bytes_meanwhile
    assert dry_run(source, out, BITS, calibration=batches(), anchored=False).bytes_meanwhile == 0
    assert alone.bytes_read == dry_run(source, out, MPOConfig(sites=3, keep=0.5)).bytes_read + 2 * (
        open_checkpoint(source).nbytes
    )


def open_checkpoint_bytes(path: Path) -> int:
    """Of the tensors in a file, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


SCRIPT = """
import sys
from pathlib import Path
import torch
from mpo_tn.torch import MPOConfig
from mpo_tn.torch.hf.folder import load_model
from mpo_tn.torch.hf.stream import compress_folder
source, small, cap = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
import resource
config = MPOConfig(sites="low-rank", bond=8, target_modules=["q_proj", "down_proj"])
batches = [{"input_ids": torch.arange(k, k + 16).reshape(2, 8)} for k in range(2)]
compress_folder(small, small.parent / "warm", config, calibration=batches)  # what is imported and started late
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + cap, used + cap))
compress_folder(source, source.parent / "out", config, calibration=batches, shard_bytes=2_000_000)
try:
    model = load_model(source)
except BaseException as error:
    print("in memory:", type(error).__name__)
"""


@pytest.mark.guarantee("stream-memory", "walk-memory")
@pytest.mark.slow
def test_text_runs_through_a_model_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    # Matrices of the same size once before the limit: OpenBLAS takes its buffers then, and waits for ever for more.
    small, source = tmp_path / "small" / "source", tmp_path / "large" / "source"
    for folder, layers in ((small, 1), (source, 40)):
        config = transformers.LlamaConfig(
            hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, vocab_size=64,
            dtype="float32",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.float32)
        model.save_pretrained(folder, max_shard_size="10MB")
    # A block, moments of two inputs and outputs twice over, a file of the result, and what a fit and allocators take.
    cap = 7 * 256**2 * 4 + 2 * 4 * 256**2 * 8 + 2_000_000 + 18_000_000
    size = open_checkpoint(source).nbytes
    assert size >= 2.5 * cap
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, small, str(cap)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "in memory:" in done.stdout
    assert (tmp_path / "large" / "out" / "config.json").is_file()
