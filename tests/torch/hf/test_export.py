"""Exported folders: what plain transformers and compressed-tensors read is what the compressed model held."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from helpers.architectures import called, tiny_model
from helpers.in_bits import read_matrix
from helpers.paths import TESTS
from helpers.tiny_models import EMBEDDINGS, FAMILIES, outputs, settled, tiny, token_ids
from safetensors.torch import load_file

from mpo_tn import MPOError, Sites
from mpo_tn.torch import MPOConfig, MPOLayer, compress, plan
from mpo_tn.torch.hf import export as export_module
from mpo_tn.torch.hf.export import Export, plan_export, write_export
from mpo_tn.torch.hf.folder import check_compressed

FORM = "compressed-tensors"
QUERY, KEY, VALUE = r"re:.*(query|q_proj|q_lin)$", r"re:.*(key|k_proj|k_lin)$", r"re:.*(value|v_proj|v_lin)$"


def exported(model: Any, out: Path) -> Export:
    planned = plan_export(model, FORM)
    write_export(model, planned, out.parent / "nowhere", out)
    return planned


def in_bits(family: str = "bert", *, tied: bool = True, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    model = tiny(family, tied=tied).to(dtype)
    compress(model, MPOConfig(**{"sites": 1, "bits": 4, "group": 16, **config}))
    return model


def loaded(cls: type, folder: Path, **options: Any) -> Any:
    """The model as plain transformers has it once it has run, which is when compressed-tensors unpacks it."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    outputs(model.eval())
    return model


def layers_of(model: Any) -> dict[str, MPOLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MPOLayer)}


def assert_same_weights(model: Any, plain: Any) -> None:
    """Every matrix in bits bit for bit, every chain to one rounding of the model's dtype and of double precision."""
    eps = torch.finfo(model.dtype).eps
    for name, layer in layers_of(model).items():
        weight, due = plain.get_submodule(name).weight.detach(), read_matrix(layer)
        weight = weight.T if layer.spec.kind == "conv1d" else weight
        if len(layer.spec.sites) == 1 and layer.spec.bits:
            assert torch.equal(weight, due.to(model.dtype)), name
        else:
            assert float((weight - due).norm()) <= eps * float(due.norm()), name


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


@pytest.mark.guarantee("export-exact")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_says_its_bytes_first(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tied=tied)
    every = f"re:.*(query|key|value|dense|ffn.*|_lin|lin[12]|_proj|c_(attn|proj|fc)|{EMBEDDINGS[family]})$"
    # GPT-2 has the three in one matrix.
    overrides = (
        {QUERY: {"sites": 3, "bond": 6, "bits": None}, VALUE: {"bits": 8, "group": 24}} if family != "gpt2" else {}
    )
    compress(model, MPOConfig(target_modules=[every], sites=1, bits=3, group=32, overrides=overrides))
    planned = exported(model, tmp_path / "out")
    plain = loaded(type(model), tmp_path / "out")
    assert_same_weights(model, plain)
    # As much as one layer may differ from another way to multiply, and these are few.
    before, after = outputs(model), outputs(plain)
    assert float((after - before).norm()) <= 64 * 2**-24 * math.sqrt(before.numel()) * float(before.norm())
    assert planned.bytes == tensor_bytes(tmp_path / "out")
    assert bool(planned.kept) == (family != "gpt2")
    tie = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tie == tied


@pytest.mark.slow
def test_a_process_without_this_package_gives_the_same(tmp_path: Path) -> None:
    model = in_bits("bert", overrides={QUERY: {"sites": "low-rank", "bond": 5, "bits": None}})
    exported(model, tmp_path / "out")
    script = (
        "import sys\n"
        "sys.modules['mpo_tn'] = None\n"  # importing it fails
        "import torch, transformers\n"
        "model = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1])\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from helpers.tiny_models import outputs\n"
        "torch.save(outputs(model), sys.argv[2])\n"
    )
    found = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, tmp_path / "out", found, TESTS], check=True, capture_output=True)
    before, after = outputs(model), torch.load(found, weights_only=True)
    assert float((after - before).norm()) <= 64 * 2**-24 * math.sqrt(before.numel()) * float(before.norm())


