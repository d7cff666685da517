from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.paths import ROOT
from helpers.streaming import CONFIG, SHARD, SOAKING, contents, in_memory, kills_of_runs, same_tensors, source_in
from helpers.tiny_models import VOCAB, tiny

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import INDEX, WEIGHTS, open_checkpoint
from mpo_tn.torch import Calibration, MPOConfig, Plan, calibrate, compress, plan
from mpo_tn.torch.hf import stream_job
from mpo_tn.torch.hf.folder import empty_model, load_model
from mpo_tn.torch.hf.record import NAME as STREAM_RECORD
from mpo_tn.torch.hf.stream import compress_folder, dry_run
from mpo_tn.torch.hf.stream_job import Job
from mpo_tn.torch.hf.verify import verify_folder
from mpo_tn.torch.models import stream
from mpo_tn.torch.models.stream_unit import do_unit, one_thread
from mpo_tn.truncate import basis, leading

CONFIGS = {
    "chains": CONFIG,
    "low rank": MPOConfig(sites="low-rank", keep=0.5),
    "tables in bits": MPOConfig(sites="low-rank", target_modules="all-matrices", bond=8, bits=4, group=16),
    "dense in bits": MPOConfig(sites=1, bits=3, group=16),
    "tolerance": MPOConfig(sites=3, tolerance=0.3),
}


def beside_weights(folder: Path) -> dict[str, bytes]:
    """What a folder has beside weights and the record of a streamed run."""
    own = (WEIGHTS, INDEX, STREAM_RECORD)
    return {name: data for name, data in contents(folder).items() if name not in own and "-of-" not in name}


@pytest.mark.guarantee("stream-same-model")
@pytest.mark.parametrize(
    ("family", "tied"),
    [("bert", True), ("albert", True), ("distilbert", True), ("gpt2", False), ("llama", True), ("llama", False)],
)
def test_a_streamed_folder_is_what_compress_gives(tmp_path: Path, family: str, tied: bool) -> None:
    source = source_in(tmp_path, family, tied=tied)
    for name, config in CONFIGS.items():
        if name in ("low rank", "dense in bits") and family != "llama":
            continue
        report = in_memory(source, tmp_path / "memory" / name, config)
        out = tmp_path / "streamed" / name
        assert compress_folder(source, out, config, shard_bytes=SHARD).to_dict() == report
        same_tensors(tmp_path / "memory" / name, out)
        assert beside_weights(out) == beside_weights(tmp_path / "memory" / name)
        assert not (out.parent / f"{out.name}.work").exists()
    back = type(tiny(family)).from_pretrained(tmp_path / "streamed" / "tables in bits")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        wanted = type(tiny(family)).from_pretrained(tmp_path / "memory" / "tables in bits")(ids).logits
        assert torch.equal(back(ids).logits, wanted)


@pytest.mark.guarantee("stream-same-model", "stream-any-workers")
@pytest.mark.slow
def test_leading_eigenvectors_alone_are_streamed_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "LARGE", 24)  # tiny models have no matrix that is large,
    monkeypatch.setattr(leading, "_GAIN", 100.0)  # and none of which it pays
    monkeypatch.setattr(basis, "FEW", 64)
    source = source_in(tmp_path)
    config = MPOConfig(sites="low-rank", bond=4)
    report = in_memory(source, tmp_path / "memory", config)
    methods = {bond.method for layer in compress(load_model(source), config).layers for bond in layer.report.bonds}
    assert "randomized" in methods
    for threads in (1, 2):
        out = tmp_path / f"streamed-{threads}"
        with ThreadPoolExecutor(threads) as executor:
            assert compress_folder(source, out, config, shard_bytes=SHARD, executor=executor).to_dict() == report
        same_tensors(tmp_path / "memory", out)


