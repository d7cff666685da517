"""Two processes that do things together, held against one process that does them alone.

Run once for each rank by tests/torch/models/test_ranks.py: ``python -m helpers.two_ranks RANK FOLDER PORT``. What came
of every check is written to ``FOLDER/RANK.json``: "ok", or the traceback.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.heal_task import BATCHES, COUNTING, DEV, Task, batch, bits, without_seconds
from helpers.planning import TEXT
from helpers.task_folders import sentence, write_encoder
from helpers.tiny_models import tiny
from mpo_tn import MPOError
from mpo_tn.app import cli
from mpo_tn.torch import MPOConfig, bond_spectra, calibrate, compress, freeze, heal, save_cores, squeeze, to_dense
from mpo_tn.torch.hf.folder import load_model, save_model
from mpo_tn.torch.loops.feeding import Feed
from mpo_tn.torch.state.host_values import tensors_digest

CHECKS: dict[str, Callable[[Path, int], None]] = {}


def check(function: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    CHECKS[function.__name__] = function
    return function


def same_everywhere(value: Any) -> None:
    told: list[Any] = [None, None]
    distributed.all_gather_object(told, value)
    assert told[0] == told[1]


def digest(model: nn.Module) -> str:
    return tensors_digest(model.state_dict().values())


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two states, relative to the largest entry of each tensor."""
    assert one.keys() == other.keys()
    pairs = [(one[name].double(), other[name].double()) for name in one if one[name].is_floating_point()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def double(family: str, in_bits: int | None = None) -> Task:
    """In double precision: Adam makes a whole step of a gradient that is rounding alone, unless that is below 1e-8."""
    task = Task(family, in_bits)
    task.model.double()
    task.teacher.double()
    return task


# Rows that no rank or one rank has, ranks whose rows are all padding, and labels that only one rank has.
PADDED = {"input_ids": BATCHES[0]["input_ids"], "attention_mask": torch.ones(6, 9, dtype=torch.int64)}
PADDED["attention_mask"][1::2] = 0
RAGGED = [batch(1), batch(2, rows=1), batch(3, rows=3), PADDED]
LABELS = [
    {**part, "labels": part["input_ids"].index_fill(0, torch.tensor(rows, dtype=torch.int64), -100)}
    for part, rows in zip(COUNTING, [[0, 2, 4], [1], [0, 1, 2, 3, 4], [5], []], strict=True)
]

CASES: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "features": ("bert", None, {}),
    "blocks": ("bert", None, {"blocks": 0.5, "batches": RAGGED, "dev": RAGGED}),
    "scales": ("bert", 3, {"tensor_lr": 1e-3, "lr": 1e-4, "scale_lr": 1e-3}),
    "logits": ("llama", None, {"objective": "logits"}),
    "labels": ("llama", None, {"objective": "loss", "batches": LABELS, "dev": COUNTING}),
}


@cache
def healed_alone(name: str) -> tuple[Any, Task]:
    family, in_bits, options = CASES[name]
    task = double(family, in_bits)
    return task.run(steps=6, every=2, **options), task


@cache
def refined(name: str) -> tuple[Any, nn.Module]:
    how: dict[str, Any] = {"bits": {"sites": 1, "bits": 2, "group": 8}, "chains": {"sites": 3, "keep": 0.5}}[name]
    model = tiny("bert").double()
    config = MPOConfig(target_modules=r".*encoder.*(query|key|value|dense)", **how)
    return compress(model, config, calibration=TEXT, anchored=False, refine=True), model


