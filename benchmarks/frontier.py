"""Size against closeness: what MiniLM is worth at every number of bytes, by every way there is to get there.

``python benchmarks/frontier.py run DATA_DIR RESULTS --parts encoder whole`` makes the rows that are missing in RESULTS,
one JSON line each, so that it can be stopped and started again; ``--again planned`` makes rows of a method anew.
``python benchmarks/frontier.py table RESULTS`` prints tables, and ``python benchmarks/frontier.py plot RESULTS FILE``
draws D against bits per weight. DATA_DIR holds the files of STS-B.

Everything is calibrated on the same sentences of the training set of STS-B and healed on others; D is taken on
sentences of the dev set that are not in the training set, Spearman's correlation on the pairs of the dev set. The
parts: ``encoder``, its 36 matrices without training; ``whole``, every table and matrix; ``confirm``, rounding by other
libraries (torchao, optimum-quanto), as far as they are installed; ``healed``; and ``repair``, a frozen centre in 2 bits
whose auxiliary tensors train, against LoRA on the dense matrix in 2 bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import common  # threads, before NumPy
import numpy as np
import torch
from baselines import Subject, at_size, carried_out, make_missing, planned, stored_bytes, zeroed
from commands import Commands, save
from rows import Job, Made, markdown, points, read, shown, with_error

from mpo_tn import plot
from mpo_tn.app.demo import ENCODER, demo_model
from mpo_tn.app.measuring import Bench, Measured, spread
from mpo_tn.planning.config import MPOConfig
from mpo_tn.torch import HealResult, freeze, heal
from mpo_tn.torch.hf.folder import load_model, load_tokenizer
from mpo_tn.torch.loops.feeding import Feed
from mpo_tn.torch.loops.healer import Healer, lent
from mpo_tn.torch.loops.objectives import objective_of
from mpo_tn.torch.loops.recipe import Recipe
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import find_units
from mpo_tn.torch.models.trainable import count_trainable
from mpo_tn.tuning import Settings, load_task
from mpo_tn.tuning.tasks.batches import Batches, sentence_batches

SEED = 0
CALIBRATION, HELD_OUT, COMPARED = 1024, 256, 512
"""Sentences to calibrate on, to stop healing by, and that D is taken on."""
BUDGETS = (8.1, 4.1, 3.1, 2.3, 1.65, 1.25, 0.85, 0.63)
ROUNDED = ((8, 128), (4, 128), (3, 128), (2, 128), (2, 32))
"""Bits and columns a scale; the finer groups are for the budget of 2.3, which 2 bits in groups of 128 do not use up."""
FACTORS = {4: (4.1, 3.1), 3: (3.1, 2.3, 1.65, 1.25, 0.85, 0.63), None: (8.1, 2.3, 0.63)}
"""Of low rank, bits and budgets: of each budget the bits that were best, or next to it, when all were tried."""
REFINED = (2.3, 1.25, 0.63)
FIRST = 256
"""D is taken on so many sentences that come first in the dev set, too, which are easier: as in the first prototype."""
WHOLE = ENCODER + r"|embeddings\.(word|position|token_type)_embeddings|pooler\.dense"
SIZES = ((23, 8), (11, 4), (6, 2))
"""MB, and the bits of everything that come nearest."""
HEALED = (2.3, 0.63, 1.25)
AUXILIARY_RATES, LORA_RATES = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
LORA_RANK = 7
"""290,304 numbers on the encoder; its auxiliary tensors on five sites have 296,064."""
FLOOR, DENSE = "encoder weights zero", "dense"


class Text:
    """Everything that is read: for calibrating, healing and measuring; none of it twice."""

    def __init__(self, folder: Path) -> None:
        data = load_task("STS-B", folder)
        train = list(dict.fromkeys(text for side in zip(*data.train.texts, strict=True) for text in side))
        order = np.random.default_rng(SEED).permutation(len(train))
        drawn = [train[k] for k in order]
        self.data = data
        self.calibration, rest = drawn[:CALIBRATION], drawn[CALIBRATION:]
        self.held_out, self.healing = rest[:HELD_OUT], rest[HELD_OUT:]
        known = set(train)
        dev = dict.fromkeys(text for side in zip(*data.dev["dev"].texts, strict=True) for text in side)
        fresh = [text for text in dev if text not in known]
        self.compared = [fresh[k] for k in spread(len(fresh), COMPARED)]
        self.first = fresh[:FIRST]


class Lab(Subject):
    """The dense model, the text, and how models are measured."""

    def __init__(self, folder: Path) -> None:
        self.text = Text(folder)
        self.source = demo_model()
        self.tokenizer = load_tokenizer(self.source)
        text = [dict(batch.inputs) for batch in self.batches(self.text.calibration).in_order()]
        super().__init__(load_model(self.source).eval(), Samples.of(text))
        self.bench = Bench((), self.text.data, Settings(batch_size=32, max_length=128), 1)
        self.inputs = [batch.inputs for batch in self.batches(self.text.compared).in_order()]
        self.wanted = list(outputs(self.dense, self.inputs))
        self.first = [batch.inputs for batch in self.batches(self.text.first).in_order()]
        self.wanted_first = list(outputs(self.dense, self.first))

    def batches(self, texts: Sequence[str], seed: int = SEED) -> Batches:
        """Sentences in batches of 32."""
        return sentence_batches(texts, self.tokenizer, batch_size=32, max_length=128, seed=seed)

    @cached_property
    def reference(self) -> Measured:
        """What the dense model scores."""
        return self.bench.measure(self.dense, self.tokenizer, None)

    def measured(self, model: Any) -> dict[str, Any]:
        """D with its error, the score with its errors, size and speed."""
        model.eval()
        list(outputs(model, self.inputs[:1]))  # so that no first call is timed
        began = common.clock()
        away = distance(model, self.wanted, self.inputs)
        seconds = common.clock() - began
        found = self.bench.measure(model, self.tokenizer, None)
        drawn, dense = found.drawn["spearman"], self.reference.drawn["spearman"]
        change = drawn - dense
        return {
            "megabytes": stored_bytes(model) / 1e6,
            "distance": away.value,
            "distance_error": away.standard_error,
            "distance_first": float(distance(model, self.wanted_first, self.first)),
            "spearman": float(drawn[0]),
            "spearman_error": float(drawn[1:].std(ddof=1)),
            "change": float(change[0]),
            "change_error": float(change[1:].std(ddof=1)),
            "seconds_per_1000": 1000 * seconds / len(self.text.compared),
        }


def encoder_jobs(lab: Lab) -> Iterator[Job]:
    """Part A: the matrices of the encoder, nothing trained."""

    def job(method: str, make: Callable[[], Made], **key: Any) -> Job:
        return Job("encoder", method, key, make)

    def uniform(method: str, config: MPOConfig, budget: float, calibrated: bool = False) -> Job:
        return job(
            method, lambda: carried_out(lab, at_size(lab.dense, config, budget), calibrated=calibrated), budget=budget
        )

    yield job(DENSE, lambda: (lab.new(), 32.0, {}))
    yield job(FLOOR, lambda: zeroed(lab, ENCODER))
    for budget in BUDGETS:
        yield job("planned", lambda b=budget: planned(lab, ENCODER, bits_per_weight=b), budget=budget)
    for bits, group in ROUNDED:
        config = MPOConfig(ENCODER, sites=1, bits=bits, group=group)
        yield job("rounding", lambda c=config: carried_out(lab, c), bits=bits, group=group)
        yield job("GPTQ", lambda c=config: carried_out(lab, c, published=True), bits=bits, group=group)
        yield job("integers", lambda c=config: carried_out(lab, c, calibrated=True), bits=bits, group=group)
    for budget in REFINED:
        make = partial(planned, lab, ENCODER, bits_per_weight=budget, refine=True)
        yield job("planned, refined", make, budget=budget)
    for bits, budgets in FACTORS.items():
        name = "low rank" if bits is None else f"low rank in {bits} bits"
        for budget in budgets:
            yield uniform(name, MPOConfig(ENCODER, sites="low-rank", bits=bits), budget, calibrated=True)
    for budget in BUDGETS:
        yield uniform("MPO, 5 sites, Frobenius", MPOConfig(ENCODER, sites=5), budget)
    for bits in (8, 4):
        rows = MPOConfig(ENCODER, sites=1, bits=bits, group=1536)
        yield job(f"int{bits}, a scale per row", lambda c=rows: carried_out(lab, c), bits=bits)


def whole_jobs(lab: Lab) -> Iterator[Job]:
    """Part C: word tables, too."""

    def job(method: str, make: Callable[[], Made], **key: Any) -> Job:
        return Job("whole", method, key, make)

    yield job(DENSE, lambda: (lab.new(), 32.0, {}))
    for size, bits in SIZES:
        yield job("planned", lambda s=size: planned(lab, WHOLE, size=f"{s}MB"), size=size)
        config = MPOConfig(WHOLE, sites=1, bits=bits)
        yield job(f"int{bits} of everything", lambda c=config: carried_out(lab, c), size=size)
        gptq = f"GPTQ in {bits} bits, tables rounded"
        yield job(gptq, lambda c=config: carried_out(lab, c, published=True), size=size)


def confirm_jobs(lab: Lab) -> Iterator[Job]:
    """Part D: rounding to the nearest by libraries that people use, beside ours."""

    def job(method: str, make: Callable[[], Made], **key: Any) -> Job:
        return Job("confirm", method, key, make)

    for bits, group in ((8, 1536), (4, 128)):
        yield job("ours", lambda b=bits, g=group: carried_out(lab, MPOConfig(ENCODER, sites=1, bits=b, group=g)),
                  bits=bits)  # fmt: skip
        if _has("torchao"):
            yield job("torchao", lambda b=bits: by_torchao(lab, b), bits=bits)
        if bits == 8 and _has("optimum-quanto"):
            yield job("optimum-quanto", lambda: by_quanto(lab), bits=bits)


def healed_jobs(lab: Lab, minutes: float) -> Iterator[Job]:
    """Part B: the same text for all; what is held in bits does not train."""

    def job(method: str, make: Callable[[], Made], **key: Any) -> Job:
        return Job("healed", method, {**key, "minutes": minutes}, make)

    def low_rank(budget: float) -> Made:
        config = at_size(lab.dense, MPOConfig(ENCODER, sites="low-rank"), budget)
        return carried_out(lab, config, calibrated=True)

    for budget in HEALED:
        make = partial(planned, lab, ENCODER, bits_per_weight=budget)
        yield job("planned", lambda m=make: healed(lab, m(), minutes), budget=budget)
        if budget > 2:
            bits, group = 2, 32
            config = MPOConfig(ENCODER, sites=1, bits=bits, group=group)
            for name, calibrated in (("rounding", False), ("integers", True)):
                make = partial(carried_out, lab, config, calibrated=calibrated)
                yield job(name, lambda m=make: healed(lab, m(), minutes), bits=bits, group=group)
        yield job("low rank", lambda b=budget: healed(lab, low_rank(b), minutes), budget=budget)


def repair_jobs(lab: Lab, steps: int, results: Path) -> Iterator[Job]:
    """The second of B: of each the rate that is best on seed 0 goes on to seeds 1 and 2."""
    ways = {"auxiliary tensors": (repaired_auxiliary, AUXILIARY_RATES), "LoRA": (repaired_lora, LORA_RATES)}

    def job(method: str, rate: float, seed: int) -> Job:
        make = ways[method][0]
        return Job("repair", method, {"rate": rate, "seed": seed, "steps": steps},
                   lambda: make(lab, rate, seed, steps))  # fmt: skip

    for place in range(3):
        for method, (_, rates) in ways.items():
            yield job(method, rates[place], 0)
    for seed in (1, 2):
        for method in ways:
            done = [row for row in read(results, "repair")
                    if (row["method"], row["seed"], row["steps"]) == (method, 0, steps)]  # fmt: skip
            yield job(method, min(done, key=lambda row: row["healing"]["after"])["rate"], seed)


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def by_torchao(lab: Lab, bits: int) -> Made:
    """Symmetric integers by torchao: 8 bits with a scale per row, 4 in groups of 128."""
    from torchao.quantization import (
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        quantize_,
    )

    model = lab.new()
    names = {unit.name for unit in find_units(model, ENCODER)[0]}
    grain = PerAxis(0) if bits == 8 else PerGroup(128)
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=grain)
    quantize_(model, config, filter_fn=lambda _, name: name in names)
    unknown = {"megabytes": None}  # its tensors hide what they hold
    return model, float("nan"), {**unknown, "library": f"torchao {version('torchao')}"}


def by_quanto(lab: Lab) -> Made:
    """Symmetric integers of 8 bits with a scale per row by optimum-quanto; its 4 bits fail in inference mode."""
    from optimum.quanto import freeze, qint8, quantize

    model = lab.new()
    quantize(model, weights=qint8, include=[unit.name for unit in find_units(model, ENCODER)[0]])
    freeze(model)
    return model, float("nan"), {"megabytes": None, "library": f"optimum-quanto {version('optimum-quanto')}"}


def healed(lab: Lab, made: Made, minutes: float) -> Made:
    """Train what trains: cores in floating point, scales of integers, norms and biases; never integers."""
    model, bits, more = made
    before = float(distance(model, lab.wanted, lab.inputs))
    result = heal(model, lab.dense, lab.batches(lab.text.healing), dev=lab.batches(lab.text.held_out),
                  train="cores", minutes=minutes, seed=SEED)  # fmt: skip
    return model, bits, {**more, "distance_before": before, "healing": _healing(result.to_dict())}


def _healing(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "losses"}


def repaired_auxiliary(lab: Lab, rate: float, seed: int, steps: int) -> Made:
    """Five sites on full bonds, the central tensors frozen in 2 bits; the others train and nothing else does."""
    model, bits, more = carried_out(lab, MPOConfig(ENCODER, sites=5, bits={"central": 2}), calibrated=True)
    before = float(distance(model, lab.wanted, lab.inputs))
    result = heal(model, lab.dense, lab.batches(lab.text.healing, seed), dev=lab.batches(lab.text.held_out),
                  train="auxiliary", also=(), tensor_lr=rate, steps=steps, seed=seed)  # fmt: skip
    return model, bits, {**more, "distance_before": before, "healing": _healing(result.to_dict())}


def repaired_lora(lab: Lab, rate: float, seed: int, steps: int) -> Made:
    """The dense matrices frozen in 2 bits by the same error feedback, with LoRA beside them; only that trains."""
    from peft import LoraConfig, get_peft_model

    compressed, bits, more = carried_out(lab, MPOConfig(ENCODER, sites=1, bits=2), calibrated=True)
    base = lab.new()
    with torch.no_grad():  # PEFT does not know the modules that hold bits: their values go into linear layers
        for unit in find_units(base, ENCODER)[0]:
            there = compressed.get_submodule(unit.name)
            unit.weight.copy_(there.dense_weight())
            unit.modules[0].bias.copy_(there.bias)
    torch.manual_seed(seed)
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=ENCODER)
    get_peft_model(base, config)  # changes the linear layers in place
    before = float(distance(base, lab.wanted, lab.inputs))
    recipe = Recipe(objective="features", train="cores", also=(), steps=steps, minutes=None, lr=rate, tensor_lr=rate,
                    scale_lr=0.0, warmup=0.05, clip=1.0, temperature=1.0, blocks=0.0, every=None, precision="float32",
                    seed=seed)  # fmt: skip
    goal = objective_of("features", temperature=1.0, blocks=0.0)
    train = Feed(lab.batches(lab.text.healing, seed), seed, "batches")
    dev = Feed(lab.batches(lab.text.held_out), seed, "dev")
    began = time.perf_counter()
    with lent(base, lab.dense):
        freeze(base, "none", also=(), train=".*lora_.*")
        healer = Healer(base, lab.dense, goal, recipe, train, dev, 2**28)
        healer.begin()
        trainable, total = count_trainable(base)
        while len(healer.done.losses) < steps:
            healer.step()
            if len(healer.done.losses) % healer.every == 0 or len(healer.done.losses) == steps:
                healer.measure()
        healer.go_back()
    done = healer.done
    found = HealResult(
        objective="features", unit=goal.unit, train="LoRA", steps=steps, best_step=done.best_step,
        before=done.held_out[0][1], after=dict(done.held_out)[done.best_step], losses=(),
        held_out=tuple(done.held_out), seconds=time.perf_counter() - began, step_seconds=done.step_seconds, lr=rate,
        tensor_lr=rate, trainable=trainable, total=total, precision="float32",
    )  # fmt: skip
    added = 32 * trainable / sum(unit.matrix().numel() for unit in find_units(lab.dense, ENCODER)[0])
    return base, bits + added, {**more, "distance_before": before, "healing": _healing(found.to_dict())}


def run(
    folder: Path,
    results: Path,
    parts: Sequence[str],
    again: Sequence[str],
    only: Sequence[str],
    budgets: Sequence[float],
    minutes: float,
    steps: int,
) -> None:
    """Make the rows that are missing."""
    lab = Lab(folder)
    jobs: dict[str, Callable[[], Iterator[Job]]] = {
        "encoder": lambda: encoder_jobs(lab),
        "whole": lambda: whole_jobs(lab),
        "confirm": lambda: confirm_jobs(lab),
        "healed": lambda: healed_jobs(lab, minutes),
        "repair": lambda: repair_jobs(lab, steps, results),
    }

    def asked_for(job: Job) -> bool:
        return (not only or job.method in only) and (not budgets or job.key.get("budget") in (None, *budgets))

    for part in parts:
        make_missing(
            filter(asked_for, jobs[part]()), results, lab, lab.measured,
            lambda row: f"D {row['distance']:.4f}, STS-B {row['spearman']:.4f}", again=again,
            text={"calibration": CALIBRATION, "held_out": HELD_OUT, "compared": COMPARED, "seed": SEED},
        )  # fmt: skip


def tables(results: Path) -> str:
    """The tables of the rows that are there, as Markdown."""
    lines: list[str] = []
    encoder = read(results, "encoder")
    if encoder:
        lines += ["### The encoder, nothing trained", "", *_by_budget(encoder), "", *_every_row(encoder), ""]
    if whole := read(results, "whole"):
        lines += ["### The whole model", "", *_every_row(whole, ("size",)), ""]
    if confirm := read(results, "confirm"):
        lines += ["### Rounding by other libraries", "", *_every_row(confirm, ("bits",), ("distance", "spearman")), ""]
    if healing := read(results, "healed"):
        lines += ["### Healed", "", *_healed_rows(healing), ""]
    if repair := read(results, "repair"):
        lines += ["### A frozen 2-bit model repaired", "", *_healed_rows(repair), ""]
    return "\n".join(lines)


FAMILIES = {
    "planned": ("planned",),
    "planned, refined": ("planned, refined",),
    "rounding": ("rounding",),
    "GPTQ": ("GPTQ",),
    "integers, fitted as plans are": ("integers",),
    "low rank": ("low rank",),
    "low rank in 4 or 3 bits, the better": tuple(f"low rank in {bits} bits" for bits in FACTORS if bits),
    "MPO, 5 sites, Frobenius": ("MPO, 5 sites, Frobenius",),
}


def _by_budget(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """D by budget: of each family the row of fewest bytes that has at least those of the planned one."""
    reached = {row["budget"]: row for row in rows if row["method"] == "planned"}
    budgets = [budget for budget in BUDGETS if budget in reached]
    cells = [
        [name, *(_least(rows, methods, reached[budget]) for budget in budgets)] for name, methods in FAMILIES.items()
    ]
    return markdown(["D at bits per weight", *(f"{budget:g}" for budget in budgets)], cells)


def _least(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], planned_row: Mapping[str, Any]) -> str:
    """Of each method the row of fewest bits with at least as many as planned; of those the best."""
    asked, own = planned_row["budget"], planned_row["bits_per_weight"]
    found: list[Mapping[str, Any]] = []
    for method in methods:
        enough = [row for row in rows if row["method"] == method and row["bits_per_weight"] >= own - 1e-9]
        if enough:
            least = min(row["bits_per_weight"] for row in enough)
            found.append(min((r for r in enough if r["bits_per_weight"] == least), key=lambda row: row["distance"]))
    near = [row for row in found if row["bits_per_weight"] <= asked * 1.05]
    if not found or (not near and "planned" in methods[0]):
        return ""
    best = min(near, key=lambda row: row["distance"]) if near else min(found, key=lambda row: row["bits_per_weight"])
    bits = best["bits_per_weight"]
    return f"{shown(best['distance'])} ({best['spearman']:.3f})" + ("" if near else f" at {bits:.2f}")


def _every_row(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = (), order: Sequence[str] = ("bits_per_weight",)
) -> list[str]:
    """Every row with all that was measured."""
    head = ["method", *keys, "bits per weight", "MB", "D", "D, first 256", "STS-B", "change", "seconds to make",
            "seconds per 1,000"]  # fmt: skip
    ordered = sorted(
        rows, key=lambda row: (*(-float(row.get(key, 99)) for key in keys), *(_sorted(row, o) for o in order))
    )
    cells = [
        [_name(row), *(f"{row[key]:g}" if key in row else "" for key in keys), _bits(row),
         f"{row['megabytes']:.1f}" if row["megabytes"] else "",
         with_error(row["distance"], row["distance_error"]),
         shown(row["distance_first"]) if "distance_first" in row else "",
         f"{row['spearman']:.4f} ± {row['spearman_error']:.4f}",
         f"{row['change']:+.4f} ± {row['change_error']:.4f}", f"{row['seconds']:.0f}",
         f"{row['seconds_per_1000']:.1f}"]
        for row in ordered
    ]  # fmt: skip
    return markdown(head, cells)


def _sorted(row: Mapping[str, Any], name: str) -> float:
    value = float(row[name])
    return (-value if name == "bits_per_weight" else value) if value == value else 0.0


def _name(row: Mapping[str, Any]) -> str:
    grouped = "group" in row
    return f"{row['method']}, {row['bits']} bits, groups of {row['group']}" if grouped else row["method"]


def _bits(row: Mapping[str, Any]) -> str:
    return "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"


def _healed_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["method", "bits per weight", "rates", "seed", "trained", "steps", "minutes", "D before", "D", "STS-B"]
    cells = [
        [_name(row), _bits(row), f"{row['healing']['lr']:g}, {row['healing']['tensor_lr']:g}",
         str(row.get("seed", SEED)),
         f"{row['healing']['trainable']:,}", str(row["healing"]["steps"]), f"{row['healing']['seconds'] / 60:.1f}",
         shown(row["distance_before"]), with_error(row["distance"], row["distance_error"]),
         f"{row['spearman']:.4f} ± {row['spearman_error']:.4f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(head, cells)


DRAWN = {
    "rounding": ("rounding",),
    "gptq": ("GPTQ",),
    "whitened": ("low rank",),
    "low-rank-bits": FAMILIES["low rank in 4 or 3 bits, the better"],
    "mpo": ("MPO, 5 sites, Frobenius",),
    "integers": ("integers",),
    "planned": ("planned",),
    "refined": ("planned, refined",),
}
"""The lines of the picture, by the names they have in every figure."""


def picture(results: Path, file: Path) -> None:
    """D and the score of the encoder, nothing trained, against its bits per weight."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = read(results, "encoder")
    by_name = {row["method"]: row for row in rows}
    with rc_context(plot.style()):
        figure = Figure(figsize=(8.6, 4.6))
        panels = figure.subplots(1, 2)
        shown = (
            ("distance", "D, distance to the dense model:\nless is better", "xy"),
            ("spearman", "STS-B, Spearman", "x"),
        )
        for attempt in range(2):  # texts look for their places again once the legend has taken its own
            for ax, (what, label, log) in zip(panels, shown, strict=True):
                ax.clear()
                dense = plot.Point("dense", 32.0, by_name[DENSE][what])
                plot.frontier(
                    _points(rows, what), ylabel=label, unit="bits per weight", dense=dense,
                    floor={FLOOR: by_name[FLOOR][what]}, log=log, zero="", labels=False, ax=ax,
                )  # fmt: skip
            if attempt == 0:
                figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, file, "Distance to the dense model and STS-B score against bits per weight of MiniLM's encoder")


