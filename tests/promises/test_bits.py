"""Cores in bits through the whole adapter: compressed, saved, loaded, tuned and squeezed, in the planned bytes."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.adapter import embedding, linear, roundtrip, small
from helpers.in_bits import bits_held, bytes_of, read_matrix
from helpers.planning import bytes_in_files
from helpers.squeeze_task import Task, everything
from helpers.tiny_models import FAMILIES, VOCAB, outputs, tiny, token_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from mpo_tn import MPOError
from mpo_tn.planning.entries import UnitPlan
from mpo_tn.planning.structure import structure
from mpo_tn.torch import (
    MPOConfig,
    Plan,
    QuantizedCore,
    bond_spectra,
    compress,
    cut_model,
    freeze,
    load_cores,
    load_state,
    parameter_groups,
    plan,
    print_trainable_parameters,
    save_cores,
    save_state,
)
from mpo_tn.torch.hf.trainer import SqueezeCallback
from mpo_tn.torch.models.compress import compress_empty
from mpo_tn.torch.models.cuts import cut_unit
from mpo_tn.torch.models.units import count_parameters, mpo_units
from mpo_tn.torch.state.saved_cores import save_cores as save

CONFIGS: dict[str, dict[str, Any]] = {
    "dense in 4 bits": {"sites": 1, "bits": 4, "group": 16, "bond": None},
    "centre in 3 bits": {"bits": {"central": 3}, "group": 16},
    "all in bits": {"bits": {"central": 4, "auxiliary": 8}, "group": 8},
    "centre in float16": {"bits": {"central": 16}},
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def saved_bytes(model: nn.Module) -> int:
    """Of what a model is made of and saves."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


# --- compressing