@pytest.mark.guarantee("stream-same-model")
def test_a_model_that_is_loaded_in_another_dtype_than_it_is_stored_in(tmp_path: Path) -> None:
    source = source_in(tmp_path, dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    in_memory(source, tmp_path / "memory", CONFIG)
    compress_folder(source, tmp_path / "out", CONFIG)
    same_tensors(tmp_path / "memory", tmp_path / "out")


@pytest.mark.guarantee("stream-same-model")
@pytest.mark.parametrize("tolerance", [0.3, 1e-6])
def test_what_would_not_be_smaller_at_its_tolerance_stays_dense(tmp_path: Path, tolerance: float) -> None:
    source, out = source_in(tmp_path, "bert"), tmp_path / "out"
    config = MPOConfig(sites=3, tolerance=tolerance)
    report = in_memory(source, tmp_path / "memory", config)
    assert len(report["layers"]) > 0 if tolerance > 0.1 else not report["layers"]
    assert any("its cores would take" in reason for reason in report["skipped"].values())
    assert compress_folder(source, out, config).to_dict() == report
    assert compress_folder(source, out, config).to_dict() == report
    same_tensors(tmp_path / "memory", out)
    assert beside_weights(out) == beside_weights(tmp_path / "memory")
    found = verify_folder(out, source)
    assert found.is_good, found.differences


@pytest.mark.guarantee("stream-same-model")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_moments_of_a_saved_calibration_fit_matrices_and_move_biases(tmp_path: Path, family: str) -> None:
    source = source_in(tmp_path, family)
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(3, VOCAB, (4, 12))} for _ in range(3)]
    with one_thread():
        calibrate(load_model(source), batches, gradients=True).save(tmp_path / "moments")
    known = Calibration.load(tmp_path / "moments")
    decided = plan(empty_model(source), MPOConfig(sites="low-rank", bond=8, bits=4, group=16), calibration=known)
    assert decided.needs_calibration
    report = in_memory(source, tmp_path / "memory", decided, calibration=known, anchored=False)
    told = dry_run(source, tmp_path / "out", decided, calibration=known).bytes_written
    done = compress_folder(source, tmp_path / "out", decided, calibration=known)
    assert done.to_dict() == report
    same_tensors(tmp_path / "memory", tmp_path / "out")
    moments = [part for layer in done.layers for part in vars(known.of(layer.name)).values()]
    written = sum(layer.bytes for layer in done.layers) + open_checkpoint(tmp_path / "out").nbytes
    assert told == written + sum(part.nbytes for part in moments if isinstance(part, torch.Tensor))
    found = verify_folder(tmp_path / "out", source)
    assert found.is_good, found.differences
    with pytest.raises(MPOError, match="nothing is known of that: give text"):
        compress_folder(source, tmp_path / "other", decided)
    other = source_in(tmp_path / "else", "llama" if family == "bert" else "bert")
    with pytest.raises(MPOError, match=r"does not fit|is not of this"):
        compress_folder(other, tmp_path / "other", decided, calibration=known)


