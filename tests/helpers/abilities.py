"""What can be done with a compressed model, one function a column of docs/architectures.md, on any tiny model.

Each takes a :class:`Case` and returns if it went well, raises :class:`NotForIt` if the model has nothing of the kind,
and raises whatever else if it did not go well.
``Case.dense`` makes of it what the dense model does, to tell the two apart.
"""

# PEFT and Trainer have no types for what their models hold.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import copy
import io
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.architectures import called, given, scores, tiny_model, without_padding
from helpers.tiny_models import settled
from mpo_tn.torch import CompressionReport, MPOConfig, MPOLayer, MPOLinear, compress, squeeze
from mpo_tn.torch.layers.parameter import HELD

FULL = MPOConfig(target_modules=r".*", sites=3)
KEPT = MPOConfig(target_modules=r".*", sites=3, keep=0.6)
FEW = MPOConfig(target_modules=r".*", sites="low-rank", bond=4)
CLOSE = 1e-4
"""What float32 rounds in some dozen layers and sums over 48 terms, relative to the norm."""


class NotForIt(Exception):  # noqa: N818 - nothing went wrong
    """The model has nothing that the column is about."""


@dataclass
class Case:
    """A tiny model, a folder of its own, and how it is compressed; not at all if it is ``dense``."""

    name: str
    folder: Path
    dense: bool = False
    other_process: Callable[[Any, Path], torch.Tensor] | None = None
    report: CompressionReport = field(init=False)

    def model(self, config: MPOConfig = KEPT, made: Any = None) -> Any:
        """A new one, or the one that is given, compressed; ``report`` says how."""
        made = settled(tiny_model(self.name)) if made is None else made
        if not self.dense:
            self.report = compress(made, config)
        return made

    @cached_property
    def original(self) -> Any:
        """The dense model. Not to be changed."""
        return settled(tiny_model(self.name))

    @cached_property
    def _kept(self) -> Any:
        return self.model()

    @property
    def kept(self) -> Any:
        """A model that was cut."""
        return copy.deepcopy(self._kept)

    def saved(self, model: Any, name: str, **options: Any) -> Path:
        """A folder with it."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        model.save_pretrained(place, **options)
        return place


def same(first: torch.Tensor, second: torch.Tensor, slack: float = CLOSE) -> None:
    """Refuse what is not close, or not a number."""
    assert first.shape == second.shape, f"shape {tuple(first.shape)} and {tuple(second.shape)}"
    assert torch.isfinite(second).all(), "not finite"
    off = float((first.double() - second.double()).norm() / second.double().norm())
    assert off <= slack, f"off by {off:.1e}"


def same_bits(first: Any, second: Any) -> None:
    """Refuse models whose tensors are not the same bits."""
    before, after = first.state_dict(), second.state_dict()
    assert before.keys() == after.keys(), f"keys {sorted(before.keys() ^ after.keys())[:3]}"
    other = [key for key in before if not torch.equal(before[key], after[key])]
    assert not other, f"other bits in {other[0]}"


def outputs(model: Any) -> torch.Tensor:
    """What it gives, in an order of memory that does not depend on where it comes from."""
    return called(settled(model))


def loaded(model: Any, place: Path, **options: Any) -> Any:
    """What the class of ``model`` reads from a folder: all of it, and nothing else."""
    found, info = type(model).from_pretrained(place, output_loading_info=True, **options)
    assert not info["missing_keys"], f"missing {sorted(info['missing_keys'])[0]}"
    assert not info["unexpected_keys"], f"unexpected {sorted(info['unexpected_keys'])[0]}"
    return found.eval()


def cores_or_self(model: Any, name: str) -> int:
    """Which tensor the parameter of this name is: the parameter itself, or the first of the cores that stand for it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    held = getattr(module, HELD, None)
    layer = module if isinstance(module, MPOLayer) else getattr(held, leaf, None) if held is not None else None
    return id(layer.cores[0]) if isinstance(layer, MPOLayer) else id(getattr(module, leaf))


def exact(case: Case) -> None:
    same(outputs(case.model(FULL)), outputs(case.original))


def ties(case: Case) -> None:
    shared: dict[int, list[str]] = {}
    for name, parameter in case.original.named_parameters(remove_duplicate=False):
        if parameter.ndim > 1:
            shared.setdefault(id(parameter), []).append(name)
    pairs = [names for names in shared.values() if len(names) > 1]
    if not pairs:
        raise NotForIt("nothing is tied")
    model = case.kept
    for each in (model, loaded(model, case.saved(model, "ties"))):
        for names in pairs:
            assert len({cores_or_self(each, name) for name in names}) == 1, f"{names[0]} and {names[1]} came apart"


