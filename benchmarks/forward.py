"""Forward time of whole compressed models against the dense one, mode by mode.

``python benchmarks/forward.py run DATA_DIR RESULTS`` makes the rows that are missing in RESULTS, one JSON line each;
``table RESULTS`` prints them. DATA_DIR holds the files of STS-B, whose training sentences calibrate. The dense model
and every mode take turns; what is given is the median, over the rounds, of the ratio of two times of one round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import in_turns  # isort: skip
import numpy as np
import torch
from baselines import Subject, planned
from commands import Commands
from rows import Job, markdown, read, surroundings, write

from mpo_tn.app.demo import ENCODER, demo_model
from mpo_tn.torch import set_mode
from mpo_tn.torch.hf.folder import load_model, load_tokenizer
from mpo_tn.torch.models.samples import Samples
from mpo_tn.tuning import load_task
from mpo_tn.tuning.tasks.batches import sentence_batches

SEED, SENTENCES = 0, 160
PLANS: Mapping[str, Mapping[str, float]] = {
    "58 MB, max_flops 0.6": {"size": 58e6, "max_flops": 0.6},
    "51.4 MB, max_flops 0.6": {"size": 51.4e6, "max_flops": 0.6},
    "51.4 MB": {"size": 51.4e6},
}
"""Sizes of the whole model, of which the word table takes 47 MB and stays."""
MODES = ("auto", "cached", "rebuild", "chain")
BATCHES = ((1, 12), (1, 128), (32, 12), (32, 128))
"""Sentences, and tokens of each."""


def subject(folder: Path) -> Subject:
    """MiniLM, and sentences to calibrate on."""
    source = demo_model()
    train = load_task("STS-B", folder).train
    texts = list(dict.fromkeys(train.texts[0]))[:SENTENCES]
    batches = sentence_batches(texts, load_tokenizer(source), batch_size=32, max_length=128, seed=SEED)
    return Subject(load_model(source).eval(), Samples.of([dict(batch.inputs) for batch in batches.in_order()]))


def jobs(known: Subject) -> Iterator[Job]:
    """A row for every plan; its times by batch go into the same row."""
    for name, budget in PLANS.items():
        given = {key: int(value) if key == "size" else value for key, value in budget.items()}
        yield Job("forward", name, {}, lambda given=given: planned(known, ENCODER, **given))


def ratios(dense: Any, model: Any, repeats: int) -> list[dict[str, Any]]:
    """Times of the dense model, and of every mode relative to them."""
    models = {"dense": dense, **{mode: _in_mode(model, mode) for mode in MODES}}
    found: list[dict[str, Any]] = []
    draws = torch.Generator().manual_seed(SEED)
    for sentences, tokens in BATCHES:
        ids = torch.randint(1000, 30000, (sentences, tokens), generator=draws)
        calls = max(1, 512 // (sentences * tokens))
        runs = {name: _run(each, ids, calls) for name, each in models.items()}
        with torch.no_grad():
            times, _ = in_turns(runs, repeats)
        seconds = {name: np.array(values) for name, values in times.items()}
        found.append({
            "sentences": sentences, "tokens": tokens, "dense_seconds": float(np.median(seconds["dense"])) / calls,
            **{mode: float(np.median(seconds[mode] / seconds["dense"])) for mode in MODES},
            "quartiles": {
                mode: [float(q) for q in np.quantile(seconds[mode] / seconds["dense"], (0.25, 0.75))] for mode in MODES
            },
        })  # fmt: skip
    return found


def _run(model: Any, ids: torch.Tensor, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            model(input_ids=ids)

    return run


def _in_mode(model: Any, mode: str) -> Any:
    found = copy.deepcopy(model)
    set_mode(found, mode)
    return found


def run(folder: Path, results: Path, again: Sequence[str], repeats: int) -> None:
    """Make the rows that are missing."""
    known = subject(folder)
    for job in jobs(known):
        if any(job.made(row) for row in read(results, job.part)) and job.method not in again:
            continue
        model, bits, more = job.make()
        model.eval()
        row = {
            "part": job.part, "method": job.method, "bits_per_weight": bits, **more,
            "times": ratios(known.dense, model, repeats), "repeats": repeats,
            **surroundings(calibration=SENTENCES, seed=SEED),
        }  # fmt: skip
        write(results, row, job)
        print("\n".join(_lines([row])), flush=True)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["plan", "bits per weight", "sentences x tokens", "dense, ms", *MODES]
    cells = [
        [row["method"], f"{row['bits_per_weight']:.2f}", f"{part['sentences']} x {part['tokens']}",
         f"{1e3 * part['dense_seconds']:.1f}",
         *("{:.2f} ({:.2f} to {:.2f})".format(part[mode], *part["quartiles"][mode]) for mode in MODES)]
        for row in rows for part in row["times"]
    ]  # fmt: skip
    return markdown(head, cells)


def main() -> None:
    commands = Commands(__doc__)
    commands.run.add_argument("--again", nargs="*", default=[], help="plans whose rows are made anew")
    commands.run.add_argument("--repeats", type=int, default=9)
    arguments = commands.asked(lambda results: "\n".join(_lines(read(results, "forward"))))
    if arguments is not None:
        run(arguments.data_dir, arguments.results, arguments.again, arguments.repeats)


if __name__ == "__main__":
    main()