@pytest.mark.guarantee("stream-same-model")
def test_fused_experts_are_streamed_where_they_are_stored_so(tmp_path: Path) -> None:
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    fused = transformers.GptOssForCausalLM(transformers.GptOssConfig(**small, head_dim=8))
    fused.save_pretrained(tmp_path / "fused")
    config = MPOConfig(sites="low-rank", bond=4)
    report = in_memory(tmp_path / "fused", tmp_path / "memory", config)
    assert any(layer["kind"] == "parameter" for layer in report["layers"])
    assert compress_folder(tmp_path / "fused", tmp_path / "out", config).to_dict() == report
    same_tensors(tmp_path / "memory", tmp_path / "out")
    assert (tmp_path / "memory" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    found = verify_folder(tmp_path / "out", tmp_path / "fused")
    assert found.is_good, found.differences


@pytest.mark.guarantee("stream-any-workers")
@pytest.mark.slow
def test_any_number_of_workers_and_threads_and_any_executor_give_the_same_bytes(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    compress_folder(source, tmp_path / "one", CONFIG, shard_bytes=SHARD)
    wanted = contents(tmp_path / "one")
    compress_folder(source, tmp_path / "two", CONFIG, shard_bytes=SHARD, workers=2)
    assert contents(tmp_path / "two") == wanted
    with ThreadPoolExecutor(1) as threads:
        compress_folder(source, tmp_path / "lent", CONFIG, shard_bytes=SHARD, executor=threads)
        assert threads.submit(int).result() == 0  # whoever made it closes it
    assert contents(tmp_path / "lent") == wanted
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress_folder(source, tmp_path / "threads", CONFIG, shard_bytes=SHARD)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "threads") == wanted


@pytest.mark.guarantee("stream-any-workers", "stream-resumes", "unit-whole")
@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    assert kills_of_runs(tmp_path, 1 if SOAKING else 7) >= (30 if SOAKING else 10)


class Stopping:
    """A progress that stops a run after so many units."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __call__(self, done: int, total: int, what: str) -> None:
        if what.startswith("compressing") and done >= self.units:
            raise KeyboardInterrupt


def stopped(source: Path, out: Path, config: MPOConfig = CONFIG, units: int = 3) -> Path:
    with pytest.raises(KeyboardInterrupt):
        compress_folder(source, out, config, progress=Stopping(units))
    return out.parent / f"{out.name}.work"


@pytest.mark.guarantee("stream-resumes")
def test_only_what_is_not_done_is_done_and_damaged_units_are_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    work = stopped(source, out)
    files = sorted((work / "units").iterdir())
    assert len(files) == 3
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    told: list[str] = []
    assert dry_run(source, out, CONFIG).done == 2
    stopped(source, out, units=2)
    done: list[str] = []
    inner = stream.do_unit
    monkeypatch.setattr(stream, "do_unit", lambda task: (done.append(task.name), inner(task))[1])
    compress_folder(source, out, CONFIG, progress=lambda _d, _t, what: told.append(what))
    assert len(done) == 14 - 2
    compress_folder(source, tmp_path / "fresh", CONFIG)
    assert contents(out) == contents(tmp_path / "fresh")
    done.clear()
    assert compress_folder(source, out, CONFIG).to_dict() == compress_folder(source, out, CONFIG).to_dict()
    assert not done  # the result itself is there


@pytest.mark.guarantee("stream-resumes")
def test_another_plan_source_or_version_is_refused_with_both_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    work = stopped(source, out)
    manifest = json.loads((work / "run.json").read_text())
    with pytest.raises(MPOError, match=f"the plan of that run is {manifest['plan']} and that of this one [0-9a-f]+"):
        compress_folder(source, out, MPOConfig(sites=3, keep=0.4))
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = load_model(other)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other, max_shard_size="20kB")
    with pytest.raises(MPOError, match=f"the source of that run is {manifest['source']} and that of this one"):
        compress_folder(other, out, CONFIG)
    (work / "run.json").write_text(json.dumps({**manifest, "versions": {"torch": "1.0"}}))
    with pytest.raises(MPOError, match="the versions of that run"):
        compress_folder(source, out, CONFIG)
    (work / "run.json").write_text("{")
    with pytest.raises(MPOError, match=r"run\.json is damaged"):
        compress_folder(source, out, CONFIG)
    shutil.rmtree(work)
    work.mkdir()
    (work / "thesis.tex").touch()
    with pytest.raises(MPOError, match=r"no folder of a run \(thesis\.tex"):
        compress_folder(source, out, CONFIG)
    assert (work / "thesis.tex").exists()


def test_two_runs_of_one_result_do_not_meet(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"

    def meanwhile(done: int, _total: int, what: str) -> None:
        if what.startswith("compressing") and done == 1:
            with ThreadPoolExecutor(1) as other, pytest.raises(MPOError, match="is being written by another"):
                other.submit(compress_folder, source, out, CONFIG).result()

    compress_folder(source, out, CONFIG, progress=meanwhile)


def poisoned(source: Path, name: str = "model.layers.1.mlp.up_proj") -> Path:
    model = load_model(source)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = torch.nan
    model.save_pretrained(source, max_shard_size="20kB")
    return source


@pytest.mark.parametrize("threads", [0, 1])
def test_a_matrix_that_fails_names_itself_and_the_others_are_kept(tmp_path: Path, threads: int) -> None:
    source, out = poisoned(source_in(tmp_path)), tmp_path / "out"
    with ThreadPoolExecutor(1) as pool, pytest.raises(MPOError, match=r"^model\.layers\.1\.mlp\.up_proj: .* NaN"):
        compress_folder(source, out, CONFIG, executor=pool if threads else None)
    assert not out.exists()
    assert 0 < dry_run(source, out, CONFIG).done < 14


def test_a_worker_of_other_versions_or_without_the_folder_does_nothing(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    job = Job.of(source, out, CONFIG, None)
    job.work.open()
    task = job.task(0)
    here = re.escape(torch.__version__)
    with pytest.raises(MPOError, match=rf"^{re.escape(task.name)}: the worker on .* has .*torch {here}"):
        do_unit(replace(task, versions={**task.versions, "torch": "1.0"}))
    with pytest.raises(MPOError, match=rf"^{re.escape(task.name)}: the worker on .* does not see"):
        do_unit(replace(task, file=str(tmp_path / "elsewhere" / "units" / "0.safetensors")))
    assert not Path(task.file).exists()
    assert do_unit(task) == task.name
    assert Path(task.file).exists()


@pytest.mark.parametrize("kind", ["file", "loop", "dangling"])
def test_what_is_in_the_way_of_unfinished_work_is_left_alone(tmp_path: Path, kind: str) -> None:
    source, work = source_in(tmp_path), tmp_path / "out.work"
    work.write_text("a thesis") if kind == "file" else work.symlink_to("out.work" if kind == "loop" else "nowhere")
    with pytest.raises(MPOError, match=r"out\.work is in the way, and it is no folder"):
        compress_folder(source, tmp_path / "out", CONFIG)
    assert work.read_text() == "a thesis" if kind == "file" else work.is_symlink()


class Dying(Executor):
    """Breaks at a unit so many times, as a pool does whose process is killed."""

    def __init__(self, name: str, times: int) -> None:
        self.name, self.times = name, times

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        if args[0].name == self.name and self.times:
            self.times -= 1
            future.set_exception(BrokenProcessPool("a process in the process pool was terminated abruptly"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_a_worker_that_dies_is_replaced_and_a_unit_that_kills_all_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name = source_in(tmp_path), "model.layers.0.mlp.up_proj"
    dying = Dying(name, 2)
    monkeypatch.setattr(stream, "_pool", lambda _workers: stream._lent(dying))
    compress_folder(source, tmp_path / "out", CONFIG, workers=2)
    assert dying.times == 0
    dying.times = 10
    with pytest.raises(MPOError, match=rf"{name}: its worker died 3 times.*fewer workers; what is done is kept"):
        compress_folder(source, tmp_path / "other", CONFIG, workers=2)
    assert dry_run(source, tmp_path / "other", CONFIG).done == 13
    with pytest.raises(MPOError, match=r"the executor broke .* 1 units left, .*up_proj among them"):
        compress_folder(source, tmp_path / "other", CONFIG, executor=Dying(name, 1))


@pytest.mark.slow
def test_workers_that_do_not_end_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_FAREWELL", 0.5)
    with stream._pool(2) as pool:
        workers = {pool.submit(os.getpid).result(60)}
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # as one that waits for the lock that a killed one held
    for worker in workers:
        assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text()


class CallingOff(Executor):
    """Gives up all work, as a client does whose scheduler is gone."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def test_an_executor_that_calls_work_off_is_said(tmp_path: Path) -> None:
    with pytest.raises(MPOError, match="the executor called off 14 units"):
        compress_folder(source_in(tmp_path), tmp_path / "out", CONFIG, executor=CallingOff())


class OfItsOwn:
    """Gives jobs, as submitit does."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Path:
        return Path("job")


def test_an_executor_without_futures_is_said(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    with pytest.raises(MPOError, match=r"the executor gives PosixPath objects, .* docs/scale\.md"):
        compress_folder(source, tmp_path / "out", CONFIG, executor=OfItsOwn())  # pyright: ignore[reportArgumentType]
    assert dry_run(source, tmp_path / "out", CONFIG).done == 0


class KilledWorker(Exception):  # noqa: N818 - the names that Dask has
    pass


class NoWorkerError(Exception):
    pass


class Failing(ThreadPoolExecutor):
    """Ends every unit with an error, as Dask does that has no workers or loses them."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KilledWorker("died"), r"^model\..*: workers died over it .died.*; what is done is kept"),
        (NoWorkerError("none"), r"^model\..*: no worker is left to do it .none.: start some, .*; what is done is kept"),
        (ValueError("odd"), r"^model\..*: ValueError: odd; what is done is kept"),
    ],
)
def test_errors_of_dask_are_said(tmp_path: Path, error: Exception, said: str) -> None:
    with Failing(error) as executor, pytest.raises(MPOError, match=said):
        compress_folder(source_in(tmp_path), tmp_path / "out", CONFIG, executor=executor)