def keep(case: Case) -> None:
    model = case.model()
    # Of a matrix of 4 rows or columns even one number a bond may be more than the share asked for.
    small = sum(layer.spec.num_parameters for layer in case.report.layers if max(layer.spec.bonds, default=1) == 1)
    assert case.report.matrix_after <= 0.6 * case.report.matrix_before + small, f"kept {case.report.kept:.3f}"
    assert torch.isfinite(outputs(model)).all(), "not finite"
    assert not torch.equal(outputs(model), outputs(case.original)), "nothing was cut"


def save(case: Case) -> None:
    model = case.kept
    place = case.saved(model, "saved")
    again = loaded(model, place)
    same_bits(model, again)
    assert torch.equal(outputs(model), outputs(again)), "other logits"


def shards(case: Case) -> None:
    model = case.kept
    place = case.saved(model, "shards", max_shard_size="20KB")
    assert len(list(place.glob("*.safetensors"))) > 1, "one shard"
    same_bits(model, loaded(model, place))


def new_process(case: Case) -> None:
    assert case.other_process is not None
    model = case.kept
    expected = outputs(model)
    same(case.other_process(model, case.saved(model, "elsewhere")), expected, 1e-6)


def half(case: Case) -> None:
    # As people do it; a model that is only cast has tables of sines that one which is loaded has not.
    place = case.saved(case.original, "single")
    model = case.model(made=loaded(case.original, place, dtype=torch.bfloat16))
    expected = outputs(model)
    assert torch.isfinite(expected).all(), "not finite"
    place = case.saved(model, "half")
    again = loaded(model, place, dtype="auto")
    same_bits(model, again)
    assert torch.equal(outputs(again), expected), "other logits"


