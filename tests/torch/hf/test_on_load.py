"""from_pretrained of a dense folder with quantization_config: compressed as it is read, to what compress would make."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.paths import ROOT
from helpers.tiny_models import EMBEDDINGS, FAMILIES, outputs, tiny
from safetensors.torch import load_file, save_file

from mpo_tn import MPOError
from mpo_tn.torch import MPOConfig, MPOEmbedding, MPOLinear, compress
from mpo_tn.torch.hf import on_load
from mpo_tn.torch.hf.on_load import OnLoad
from mpo_tn.torch.models.units import mpo_specs

CONFIG = MPOConfig(sites=3, keep=0.6)
CONFIGS = {
    "low rank": MPOConfig(sites="low-rank", keep=0.5),
    "exact": MPOConfig(sites=3),
    "tolerance": MPOConfig(sites="low-rank", tolerance=0.8),
    "no tolerance that saves": MPOConfig(sites=3, tolerance=0.01),
    "dense in bits": MPOConfig(sites=1, bits=4, group=16),
    "centre in bits": MPOConfig(sites=3, keep=0.6, bits={"central": 4}, group=16),
    "overrides": MPOConfig(sites=3, keep=0.6, overrides={"re:.*q_proj": {"sites": "low-rank", "keep": 0.3}}),
}


def dense_in(folder: Path, family: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    tiny(family, tied=tied).to(dtype).save_pretrained(folder / "dense", max_shard_size="20kB")
    return folder / "dense"


def both(folder: Path, kind: type, config: MPOConfig, **kwargs: Any) -> tuple[Any, Any]:
    """Compressed on load, and loaded and then compressed."""
    loaded, info = kind.from_pretrained(folder, quantization_config=config.to_hf(), output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    expected = kind.from_pretrained(folder, **kwargs)
    compress(expected, config)
    return loaded, expected


def assert_same(loaded: Any, expected: Any) -> None:
    assert mpo_specs(loaded) == mpo_specs(expected)
    mine, theirs = loaded.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].device) == (tensor.dtype, tensor.device), name
        assert mine[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(mine[name], tensor), name
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in expected.named_parameters()]  # shared once
    assert loaded.all_tied_weights_keys == expected.all_tied_weights_keys
    assert torch.equal(outputs(loaded), outputs(expected))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was made into cores while it was read; of those before, each was dropped by then."""
    names: list[str] = []
    weights: list[weakref.ref[torch.Tensor]] = []
    read = OnLoad.read

    def watched(self: OnLoad, name: str, weight: torch.Tensor) -> torch.Tensor:
        assert not [ref for ref in weights if ref() is not None]
        found = read(self, name, weight)
        if found is not weight:
            names.append(name)
            weights.append(weakref.ref(weight))
            assert found.untyped_storage().nbytes() == weight.element_size()
        return found

    monkeypatch.setattr(OnLoad, "read", watched)
    return names


@pytest.mark.guarantee("on-load-same-model", "on-load-memory")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tied: bool, tmp_path: Path, one_by_one: list[str]) -> None:
    source = dense_in(tmp_path, family, tied=tied)
    kind = type(tiny(family))
    for target in ("all-linear", ["all-linear", EMBEDDINGS[family]]):
        one_by_one.clear()
        loaded, expected = both(source, kind, MPOConfig(target_modules=target, sites=3, keep=0.7))
        assert_same(loaded, expected)
        assert len(one_by_one) == len({spec for spec in mpo_specs(expected) if not mpo_specs(expected)[spec].tied_to})
        assert not [p for p in loaded.parameters() if p.is_meta or 0 in p.stride()]
    assert isinstance(loaded.get_input_embeddings(), MPOEmbedding)
    assert isinstance(loaded.get_output_embeddings(), MPOLinear) == tied
    loaded.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(kind.from_pretrained(tmp_path / "small")), outputs(expected))


@pytest.mark.guarantee("on-load-same-model")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_structure(name: str, tmp_path: Path, one_by_one: list[str]) -> None:
    source = dense_in(tmp_path, "llama")
    config = CONFIGS[name]
    if name == "no tolerance that saves":  # one that is, or compress would have nothing to do
        config = MPOConfig(sites=3, tolerance=0.01, overrides={"re:.*up_proj": {"tolerance": 0.9}})
    loaded, expected = both(source, transformers.LlamaForCausalLM, config)
    assert_same(loaded, expected)
    assert len(one_by_one) == len(mpo_specs(expected))
    assert one_by_one


@pytest.mark.guarantee("on-load-same-model")
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "auto")])
def test_dtypes_and_devices(
    stored: str, dtype: str, device_map: str | None, tmp_path: Path, one_by_one: list[str]
) -> None:
    source = dense_in(tmp_path, "llama", dtype=getattr(torch, stored))
    kwargs = {} if device_map is None else {"device_map": device_map}
    loaded, expected = both(source, transformers.AutoModelForCausalLM, CONFIG, dtype=dtype, **kwargs)
    assert_same(loaded, expected)
    assert len(one_by_one) == 14
    ids = torch.arange(4).reshape(1, 4)
    one, other = (m.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (loaded, expected))
    assert torch.equal(one, other)


