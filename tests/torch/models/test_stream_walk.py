"""Moments of a model on disk are those of the loaded one; what cannot be run block by block is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import given, tiny_model
from helpers.calibrating import near, padded_batches
from helpers.tiny_models import VOCAB, tiny

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import open_checkpoint
from mpo_tn.torch import calibrate
from mpo_tn.torch.hf.folder import hollow_model, load_model
from mpo_tn.torch.hf.snapshot import read_names
from mpo_tn.torch.models.on_disk import WeightsOnDisk
from mpo_tn.torch.models.stream_unit import read_moments
from mpo_tn.torch.models.stream_walk import StreamWalk
from mpo_tn.torch.models.walk_files import StaleWalkError, WalkFiles

EPS = 2.3e-16
"""Of the models here: double precision, so that what a model rounds shows in no digit that is looked at."""


def weights_of(folder: Path) -> WeightsOnDisk:
    model = hollow_model(folder)
    return WeightsOnDisk(model, read_names(model, open_checkpoint(folder)).readers(model))


def walk_of(folder: Path, batches: list[Any], units: list[str], weights: WeightsOnDisk | None = None) -> StreamWalk:
    files = WalkFiles(folder.parent / "walk", {unit: number for number, unit in enumerate(units)}, "run")
    return StreamWalk(weights or weights_of(folder), batches, units, files, lambda *_: None)


def saved(model: Any, folder: Path) -> Path:
    model.double().save_pretrained(folder / "model")
    return folder / "model"


def compare(folder: Path, batches: list[Any], target: str = "all-matrices", eps: float = EPS) -> StreamWalk:
    """All moments with those of the loaded model."""
    wanted = calibrate(load_model(folder), batches, target_modules=target, gradients=True)
    walk = walk_of(folder, batches, list(wanted.units))
    seen: list[str] = []
    for part in walk.parts():
        for unit, paths in part.units.items():
            seen.append(unit)
            found, own = read_moments(paths), wanted.of(unit)
            for kind in ("second", "cross", "outer", "rows", "mean", "dense_mean"):
                mine, there = getattr(found, kind), None if own is None else getattr(own, kind)
                assert (mine is None) == (there is None), (unit, kind)
                if there is not None:
                    # A product may round otherwise where operands lie elsewhere: some hundred roundings.
                    near(mine, there.numpy(), 100 * float(there.norm()), eps=eps)
    assert sorted(seen) == sorted(wanted.units)
    return walk


@pytest.mark.guarantee("walk-same-moments", "weights-given-back")
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_moments_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    walk = compare(saved(tiny(family), tmp_path), padded_batches())
    assert all(parameter.is_meta for parameter in walk.model.parameters())
    assert len(walk.blocks) == 2
    assert [path.name for path in (tmp_path / "walk" / "hidden").iterdir()] == []


@pytest.mark.guarantee("walk-same-moments")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["electra", "bloom", "gemma 3", "llama 4", "mamba", "mobilebert", "vit"])
def test_architectures_of_many_kinds(tmp_path: Path, name: str) -> None:
    """Units before the blocks, more than hidden states handed on, two kinds of masks, experts, no attention at all."""
    folder = saved(tiny_model(name), tmp_path)
    compare(folder, [given(load_model(folder), torch.float64)])


@pytest.mark.guarantee("walk-same-moments")
@pytest.mark.parametrize("name", ["mixtral", "deepseek v3"])
def test_experts_that_are_fused_while_they_are_read(tmp_path: Path, name: str) -> None:
    """In single precision, the widest that kernels of experts take."""
    tiny_model(name).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert any("experts.0." in key for key in open_checkpoint(tmp_path / "model").tensors)
    walk = compare(tmp_path / "model", [given(model)], eps=1.2e-7)
    assert any("experts" in name for name, _ in walk.model.named_parameters())


@pytest.mark.guarantee("walk-same-moments")
def test_without_the_blocks_that_have_no_units(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path)
    walk = compare(folder, padded_batches(), target="re:model.layers.1.mlp.*")
    assert walk.first == 1


def test_a_walk_that_is_broken_off_goes_on(tmp_path: Path) -> None:
    folder, batches = saved(tiny("llama"), tmp_path), padded_batches()
    units = [name for name, _ in tiny("llama").named_modules() if name.endswith("_proj")]
    whole = [(part.place, part.units) for part in walk_of(folder, batches, units).parts()]
    moments = {path.name: path.read_bytes() for path in (tmp_path / "walk" / "moments").iterdir()}
    for path in (tmp_path / "walk").rglob("*"):
        if path.is_file():
            path.unlink()
    for stop in range(3):
        parts = walk_of(folder, batches, units).parts()
        seen = [next(parts) for _ in range(min(stop, 2))]
        assert [part.is_old for part in seen] == [True] * max(0, stop - 1) + [False] * min(stop, 1)
        parts.close()
    again = list(walk_of(folder, batches, units).parts())
    assert [(part.place, part.units) for part in again] == whole
    assert [part.is_old for part in again] == [True, True]
    assert {path.name: path.read_bytes() for path in (tmp_path / "walk" / "moments").iterdir()} == moments


def test_what_is_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    folder, batches = saved(tiny("llama"), tmp_path), padded_batches()
    units = [name for name, _ in tiny("llama").named_modules() if name.endswith("_proj")]
    parts = walk_of(folder, batches, units).parts()
    next(parts)
    parts.close()
    path = tmp_path / "walk" / "hidden" / "0001-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StaleWalkError, match="damaged"):
        list(walk_of(folder, batches, units).parts())
    marker = next((tmp_path / "walk" / "parts").glob("*.json"))
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "run": "another"}))
    with pytest.raises(StaleWalkError, match="of another run"):
        list(walk_of(folder, batches, units).parts())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("albert", "has no blocks that hidden states go through"),
        ("t5", "has an encoder and a decoder"),
        ("clip", "what comes after the blocks depends on .*_projection, which is called before them"),
        ("wavlm", "more depends on the hidden states of a block"),
        ("convnext", "cannot be run block by block, without what its blocks give"),
    ],
)
def test_what_cannot_be_run_block_by_block_is_refused_with_the_way_out(tmp_path: Path, name: str, said: str) -> None:
    tiny_model(name).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    units = list(calibrate(model, [given(model)]).units)
    with pytest.raises(MPOError, match=rf"{said}.*--calibration FILE"):
        list(walk_of(tmp_path / "model", [given(model)], units).parts())


def test_a_layer_that_several_blocks_share_is_refused(tmp_path: Path) -> None:
    folder = saved(tiny("llama"), tmp_path)
    weights = weights_of(folder)
    layers = weights.model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    with pytest.raises(MPOError, match=r"up_proj is used in several blocks.*--exclude"):
        walk_of(folder, padded_batches(), ["model.layers.0.mlp.up_proj"], weights)


def test_buffers_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=64, dtype="bfloat16",
        rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32, "rope_theta": 500000.0},
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    wanted = dict(load_model(tmp_path / "model").named_buffers())
    found = dict(hollow_model(tmp_path / "model").named_buffers())
    assert found.keys() == wanted.keys()
    for name, buffer in wanted.items():
        assert found[name].dtype == buffer.dtype
        assert torch.equal(found[name], buffer), name