@pytest.mark.guarantee("export-exact")
@pytest.mark.parametrize("group", [8, 16, 24, 48, 128])
def test_all_bits_and_groups_are_read_from_the_file_as_they_were(group: int, tmp_path: Path) -> None:
    names = ("0.attention.self.query", "0.attention.self.key", "0.attention.self.value", "0.intermediate.dense",
             "0.output.dense", "1.output.dense", "1.intermediate.dense")  # fmt: skip
    overrides = {f"re:.*layer.{name}$": {"bits": bits} for bits, name in enumerate(names, start=2)}
    model = in_bits(group=group, overrides=overrides)
    planned = exported(model, tmp_path / "out")
    tensors, layers = load_file(tmp_path / "out" / "model.safetensors"), layers_of(model)
    assert {matrix.bits for matrix in planned.kept} == {2, 3, 4, 5, 6, 7, 8}
    negative = False
    for matrix in planned.kept:
        layer = layers[matrix.name]
        held = {name: tensors[f"{matrix.name}.weight_{name}"] for name in ("packed", "scale", "shape")}
        assert tuple(held["shape"].tolist()) == matrix.shape
        assert matrix.bits is not None
        assert matrix.group is not None
        assert matrix.shape[1] % matrix.group == 0
        assert held["scale"].dtype == matrix.dtype == torch.float32
        values = unpack_from_int32(held["packed"], matrix.bits, torch.Size(matrix.shape)).numpy()
        matrix_read = values * np.repeat(held["scale"].double().numpy(), matrix.group, axis=1)
        assert np.array_equal(matrix_read, read_matrix(layer).numpy())
        negative |= bool((held["scale"] < 0).any())
        assert bool(matrix.note) == (matrix.group != min(group, matrix.shape[1]))
        assert matrix.bytes == sum(tensor.nbytes for tensor in held.values())
    assert negative  # both signs occur, and both are read
    assert_same_weights(model, loaded(type(model), tmp_path / "out"))


def test_groups_that_would_cost_more_than_they_save_are_multiplied_out(tmp_path: Path) -> None:
    model = in_bits(group=9, bits=8, overrides={VALUE: {"group": 8}})  # gcd(32, 9) = 1: a scale for every number
    planned = exported(model, tmp_path / "out")
    assert [matrix.name.rpartition(".")[2] for matrix in planned.kept] == ["value", "dense", "value", "dense"]
    assert [matrix.group for matrix in planned.kept] == [8, 3, 8, 3]  # 48 columns in threes
    assert "more bytes than dense" in planned.multiplied_out[0].note
    assert_same_weights(model, loaded(type(model), tmp_path / "out"))


def test_padding_is_cut_off(tmp_path: Path) -> None:
    model = tiny("bert")
    decided = plan(model, MPOConfig(target_modules=["query"], sites=1, bits=3, group=16))
    wide = [replace(u, spec=replace(u.spec, sites=Sites((40,), (35,)))) for u in decided.units]
    compress(model, replace(decided, units=tuple(wide)))
    planned = exported(model, tmp_path / "out")
    assert {matrix.shape for matrix in planned.kept} == {(32, 32)}
    assert_same_weights(model, loaded(type(model), tmp_path / "out"))


@pytest.mark.guarantee("export-exact")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    model = in_bits(dtype=dtype, overrides={QUERY: {"sites": 3, "bond": 6, "bits": None}})
    planned = exported(model, tmp_path / "out")
    assert {m.dtype for m in planned.kept} == {torch.float16 if dtype == torch.float16 else torch.float32}
    assert {m.dtype for m in planned.multiplied_out} == {dtype}
    assert planned.loss == ""
    plain = loaded(type(model), tmp_path / "out")
    assert plain.dtype == dtype
    assert_same_weights(model, plain)