@pytest.mark.guarantee("on-load-same-model")
def test_a_part_of_a_model_and_one_around_it(tmp_path: Path) -> None:
    source = dense_in(tmp_path, "bert")
    assert_same(*both(source, transformers.BertModel, CONFIG, add_pooling_layer=False))
    kwargs = {"num_labels": 3}
    config = MPOConfig(target_modules=["all-linear", "classifier"], exclude_modules=["pooler"], sites=3, keep=0.9)
    loaded = transformers.BertForSequenceClassification.from_pretrained(
        source, quantization_config=config.to_hf(), **kwargs
    )
    assert isinstance(loaded.classifier, MPOLinear)  # of random numbers, which no file holds
    assert all(torch.isfinite(core).all() for core in loaded.classifier.cores)
    expected = transformers.BertForSequenceClassification.from_pretrained(source, **kwargs)
    compress(expected, config)
    assert torch.equal(outputs(loaded.bert), outputs(expected.bert))


@pytest.mark.parametrize("same", [True, False])
def test_files_with_both_names_of_a_tied_weight(same: bool, tmp_path: Path, one_by_one: list[str]) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if same else table.flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = MPOConfig(target_modules=["embed_tokens", "q_proj"], sites=3, keep=0.6)
    loaded, expected = both(tmp_path, transformers.LlamaForCausalLM, config)
    assert_same(loaded, expected)
    assert isinstance(loaded.lm_head, MPOLinear) == same
    assert [name.split(".")[-2] for name in one_by_one] == ["q_proj", "q_proj"]


@pytest.mark.guarantee("on-load-same-model")
def test_experts_that_are_fused_on_the_way(tmp_path: Path, one_by_one: list[str]) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, num_local_experts=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    loaded, expected = both(
        tmp_path, transformers.MixtralForCausalLM, MPOConfig(target_modules="all-matrices", sites=3, keep=0.6)
    )
    assert_same(loaded, expected)
    assert "model.layers.0.mlp.experts.gate_up_proj" in one_by_one
    loaded.save_pretrained(tmp_path / "small")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(again), outputs(expected))


def test_what_is_wrong_is_said_as_compress_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    factorise = on_load.factorise

    def counted(planned: Any, unit: Any) -> Any:
        made.append(unit.name)
        return factorise(planned, unit)

    monkeypatch.setattr(on_load, "factorise", counted)
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bad = "model.layers.0.mlp.down_proj"
    tensors[f"{bad}.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    def load(config: MPOConfig, **kwargs: Any) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config.to_hf(), **kwargs)

    with pytest.raises(MPOError, match=rf"^{bad}: .*(NaN|finite)"):
        load(CONFIG)
    assert made == [bad]  # the first that is read, and the others are not worth the time
    made.clear()
    with pytest.raises(MPOError, match="q_porj"):
        load(MPOConfig(target_modules=["q_porj"]))
    with pytest.raises(MPOError, match="budget"):
        load(MPOConfig(size="10kB"))
    assert not made  # before anything was read

    config = MPOConfig(target_modules=["q_proj", "lm_head"], sites=3, keep=0.6)
    with pytest.raises(RuntimeError, match="ismatch"):
        load(config, vocab_size=97, tie_word_embeddings=False)
    loaded = load(config, vocab_size=97, tie_word_embeddings=False, ignore_mismatched_sizes=True)
    assert loaded.lm_head.out_features == 97
    assert all(torch.isfinite(core).all() for core in loaded.lm_head.cores)


SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch, transformers
from mpo_tn.torch import MPOConfig
torch.set_num_threads(1)
config = MPOConfig(sites="low-rank", keep=0.25)

def load(folder):
    how = {"dtype": torch.float32, "quantization_config": config.to_hf()}
    return transformers.LlamaForCausalLM.from_pretrained(folder, **how)

def held():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Anonymous:")[1].split()[0]) * 1024

load(sys.argv[2])  # what is imported and started late
most, start, done = 0, held(), threading.Event()

def watch():
    global most
    while not done.wait(0.002):
        most = max(most, held() - start)

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1])
done.set()
thread.join()
print(most, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.guarantee("on-load-memory")
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells how much memory is held")
def test_the_dense_model_is_never_held(tmp_path: Path) -> None:
    for name, layers in (("large", 12), ("small", 1)):
        config = transformers.LlamaConfig(
            hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=4,
            vocab_size=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "large", tmp_path / "small"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    most, held = map(int, done.stdout.split())
    largest, dense = 512 * 1024 * 8, 12 * (4 * 512**2 + 3 * 2 * 512**2) * 4  # in double precision; in single
    assert held / 2 < most < held + 4 * largest + 20_000_000 < dense