@given(
    st.integers(2, 60), st.integers(2, 60), st.sampled_from([1, 2, 3, 5]), st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_error_is_that_of_what_the_bits_stand_for(
    out: int, in_: int, sites: int, bits: int, dtype: torch.dtype, table: bool, centre: bool
) -> None:
    model = nn.Sequential(embedding(out, in_, dtype=dtype) if table else linear(in_, out, dtype=dtype))
    dense = model[0].weight.detach().double()
    of = {"central": bits} if centre else bits
    decided = plan(model, MPOConfig(target_modules=["0"], sites=sites, bits=of, group=16))
    layer_report = compress(model, decided).layers[0]
    difference = float((dense - read_matrix(model[0])).norm())
    # Both are sums in double precision over at most five cores of what float32 or more holds.
    assert abs(difference - layer_report.error) <= 1e-12 * float(dense.norm()) * math.sqrt(out * in_)
    assert layer_report.spec.exact
    assert layer_report.spec.rel_error == layer_report.error / layer_report.norm
    biases = (
        sum(parameter.numel() * parameter.element_size() for parameter in [model[0].bias] if not table)
        if not table
        else 0
    )
    assert layer_report.bytes == decided.units[0].bytes == bytes_of(model) - biases
    assert decided.bytes_after == bytes_of(model)


def test_fewer_bits_are_further_away_and_a_plan_says_what_they_take() -> None:
    errors: list[float] = []
    for bits in (2, 3, 4, 6, 8, 16):
        model = nn.Sequential(linear(64, 96))
        report = compress(model, MPOConfig(sites=1, bits=bits, group=32))
        errors.append(report.rel_error)
        assert report.bits_per_weight == pytest.approx(16 if bits == 16 else bits + 16 / 32 + 128 / (64 * 96))
        assert f"{report.bits_per_weight:.2f} bits per weight" in str(report)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[2] < 0.12


def test_an_edited_plan_sets_the_bits_of_one_matrix() -> None:
    model = tiny("bert")
    decided = plan(model, MPOConfig(sites=3))
    values = decided.to_dict()
    assert "bits" not in values["units"][0]
    unit = values["units"][0]
    del unit["parameters"], unit["bytes"]
    unit |= {"bits": [None, 4, None], "group": 16}
    edited = Plan.from_dict(json.loads(json.dumps(values)))
    assert edited.bytes_after < decided.bytes_after
    report = compress(model, edited)
    assert [layer.spec.bits for layer in report.layers if layer.spec.bits] == [(None, 4, None)]
    assert bytes_of(model) - sum(
        b.numel() * b.element_size() for n, b in model.named_buffers() if "cores" not in n
    ) == (edited.bytes_after)
    unit["bits"] = [4]
    with pytest.raises(MPOError, match=r"query: bits=.* not one for each"):
        Plan.from_dict(values)
    unit["bits"] = 4
    with pytest.raises(MPOError, match=r"query.*wrong kind"):
        Plan.from_dict(values)


def test_an_empty_compression_has_the_same_bits(config: dict[str, Any]) -> None:
    options = MPOConfig(**{"sites": 3, **{key: value for key, value in config.items() if value is not None}})
    full, empty = tiny("bert"), tiny("bert")
    report, specs = compress(full, options), compress_empty(empty, options)
    assert [layer.spec.bits for layer in report.layers] == [spec.bits for spec in specs.values()]
    kinds = {name: (value.dtype, value.shape) for name, value in full.state_dict().items()}
    assert kinds == {name: (value.dtype, value.shape) for name, value in empty.state_dict().items()}


def test_complex_weights_have_no_bits() -> None:
    spec = structure("linear", 8, 8, MPOConfig(sites=3, bits=4))
    with pytest.raises(MPOError, match=r"bits=\[4, 4, 4\] for a matrix in complex64"):
        UnitPlan(("0",), spec, "complex64")
    with pytest.raises(MPOError, match="complex"):
        QuantizedCore.rounded(torch.ones(1, 2, 2, 1, dtype=torch.complex64), 16)


def test_a_weight_beyond_scales_changes_nothing() -> None:
    model = nn.Sequential(linear(16, 16), linear(16, 16))
    with torch.no_grad():
        model[1].weight[0, 0] = 1e9
    with pytest.raises(MPOError, match=r"^1: entries of size"):
        compress(model, MPOConfig(sites=1, bits=4))
    assert type(model[0]) is type(model[1]) is nn.Linear


# --- saving and loading


@pytest.mark.guarantee("reload-bits")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_bits_come_back(family: str, tied: bool, config: dict[str, Any], tmp_path: Path) -> None:
    model = small(family, tied=tied, **config)
    loaded = roundtrip(model, tmp_path / "float32")
    assert torch.equal(outputs(loaded), outputs(model))
    before, after = bits_held(model), bits_held(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    again = roundtrip(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "float32/model.safetensors").read_bytes()
    shared = [len({id(core) for core in unit.cores}) for unit in mpo_units(again).values()]
    assert shared == [len({id(core) for core in unit.cores}) for unit in mpo_units(model).values()]

    half = roundtrip(model, tmp_path / "half", dtype=torch.bfloat16)
    narrow = bits_held(half)
    assert all(torch.equal(value, narrow[name]) for name, value in before.items())
    assert all(
        layer.dense_weight().dtype == torch.bfloat16 for unit in mpo_units(half).values() for layer in unit.modules
    )
    assert outputs(half).dtype == torch.bfloat16


@pytest.mark.slow
def test_another_process_reads_the_same_bits_and_the_file_has_the_planned_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = transformers.BertModel(transformers.BertConfig(**shape, vocab_size=2000, max_position_embeddings=64)).eval()
    targets = r".*(query|key|value|dense|word_embeddings)"
    overrides = {"word_embeddings": {"sites": 1, "bits": 4, "group": 64}}
    decided = plan(model, MPOConfig(targets, sites=3, bits={"central": 3}, overrides=overrides))
    compress(model, decided)
    model.save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert saved_bytes(model) == decided.bytes_after
    assert on_disk == pytest.approx(decided.bytes_after, rel=0.05)  # a line and a name for each of 150 tensors
    assert bytes_in_files(model, tmp_path) == decided.bytes_after
    script = (
        "import sys, torch, transformers, mpo_tn.torch\n"
        "model = transformers.AutoModel.from_pretrained(sys.argv[1])\n"
        "torch.save(model.state_dict(), sys.argv[2])\n"
        "print(sum(t.numel() * t.element_size() for t in model.state_dict().values()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "state.pt")], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert int(done.stdout) == decided.bytes_after
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modules_that_transformers_keeps_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("bert", **CONFIGS["centre in 3 bits"])
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.BertForMaskedLM, "_keep_in_fp32_modules_strict", {"intermediate"})
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = loaded.bert.encoder.layer[0].intermediate.dense
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    before, after = bits_held(model), bits_held(loaded)
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    assert layer.dense_weight().dtype == torch.float32


def test_a_base_model_in_a_head_and_back(tmp_path: Path) -> None:
    masked = small("bert", **CONFIGS["all in bits"])
    masked.save_pretrained(tmp_path / "masked")
    base = transformers.BertModel.from_pretrained(tmp_path / "masked").eval()
    before = {name.removeprefix("bert."): value for name, value in bits_held(masked).items()}
    assert all(torch.equal(value, before[name]) for name, value in bits_held(base).items())
    base.save_pretrained(tmp_path / "base")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    held = bits_held(again)
    assert held.keys() == {f"bert.{name}" for name in bits_held(base)}
    assert all(torch.equal(value, held[f"bert.{name}"]) for name, value in bits_held(base).items())


@pytest.mark.guarantee("no-random-cores")
@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_part_that_is_missing(part: str, tmp_path: Path) -> None:
    small("bert", **CONFIGS["all in bits"]).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if key.endswith(f"query.cores.1.{part}"))
    save_file(
        {key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(MPOError, match=f"{lost}.*incomplete"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


DAMAGE = {
    "short": ("weight_packed", lambda value: value[:, :-1].contiguous(), "weight_packed"),
    "zero": ("weight_scale", torch.zeros_like, "weight_scale has scales of zero"),
    "nan": ("weight_scale", lambda value: value * float("nan"), "weight_scale has entries that are NaN or infinite"),
    "infinite": ("weight_scale", lambda value: value / 0, "weight_scale has entries that are NaN or infinite"),
    "other shape": ("weight_shape", lambda value: value + 1, r"weight_shape is \["),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_named(kind: str, tmp_path: Path) -> None:
    part, change, message = DAMAGE[kind]
    small("bert", **{**CONFIGS["all in bits"], "target_modules": ["intermediate.dense"]}).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if key.endswith(f"0.intermediate.dense.cores.1.{part}"))
    state[name] = change(state[name])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((MPOError, RuntimeError), match=rf"intermediate\.dense\.cores\.1\.{message}"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


# --- what trains


def test_cores_in_bits_never_train_and_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    dense = count_parameters(tiny("bert"))
    plain, model = small("bert"), small("bert", bits={"central": 4})
    assert count_parameters(model) == count_parameters(plain) != dense
    in_bits = sum(core.numel() for core in model.modules() if isinstance(core, QuantizedCore))
    for policy in ("auxiliary", "cores", "central", "none"):
        report, other = freeze(model, policy), freeze(plain, policy)
        assert report.total == other.total
        central = other.by_group["cores"] if policy == "central" else in_bits
        trained = {"auxiliary": other.by_group["cores"], "cores": other.by_group["cores"] - central}.get(policy, 0)
        assert report.by_group["cores"] == trained
        assert all(not buffer.requires_grad for buffer in model.buffers())
    print_trainable_parameters(model)
    assert f"all params: {count_parameters(plain):,}" in capsys.readouterr().out
    freeze(model, "auxiliary")
    tensors = next(group for group in parameter_groups(model) if group["name"] == "tensors")
    assert sum(parameter.numel() for parameter in tensors["params"]) == freeze(plain, "auxiliary").by_group["cores"]


def test_a_training_leaves_the_bits_alone() -> None:
    model = small("bert", bits={"central": 4})
    freeze(model, "auxiliary")
    before, groups = bits_held(model), parameter_groups(model, tensor_lr=1e-2)
    optimizer = torch.optim.AdamW(groups)
    losses: list[float] = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in bits_held(model).items())


# --- cutting


class QuantizedTask(Task):
    """The task on layers whose centre is in bits."""

    def __init__(self, bits: int = 4) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.x = torch.randn(64, 12)
        self.y = self.model(self.x).detach()
        compress(self.model, MPOConfig(target_modules=["0", "2"], sites=3, bits={"central": bits}, group=8))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.seen = []


@pytest.mark.parametrize("bits", [3, 8, 16])
@pytest.mark.parametrize("bond", [0, 1])
def test_a_cut_beside_bits_rounds_them_again(bond: int, bits: int) -> None:
    task = QuantizedTask(bits)
    task.train_step(0)
    unit = mpo_units(task.model)["0"]
    before = unit.modules[0].dense_weight().detach().double()
    spectrum = bond_spectra(task.model)["0"]
    parameters = list(task.model.parameters())
    new = unit.spec.bonds[bond] - 1
    assert cut_unit(unit, bond, new, task.optimizer) == []
    core, spec = unit.cores[1], unit.spec
    assert spec.bonds[bond] == new
    assert (spec.bits, spec.group, spec.exact) == ((None, bits, None), 8, False)
    assert isinstance(core, QuantizedCore)
    assert tuple(core.shape) == spec.core_shapes[1]
    core.check("0.cores.1")
    assert all(a is b for a, b in zip(task.model.parameters(), parameters, strict=True))
    assert task.optimizer.state[unit.cores[2 * bond]]["exp_avg"].shape == unit.cores[2 * bond].shape
    after = unit.modules[0].dense_weight().detach().double()
    error = float((after - before).norm())
    tail = float(torch.tensor(spectrum[bond][new:]).norm())
    # The rounding moves what the cut leaves by at most this much of the norm; with 16 bits by next to nothing.
    allowed = {3: 0.5, 8: 0.02, 16: 1e-3}[bits] * float(before.norm())
    assert tail - allowed <= error <= tail + allowed
    task.train_step(1)


def test_tied_modules_follow_a_cut() -> None:
    model = small("bert", bits={"central": 4}, group=8)
    unit = next(unit for unit in mpo_units(model).values() if len(unit.modules) == 2)
    cut_model(model, {unit.name: [bond - 1 for bond in unit.spec.bonds]})
    one, other = unit.modules
    assert one.spec.bonds == other.spec.bonds
    assert all(a is b for a, b in zip(one.cores, other.cores, strict=True))
    outputs(model)


@pytest.mark.guarantee("last-good-state")
def test_squeezing_goes_back_to_the_bits_it_had(tmp_path: Path) -> None:
    task = QuantizedTask()
    with torch.no_grad():
        reference = float(task.evaluate(task.model.eval()))
    result = task.run(delta=0.02, max_steps=60, cuts_per_round=2)
    assert result.stopped == "gap"
    assert result.bonds == task.bonds() != result.start_bonds
    with torch.no_grad():
        assert float(task.evaluate(task.model.eval())) == result.value <= reference + 0.02
    assert result.parameters == count_parameters(task.model)


@pytest.mark.guarantee("state-bits")
def test_a_state_brings_bits_and_bonds_back(tmp_path: Path) -> None:
    task = QuantizedTask()
    task.run(delta=5, max_steps=3, cuts_per_round=3)
    save_state(tmp_path / "state", model=task.model, optimizer=task.optimizer)
    fresh = QuantizedTask()
    load_state(tmp_path / "state", model=fresh.model, optimizer=fresh.optimizer)
    assert everything(fresh.model, fresh.optimizer) == everything(task.model, task.optimizer)
    assert torch.equal(fresh.model(fresh.x), task.model(task.x))
    other = QuantizedTask(5)
    before = everything(other.model, other.optimizer)
    with pytest.raises(MPOError, match=r"0\.cores\.1\.weight_packed is .*4, 8\].*5, 8\]"):
        load_state(tmp_path / "state", model=other.model, optimizer=other.optimizer)
    assert everything(other.model, other.optimizer) == before


@pytest.mark.guarantee("base-known")
def test_saved_cores_know_the_bits_of_their_base(tmp_path: Path) -> None:
    base = small("bert", bits={"central": 4})
    freeze(base, "auxiliary")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    names = save_cores(tuned, tmp_path / "auxiliary")
    assert not any("weight_packed" in name for name in names)
    load_cores(base, tmp_path / "auxiliary")
    assert torch.equal(outputs(base), outputs(tuned))
    core = next(module for module in base.modules() if isinstance(module, QuantizedCore))
    core.weight_packed[0, 0] ^= 1
    with pytest.raises(MPOError, match=r"cores\.1\.weight_packed is frozen and has other numbers"):
        load_cores(base, tmp_path / "auxiliary")
    everything_held = save(tuned, tmp_path / "cores", "cores")
    assert set(bits_held(tuned)) <= set(everything_held)
    load_cores(base, tmp_path / "cores")
    assert all(torch.equal(value, bits_held(tuned)[name]) for name, value in bits_held(base).items())


@pytest.mark.slow
def test_a_trainer_trains_and_squeezes_beside_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(tiny("bert").config)
    compress(model, MPOConfig(r".*encoder.*(query|key|value|dense)", sites=3, bits={"central": 4}, group=16))
    freeze(model, "auxiliary")
    before = bits_held(model)
    ids = torch.randint(0, VOCAB, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": int(row[0] > 50)} for row in ids]
    callback = SqueezeCallback(delta=100.0, every_steps=2, cuts_per_round=4)

    def trainer(steps: int, callbacks: list[Any]) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)

    first = trainer(3, [])
    first.train()
    assert all(torch.equal(value, before[name]) for name, value in bits_held(model).items())
    first.save_model(str(tmp_path / "saved"))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, bits_held(loaded)[name]) for name, value in before.items())
    trainer(8, [callback]).train()
    assert callback.result is not None
    assert callback.result.bonds != callback.result.start_bonds
    assert all(core.bits == 4 for core in model.modules() if isinstance(core, QuantizedCore))
    assert torch.equal(outputs(roundtrip(model.eval(), tmp_path / "squeezed")), outputs(model))
