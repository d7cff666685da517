"""heal: what it trains and what it leaves alone, the best state, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import MISSING, changed
from helpers.heal_task import BATCHES, COUNTING, DEV, Task, batch, bits, without_seconds
from helpers.in_bits import bytes_of
from helpers.paths import ROOT, TESTS
from helpers.tiny_models import tiny
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch import HealResult, MPOConfig, compress, heal
from mpo_tn.torch.layers.quantized import quantized_cores, trained_scales
from mpo_tn.torch.loops import healer as healers
from mpo_tn.torch.models.units import mpo_units


@pytest.mark.parametrize(
    ("family", "objective"),
    [("bert", "features"), ("gpt2", "features"), ("bert", "logits"), ("llama", "logits"), ("llama", "loss")],
)
def test_held_out_text_is_closer_afterwards(family: str, objective: str) -> None:
    task = Task(family)
    learnt = {"batches": COUNTING, "dev": COUNTING} if objective == "loss" else {}
    result = task.run(objective=objective, steps=30, **learnt)
    assert result.after is not None
    assert result.before is not None
    assert result.after < (0.99 if objective == "loss" else 0.8) * result.before
    assert len(result.losses) == result.steps == 30
    assert [step for step, _ in result.held_out] == list(range(0, 31, 3))
    assert dict(result.held_out)[result.best_step] == result.after == min(value for _, value in result.held_out)


def test_what_is_measured_is_the_relative_squared_distance() -> None:
    """Against the formula, in double precision and sentence by sentence, on what is not padding."""
    task = Task()
    result = task.run(steps=3)
    off = size = 0.0
    with torch.no_grad():
        for part in DEV:
            for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
                one = {"input_ids": ids[None, : mask.sum()], "attention_mask": mask[None, : mask.sum()]}
                h, there = (m.bert(**one).last_hidden_state.double() for m in (task.model, task.teacher))
                off, size = off + float((h - there).square().sum()), size + float(there.square().sum())
    assert result.after == pytest.approx(off / size, rel=1e-2)  # |h - h_t| is 1e-2 |h_t|, whose rounding is 1e-6


@pytest.mark.guarantee("heal-frozen-bits")
@pytest.mark.parametrize("train", ["auxiliary", "cores"])
def test_only_what_is_meant_changes(train: str) -> None:
    task = Task()
    task.model.train()
    task.model.bert.encoder.layer[0].eval()
    next(task.model.parameters()).requires_grad_(False)
    flags = [module.training for module in task.model.modules()]
    grads = [parameter.requires_grad for parameter in task.model.parameters()]
    before, teacher = bits(task.model), bits(task.teacher)
    result = task.run(train=train)
    after = bits(task.model)
    central = {f"{unit.name}.cores.{unit.spec.center}" for unit in mpo_units(task.model).values()}
    for name, value in before.items():
        own = name.rpartition(".")[2]
        is_core = ".cores." in name
        trains = (is_core and (train == "cores" or name not in central)) or own == "bias" or "LayerNorm" in name
        # The pooled and the masked-word heads do not reach the last hidden states.
        if not trains:
            assert after[name] == value, name
        elif "encoder" in name and "key.bias" not in name:  # softmax does not see a bias of the keys
            assert after[name] != value, name
    assert bits(task.teacher) == teacher
    assert [module.training for module in task.model.modules()] == flags
    assert [parameter.requires_grad for parameter in task.model.parameters()] == grads
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert result.train == train
    assert 0 < result.trainable < result.total


@pytest.mark.guarantee("heal-never-worse")
def test_the_best_state_is_kept() -> None:
    task = Task()
    before = bits(task.model)
    wild = task.run(tensor_lr=3.0, lr=3.0, every=1)
    assert wild.best_step == 0
    assert wild.after == wild.before
    assert bits(task.model) == before
    seen: dict[int, Any] = {0: before}
    task, again = Task(), Task()
    result = task.run(steps=8, every=1, tensor_lr=0.3, progress=lambda done, *_: seen.update({done: bits(task.model)}))
    assert 0 <= result.best_step < 8  # whatever follows the best step is undone
    assert result.after == min(value for _, value in result.held_out)
    assert bits(task.model) == seen[result.best_step]
    assert again.run(steps=8, every=1, tensor_lr=0.3).after == result.after


@pytest.mark.guarantee("heal-never-worse")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, MPOError])
def test_whatever_ends_it_the_best_state_is_left(stop: type[BaseException]) -> None:
    task, seen = Task(), {}

    def progress(done: int, total: int, what: str) -> None:
        seen[done] = bits(task.model)
        if done == 5:
            raise stop

    with pytest.raises(stop):
        task.run(every=2, progress=progress)
    assert bits(task.model) == seen[4] != seen[5]


def test_a_loss_that_is_no_number_names_the_step() -> None:
    task = Task()
    before = bits(task.model)
    with pytest.raises(MPOError, match=r"is (nan|inf) in step 2 of 12.*after step 0.*lower lr"):
        task.run(lr=1e30, tensor_lr=1e30, warmup=0)
    assert bits(task.model) == before


def test_the_rate_of_cores_follows_the_length_of_the_chains() -> None:
    batches = [{"input": torch.randn(4, 12)}]
    for sites, train, expected in [("low-rank", "cores", 3e-3), (3, "cores", 1e-3), (3, "auxiliary", 5e-3)]:
        teacher = nn.Sequential(nn.Linear(12, 12))
        model = copy.deepcopy(teacher)
        compress(model, MPOConfig(sites=sites, keep=0.5))
        result = heal(model, teacher, batches, train=train, steps=1)
        assert (result.lr, result.tensor_lr) == (1e-3, expected)


@pytest.mark.guarantee("heal-frozen-bits")
def test_scales_train_and_integers_stay() -> None:
    task, without = Task(bits=2), Task(bits=2)
    before, size = bits(task.model), bytes_of(task.model)
    result = task.run(steps=30)
    after = bits(task.model)
    assert bytes_of(task.model) == size
    assert not trained_scales(task.model)
    for name, value in before.items():
        own = name.rpartition(".")[2]
        if own == "weight_scale" and "encoder" in name:
            assert after[name] != value, name
        elif own not in ("weight_scale", "bias") and "LayerNorm" not in name:
            assert after[name] == value, name
    for core in quantized_cores(task.model).values():
        core.check("a core")
    scales = sum(core.weight_scale.numel() for core in quantized_cores(task.model).values())
    fewer = without.run(steps=30, also=("norms", "biases"))
    assert result.trainable == fewer.trainable + scales
    assert result.total == fewer.total
    assert result.after is not None
    assert fewer.after is not None
    assert result.after < fewer.after < result.before  # pyright: ignore[reportOperatorIssue]
    for name, value in bits(without.model).items():
        if ".cores." in name:
            assert value == before[name], name


@pytest.mark.guarantee("heal-never-worse")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_measured_with_scales_is_what_is_left(dtype: torch.dtype) -> None:
    task = Task(bits=3)
    task.model.to(dtype)
    task.teacher.to(dtype)
    result = task.run(steps=12, every=2, scale_lr=0.3)  # far too much: the best is somewhere on the way
    assert result.after == min(value for _, value in result.held_out)
    assert result.held_out[0][1] != result.held_out[-1][1]
    again = copy.deepcopy(task).run(steps=1, lr=0, tensor_lr=0, scale_lr=0)
    assert again.before == result.after


@pytest.mark.guarantee("heal-never-worse")
def test_scales_are_left_in_the_best_state_whatever_ends_it() -> None:
    task = Task(bits=3)
    seen: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append(done)
        if done == 5:
            raise KeyboardInterrupt

    before = bits(task.model)
    with pytest.raises(KeyboardInterrupt):
        task.run(steps=12, every=6, progress=progress)
    assert seen[-1] == 5
    assert bits(task.model) == before
    assert not trained_scales(task.model)


def test_without_held_out_batches_the_last_state_is_kept() -> None:
    task, again = Task(), Task()
    result, other = task.run(dev=None), again.run(every=12)
    assert (result.before, result.after, result.held_out, result.best_step) == (None, None, (), 12)
    assert result.losses == other.losses
    assert other.best_step == 12
    assert bits(task.model) == bits(again.model)


def stopped(folder: Path, at: int, in_bits: int | None = None, **options: Any) -> None:
    """A run whose process ends after so many steps."""

    def progress(done: int, total: int, what: str) -> None:
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Task(bits=in_bits).run(folder=folder, progress=progress, **options)


@pytest.mark.guarantee("heal-same-bits")
@pytest.mark.parametrize("in_bits", [None, 3])
@pytest.mark.parametrize("at", [1, 3, 7, 12])
def test_resumed_it_ends_in_the_same_bits(at: int, in_bits: int | None, tmp_path: Path) -> None:
    whole = Task(bits=in_bits)
    expected = whole.run(every=3, tensor_lr=0.02)
    stopped(tmp_path / "run", at, in_bits, every=3, tensor_lr=0.02)
    task = Task(bits=in_bits)
    result = task.run(every=3, tensor_lr=0.02, folder=tmp_path / "run")
    assert without_seconds(result) == without_seconds(expected)
    assert bits(task.model) == bits(whole.model)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.json", f"state-{result.best_step:06d}"
    ]  # fmt: skip
    for model in (
        task,
        Task(bits=in_bits),
    ):  # a finished run answers at once, for the model as it is and for a fresh one
        assert model.run(every=3, tensor_lr=0.02, folder=tmp_path / "run", progress=None) == result
        assert bits(model.model) == bits(whole.model)


@pytest.mark.guarantee("heal-same-bits")
@pytest.mark.slow
@pytest.mark.parametrize("in_bits", [[], ["3"]])
def test_killed_at_any_point_it_ends_in_the_same_bits(in_bits: list[str], tmp_path: Path) -> None:
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "helpers.kill_heal", str(tmp_path), *in_bits]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 15


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder, 5, every=2)
    for options, match in [
        ({"steps": 13}, "steps=12, and this one has 13"),
        ({"train": "auxiliary"}, "train='cores'"),
        ({"batches": BATCHES[1:]}, "batches="),
        ({"dev": None}, "dev="),
    ]:
        with pytest.raises(MPOError, match=match):
            Task().run(folder=folder, **{"every": 2, **options})
    moved = Task()
    with torch.no_grad():
        next(iter(mpo_units(moved.model).values())).cores[0].mul_(1.5)
    before = bits(moved.model)
    with pytest.raises(MPOError, match=r"other values at the start.*resume=False"):
        moved.run(folder=folder, every=2)
    assert bits(moved.model) == before
    frozen = Task()
    with torch.no_grad():
        frozen.model.bert.embeddings.position_embeddings.weight.add_(1)
    with pytest.raises(MPOError, match=r"cannot be resumed.*frozen.*resume=False"):
        frozen.run(folder=folder, every=2)
    assert Task().run(folder=folder, every=2, resume=False).steps == 12


LOG: list[tuple[tuple[Any, ...], list[Any]]] = [
    (("state",), [3, None, MISSING, "..", "state-000099"]),
    (("best",), [None, MISSING, "state-2"]),
    (("start_digest",), [None, 3, MISSING]),
    (("planned",), [0, "x", None, 2, MISSING]),
    (("precision",), ["int8", MISSING]),
    (("notes",), [None, [3], MISSING]),
    (("losses",), [None, ["x"], {}, MISSING]),
    (("held_out",), [None, [[0]], [["x", 1]], [[99, 1.0]], MISSING]),
    (("best_step",), [-1, 99, 1, None, MISSING]),
    (("seconds",), ["x", MISSING]),
    (("result",), [3, None, {}]),
    (("format_version",), [9]),
]


def test_a_damaged_log_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder, 5, every=2)
    file, task = folder / "log.json", Task()
    text, before, there = file.read_text(), bits(task.model), sorted(folder.iterdir())
    for path, values in LOG:
        for value in values:
            file.write_text(json.dumps(changed(json.loads(text), path, value)))
            with pytest.raises(MPOError, match="resume=False"):
                task.run(folder=folder, every=2)
            assert bits(task.model) == before
            assert sorted(folder.iterdir()) == there
    file.write_text(text)
    task.run(folder=folder, every=2)


def test_what_the_teacher_says_is_held_as_far_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(task: Task) -> Task:
        inner = task.teacher.bert.forward
        monkeypatch.setattr(task.teacher.bert, "forward", lambda **given: (calls.append(1), inner(**given))[1])
        return task

    held, fresh = counted(Task()), counted(Task())
    result = held.run()
    assert len(calls) == len(BATCHES) + len(DEV)
    calls.clear()
    size = 6 * 9 * 32 * 4  # of one batch
    assert fresh.run(cache_bytes=2 * size).losses == result.losses
    assert len(calls) > 12
    cache = healers.TargetCache(2 * size)
    for k in range(5):
        cache.get("train", healers.Fed({}, None, k), lambda: (torch.zeros(6, 9, 32),))
    assert cache.used == 2 * size


def test_minutes_and_precision_are_decided_by_timing_and_leave_no_trace() -> None:
    task = Task()
    result = task.run(steps=None, minutes=0.005, precision="auto")
    assert 1 <= result.steps < 500
    assert result.precision in ("float32", "bfloat16")
    assert "ms in float32" in result.notes[0]
    assert f"are {result.steps} steps here" in result.notes[1]
    again = Task()
    assert again.run(steps=result.steps, precision=result.precision).losses == result.losses
    assert bits(again.model) == bits(task.model)


def test_other_blocks_count_only_if_asked() -> None:
    task, plain = Task(), Task()
    both, last = task.run(blocks=1.0, steps=30), plain.run(steps=30)
    assert both.before == pytest.approx(last.before)
    assert both.losses[0] > last.losses[0]
    assert both.after < both.before

    def between(model: Any) -> float:
        with torch.no_grad():
            states = [m.bert(**DEV[0], output_hidden_states=True).hidden_states[1] for m in (model, task.teacher)]
        return float((states[0] - states[1]).norm())

    assert between(task.model) < between(plain.model)


def test_a_model_that_is_no_transformer() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    model = copy.deepcopy(teacher)
    compress(model, MPOConfig(sites=3, keep=0.5))
    batches = [{"input": torch.randn(16, 16)} for _ in range(4)]
    for objective in ("features", "logits"):
        healed = copy.deepcopy(model)
        result = heal(healed, teacher, batches, dev=batches, objective=objective, steps=40)
        assert result.after < 0.9 * result.before


def test_the_result_is_json_and_says_what_happened() -> None:
    result = Task().run()
    assert HealResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    text = str(result)
    assert f"{result.trainable:,} of {result.total:,} parameters, in 12 steps" in text
    assert f"held-out batches: {result.before:.4g} -> {result.after:.4g}" in text
    assert "held-out" not in str(Task().run(dev=None))


class NoLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = tiny("bert").bert

    def forward(self, **given: Any) -> Any:
        return self.bert(**given)


WIDER = tiny("gpt2")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"batches": []}, "batches holds no batch"),
    ({"batches": (part for part in BATCHES)}, "only once"),
    ({"batches": BATCHES[0]}, "batches is one batch"),
    ({"batches": 3}, "batches is a int"),
    ({"batches": ["text"]}, "batch 0 of batches is a str without tensors"),
    ({"batches": [{key: value * 0 for key, value in BATCHES[0].items()}]}, "no text in it"),
    ({"batches": [{"input_ids": torch.zeros(0, 9, dtype=torch.long)}]}, "is empty"),
    ({"batches": [{"input_ids": torch.full((2, 5), 5000)}]}, "cannot go through"),
    ({"batches": [{"nonsense": torch.zeros(2, 5)}]}, "cannot go through"),
    ({"dev": []}, "dev holds no batch"),
    ({"objective": "hope"}, "objective='hope' is not one of"),
    ({"objective": "loss"}, "needs labels in the batches"),
    ({"objective": "logits", "teacher": NoLogits()}, "the teacher, a NoLogits, gives no logits"),
    ({"teacher": None}, "needs a teacher"),
    ({"train": "central"}, "train='central' is not one of"),
    ({"also": "everything"}, "also='everything'"),
    ({"steps": 0}, "steps=0"),
    ({"steps": 5, "minutes": 1}, "both say how long"),
    ({"steps": None, "minutes": math.inf}, "minutes=inf"),
    ({"lr": -1.0}, "lr=-1.0"),
    ({"tensor_lr": math.nan}, "tensor_lr=nan"),
    ({"warmup": 1}, "warmup=1"),
    ({"clip": 0}, "clip=0"),
    ({"temperature": 2.0}, "temperature=2.0 is of objective='logits'"),
    ({"objective": "logits", "temperature": 0}, "temperature=0"),
    ({"objective": "logits", "blocks": 1.0}, "blocks=1.0 is of objective='features'"),
    ({"every": 0}, "every=0"),
    ({"precision": "int4"}, "precision='int4'"),
    ({"seed": -1}, "seed=-1"),
]


@pytest.mark.parametrize(("options", "match"), BAD, ids=[match for _, match in BAD])
def test_bad_arguments_change_nothing(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    task = Task()
    before = bits(task.model)
    with pytest.raises(MPOError, match=match):
        task.run(folder=tmp_path / "run", **options)
    assert bits(task.model) == before
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_model() -> None:
    task = Task()
    with pytest.raises(MPOError, match="the teacher is the model itself"):
        task.run(teacher=task.model)
    config = copy.deepcopy(task.teacher.config)
    config.hidden_size, config.intermediate_size = 16, 20
    with pytest.raises(MPOError, match=r"hidden states of the model have shape \[6, 9, 32\] and the teacher's .*16"):
        task.run(teacher=type(task.teacher)(config))
    config = copy.deepcopy(task.teacher.config)
    config.vocab_size = 77
    with pytest.raises(MPOError, match="knows 101 tokens and the teacher 77"):
        task.run(teacher=type(task.teacher)(config))
    shallow = copy.deepcopy(task.teacher.config)
    shallow.num_hidden_layers = 3
    with pytest.raises(MPOError, match="the model has 2 blocks and the teacher 3"):
        task.run(teacher=type(task.teacher)(shallow), blocks=1.0)
    broken = tiny("bert")
    with torch.no_grad():
        broken.bert.encoder.layer[0].output.dense.weight.fill_(math.nan)
    with pytest.raises(MPOError, match="is nan before the first step"):
        task.run(teacher=broken)


def test_held_out_batches_that_are_no_numbers() -> None:
    teacher = nn.Sequential(nn.Linear(8, 8))
    model = copy.deepcopy(teacher)
    compress(model, MPOConfig(sites=3, keep=0.5))
    spoilt = [{"input": torch.full((4, 8), math.nan)}]
    with pytest.raises(MPOError, match="is nan on dev before the first step"):
        heal(model, teacher, [{"input": torch.randn(4, 8)}], dev=spoilt)


def test_a_model_that_has_nothing_to_train() -> None:
    with pytest.raises(MPOError, match="no MPO modules"):
        heal(tiny("bert"), tiny("bert"), BATCHES)
    alone = nn.Sequential(nn.Linear(8, 8, bias=False))
    teacher = copy.deepcopy(alone)
    compress(alone, MPOConfig(sites=1))
    with pytest.raises(MPOError, match="nothing is left to train"):
        heal(alone, teacher, [{"input": torch.randn(4, 8)}], train="auxiliary")


def test_padding_does_not_count() -> None:
    task, again = Task(), Task()
    other = [dict(part, input_ids=part["input_ids"] + 7 * (1 - part["attention_mask"])) for part in BATCHES]
    ours, theirs = task.run(steps=4), again.run(steps=4, batches=other)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)  # what is masked may be rounded in
    assert batch(0)["input_ids"].equal(BATCHES[0]["input_ids"])
