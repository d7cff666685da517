"""Size against loss: what language models are worth at every number of bytes, by every way there is to get there.

``python benchmarks/language.py run DATA_DIR RESULTS`` makes the rows that are missing in RESULTS, one JSON line each;
``table RESULTS`` prints tables, ``plot RESULTS FILE`` draws the loss against bits per weight. DATA_DIR holds
``stories260K`` and ``wikitext-2``. The second model is trained here first (five minutes of one core) and kept in a
folder of its own (``--cache``).

What is compressed is every matrix of the blocks; word tables and the head, which are one matrix in both, stay as they
are. All is calibrated on the same windows of text. The loss is the mean over the tokens of other windows, in nats; each
window begins with the token of the beginning. The texts: of the kind that was calibrated on, and WikiText-2.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import Subject, at_size, carried_out, forget, make_missing, planned, stored_bytes, zeroed
from commands import Commands, save
from language_models import LENGTH, MEASURED, SEED, Language, gpt, stories
from rows import Job, Made, markdown, points, read, shown
from torch.nn import functional

from mpo_tn import plot
from mpo_tn.planning.config import MPOConfig
from mpo_tn.torch import plan
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.samples import Samples
from mpo_tn.truncate.quantize import GROUP

BUDGETS = (8.1, 4.1, 3.1, 2.3, 1.65, 1.25)
ROUNDED = ((8, 128), (4, 128), (3, 128), (2, 128), (2, 32))
"""Bits, and columns a scale."""
FACTORS = (4, 3, 2)
PAIRED = BUDGETS[2:]
"""Of low-rank pairs in bits: above, integers are far ahead."""
BATCH = 8
DENSE, FLOOR = "dense", "matrices zero"
MODELS = ("stories260K", "GPT")
UNIFORM = ("rounding", "GPTQ", *(f"low rank in {bits} bits" for bits in FACTORS))


class Lab(Subject):
    """A model, what it is calibrated on, and how its losses are measured."""

    def __init__(self, language: Language) -> None:
        super().__init__(language.model, Samples.of(_batches(language.calibration)))
        self.language = language
        self.first = _batches(next(iter(language.measured.values())))
        self.wanted = list(outputs(self.dense, self.first))

    def measured(self, model: Any) -> dict[str, Any]:
        """Losses by text, in the mean and by window; D on the first text; size."""
        model.eval()
        by_window = {name: _losses(model, ids) for name, ids in self.language.measured.items()}
        return {
            "megabytes": stored_bytes(model) / 1e6,
            "loss": {name: float(found.mean()) for name, found in by_window.items()},
            "distance": float(distance(model, self.wanted, self.first)),
            "unigram": self.language.unigram,
            "losses": {name: [round(float(loss), 4) for loss in found] for name, found in by_window.items()},
        }


def _batches(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids.split(BATCH)]


def _losses(model: Any, ids: torch.Tensor) -> np.ndarray:
    """Nats a token, window by window."""
    found: list[torch.Tensor] = []
    with torch.no_grad():
        for part in ids.split(BATCH):
            logits = model(input_ids=part).logits[:, :-1]
            found.append(functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(1))
    return torch.cat(found).double().numpy()


def jobs(lab: Lab) -> Iterator[Job]:
    """Every row of a model."""
    target = lab.language.target

    def job(method: str, make: Any, **key: Any) -> Job:
        return Job(lab.language.name.lower(), method, key, make)

    def uniform(config: MPOConfig, budget: float) -> Made:
        return carried_out(lab, at_size(lab.dense, config, budget), calibrated=True)

    yield job(DENSE, lambda: (lab.new(), 32.0, {}))
    yield job(FLOOR, lambda: zeroed(lab, target))
    exact: set[float] = set()
    for bits, group in ROUNDED:
        config = MPOConfig(target, sites=1, bits=bits, group=group)
        if group == GROUP:
            exact.add(math.ceil(1e4 * plan(lab.dense, config).bits_per_weight) / 1e4)
        yield job("rounding", lambda c=config: carried_out(lab, c), bits=bits, group=group)
        yield job("GPTQ", lambda c=config: carried_out(lab, c, calibrated=True), bits=bits, group=group)
    for bits in FACTORS:
        config = MPOConfig(target, sites="low-rank", bits=bits)
        for budget in PAIRED:
            yield job(f"low rank in {bits} bits", lambda c=config, b=budget: uniform(c, b), budget=budget)
    for budget in (*BUDGETS, *sorted(exact, reverse=True)):  # the latter so that plans meet integers at equal bytes
        yield job("planned", lambda b=budget: planned(lab, target, bits_per_weight=b), budget=budget)


def run(folder: Path, results: Path, cache: Path, names: Sequence[str], again: Sequence[str]) -> None:
    """Make the rows that are missing."""
    for name in names:
        forget()
        language = stories(folder) if name == "stories260K" else gpt(folder, cache)
        lab = Lab(language)
        text = {"calibration": len(language.calibration), "tokens": LENGTH, "seed": SEED, "at most": MEASURED}
        make_missing(
            jobs(lab), results, lab, lab.measured, _said, again=again,
            text={**text, **{name: len(ids) for name, ids in language.measured.items()}},
        )  # fmt: skip


def _said(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in row["loss"].items()) + f", D {row['distance']:.4f}"


def tables(results: Path) -> str:
    """The tables of the rows that are there, as Markdown."""
    lines: list[str] = []
    for name in MODELS:
        if rows := read(results, name.lower()):
            dense = _row(rows, DENSE)
            lines += [f"### {name}", "", _caption(rows), "", *_by_budget(rows), "", *_every_row(rows, dense), ""]
    return "\n".join(lines)


def _row(rows: Sequence[Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    return next(row for row in rows if row["method"] == method)


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    dense, floor = _row(rows, DENSE), _row(rows, FLOOR)
    said = "; ".join(
        f"{text}: dense {loss:.3f}, matrices zero {floor['loss'][text]:.3f}" for text, loss in dense["loss"].items()
    )
    return (
        f"Nats a token. {said}. How often words are in the calibration text alone: {dense['unigram']:.3f} on the first."
    )


def _by_budget(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every plan beside the best uniform model of no more bytes, text by text."""
    texts = list(_row(rows, DENSE)["loss"])
    head = ["bits per weight", *(f"{text}: planned, best uniform, difference" for text in texts), "which"]
    cells: list[list[str]] = []
    for row in sorted((row for row in rows if row["method"] == "planned"), key=lambda row: -row["bits_per_weight"]):
        cells.append([f"{row['bits_per_weight']:.2f}"])
        within = [
            other for other in rows
            if other["method"] in UNIFORM and other["bits_per_weight"] <= row["bits_per_weight"] * 1.005
        ]  # fmt: skip
        for text in texts:
            if not within:
                cells[-1].append(f"{row['loss'][text]:.3f}, none so small")
                continue
            best = min(within, key=lambda other: other["loss"][text])
            gap, error = _difference(row, best, text)
            cells[-1].append(f"{row['loss'][text]:.3f}, {best['loss'][text]:.3f}, {gap:+.3f} ± {error:.3f}")
        first = min(within, key=lambda other: other["loss"][texts[0]], default=None)
        cells[-1].append(_name(first) if first else "")
    return markdown(head, cells)