class _Trainer(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        return scores(model(**inputs)).float().square().mean()


def trainer(case: Case) -> None:
    model = case.kept
    if not model.supports_gradient_checkpointing:
        raise NotForIt("the class has no checkpointing")
    rows = [{key: value[k] for key, value in given(model).items()} for k in range(2)]
    arguments = transformers.TrainingArguments(
        output_dir=str(case.folder / "trainer"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _Trainer(model, arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    trained = {name for name in before if ".cores." in name} or set(before)
    # But for an expert or a segment that no token went to.
    assert len(moved & trained) >= 0.85 * len(trained), f"{len(moved & trained)} of {len(trained)} moved"
    assert torch.isfinite(outputs(model.eval())).all(), "not finite"


def whole_graph(case: Case) -> None:
    model = case.kept
    expected = called(model)
    torch.compiler.reset()
    try:
        with torch.no_grad():
            same(scores(torch.compile(model, backend="eager", fullgraph=True)(**given(model))), expected)
    finally:
        torch.compiler.reset()


class _Scores(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return scores(self.model(**inputs))


def export(case: Case) -> None:
    model = case.kept
    expected, inputs = called(model), given(model)
    with torch.no_grad():
        program = torch.export.export(_Scores(model), (), inputs, strict=False)
        same(program.module()(**inputs), expected)


def generate(case: Case) -> None:
    model = case.model(FULL)
    if not model.can_generate():
        raise NotForIt("the class does not generate")

    def texts(of: Any) -> Any:
        options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True}
        wanted = {key: value for key, value in given(of).items() if key != "decoder_input_ids"}
        options |= {"output_scores": True, "return_dict_in_generate": True, "num_beams": 1, "pad_token_id": 0}
        with torch.no_grad():
            made = of.generate(**wanted, **options)
        return torch.stack(made.scores)

    found, expected = texts(model), texts(case.original)
    legal = torch.isfinite(expected)
    same(found[legal], expected[legal], 10 * CLOSE)


def squeezed(case: Case) -> None:
    model, inputs = case.model(FULL).train(), given(case.original)
    expected = outputs(case.original)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(_: int) -> float:
        optimizer.zero_grad()
        loss = (scores(model(**inputs)) - expected).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    def evaluate(of: Any) -> float:
        return float((called(of) - expected).norm())

    result = squeeze(
        model, evaluate=evaluate, delta=math.inf, train_step=step, optimizer=optimizer, higher_is_better=False,
        max_steps=1, cuts_per_round=2, tune_steps=1,
    )  # fmt: skip
    assert sum(cut.before - cut.after for cut in result.rounds[0].cuts) == 2
    same_bits(model, loaded(model, case.saved(model, "squeezed")))


def program(case: Case) -> None:
    from mpo_tn.app import cli, terminal

    dense, out = case.saved(case.original, "plain"), case.folder / "small"
    shutil.rmtree(out, ignore_errors=True)

    def run(*words: str) -> str:
        said, errors, code = io.StringIO(), io.StringIO(), None
        before = sys.argv, terminal.out.file, terminal.err.file
        sys.argv, terminal.out.file, terminal.err.file = ["mpo-tn", *words], said, errors
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
                cli.main()
        except SystemExit as stopped:
            code = stopped.code
        finally:
            sys.argv, terminal.out.file, terminal.err.file = before
        assert not code, " ".join(errors.getvalue().split())[-200:]
        return said.getvalue()

    run("compress", str(dense), str(out), "--sites", "3", "--keep", "0.6", "--target", "re:.*")
    again = loaded(case.original, out)
    same(outputs(again), outputs(case.kept), 1e-6)
    assert "% of the matrix parameters" in run("inspect", str(dense)), "inspect says nothing"


def on_load(case: Case) -> None:
    place = case.saved(case.original, "dense")
    found = type(case.original).from_pretrained(place, quantization_config=KEPT.to_hf()).eval()
    same(outputs(found), outputs(case.kept), 1e-6)
    same_bits(found, loaded(found, case.saved(found, "on load")))


def _has_room(layer: MPOLinear) -> bool:
    """Whether the bond may be raised by one, as merging does, and still be less than the dense matrix."""
    rows, columns = layer.spec.sites.shape
    return (layer.spec.bonds[0] + 1) * (rows + columns) < layer.spec.out_features * layer.spec.in_features


def lora(case: Case) -> None:
    import peft

    model = case.model(FEW)
    counts: dict[int, int] = {}
    for _, core in model.named_parameters(remove_duplicate=False):
        counts[id(core)] = counts.get(id(core), 0) + 1
    targets = [
        name
        for name, layer in model.named_modules()
        if (_has_room(layer) if isinstance(layer, MPOLinear) else case.dense and type(layer) is torch.nn.Linear)
        and counts.get(cores_or_self(model, f"{name}.weight")) == 1
    ]
    if not targets:
        raise NotForIt("no layer that LoRA is for")
    before = outputs(model)
    tuned: Any = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=targets))
    same(outputs(tuned), before, 1e-6)
    assert any("lora_" in name for name, p in tuned.named_parameters() if p.requires_grad)
    scores(tuned(**given(model))).float().square().mean().backward()
    trained = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    assert len([p for p in trained if p.grad is not None]) >= 0.85 * len(trained), "no gradient"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    changed = outputs(tuned)
    assert not torch.equal(changed, before), "the adapter does nothing"
    same(outputs(tuned.merge_and_unload()), changed)


def dequantize(case: Case) -> None:
    model = case.kept
    expected = outputs(model)
    assert model.dequantize() is model
    assert not any(isinstance(module, MPOLayer) for module in model.modules()), "cores are left"
    shapes = {key: value.shape for key, value in case.original.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes, "other keys"
    same(outputs(model), expected)
    without_padding(model)
    same_bits(model, loaded(model, case.saved(model, "dequantized")))


COLUMNS: dict[str, Callable[[Case], None]] = {
    "exact": exact, "ties": ties, "keep": keep, "save": save, "shards": shards, "new process": new_process,
    "bf16": half, "Trainer": trainer, "compile": whole_graph, "export": export, "generate": generate,
    "squeeze": squeezed, "program": program, "on load": on_load, "LoRA": lora, "dequantize": dequantize,
}  # fmt: skip
CONTROLLED = frozenset({"save", "shards", "new process", "bf16", "Trainer", "compile", "export", "generate", "LoRA"})
"""Columns that ask nothing of cores: what fails in them may fail for the dense model, too."""
CHEAP = ("exact", "ties", "keep", "save", "dequantize")


def read_elsewhere(build: str, place: Path) -> None:
    """In a process of its own: write beside a folder what the model in it gives."""
    found = getattr(transformers, build).from_pretrained(place).eval()
    save_file({"outputs": outputs(found).contiguous()}, place / "outputs")


def written_elsewhere(place: Path) -> torch.Tensor:
    """What :func:`read_elsewhere` wrote."""
    return load_file(place / "outputs")["outputs"]


def cell(column: str, case: Case) -> list[str]:
    """``["ok"]``, ``["n/a", reason]`` or ``["fails", reason]``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            COLUMNS[column](case)
        except NotForIt as reason:
            return ["n/a", str(reason)]
        except Exception as error:
            reason = _shortly(error)
            if column in CONTROLLED and not case.dense:
                plain = cell(
                    column, Case(case.name, case.folder / "control", dense=True, other_process=case.other_process)
                )
                if plain[0] == "fails":
                    return ["n/a", f"nor does the dense model: {plain[1]}"]
            return ["fails", reason]
    return ["ok"]


def _shortly(error: Exception) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}"[:160]