def test_what_bfloat16_loses_is_said_and_no_more(tmp_path: Path) -> None:
    model = in_bits(dtype=torch.bfloat16)
    planned = exported(model, tmp_path / "out")
    assert "2^-8" in planned.loss
    narrow = loaded(type(model), tmp_path / "out")
    wide = loaded(type(model), tmp_path / "out", dtype=torch.float32)
    assert narrow.dtype == torch.bfloat16
    for name, layer in layers_of(model).items():
        due = read_matrix(layer)
        assert torch.equal(wide.get_submodule(name).weight.detach().double(), due)
        # The scale is rounded, and then the product.
        error = (narrow.get_submodule(name).weight.detach() - due).abs()
        assert bool((error <= ((1 + 2**-8) ** 2 - 1) * due.abs()).all())


def test_with_a_head_and_without(tmp_path: Path) -> None:
    model = in_bits()
    exported(model, tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    exported(compressed_base := in_bits_base(), tmp_path / "base")
    head = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    for plain, source, cut in ((base, model.bert, ""), (head, compressed_base, "bert.")):
        outputs(plain)
        for name, layer in layers_of(source).items():
            if "pooler" not in name:
                weight = plain.get_submodule(cut + name).weight.detach()
                assert torch.equal(weight, read_matrix(layer).float()), name


def in_bits_base() -> Any:
    model = tiny("bert").bert
    compress(model, MPOConfig(sites=1, bits=3, group=16))
    return model


def test_tables_and_shared_weights_say_why_they_are_dense(tmp_path: Path) -> None:
    for tied, reason in ((True, "shares no weight"), (False, "cannot load this Embedding")):
        model = in_bits(tied=tied, target_modules=["word_embeddings", "query"])
        planned = exported(model, tmp_path / f"{tied}")
        (table,) = planned.multiplied_out
        assert reason in table.note
        assert len(table.names) == 1 + tied
        assert table.bytes == 101 * 32 * 4  # what is tied is written once
        assert planned.bytes == tensor_bytes(tmp_path / f"{tied}")


def test_what_is_said_not_to_load_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a release of transformers load tables without a dense weight, their bits are kept and this test ends."""
    model = in_bits(tied=False, target_modules=["word_embeddings"])
    monkeypatch.setattr(export_module, "_read_when_initialised", lambda *_: [])
    assert len(exported(model, tmp_path / "out").kept) == 1
    with pytest.raises(AttributeError, match="weight"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")


def test_a_family_that_reads_the_weights_of_its_linear_layers_is_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config).eval()
    compress(model, MPOConfig(target_modules=["q", "wi", "lm_head"], sites=1, bits=4))
    planned = exported(model, tmp_path / "out")
    assert {matrix.name.rpartition(".")[2] for matrix in planned.multiplied_out} >= {"q", "wi"}
    plain, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        plain(input_ids=token_ids(), decoder_input_ids=token_ids())
    assert_same_weights(model, plain)


def test_the_configuration_names_every_module(tmp_path: Path) -> None:
    model = in_bits(overrides={QUERY: {"sites": 3, "bond": 6, "bits": None}, KEY: {"bits": 8, "group": 32}})
    exported(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    groups = list(config["config_groups"].values())
    assert [(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in groups] == [(8, 32), (4, 16)]
    assert groups[0]["targets"] == [r"re:(bert\.)?encoder\.layer\.(0|1)\.attention\.self\.key$"]
    assert r"re:(bert\.)?encoder\.layer\.(0|1)\.attention\.self\.query$" in config["ignore"]
    assert r"re:(bert\.)?cls\.predictions\.decoder$" in config["ignore"]
    assert not {*config["ignore"]} & {target for group in groups for target in group["targets"]}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("other", [None, {"bits": 3}, {"bits": 8}, {"group": 8}, {"group": 32}])
def test_dequantized_by_transformers_it_is_right_or_refused(other: dict[str, int] | None, tmp_path: Path) -> None:
    model = in_bits(overrides={} if other is None else {KEY: other})
    exported(model, tmp_path / "out")
    how = transformers.CompressedTensorsConfig(dequantize=True)
    if other is None:
        assert_same_weights(model, loaded(type(model), tmp_path / "out", quantization_config=how))
        return
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # it reads all by the first group
        type(model).from_pretrained(tmp_path / "out", quantization_config=how)


def test_without_bits_it_is_a_plain_dense_model(tmp_path: Path) -> None:
    model = in_bits(bits=16, overrides={QUERY: {"sites": 3, "bits": {"central": 4}}, KEY: {"bits": None}})
    planned = exported(model, tmp_path / "out")
    assert planned.kept == ()
    notes = {matrix.note for matrix in planned.multiplied_out}
    assert notes == {
        "a chain of 3 cores", "one core in float16, not in integers", "one core in float32, not in integers"
    }  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_same_weights(model, loaded(type(model), tmp_path / "out"))


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = in_bits()
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    exported(model, tmp_path / "out")
    assert {k: torch.equal(v, state[k]) for k, v in model.state_dict().items()} == dict.fromkeys(state, True)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path / "again")
    check_compressed(tmp_path / "again")


def test_the_json_says_what_was_planned() -> None:
    planned = plan_export(in_bits(), FORM)
    document = json.loads(json.dumps(planned.to_dict()))
    assert document["bytes"] == document["other_bytes"] + sum(row["bytes"] for row in document["kept"])
    assert document["kept"][0] == {
        "name": "bert.encoder.layer.0.attention.self.query", "names": ["bert.encoder.layer.0.attention.self.query"],
        "shape": [32, 32], "bits": 4, "group": 16, "dtype": "float32", "bytes": 32 * (16 + 8) + 16, "note": "",
    }  # fmt: skip


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    model = in_bits()
    with pytest.raises(MPOError, match=r"no format 'gguf' to export to: name one of compressed-tensors$"):
        plan_export(model, "gguf")
    with pytest.raises(MPOError, match="has no MPO modules: compress it first"):
        plan_export(tiny("bert"), FORM)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(MPOError, match="exists and is not empty"):
        write_export(model, plan_export(model, FORM), tmp_path / "nowhere", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model = in_bits()
    planned = plan_export(model, FORM)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(MPOError, match="No space left"):
        write_export(model, planned, tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_compressed_is_told_by_the_configuration(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "dense")
    exported(in_bits(), tmp_path / "out")
    with pytest.raises(MPOError, match="is dense, not compressed by mpo-tn: compress it first"):
        check_compressed(tmp_path / "dense")
    with pytest.raises(MPOError, match="is quantized by compressed-tensors, not compressed by mpo-tn"):
        check_compressed(tmp_path / "out")
    with pytest.raises(MPOError, match="there is no model folder"):
        check_compressed(tmp_path / "missing")


@pytest.mark.guarantee("export-exact")
@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "olmoe"])
@pytest.mark.parametrize("experts", [False, True])
def test_packed_attention_beside_experts(name: str, experts: bool, tmp_path: Path) -> None:
    """Which transformers otherwise looks for packed, one by one."""
    model = settled(tiny_model(name))
    more = ["experts"] if experts else []
    compress(model, MPOConfig(target_modules=["q_proj", *more], sites=1, bits=4, group=16))
    expected = called(model)
    planned = exported(model, tmp_path / "out")
    assert planned.kept
    assert "All experts of a layer are in one tensor" in planned.remark
    assert planned.bytes == tensor_bytes(tmp_path / "out")
    plain, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(called(plain.eval()), expected, rtol=1e-4, atol=1e-5)  # what float32 rounds
    dense = settled(tiny_model(name))
    compress(dense, MPOConfig(target_modules=["q_proj"], sites="low-rank", bond=4))
    assert not plan_export(dense, FORM).fused  # nothing is packed: tensors have the names they usually have
