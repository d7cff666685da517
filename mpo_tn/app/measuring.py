"""One model measured on one text: its scores and their errors, its distance from the dense model, its speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpo_tn.app.fidelity import Fidelity, embed_batches, fidelity
from mpo_tn.app.texts import batches_of, kind_of
from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.distance import Distance, distance, outputs
from mpo_tn.tuning import Settings, TaskData
from mpo_tn.tuning.scoring import losses_of, perplexities, predictions_of
from mpo_tn.tuning.tasks.batches import Batches, task_batches
from mpo_tn.tuning.tasks.glue import METRICS

# A standard error from so many draws is good to 4 %.
_DRAWS = 300
# Fidelity looks at the ten nearest texts, so that there have to be more.
_FEWEST_FOR_NEIGHBOURS = 11


@dataclass(frozen=True)
class Measured:
    """What one model gave.

    ``drawn`` holds of every score its value and then those of :data:`_DRAWS` resamplings, the same ones for every
    model. ``seconds`` are for one text, of a language model for one token. ``reference`` is what other models are
    compared with: the rows that were encoded, those chosen for comparing, embeddings and outputs.
    """

    drawn: Mapping[str, np.ndarray]
    seconds: float
    batches: Batches
    embeddings: np.ndarray | None
    reference: Any
    distance: Distance | None = None
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Bench:
    """What every model is measured on and how: texts, or the dev set of a task; how many texts are compared closely."""

    texts: tuple[str, ...]
    data: TaskData | None
    settings: Settings
    sample: int

    def measure(self, model: Any, tokenizer: Any, dense: Measured | None) -> Measured:
        """Score a model, and compare it with what the dense one gave, if there is one.

        Raises:
            MPOError: text that the tokenizer does not know, a head of another task, a dense model with another
                tokenizer or of another width.
        """
        kind = kind_of(model)
        if kind == "encoder":
            model = model.base_model
            found = self._encoder(model, tokenizer)
        elif kind == "classifier":
            found = self._classifier(model, tokenizer)
        else:
            found = self._language_model(model, tokenizer)
        chosen = _sampled(found.batches, self.sample)
        inputs = [batch.inputs for batch in chosen.in_order()]
        if dense is None:
            # Logits of a language model are too many to keep: the model stays, and is run beside the others.
            kept = model if kind == "language model" else list(outputs(model, inputs))
            return replace(found, reference=kept)
        if found.batches.rows != dense.batches.rows:
            raise MPOError("its tokenizer reads the text otherwise than that of the dense model: it was not made of it")
        close = None
        if found.embeddings is not None and dense.embeddings is not None and len(chosen.rows) >= _FEWEST_FOR_NEIGHBOURS:
            rows = spread(len(found.embeddings), self.sample)
            close = fidelity(dense.embeddings[rows], found.embeddings[rows])
        return replace(found, distance=distance(model, dense.reference, inputs), fidelity=close)

    def _encoder(self, model: Any, tokenizer: Any) -> Measured:
        texts, labels = self.texts, np.zeros(0)
        if self.data is not None:
            pairs = self.data.dev["dev"]
            texts, labels = [text for side in zip(*pairs.texts, strict=True) for text in side], np.array(pairs.labels)
        batches = batches_of(texts, "encoder", tokenizer, **self._sizes())
        seconds, embeddings = _timed(batches, lambda some: embed_batches(model, some))
        drawn: dict[str, np.ndarray] = {}
        if self.data is not None:
            cosines = (embeddings[: len(labels)] * embeddings[len(labels) :]).sum(axis=1)
            drawn["spearman"] = _drawn(len(labels), lambda k: METRICS["spearman"](labels[k], cosines[k]))
        return Measured(drawn, seconds / len(texts), batches, embeddings, None)

    def _classifier(self, model: Any, tokenizer: Any) -> Measured:
        drawn: dict[str, np.ndarray] = {}
        if self.data is None:
            batches = batches_of(self.texts, "classifier", tokenizer, **self._sizes())
            seconds, _ = _timed(batches, lambda some: predictions_of(model, some, self.settings, False))
            return Measured(drawn, seconds / len(batches.rows), batches, None, None)
        task = self.data.task
        if model.config.num_labels != task.num_labels:
            raise MPOError(
                f"its head has {model.config.num_labels} outputs, and {task.name} needs {task.num_labels}: it was "
                "tuned on something else"
            )
        spent = 0.0
        splits = {name: task_batches(split, tokenizer, **self._sizes()) for name, split in self.data.dev.items()}
        for name, batches in splits.items():
            seconds, found = _timed(
                batches, lambda some: predictions_of(model, some, self.settings, task.is_regression)
            )
            spent += seconds
            truth = np.array(self.data.dev[name].labels)
            for metric in task.metrics:
                values = _drawn(len(truth), lambda k, m=metric, t=truth, f=found: 100 * METRICS[m](t[k], f[k]))
                drawn[metric if len(splits) == 1 else f"{metric} {name}"] = values
        count = sum(len(batches.rows) for batches in splits.values())
        return Measured(drawn, spent / count, next(iter(splits.values())), None, None)

    def _language_model(self, model: Any, tokenizer: Any) -> Measured:
        batches = batches_of(self.texts, "language model", tokenizer, **self._sizes())
        seconds, (losses, counts) = _timed(batches, lambda some: losses_of(model, some, self.settings))
        size, tokens = sum(len(text.encode()) for text in self.texts), int(counts.sum())

        def of(name: str) -> np.ndarray:
            # A draw of blocks has as many bytes a token as the whole text.
            return _drawn(
                len(losses), lambda k: perplexities(losses[k], counts[k], size * counts[k].sum() / tokens)[name]
            )

        drawn = {name: of(name) for name in ("perplexity", "byte perplexity")}
        return Measured(drawn, seconds / tokens, batches, None, None)

    def _sizes(self) -> dict[str, int]:
        return {"batch_size": self.settings.batch_size, "max_length": self.settings.max_length}


def spread(count: int, most: int) -> list[int]:
    """At most so many places of ``count``, spread evenly.

    >>> spread(10, 3)
    [0, 3, 6]
    """
    taken = min(count, most)
    return [k * count // taken for k in range(taken)]


def _sampled(batches: Batches, most: int) -> Batches:
    rows = spread(len(batches.rows), most)
    return replace(batches, rows=[batches.rows[k] for k in rows], labels=None)


def _drawn(count: int, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
    """The statistic of all examples, then of draws with replacement: the same for every model."""
    random = np.random.default_rng(0)
    draws = [np.arange(count), *(random.integers(0, count, count) for _ in range(_DRAWS if count > 1 else 0))]
    return np.array([statistic(draw) for draw in draws])


def _timed(batches: Batches, run: Callable[[Batches], Any]) -> tuple[float, Any]:
    """Seconds and result. One batch goes first, so that no first call is timed."""
    run(replace(batches, rows=list(batches.rows[: batches.batch_size]), labels=None))
    start = time.perf_counter()
    result = run(batches)
    return time.perf_counter() - start, result
