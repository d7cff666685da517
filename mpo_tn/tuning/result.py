"""What a run was asked for, what it did and how it scored."""

from __future__ import annotations

import json
import math
import platform
import resource
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import checked_file
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.past_defaults import FORMAT_VERSION, checked_version, completed
from mpo_tn.tuning.phases import squeezing_of
from mpo_tn.tuning.run import Run
from mpo_tn.tuning.settings import Settings, Squeezing
from mpo_tn.tuning.tasks.data import Data, TextData


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did and how it scored.

    ``scores`` holds one dictionary per epoch, in points from 0 to 100 (text: perplexities). ``headline`` is that of the
    *last* epoch: choosing the best one would choose on the dev set; ``best`` is it for comparison. ``baseline`` is what
    a constant scores, ``baseline_headline`` the same as one number. ``squeezing`` is the trajectory of the method
    ``squeeze``, see :class:`~mpo_tn.torch.SqueezeResult`. Seconds are of a training step, evaluation apart; memory is
    the peak of the whole process.
    """

    method: str
    task: str
    seed: int
    scores: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    losses: list[float] = field(default_factory=list[float])
    headline: float = math.nan
    best: float = math.nan
    higher_is_better: bool = True
    baseline: dict[str, float] = field(default_factory=dict[str, float])
    baseline_headline: float = math.nan
    baseline_is: str = ""
    note: str = ""
    trainable: int = 0
    total: int = 0
    matrix_dense: int = 0
    matrix_parameters: int = 0
    matrix_trainable: int = 0
    steps: int = 0
    tokens_per_step: float = 0.0
    seconds_per_step: float = 0.0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict[str, str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    squeezing: dict[str, Any] | None = None

    @property
    def last(self) -> dict[str, float]:
        """The scores of the last epoch."""
        return self.scores[-1] if self.scores else {}

    def above_baseline(self, headline: float) -> bool:
        """Whether a score is better than a constant's; one that has no score is beaten by any number."""
        if math.isnan(headline) or math.isnan(self.baseline_headline):
            return not math.isnan(headline)
        return (headline > self.baseline_headline) == self.higher_is_better and headline != self.baseline_headline

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold; NaN and infinity become None."""
        return {"format_version": FORMAT_VERSION, **plain(asdict(self))}


def asked_settings(
    source: str, data: Data, method: Method, settings: Settings, squeezing: Squeezing | None
) -> dict[str, Any]:
    """What a run was asked for."""
    asked = {**asdict(method), **asdict(settings), "source": source, "data": data.source, "method": method.name}
    asked.pop("name")
    asked["lr"], asked["tensor_lr"] = method.rates
    return {**asked, "squeezing": asdict(squeezing) if squeezing else None}


def settings_of(run: Run) -> dict[str, Any]:
    """What a run was asked for, and how many examples it trains on."""
    asked = asked_settings(run.source, run.data, run.method, run.settings, squeezing_of(run.phases))
    return {**asked, "examples": len(run.train.rows)}


def result_of(run: Run, seconds: float) -> FinetuneResult:
    """What a run did that has scored at least once, and that took so long in all."""
    data, prepared, record = run.data, run.prepared, run.record()
    baseline, baseline_is = data.baseline()
    headlines = [data.headline(scores) for scores in record.scores]
    known = [value for value in headlines if not math.isnan(value)]
    matrix_parameters, matrix_trainable = run.matrix_counts()
    resumed = {} if run.resumed_at is None else {"resumed at step": run.resumed_at}
    return FinetuneResult(
        method=run.method.name,
        task=data.name,
        seed=run.settings.seed,
        scores=record.scores,
        losses=record.epoch_losses,
        headline=headlines[-1],
        best=(max if data.higher_is_better else min)(known, default=math.nan),
        higher_is_better=data.higher_is_better,
        baseline=baseline,
        baseline_headline=data.headline(baseline),
        baseline_is=baseline_is,
        note="" if isinstance(data, TextData) else data.task.note,
        trainable=prepared.trainable,
        total=prepared.total,
        matrix_dense=prepared.matrix_dense,
        matrix_parameters=matrix_parameters,
        matrix_trainable=matrix_trainable,
        steps=record.done,
        tokens_per_step=record.tokens / max(1, len(record.seconds)),
        seconds_per_step=statistics.median(record.seconds) if record.seconds else math.nan,
        seconds=seconds,
        peak_rss_bytes=peak_rss(),
        versions=versions(),
        settings=settings_of(run),
        notes={**prepared.notes, **resumed},
        squeezing=record.squeezed,
    )


def read_result(folder: Path) -> FinetuneResult:
    """The result of a finished run, as it was; a setting that it does not name has the default of its time.

    Raises:
        MPOError: there is none, or it is damaged, or of a newer version.
    """
    path = folder / "result.json"
    try:
        values = json.loads((checked_file(path, "a result") if path.exists() else path).read_text(encoding="utf-8"))
        version = checked_version(values, path)
        known = {field.name: field for field in fields(FinetuneResult)}
        kept = {name: values[name] for name in known}
        for name, field in known.items():
            if field.type == "float" and kept[name] is None:
                kept[name] = math.nan
        kept["scores"] = [_numbers(scores) for scores in kept["scores"]]
        kept["baseline"] = _numbers(kept["baseline"])
        kept["settings"] = completed(kept["settings"], version)
        return FinetuneResult(**kept)
    except MPOError:
        raise
    except OSError as error:
        raise MPOError(f"{path} cannot be read ({error.strerror}): name the --out folder of a finished run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MPOError(f"{path} is not the result of a run of this version ({error!r})") from None


def _numbers(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in scores.items()}


def plain(value: Any) -> Any:
    """The same for JSON, which knows no tuples and no NaN or infinity: they become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_rss() -> int:
    """The largest memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """What a result depends on."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for name in ("mpo-tn", "torch", "transformers", "numpy", "scikit-learn", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
