"""Tuning on top of few bits: frozen centres with auxiliary tensors, against LoRA on dense matrices in the same bits.

``python benchmarks/frozen.py run DATA_DIR RESULTS --tasks MRPC STS-B`` makes the runs that are missing in RESULTS, one
file each, so that it can be stopped and started again; ``python benchmarks/frozen.py table RESULTS`` prints a table,
with the runs of 16-bit LFA, LoRA and full fine-tuning that ``benchmarks/glue.py`` keeps in a folder beside it.

Both ways start from the same model, whose matrices are put into integers by the same error feedback on 1,024 sentences
of the training set, and train as many numbers, with the rates that were best for each (docs/results.md). What trains
beside them, norms, biases and the head, is the same. LoRA on integers is what QLoRA does, with integers in place of its
four-bit floats.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import common  # threads, before NumPy
import glue
import numpy as np
import torch
from baselines import Subject, carried_out, stored_bytes
from commands import Commands
from rows import markdown

from mpo_tn.planning.config import MPOConfig
from mpo_tn.torch.hf.folder import load_model, load_tokenizer
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.survey import find_units
from mpo_tn.tuning import TaskData, finetune, load_task
from mpo_tn.tuning.tasks.batches import sentence_batches

CALIBRATION, SEED = 1024, 0
BITS = (4, 3)
WAYS = ("lfa", "lora")
"""Method of :mod:`benchmarks.glue`, by which the results are named, too."""
SHOWN = {
    "lfa": "centres frozen in {} bits, auxiliary tensors train",
    "lora": "matrices frozen in {} bits, LoRA trains",
}
BESIDE = {"full": "dense, all trained", "lfa": "MPO, auxiliary tensors train", "lora": "dense frozen, LoRA trains"}


class Start:
    """Where the runs of one task start: the model with its matrices in bits, each made once and kept in a folder."""

    def __init__(self, data: TaskData, folder: Path) -> None:
        self.data, self.folder, self.source = data, folder, glue.demo_model()

    @cached_property
    def subject(self) -> Subject:
        """The dense model and sentences of the training set."""
        texts = list(dict.fromkeys(text for side in zip(*self.data.train.texts, strict=True) for text in side))
        drawn = [texts[k] for k in np.random.default_rng(SEED).permutation(len(texts))[:CALIBRATION]]
        tokenizer = load_tokenizer(self.source)
        batches = sentence_batches(drawn, tokenizer, batch_size=32, max_length=128, seed=SEED)
        model = load_model(self.source).eval()
        return Subject(model, Samples.of([dict(batch.inputs) for batch in batches.in_order()]))

    def made(self, way: str, bits: int) -> tuple[Path, dict[str, Any]]:
        """The folder to start from, and what is known of it: bits per weight of the frozen part, and bytes."""
        where = self.folder / f"{self.data.name}-{way}-{bits}"
        if not where.exists():
            sites: dict[str, Any] = (
                {"sites": 5, "bits": {"central": bits}} if way == "lfa" else {"sites": 1, "bits": bits}
            )
            model, per_weight, _ = carried_out(self.subject, MPOConfig(glue.ENCODER, **sites), calibrated=True)
            size = stored_bytes(model)
            if way == "lora":  # PEFT does not know the modules that hold bits: their values go into linear layers
                model = self._in_linear_layers(model)
            temporary = Path(tempfile.mkdtemp(dir=self.folder))
            shutil.copytree(self.source, temporary, dirs_exist_ok=True)
            for weights in temporary.glob("*.safetensors"):
                weights.unlink()
            model.save_pretrained(temporary)
            found = {"bits_per_weight": per_weight, "bytes": size, "bits": bits}
            (temporary / "start.json").write_text(json.dumps(found), encoding="utf-8")
            temporary.rename(where)
        return where, json.loads((where / "start.json").read_text(encoding="utf-8"))

    def _in_linear_layers(self, compressed: Any) -> Any:
        model = self.subject.new()
        with torch.no_grad():
            for unit in find_units(model, glue.ENCODER)[0]:
                unit.weight.copy_(compressed.get_submodule(unit.name).dense_weight())
        return model


def run(data: TaskData, seed: int, results: Path, start: Start) -> None:
    """The rows of a task and seed that are missing."""
    maker = glue.Maker(data, seed, results, bf16=True)
    for bits in BITS:
        for way in WAYS:
            row = f"{way}-{bits}-bits"
            if not maker.file(row).exists():
                folder, known = start.made(way, bits)
                result, model = finetune(folder, data, glue.method(way), maker.settings(maker.epochs))
                if way == "lfa":  # what is in memory: integers, scales and all that is left in floating point
                    known = {**known, "bytes": stored_bytes(model)}
                else:
                    known = {**known, "bytes": known["bytes"] + 4 * result.trainable}
                result.notes.update(known)
                maker.write(row, None, result)


def tables(results: Path) -> str:
    """Scores by row: the mean over the seeds and its spread, the difference seed by seed, and bytes in memory."""
    lines: list[str] = []
    found = {name: runs for folder in (results.parent / "glue", results) for name, runs in _by_row(folder)}
    for task in dict.fromkeys(task for task, row in found if row.endswith("bits")):
        rows = [*((row, text) for row, text in BESIDE.items()),
                *((f"{way}-{bits}-bits", SHOWN[way].format(bits)) for bits in BITS for way in WAYS)]  # fmt: skip
        cells = [_cells(text, found[task, row]) for row, text in rows if (task, row) in found]
        lines += ["", f"## {task}", "", *markdown(("", "score", "each seed", "trained", "MB in memory"), cells)]
    return "\n".join(lines)


def _by_row(folder: Path) -> Iterator[tuple[tuple[str, str], list[dict[str, Any]]]]:
    files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    plain = [run for run in files if run["keep"] is None]
    for key in dict.fromkeys((run["task"], run["row"]) for run in plain):
        yield key, sorted((run for run in plain if (run["task"], run["row"]) == key), key=lambda run: run["seed"])


def _cells(text: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    scores = [run["headline"] or 0.0 for run in runs]
    spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    size = float(np.mean([run["notes"].get("bytes", 4 * run["total"]) for run in runs])) / 1e6
    each = ", ".join(f"{score:.1f}" for score in scores)
    return text, f"{np.mean(scores):.1f}{spread}", each, f"{runs[0]['trainable']:,}", f"{size:.1f}"


def main() -> None:
    commands = Commands(__doc__)
    commands.run.add_argument("--tasks", nargs="+", default=["MRPC", "STS-B"])
    commands.run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    commands.run.add_argument("--cache", type=Path, help="where models in bits are kept between calls")
    arguments = commands.asked(tables)
    if arguments is None:
        return
    torch.set_num_threads(common.THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        arguments.results.mkdir(parents=True, exist_ok=True)
        tasks = [load_task(task, arguments.data_dir) for task in arguments.tasks]
        starts = {data.name: Start(data, cache) for data in tasks}
        for seed in arguments.seeds:
            for data in tasks:
                run(data, seed, arguments.results, starts[data.name])


if __name__ == "__main__":
    main()