def test_a_closed_executor_is_said(tmp_path: Path) -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(MPOError, match="the executor takes no work"):
        compress_folder(source_in(tmp_path), tmp_path / "out", CONFIG, executor=pool)


def test_bad_folders_are_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"

    def refused(
        match: str, source: Path = source, out: Path = out, config: MPOConfig | Plan = CONFIG, **o: Any
    ) -> None:
        with pytest.raises(MPOError, match=match):
            compress_folder(source, out, config, **o)
        assert not (out.parent / f"{out.name}.work").exists()

    refused("lies in the source", out=source / "small")
    refused("holds the input", out=tmp_path)
    refused("a budget is spent", config=MPOConfig(size="20kB", target_modules="all-matrices"))
    refused("workers=0", workers=0)
    refused("shard_bytes=0", shard_bytes=0)
    out.mkdir()
    (out / "thesis.tex").touch()
    refused("exists and is not empty")
    refused("will not be replaced", overwrite=True)
    (out / "thesis.tex").unlink()
    gpt2 = plan(tiny("gpt2"), CONFIG)
    refused("does not fit this LlamaForCausalLM", config=gpt2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    refused("has 0 GB free, and .* are needed")
    monkeypatch.undo()
    (source / "model.safetensors.index.json").unlink()
    refused("neither model.safetensors nor model.safetensors.index.json")


def test_a_checkpoint_without_a_tensor_or_with_one_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    for change, match in (
        (lambda s: s.pop("model.layers.0.mlp.up_proj.weight"), r"missing, for instance model\.layers\.0\.mlp\.up_proj"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(7)}), r"model\.norm\.weight is \[7\]"),
        (lambda s: s.update({"model.norm.weight": s["model.norm.weight"].int()}), r"model\.norm\.weight is int32"),
    ):
        state = model.state_dict()
        del state["lm_head.weight"]
        change(state)
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        model.save_pretrained(tmp_path / "source")
        from safetensors.torch import save_file

        save_file(state, tmp_path / "source" / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(MPOError, match=match):
            compress_folder(tmp_path / "source", tmp_path / "out", CONFIG)


def test_tied_tensors_that_are_both_there_have_to_be_equal(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, model = source_in(tmp_path), tiny("llama")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for file in source.glob("model*"):
        file.unlink()
    save_file(state, source / WEIGHTS, metadata={"format": "pt"})
    compress_folder(source, tmp_path / "out", CONFIG)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors
    state["lm_head.weight"][0, 0] += 1
    save_file(state, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(MPOError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied by config\.json"):
        compress_folder(source, tmp_path / "other", CONFIG)


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"

    def shorten(done: int, _total: int, what: str) -> None:
        if what.startswith("compressing") and done == 2:
            for path in source.glob("*.safetensors"):
                os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(MPOError, match="was changed while it was read"):
        compress_folder(source, out, CONFIG, progress=shorten)
    assert not out.exists()


def test_the_card_names_what_a_hub_name_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_in(tmp_path)
    monkeypatch.setattr(stream_job, "local_folder", lambda _: source)
    compress_folder("someone/some-model", tmp_path / "out", CONFIG)
    assert "base_model: someone/some-model" in (tmp_path / "out" / "README.md").read_text()


def test_a_compressed_folder_is_no_source(tmp_path: Path) -> None:
    compress_folder(source_in(tmp_path), tmp_path / "out", CONFIG)
    with pytest.raises(MPOError, match="compressed or quantized already"):
        compress_folder(tmp_path / "out", tmp_path / "again", CONFIG)


def test_a_dry_run_writes_nothing_and_tells_the_bytes(tmp_path: Path) -> None:
    source, out = source_in(tmp_path), tmp_path / "out"
    found = dry_run(source, out, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    read = open_checkpoint(source).nbytes
    compress_folder(source, out, CONFIG)
    written = open_checkpoint(out).nbytes
    units = sum(layer.bytes for layer in compress_folder(source, out, CONFIG).layers)
    assert (found.units, found.done, found.bytes_read) == (14, 0, read)
    assert found.bytes_written == units + written
    assert dry_run(source, out, CONFIG).done == 14


SCRIPT = """
import resource, sys
from pathlib import Path
from mpo_tn.torch import MPOConfig
from mpo_tn.torch.hf.folder import load_model
from mpo_tn.torch.hf.stream import compress_folder
source, small, cap = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
some = {"target_modules": "re:.*layers\\\\.[01]\\\\..*"}  # all the others are copied
configs = {
    "five sites": MPOConfig(sites=5, bond=8),
    "low rank": MPOConfig(sites="low-rank", keep=0.5, **some),
    "dense in bits": MPOConfig(sites=1, bits=4, **some),
    "low rank in bits": MPOConfig(sites="low-rank", keep=0.5, bits=4, **some),
}
for name, config in configs.items():  # what is imported and started late
    compress_folder(small, small.parent / name, config)
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + cap, used + cap))
for name, config in configs.items():
    compress_folder(source, source.parent / name, config, shard_bytes=4_000_000)
    print("done:", name)
try:
    model = load_model(source)
except BaseException as error:
    print("in memory:", type(error).__name__)
"""


@pytest.mark.guarantee("stream-memory")
@pytest.mark.slow
def test_a_checkpoint_of_four_times_the_memory_there_is(tmp_path: Path) -> None:
    small = source_in(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=23, num_attention_heads=4, vocab_size=64,
        dtype="bfloat16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    source = tmp_path / "large" / "source"
    model.save_pretrained(source, max_shard_size="10MB")
    del model
    size = open_checkpoint(source).nbytes
    # Twice the largest matrix in double precision, a file of the result, and what is left of 300 MB by the libraries.
    cap = 2 * 512 * 2048 * 8 + 4_000_000 + 26_000_000
    assert size >= 4 * cap
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source, small, str(cap)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("done:") == 4
    assert "in memory:" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_DATA)


def test_a_worker_loads_no_transformers_and_gives_memory_back(tmp_path: Path) -> None:
    code = (
        "import sys, mpo_tn.torch.models.stream_unit, torch; from mpo_tn.torch import QuantizedCore\n"
        "QuantizedCore.rounded(torch.randn(1, 4, 9, 1), 3, 8)\n"
        "print(*sorted({'transformers', 'torch._dynamo', 'compressed_tensors', 'sympy'} & set(sys.modules)), '.')\n"
        "import transformers\n"
        "print('mpo' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split() == [".", "True"], done.stdout + done.stderr[-2000:]
