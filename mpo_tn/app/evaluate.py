"""Several models measured on the same text: what they score, how far they are from the dense one, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpo_tn.app.fidelity import Fidelity, reading_length
from mpo_tn.app.measuring import Bench, Measured
from mpo_tn.app.texts import kind_of
from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress, silent
from mpo_tn.torch.hf.folder import check_source, dense_parameters, load_model, load_tokenizer, weight_bytes
from mpo_tn.torch.models.distance import Distance
from mpo_tn.tuning import Settings, TaskData, load_task, read_texts
from mpo_tn.tuning.result import plain
from mpo_tn.tuning.tasks.batches import first_token, unknown_share
from mpo_tn.tuning.tasks.data import load_labelled

# Texts that models are compared on: of MiniLM's D the standard error is then a few percent.
SAMPLE = 256
_WITH_ARTICLE = {"encoder": "an encoder", "classifier": "a classifier", "language model": "a language model"}


@dataclass(frozen=True)
class Score:
    """A score, its standard error, and how much it differs from the dense model's.

    Errors are of the draw of examples (bootstrap); ``change_error`` is that of the difference on the same examples.
    """

    name: str
    value: float
    error: float
    change: float | None = None
    change_error: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One model.

    ``bits_per_weight`` are all bytes of its weight files, in bits, over the parameters of the dense model of its shape.
    ``seconds`` are for 1,000 texts, of a language model for 1,000 tokens. ``distance`` and ``fidelity`` compare it with
    the dense model, if one was named.
    """

    model: str
    bytes: int
    dense_parameters: int
    bits_per_weight: float
    seconds: float
    scores: tuple[Score, ...]
    distance: Distance | None
    fidelity: Fidelity | None
    is_reference: bool


@dataclass(frozen=True)
class EvalReport:
    """What was measured, on what, and how; ``kind`` is of all models."""

    kind: str
    data: str
    how: tuple[str, ...]
    threads: int
    device: str
    rows: list[Evaluation] = field(default_factory=list[Evaluation])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; what is no number becomes None."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Source:
    """What models are measured on: the dev set of a GLUE task, or the texts of a file, with labels or without."""

    task: str | None = None
    data_dir: Path | None = None
    texts: Path | None = None
    text: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if (self.task is None) == (self.texts is None):
            raise MPOError("models are measured on a task or on texts: give one of --task and --texts FILE")
        if self.texts is None and (self.text is not None or self.label is not None):
            raise MPOError("--text and --label name columns of the file that --texts names: give that, too")
        if self.data_dir is not None and self.task is None:
            raise MPOError("--data-dir is the folder of a task: give --task, too")

    def read(self, kind: str, model: Any) -> tuple[tuple[str, ...], TaskData | None, str]:
        """The texts or the task, and what to call them. A language model reads a ``.txt`` file as one text.

        The classes of a file's labels are those that the model was tuned on.

        Raises:
            MPOError: they cannot be read, or are nothing for models of this kind.
        """
        if self.texts is not None and self.label is not None:
            classes = list(model.config.id2label.values()) if kind == "classifier" else []
            own = load_labelled(self.texts, self.text, self.label, classes if len(classes) > 1 else ())
            return (), self._checked(own, kind), own.source
        if self.texts is not None:
            return read_texts(self.texts, self.text, whole=kind == "language model"), None, str(self.texts)
        data = load_task(self.task or "", self.data_dir)
        if not isinstance(data, TaskData):
            if kind != "language model":
                raise MPOError("the task text is for language models: give --texts FILE")
            return data.valid, None, f"the validation text of {data.source}"
        return (), self._checked(data, kind), f"the dev set of {data.name}"

    def _checked(self, data: TaskData, kind: str) -> TaskData:
        if kind == "language model":
            raise MPOError(f"a language model has no head for {data.name}: give --texts FILE, or tune it on the task")
        if kind == "encoder" and not (data.task.is_regression and len(data.task.text) == 2):
            raise MPOError(
                f"a model without a head is measured on pairs with a score, as those of STS-B: tune it on {data.name} "
                "with mpo-tn finetune, or give --texts FILE without labels"
            )
        return data


