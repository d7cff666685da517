"""Experts that a checkpoint holds one by one, and transformers as one tensor: streamed from their pieces."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers.calibrating import padded_batches
from helpers.streaming import SHARD, SOAKING, contents, experts_in, in_memory, kills_of_runs, same_tensors
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import open_checkpoint
from mpo_tn.torch import Calibration, MPOConfig, calibrate, plan
from mpo_tn.torch.hf.folder import empty_model, load_model
from mpo_tn.torch.hf.snapshot import read_names
from mpo_tn.torch.hf.stream import compress_folder, dry_run
from mpo_tn.torch.hf.verify import verify_folder
from mpo_tn.torch.models.stream_unit import one_thread, tensor_of

LOW_RANK = MPOConfig(sites="low-rank", bond=4)
FAMILIES = ("mixtral", "qwen2 moe", "qwen3 moe", "deepseek v3", "olmoe", "phi moe", "jamba")
CONFIGS = {
    "everything": LOW_RANK,
    "experts alone, in chains": MPOConfig(sites=3, keep=0.5, target_modules="re:.*experts.*"),
    "one of two, in bits": MPOConfig(sites=1, bits=4, group=8, target_modules="re:.*experts.down_proj"),
    "some stay dense": MPOConfig(sites="low-rank", tolerance=0.35),
}


def test_a_tensor_in_pieces_is_what_transformers_loads(tmp_path: Path) -> None:
    source = experts_in(tmp_path, "mixtral")
    names = read_names(empty_model(source), open_checkpoint(source))
    loaded = dict(load_model(source).named_parameters())
    assert len(names.pieces) == 4
    for name, stored in names.pieces.items():
        assert torch.equal(tensor_of(stored), loaded[name])
    assert {names.pieces[name].key for name in names.pieces} == {
        f"model.layers.{k}.block_sparse_moe.experts.{kind}_proj" for k in range(2) for kind in ("gate_up", "down")
    }


@pytest.mark.guarantee("stream-same-model")
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_pieces_become_what_compress_gives(tmp_path: Path, family: str) -> None:
    source = experts_in(tmp_path, family)
    wanted = FAMILIES.index(family) % 3 + 1
    for name in ("everything", list(CONFIGS)[wanted]):
        memory, out = tmp_path / f"{name} in memory", tmp_path / name
        report = in_memory(source, memory, CONFIGS[name])
        assert any(layer["kind"] == "parameter" for layer in report["layers"])
        told = dry_run(source, out, CONFIGS[name]).bytes_written
        done = compress_folder(source, out, CONFIGS[name], shard_bytes=SHARD)
        assert done.to_dict() == report
        same_tensors(memory, out)
        assert (memory / "config.json").read_bytes() == (out / "config.json").read_bytes()
        assert told >= sum(layer.bytes for layer in done.layers) + open_checkpoint(out).nbytes
        for folder in (memory, out):
            found = verify_folder(folder, source)
            assert found.is_good, found.differences
    again, loaded = load_model(tmp_path / "everything"), load_model(tmp_path / "everything in memory")
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)


@pytest.mark.guarantee("stream-same-model")
def test_what_stays_dense_stays_in_its_pieces(tmp_path: Path) -> None:
    source = experts_in(tmp_path, "mixtral")
    config = MPOConfig(sites=3, tolerance=1e-6, overrides={"re:.*layers.0.*down_proj": {"tolerance": 0.9}})
    report = in_memory(source, tmp_path / "memory", config)
    assert [layer["name"] for layer in report["layers"]] == ["model.layers.0.mlp.experts.mpo.down_proj"]
    assert compress_folder(source, tmp_path / "out", config).to_dict() == report
    same_tensors(tmp_path / "memory", tmp_path / "out")
    there = open_checkpoint(tmp_path / "out").tensors
    assert there["model.layers.0.block_sparse_moe.experts.3.w2.weight"].nbytes == 0  # which stops who is without us
    assert there["model.layers.0.block_sparse_moe.experts.3.w1.weight"].nbytes > 0
    found = verify_folder(tmp_path / "out", source)
    assert found.is_good, found.differences


@pytest.mark.guarantee("verify-any-bit")
def test_alterations_of_cores_of_pieces_left_dense_and_of_the_source_are_seen(tmp_path: Path) -> None:
    source, out = experts_in(tmp_path, "mixtral"), tmp_path / "out"
    compress_folder(source, out, CONFIGS["one of two, in bits"])
    for key in (
        "model.layers.1.block_sparse_moe.experts.mpo.down_proj.cores.0.weight_packed",
        "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    ):
        own = open_checkpoint(out).tensors[key]
        data = bytearray(Path(own.file).read_bytes())
        data[own.start + 3] ^= 1
        (tmp_path / "altered").mkdir()
        shutil.copytree(out, tmp_path / "altered", dirs_exist_ok=True)
        (tmp_path / "altered" / Path(own.file).name).write_bytes(data)
        assert any(key in said for said in verify_folder(tmp_path / "altered").differences)
        shutil.rmtree(tmp_path / "altered")
    for key, said in (
        ("model.layers.1.block_sparse_moe.experts.2.w2.weight", "is not the matrix that"),
        ("model.layers.1.block_sparse_moe.experts.2.w1.weight", "has other numbers than the dense model"),
    ):
        own = open_checkpoint(source).tensors[key]
        data = bytearray(Path(own.file).read_bytes())
        data[own.start + 3] ^= 1
        other = tmp_path / "other"
        shutil.copytree(source, other, dirs_exist_ok=True)
        (other / Path(own.file).name).write_bytes(data)
        assert any(said in each for each in verify_folder(out, other).differences), said
        shutil.rmtree(other)


@pytest.mark.guarantee("stream-same-model")
def test_a_saved_calibration_is_told_from_that_of_another_model(tmp_path: Path) -> None:
    source = experts_in(tmp_path, "mixtral")
    with one_thread():
        calibrate(load_model(source), padded_batches(3), gradients=True).save(tmp_path / "moments")
    known = Calibration.load(tmp_path / "moments")
    decided = plan(empty_model(source), LOW_RANK, calibration=known)
    assert decided.needs_calibration
    report = in_memory(source, tmp_path / "memory", decided, calibration=known, anchored=False)
    assert compress_folder(source, tmp_path / "out", decided, calibration=known).to_dict() == report
    same_tensors(tmp_path / "memory", tmp_path / "out")
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    file = Path(open_checkpoint(source).tensors[key].file)
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(MPOError, match="is not of this"):
        compress_folder(source, tmp_path / "other", decided, calibration=known)


def test_an_expert_that_is_missing_is_named_before_anything_is_done(tmp_path: Path) -> None:
    source = tmp_path / "source"
    experts_in(tmp_path, "mixtral")
    state = {key: tensor_of(stored) for key, stored in open_checkpoint(source).tensors.items()}
    for file in source.glob("model*"):
        file.unlink()
    lost = state.pop("model.layers.1.block_sparse_moe.experts.1.w2.weight")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MPOError, match=r"layers.1.mlp.experts.down_proj .* is \[4, 32, 48\] .* are \[3, 32, 48\]"):
        compress_folder(source, tmp_path / "out", LOW_RANK)
    state["model.layers.1.block_sparse_moe.experts.1.w2.weight"] = lost.to(torch.float16)
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(MPOError, match="they are to be one tensor"):
        compress_folder(source, tmp_path / "out", LOW_RANK)


def test_what_is_made_in_another_way_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64
    )
    transformers.NomicBertModel(config).save_pretrained(tmp_path / "source")
    with pytest.raises(MPOError, match=r"q_proj.* not only stacked, joined or transposed: leave it out"):
        compress_folder(tmp_path / "source", tmp_path / "out", LOW_RANK)
    others = replace(LOW_RANK, exclude_modules="re:.*[qkv]_proj")
    in_memory(tmp_path / "source", tmp_path / "memory", others)
    compress_folder(tmp_path / "source", tmp_path / "out", others)
    same_tensors(tmp_path / "memory", tmp_path / "out")


@pytest.mark.guarantee("stream-any-workers", "stream-resumes")
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_two_workers(tmp_path: Path) -> None:
    source = experts_in(tmp_path, "mixtral")
    compress_folder(source, tmp_path / "one", LOW_RANK, shard_bytes=SHARD)

    def stop(done: int, _total: int, what: str) -> None:
        if what.startswith("compressing") and done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_folder(source, tmp_path / "two", LOW_RANK, shard_bytes=SHARD, progress=stop)
    assert dry_run(source, tmp_path / "two", LOW_RANK).done == 3
    compress_folder(source, tmp_path / "two", LOW_RANK, shard_bytes=SHARD, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.guarantee("stream-resumes")
@pytest.mark.slow
def test_a_run_that_is_killed_while_experts_are_read_goes_on(tmp_path: Path) -> None:
    assert kills_of_runs(tmp_path, 1 if SOAKING else 100, "experts") >= 2