def _difference(row: Mapping[str, Any], other: Mapping[str, Any], text: str) -> tuple[float, float]:
    """How much more a row loses than another, and the standard error over the windows that both have read."""
    apart = np.subtract(row["losses"][text], other["losses"][text])
    return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart)))


def _name(row: Mapping[str, Any]) -> str:
    if "group" in row:
        return f"{row['method']}, {row['bits']} bits, groups of {row['group']}"
    return f"{row['method']}"


def _every_row(rows: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> list[str]:
    texts = list(dense["loss"])
    head = ["method", "bits per weight", "MB", *(f"{text}, above dense" for text in texts), "D", "seconds to make"]
    cells = [
        [_name(row), f"{row['bits_per_weight']:.2f}", f"{row['megabytes']:.2f}",
         *("{:+.4f} ± {:.4f}".format(*_difference(row, dense, text)) for text in texts),
         shown(row["distance"]), f"{row['seconds']:.1f}"]
        for row in sorted(rows, key=lambda row: (-row["bits_per_weight"], row["distance"]))
    ]  # fmt: skip
    return markdown(head, cells)


DRAWN = {"rounding": ("rounding",), "gptq": ("GPTQ",), "low-rank-bits": UNIFORM[2:], "planned": ("planned",)}
"""The lines of the picture, by the names they have in every figure."""


LEVEL = 1e-4
"""Nats above the dense model that cannot be told from none, and have no place on a logarithmic axis."""


def picture(results: Path, file: Path) -> None:
    """For each model what it loses on text of the kind that was calibrated on, above the dense model's loss."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(plot.style()):
        figure = Figure(figsize=(8.6, 4.4))
        panels = figure.subplots(1, 2)
        for attempt in range(2):  # texts look for their places again once the legend has taken its own
            for name, ax in zip(MODELS, panels, strict=True):
                rows = read(results, name.lower())
                dense = _row(rows, DENSE)
                text = next(iter(dense["loss"]))

                def above(row: Mapping[str, Any], zero: float = dense["loss"][text], text: str = text) -> float:
                    return float(row["loss"][text] - zero)

                ax.clear()
                plot.frontier(
                    [point for point in points(rows, DRAWN, above) if point.value >= LEVEL],
                    ylabel=f"{name}, {text}:\nnats a token above dense, less is better",
                    unit="bits per weight",
                    floor={"word frequencies alone": dense["unigram"] - dense["loss"][text]},
                    log="xy", zero="", labels=False, ax=ax,
                )  # fmt: skip
            if attempt == 0:
                figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        save(figure, file, "What two language models lose, against bits per weight of the matrices of their blocks")


def main() -> None:
    commands = Commands(__doc__)
    commands.run.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    commands.run.add_argument("--again", nargs="*", default=[], help="methods whose rows are made anew")
    commands.run.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "mpo_tn_benchmarks")
    arguments = commands.asked(tables, picture)
    if arguments is not None:
        run(arguments.data_dir, arguments.results, arguments.cache, arguments.models, arguments.again)


if __name__ == "__main__":
    main()
