"""The checkpoints of a run, what may differ when it is resumed, and the folder they are in."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import check_target
from mpo_tn.torch.state.training_state import load_state, save_state
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.result import FinetuneResult, read_result
from mpo_tn.tuning.run import Data, NotFiniteError, Run, Settings
from mpo_tn.tuning.squeezing import Squeezing

# What may differ between the two halves of a run: it is what one changes after a loss that was no number.
_MAY_CHANGE = ("lr", "tensor_lr", "clip", "bf16", "save_every")


# A setting that is newer than a run had this value in it.
DEFAULTS = json.loads(json.dumps({**asdict(Method()), **asdict(Settings())}))
del DEFAULTS["name"]


@dataclass
class Keeper:
    """The checkpoints of a run, and what has to be in them besides tensors. Without a folder it does nothing."""

    folder: Path | None
    run: Run
    result: FinetuneResult
    began: float
    resumed: bool = False
    before: float = 0.0
    saved_at: int | None = None
    squeezed_to: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def checkpoint(self) -> Path | None:
        """Where the checkpoint is."""
        return self.folder / "checkpoint" if self.folder else None

    def elapsed(self) -> float:
        """Seconds of this run, of the time before it was resumed too."""
        return self.before + time.perf_counter() - self.began

    def save(self) -> None:
        """Write a checkpoint of the run as it is."""
        if self.checkpoint is None:
            return
        run, result = self.run, self.result
        extra: dict[str, Any] = {
            "done": run.done, "tokens": run.tokens, "seconds": run.seconds, "losses": run.losses,
            "scores": result.scores, "epoch losses": result.losses, "elapsed": self.elapsed(),
            "settings": json.dumps(result.to_dict()["settings"]), "squeezing": json.dumps(result.squeezing),
            "squeezed to": self.squeezed_to,
        }  # fmt: skip
        save_state(self.checkpoint, model=run.model, optimizer=run.optimizer, extra=extra)
        self.saved_at = run.done

    def read(self) -> None:
        """Bring the run to its checkpoint, if there is one.

        Raises:
            MPOError: it is of another run.
        """
        if self.checkpoint is None or not self.checkpoint.is_dir():
            return
        self.resumed = True
        run, result = self.run, self.result
        rates = [group["initial_lr"] for group in run.optimizer.param_groups]
        _check_settings(self.checkpoint, result)
        extra = load_state(self.checkpoint, model=run.model, optimizer=run.optimizer)
        for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate
        run.done, run.tokens = extra["done"], extra["tokens"]
        run.seconds, run.losses = list(extra["seconds"]), list(extra["losses"])
        result.scores, result.losses = [dict(scores) for scores in extra["scores"]], list(extra["epoch losses"])
        result.squeezing, self.squeezed_to = json.loads(extra["squeezing"]), dict(extra["squeezed to"])
        self.before, self.saved_at = extra["elapsed"], run.done
        result.notes["resumed at step"] = run.done

    def told(self, error: NotFiniteError) -> NotFiniteError:
        """The same error, with the place of the last good state."""
        if self.checkpoint is None or self.saved_at is None:
            return error
        return NotFiniteError(
            f"{error}. The state after step {self.saved_at} is in {self.checkpoint}: --resume goes on from it, with "
            "other rates if you like",
            error.step,
        )


def _check_settings(checkpoint: Path, result: FinetuneResult) -> None:
    """A checkpoint of other settings is of another run."""
    try:
        values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        saved = json.loads(values["extra"]["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # load_state says what is wrong with it
    saved = DEFAULTS | saved
    here = json.loads(json.dumps(result.to_dict()["settings"]))
    for key in sorted({*saved, *here}):
        if saved.get(key) != here.get(key) and key not in _MAY_CHANGE:
            raise MPOError(
                f"the checkpoint in {checkpoint} is of another run: {key} was {saved.get(key)!r} and is "
                f"{here.get(key)!r}; give the same arguments, or start anew with --overwrite"
            )


def asked_settings(
    source: str, data: Data, method: Method, settings: Settings, squeezing: Squeezing | None
) -> dict[str, Any]:
    """What a run was asked for."""
    asked = {**asdict(method), **asdict(settings), "source": source, "data": data.source, "method": method.name}
    asked.pop("name")
    asked["lr"], asked["tensor_lr"] = method.rates
    return {**asked, "squeezing": asdict(squeezing) if squeezing else None}


def finished_run(
    folder: Path, source: str | Path, data: Data, method: Method, settings: Settings, squeezing: Squeezing | None
) -> FinetuneResult:
    """The result in the folder of a run that is finished.

    Raises:
        MPOError: it is damaged, or of a run that was asked for something else.
    """
    result = read_result(folder)
    asked = {"task": data.name, **asked_settings(str(source), data, method, settings, squeezing)}
    there = {**DEFAULTS, "task": result.task, **result.settings}
    for key, value in json.loads(json.dumps(asked)).items():
        if there.get(key) != value:
            raise MPOError(
                f"{folder} holds the finished run of something else: {key} was {there.get(key)!r} and is {value!r}; "
                "give the same arguments, or start anew with --overwrite"
            )
    return result


def check_folder(folder: Path, source: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder before any work is done, and clear away an unfinished run that is to be overwritten.

    Raises:
        MPOError: it is in use; or it holds an unfinished run and neither of the two is asked for.
    """
    unfinished = folder.is_dir() and not (folder / "result.json").exists() and _is_run(folder)
    if unfinished and resume:
        return
    if unfinished and not overwrite:
        raise MPOError(f"{folder} holds an unfinished run: pass --resume to go on, or --overwrite to start anew")
    if unfinished:
        shutil.rmtree(folder)
    elif resume and (folder / "result.json").exists():
        raise MPOError(f"{folder} holds a finished run, there is nothing to resume: read its result.json")
    check_target(folder, overwrite=overwrite, marker="result.json", keep=Path(source))


def _is_run(folder: Path) -> bool:
    inside = {path.name for path in folder.iterdir()}
    return bool(inside & {"checkpoint", "squeezing"}) and all(
        name in ("checkpoint", "squeezing") or name.startswith((".checkpoint", ".squeezing")) for name in inside
    )