def _points(rows: Sequence[Mapping[str, Any]], what: str) -> list[plot.Point]:
    """Of every line the nearest row at each of its sizes, whatever is shown of it."""
    return points(
        rows, DRAWN, lambda row: row[what], least=lambda row: row["distance"],
        error=(lambda row: row["spearman_error"]) if what == "spearman" else None,
    )  # fmt: skip


def main() -> None:
    commands = Commands(__doc__)
    make = commands.run
    make.add_argument("--parts", nargs="+", default=["encoder", "whole", "confirm", "healed", "repair"])
    make.add_argument("--again", nargs="*", default=[], help="methods whose rows are made anew")
    make.add_argument("--only", nargs="*", default=[], help="methods that are made, if not all")
    make.add_argument("--budgets", nargs="*", type=float, default=[], help="of the rows that have one, if not all")
    make.add_argument("--minutes", type=float, default=10.0, help="of healing")
    make.add_argument("--steps", type=int, default=300, help="of repairing a hard quantisation")
    arguments = commands.asked(tables, picture)
    if arguments is None:
        return
    run(
        arguments.data_dir,
        arguments.results,
        arguments.parts,
        arguments.again,
        arguments.only,
        arguments.budgets,
        arguments.minutes,
        arguments.steps,
    )


if __name__ == "__main__":
    main()
