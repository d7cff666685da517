"""docs/architectures.md: what works with which architecture, tried on random tiny models.

``python -m helpers.architecture_table run RESULTS [NAME ...]`` tries what is not yet in RESULTS, a file of JSON lines,
with these versions (or the models named, again); it may be stopped and started again at any time. ``page RESULTS PAGE``
writes the page. ``make architectures`` does both.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from helpers.abilities import COLUMNS, FULL, Case, cell, read_elsewhere, written_elsewhere
from helpers.architectures import MODELS
from mpo_tn.storage.files import write_whole

PACKAGES = ("mpo-tn", "torch", "transformers", "peft", "accelerate")
HEAD = """# Architectures

What of the library works with which model of transformers: {count} tiny models with random weights (every width at most
64, one to three layers), each tried with everything of the list below by `tests/helpers/architecture_table.py`.
`make architectures` makes this page, here with {versions}.

"ok": it was done and the numbers were compared; "-": the model has nothing of the kind, or the dense model cannot do it
either; "no": it fails. The notes at the end give the reasons.

{legend}
"""
LEGEND = {
    "in cores": "the share of the parameters like matrices that `compress` with the target `.*` puts in cores",
    "exact": "full bonds give the logits of the dense model to 1e-4",
    "ties": "tied weights share their cores, also after saving and loading",
    "keep": "`keep=0.6` keeps no more, and the model still gives numbers",
    "save": "`save_pretrained` and `from_pretrained` give the same bits of every tensor and of the logits",
    "shards": "the same with several files",
    "new process": "the same logits in a process that did not compress it",
    "bf16": "compressed in bfloat16, saved and loaded: the same bits of every tensor and of the logits",
    "Trainer": "a step of `Trainer` with gradient checkpointing moves the cores",
    "compile": '`torch.compile(fullgraph=True, backend="eager")` gives the same logits',
    "export": "`torch.export` gives a program with the same logits",
    "generate": "greedy text with a cache has the scores that the dense model gives",
    "squeeze": "a round of `squeeze`: two cuts, a step of tuning, saved and loaded",
    "program": "`mpo-tn compress` gives the model that `compress` gives, and `mpo-tn inspect` reads the dense one",
    "on load": "`from_pretrained(quantization_config=...)` gives it, too, and it can be saved",
    "LoRA": "adapters of PEFT on all untied MPO layers: nothing changes, they train, and they merge into the cores",
    "dequantize": "`model.dequantize()` gives the dense model of the same matrices, and it can be saved",
}


def versions() -> dict[str, str]:
    """Of everything that a cell depends on."""
    return {name: version(name) for name in PACKAGES}


class Elsewhere:
    """Another process, which has compressed nothing: it reads folders and says what the models in them give."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "helpers.architecture_table", "elsewhere"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __call__(self, model: Any, place: Path) -> torch.Tensor:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([type(model).__name__, str(place)]) + "\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        if said:
            raise RuntimeError(said)
        return written_elsewhere(place)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def elsewhere() -> None:
    """The other process: a line for each folder, empty if all went well."""
    import mpo_tn.torch as _  # noqa: F401 - what a reader has to import

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        build, place = json.loads(line)
        said = ""
        try:
            read_elsewhere(build, Path(place))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"[:300]
        answers.write(json.dumps(said) + "\n")
        answers.flush()


def row(name: str, columns: Iterable[str], folder: Path, other: Elsewhere | None) -> dict[str, Any]:
    """Everything that is tried with a model."""
    began = time.perf_counter()
    case = Case(name, folder, other_process=other)
    found: dict[str, Any] = {
        "name": name,
        "kind": MODELS[name].kind,
        "class": MODELS[name].build,
        "versions": versions(),
    }
    case.model(FULL)
    assert case.report is not None
    found["coverage"] = case.report.coverage.to_dict()
    found["cells"] = {column: cell(column, case) for column in columns}
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last row of each model."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {found["name"]: found for found in map(json.loads, filter(None, lines))}


def run(results: Path, again: Sequence[str] = ()) -> None:
    """Add rows of the models that have none of these versions, or of those that are named."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    now, there = versions(), read(results)
    todo = again or [name for name in MODELS if name not in there or there[name]["versions"] != now]
    other = Elsewhere()
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in todo:
        with tempfile.TemporaryDirectory() as folder:
            found = row(name, COLUMNS, Path(folder), other)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        bad = {column: value[1] for column, value in found["cells"].items() if value[0] == "fails"}
        print(
            f"{name}: {found['seconds']} s, {100 * found['coverage']['share']:.1f} %, {bad or 'all well'}", flush=True
        )
    other.close()


def page(results: Path) -> str:
    """The page."""
    rows = [found for name, found in read(results).items() if name in MODELS]
    rows.sort(key=lambda found: list(MODELS).index(found["name"]))
    told = ", ".join(f"{name} {number}" for name, number in rows[-1]["versions"].items())
    legend = "\n".join(f"- **{name}**: {text}" for name, text in LEGEND.items())
    notes: dict[str, int] = {}

    def shown(value: Sequence[str]) -> str:
        if value[0] == "ok":
            return "ok"
        number = notes.setdefault(value[1], len(notes) + 1)
        return f"{'-' if value[0] == 'n/a' else 'no'} [{number}]"

    def share(found: dict[str, Any]) -> str:
        exact = 100 * found["coverage"]["share"]
        text = f"{exact:.1f} %" if exact == 100 or exact < 99.95 else "99.9 %"
        reasons = sorted({f"{each['name']}: {each['reason']}" for each in found["coverage"]["dense"]})
        return f"{text} [{notes.setdefault(reasons[0], len(notes) + 1)}]" if exact < 95 else text

    lines = [HEAD.format(count=len(rows), versions=told, legend=legend)]
    for kind in dict.fromkeys(found["kind"] for found in rows):
        own = [found for found in rows if found["kind"] == kind]
        lines += [f"## {kind[0].upper()}{kind[1:]}", ""]
        head = ["model", "class", "in cores", *COLUMNS]
        lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))]
        for found in own:
            cells = [found["name"], f"`{found['class']}`", share(found), *(shown(found["cells"][c]) for c in COLUMNS)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    count = [value[0] for found in rows for value in found["cells"].values()]
    least = min(rows, key=lambda found: found["coverage"]["share"])
    lines += [
        "## Notes", "",
        f"{count.count('ok')} cells are ok, {count.count('n/a')} do not apply, {count.count('fails')} fail. "
        f"In cores: at least {share(least)} ({least['name']}).", "",
    ]  # fmt: skip
    lines += [f"{number}. {_safe(text)}" for text, number in notes.items()]
    if untried := [name for name in MODELS if name not in {found["name"] for found in rows}]:
        lines += ["", f"Not tried with these versions: {', '.join(untried)}."]
    return "\n".join(lines) + "\n"


def _safe(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "run":
        run(Path(words[0]), words[1:])
    elif command == "page":
        write_whole(Path(words[1]), page(Path(words[0])).encode())
    else:
        elsewhere()