def evaluate(
    models: Sequence[str],
    source: Source,
    *,
    against: str | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    sample: int = SAMPLE,
    device: str = "cpu",
    progress: Progress | None = None,
) -> EvalReport:
    """Measure models on the same text, one after another.

    Sentence encoders: Spearman's correlation of the cosines of mean-pooled embeddings with the scores of STS-B.
    Language models: perplexity. Models with the head of a task: its scores. All: the distance D from the dense model.

    Args:
        models: folders or hub names.
        source: the task or the texts.
        against: the dense model; it gets the first row.
        batch_size: texts at a time; 32, of a language model 4 blocks.
        max_length: tokens at which a text is cut, or of a block; what the model reads, and at most 512.
        sample: the most texts, or blocks, on which models are compared with the dense one; spread evenly.
        device: where.
        progress: told of every model.

    Raises:
        MPOError: models that cannot be read or are of different kinds, text that cannot be read, nothing to measure.
    """
    if sample < 1:
        raise MPOError(f"sample={sample} leaves nothing to compare models on: give for instance {SAMPLE}")
    names = list(dict.fromkeys((*(() if against is None else (against,)), *models)))
    for name in names:
        check_source(name)
    say = progress or silent
    report: EvalReport | None = None
    bench: Bench | None = None
    reference: Measured | None = None
    for done, name in enumerate(names):
        say(done, len(names), f"reading {name}")
        model, tokenizer = load_model(name).to(device), load_tokenizer(name)
        kind = kind_of(model)
        if bench is None or report is None:
            texts, data, called = source.read(kind, model)
            if data is None and kind != "language model" and against is None:
                raise MPOError(f"on text alone {_WITH_ARTICLE[kind]} has no score: name the dense model with --against")
            length = max_length or reading_length(model, tokenizer)
            size = batch_size or (4 if kind == "language model" else 32)
            bench = Bench(texts, data, Settings(batch_size=size, max_length=length, device=device), sample)
            report = EvalReport(kind, called, (), torch.get_num_threads(), device)
        elif kind != report.kind:
            raise MPOError(
                f"{names[0]} is {_WITH_ARTICLE[report.kind]} and {name} {_WITH_ARTICLE[kind]}: measure them apart"
            )
        say(done, len(names), f"measuring {name}")
        try:
            found = bench.measure(model, tokenizer, reference)
        except MPOError as error:
            raise MPOError(f"{name}: {error}") from error
        if not report.rows:
            report = replace(report, how=_how(bench, found, kind, tokenizer, against is not None))
        report.rows.append(_row(name, kind, found, reference, is_reference=name == against))
        if name == against:
            reference = found
    assert report is not None
    say(len(names), len(names), "measured")
    return report


def _row(name: str, kind: str, found: Measured, dense: Measured | None, *, is_reference: bool) -> Evaluation:
    scores: list[Score] = []
    for metric, drawn in found.drawn.items():
        change = (None, None)
        if dense is not None and np.isfinite(drawn[0]):
            change = _value_and_error(drawn - dense.drawn[metric])
        scores.append(Score(metric, *_value_and_error(drawn), *change))
    size, parameters = weight_bytes(name), dense_parameters(name)
    return Evaluation(
        name, size, parameters, 8 * size / parameters, 1000 * found.seconds, tuple(scores), found.distance,
        found.fidelity, is_reference,
    )  # fmt: skip


def _value_and_error(drawn: np.ndarray) -> tuple[float, float]:
    known = len(drawn) > 2 and bool(np.isfinite(drawn).all())
    return float(drawn[0]), float(drawn[1:].std(ddof=1)) if known else math.nan


def _how(bench: Bench, found: Measured, kind: str, tokenizer: Any, compared: bool) -> tuple[str, ...]:
    """What was done, in sentences."""
    count, length = len(found.batches.rows), bench.settings.max_length
    some = min(count, bench.sample)
    if kind == "language model":
        tokens = sum(len(row["input_ids"]) - 1 for row in found.batches.rows)
        first = first_token(tokenizer)
        begin = (
            "Nothing is put before a text" if first is None else f"Each text begins with {tokenizer.decode([first])}"
        )
        said = (
            f"{tokens:,} tokens in {count:,} blocks of {length} that share one token (a stride of {length - 1}): each "
            f"is scored once, from what is before it in its block. {begin}.",
            f"D: mean KL(dense || model) of next tokens, in nats, on {some:,} of the blocks.",
        )
    elif kind == "classifier":
        said = (
            f"{count:,} texts, cut at {length} tokens.",
            f"D: mean KL(dense || model) of the classes, in nats, on {some:,} of them.",
        )
    else:
        said = (
            f"{count:,} texts, cut at {length} tokens; embeddings are means over tokens.",
            f"D: |h - h_dense|^2 / |h_dense|^2 of the last hidden states on {some:,} of them, on which cosines of "
            "embeddings, shared ten nearest neighbours and rank correlation of similarities are taken, too.",
        )
    said = said if compared else said[:1]
    unknown = unknown_share(found.batches.rows, tokenizer)
    if unknown > 0.1:
        said += (f"{unknown:.0%} of the tokens are unknown to the tokenizer.",)
    return said