def trained(wrap: Callable[[nn.Module], nn.Module], family: str, part: slice) -> nn.Module:
    """Four steps of AdamW on a loss that is a mean over rows."""
    model = double(family).model
    freeze(model, "cores", also=("norms", "biases"))
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for whole in BATCHES[:4]:
        optimizer.zero_grad()
        wrapped(**{name: value[part] for name, value in whole.items()}).logits.square().mean().backward()
        optimizer.step()
    return wrapped


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(model: nn.Module) -> dict[str, Any]:
    """Whole in the first process, empty in the other, as accelerator.get_state_dict gives it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@check
def command(home: Path, rank: int) -> None:
    """``mpo-tn heal``, as torchrun starts it: before there is a group."""
    small, dense, texts = home / f"small-{rank}", home / f"dense-{rank}", home / f"texts-{rank}.txt"
    source = random.Random(0)
    texts.write_text("".join(f"{sentence(source)} .\n" for _ in range(60)), encoding="utf-8")
    model = load_model(write_encoder(dense))
    compress(model, MPOConfig(sites=3, keep=0.5))
    save_model(model, dense, small, overwrite=False, files={})

    def run(target: Path, *options: str) -> tuple[int, str, str]:
        return started(
            "heal", str(small), "--against", str(dense), "--texts", str(texts), "--steps", "10", "--batch-size", "5",
            "--out", str(target), *options,
        )  # fmt: skip

    def started(*arguments: str) -> tuple[int, str, str]:
        sys.argv = ["mpo-tn", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), out.getvalue(), err.getvalue()

    told = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
    assert run(home / f"alone-{rank}")[0] == 0
    os.environ |= told
    code, out, err = run(home / "together")
    assert (code, bool(out), err) == (0, rank == 0, "")
    if rank == 0:
        assert sorted(path.name for path in home.glob("together*")) == ["together"]
        results = [json.loads((home / name / "healing.json").read_text()) for name in ("together", "alone-0")]
        for key in ("losses", "after"):  # of tensors Adam makes a whole step where a gradient is rounding alone
            assert results[0][key] == pytest.approx(results[1][key], rel=1e-4)
    code, out, err = run(home / "wrong", *(["--steps", "0"] if rank else []))
    assert (code, out) == (2, "")
    assert ("process 1 of 2 stopped: steps=0" in " ".join(err.split())) == (rank == 0)
    assert bool(err) == (rank == 0)
    assert not list(home.glob("wrong*"))
    code, out, err = started("inspect", str(small))
    assert (code, out) == (2, "")
    assert ("one of 2 processes, and inspect does not share" in " ".join(err.split())) == (rank == 0) == bool(err)


@check
def healing_is_that_of_one(home: Path, rank: int) -> None:
    for name, (family, in_bits, options) in CASES.items():
        expected, other = healed_alone(name)
        task = double(family, in_bits)
        if rank:  # what the first one has counts
            next(task.model.parameters()).data.add_(1.0)
        wrapped = DistributedDataParallel(task.model) if name == "features" else task.model
        batches = options.get("batches", BATCHES)
        rest = {"dev": DEV, "tensor_lr": 3e-3, **options} | {"steps": 6, "every": 2}
        rest.pop("batches", None)
        result = heal(wrapped, task.teacher, batches, **rest)
        same_everywhere((result, digest(task.model)))
        assert result.best_step == expected.best_step > 0, name
        # The loss of a language model is in single precision whatever the model is in.
        close = 1e-5 if family == "llama" else 1e-12
        assert result.losses == pytest.approx(expected.losses, rel=close), name
        assert [value for _, value in result.held_out] == pytest.approx([v for _, v in expected.held_out], rel=close)
        assert apart(task.model.state_dict(), other.model.state_dict()) < close, name


def begun_alone(home: Path) -> None:
    """A run of one process that was stopped, which two go on with."""

    def progress(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        Task().run(every=2, folder=home / "begun-alone", progress=progress)


@check
def healing_goes_on(home: Path, rank: int) -> None:
    """The one that stopped it stops all; only the first one writes; all go on from there."""
    whole, task = Task(), Task()
    expected = whole.run(every=2)
    folder, others = home / "run", home / "begun-alone"
    result = Task().run(every=2, folder=others if rank == 0 else home / "nowhere")
    assert without_seconds(result)["losses"] == pytest.approx(expected.losses, rel=1e-5)
    calls: list[int] = []

    def progress(done: int, total: int, what: str) -> None:
        calls.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(MPOError if rank else KeyboardInterrupt) as stopped:
        task.run(every=2, folder=folder if rank == 0 else home / "nowhere", progress=progress)
    assert rank == 0 or "process 0 of 2 stopped: KeyboardInterrupt" in str(stopped.value)
    assert calls == ([] if rank else [1, 2, 3, 4, 5])
    same_everywhere(digest(task.model))
    for again in (Task(), Task()):
        result = again.run(every=2, folder=folder if rank == 0 else home / "nowhere")
        assert without_seconds(result) == without_seconds(expected)
        assert bits(again.model) == bits(whole.model)
    assert not (home / "nowhere").exists()
    with pytest.raises(MPOError, match="of a run with steps=12"):
        Task().run(every=2, steps=13, folder=folder)


@check
def refining_is_that_of_one(home: Path, rank: int) -> None:
    for name in ("bits", "chains"):
        report, model = refined.__wrapped__(name)
        expected, other = refined(name)
        same_everywhere((digest(model), report.to_dict()))
        assert [block.epoch for block in report.refined] == [block.epoch for block in expected.refined]
        found = [value for block in report.refined for value in (block.before, block.after)]
        # The distances are in single precision whatever the model is in.
        assert found == pytest.approx([v for block in expected.refined for v in (block.before, block.after)], rel=1e-5)
        assert apart(model.state_dict(), other.state_dict()) < 1e-4, name


@check
def calibrations_are_shared(home: Path, rank: int) -> None:
    model = tiny("bert")
    found = calibrate(model, TEXT, gradients=True)
    same_everywhere([found.moments[key].second.tolist() for key in found.moments])
    with pytest.raises(MPOError, match="process 1 of 2 has other batches"):
        calibrate(model, TEXT[rank:])
    if rank:
        next(model.parameters()).data.add_(1.0)
    with pytest.raises(MPOError, match="process 1 of 2 has other numbers in the model"):
        calibrate(model, TEXT)


@check
def training_is_that_of_one(home: Path, rank: int) -> None:
    for family in ("bert", "llama"):
        expected = trained(lambda model: model, family, slice(None)).state_dict()
        found = trained(DistributedDataParallel, family, slice(rank, None, 2)).module.state_dict()
        assert apart(found, expected) < 1e-12
        with warnings.catch_warnings():  # of torch, on what a Bert returns
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            whole = gathered(trained(sharded, family, slice(rank, None, 2)))
        assert rank or apart(whole, expected) < 1e-12


@check
def what_is_sharded_is_saved_whole(home: Path, rank: int) -> None:
    for family, in_bits in (("bert", None), ("llama", 3)):
        plain = Task(family, in_bits).model
        model: Any = sharded(copy.deepcopy(plain))
        folder = home / f"sharded-{family}"
        state = gathered(model)
        model.save_pretrained(folder, state_dict=state, is_main_process=rank == 0)
        distributed.barrier()
        loaded = type(plain).from_pretrained(folder)
        assert bits(loaded) == bits(plain)
        assert f"# {type(plain).__name__}," in (folder / "README.md").read_text()
        assert (folder / "config.json").stat().st_mtime > 0
        with pytest.raises(MPOError, match=r"sharded over processes.*get_state_dict"):
            model.save_pretrained(home / "not-whole")


@check
def what_needs_all_of_it_refuses_what_is_sharded(home: Path, rank: int) -> None:
    model, dense = sharded(copy.deepcopy(Task().model)), sharded(tiny("bert"))
    verbs: list[Callable[[], object]] = [
        lambda: heal(model, tiny("bert"), BATCHES, steps=1),
        lambda: heal(Task().model, dense, BATCHES, steps=1),
        lambda: calibrate(model, BATCHES),
        lambda: compress(dense, MPOConfig(sites=3, keep=0.5)),
        lambda: to_dense(model),
        lambda: save_cores(model, home / "cores"),
        lambda: bond_spectra(model),
    ]
    for verb in verbs:
        with pytest.raises(MPOError, match=r"is sharded over processes"):
            verb()


@dataclass
class Odd:
    """Batches of which one process makes something else at a step."""

    happens: Callable[[], None]
    step: int = 3

    def at(self, step: int) -> dict[str, torch.Tensor]:
        if step == self.step:
            self.happens()
        return BATCHES[step % len(BATCHES)]


@check
def who_differs_is_named(home: Path, rank: int) -> None:
    task = Task()
    before = bits(task.model)
    for options, what in [
        ({"steps": 5 + rank}, "other steps"),
        ({"batches": BATCHES[rank:]}, "other batches"),
        ({"dev": DEV[rank:]}, "other dev"),
        ({"folder": home / "some" if rank else None}, "other folder"),
        ({"teacher": tiny("bert").double() if rank else task.teacher}, "process 1 of 2"),
        ({"train": "all" if rank else "cores"}, r"train='all'"),
    ]:
        with pytest.raises(MPOError, match=what):
            task.run(**options)
        assert bits(task.model) == before
    wide = [{**part, "position_ids": torch.zeros(4, 9, dtype=torch.int64)} for part in BATCHES]
    with pytest.raises(MPOError, match=r"position_ids has the shape \[4, 9\] in a batch of 6 rows"):
        task.run(batches=wide)

    def drift() -> None:
        if rank:
            next(p for p in task.model.parameters() if p.requires_grad).data.add_(1.0)

    with pytest.raises(MPOError, match="process 1 of 2 has other numbers after step 4"):
        task.run(batches=Odd(drift), every=2)
    assert Feed(Odd(drift), 0, "batches").at(0).key is None
    with pytest.raises(MPOError, match="one of 2 processes"):
        squeeze(task.model, evaluate=lambda _: 0.0, delta=1.0)


@check
def what_raises_in_one_raises_in_all(home: Path, rank: int) -> None:
    task, expected = Task(), Task()

    def fail() -> None:
        if rank:
            raise OSError("the disk is gone")

    with pytest.raises(OSError if rank else MPOError, match="the disk is gone") as stopped:
        task.run(batches=Odd(fail), every=1)
    assert rank or str(stopped.value) == "process 1 of 2 stopped: OSError: the disk is gone"
    same_everywhere(digest(task.model))
    expected.run(batches=Odd(lambda: None), every=1, steps=12, progress=None)
    assert digest(task.model) != digest(Task().model)  # the best state, of three steps
    (home / "a-file").write_text("")
    with pytest.raises(MPOError, match="a-file is a file"):
        task.run(folder=home / "a-file")


@check
def who_dies_ends_all(home: Path, rank: int) -> None:
    """Last of all: the other process is gone afterwards."""

    def die() -> None:
        if rank:
            os.kill(os.getpid(), signal.SIGKILL)

    task = Task()
    before = bits(task.model)
    with pytest.raises(MPOError, match="another of the 2 processes has ended"):
        task.run(batches=Odd(die), every=12)
    assert bits(task.model) == before


def main(rank: int, home: Path, port: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, function in CHECKS.items():
        if name == "healing_is_that_of_one":  # alone what is compared with; from here on there is a group
            for case in CASES:
                healed_alone(case)
            for case in ("bits", "chains"):
                refined(case)
            if rank == 0:
                begun_alone(home)
            distributed.init_process_group("gloo", timeout=timedelta(seconds=240))
        found[name] = "ended" if name == "who_dies_ends_all" else "not finished"
        (home / f"{rank}.json").write_text(json.dumps(found))
        try:
            function(home, rank)
            found[name] = "ok"
        except BaseException:
            found[name] = traceback.format_exc()
            break  # the other process cannot go on alone
    (home / f"{rank}.json").write_text(json.dumps(found))
    sys.exit(found[name] != "ok")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
