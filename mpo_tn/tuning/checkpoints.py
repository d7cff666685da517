"""The checkpoints of a run, what may differ when it is resumed, and the folder they are in."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import check_target
from mpo_tn.storage.places import recover
from mpo_tn.torch.state.training_state import save_state
from mpo_tn.tuning.methods import Method
from mpo_tn.tuning.past_defaults import FORMAT_VERSION, checked_version, completed
from mpo_tn.tuning.phases import SqueezePhase
from mpo_tn.tuning.result import FinetuneResult, asked_settings, read_result, settings_of
from mpo_tn.tuning.run import NotFiniteError, Record, Run
from mpo_tn.tuning.settings import Settings, Squeezing
from mpo_tn.tuning.tasks.data import Data

# What may differ between the two halves of a run: it is what one changes after a loss that was no number.
_MAY_CHANGE = ("lr", "tensor_lr", "clip", "bf16", "save_every")

# Without these, which every version has written, there is nothing to go on from.
_NEEDED = {"done", "tokens", "seconds", "losses", "scores", "epoch losses", "elapsed", "squeezing", "squeezed to"}


@dataclass
class Keeper:
    """The checkpoints of a run, and what has to be in them besides tensors. Without a folder it does nothing.

    The phases of the run are those of :func:`~mpo_tn.tuning.phases.phases_of`, with one squeezing at most.
    """

    folder: Path | None
    run: Run
    began: float = field(default_factory=time.perf_counter)
    resumed: bool = False
    before: float = 0.0
    saved_at: int | None = None

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
        run, record = self.run, self.run.record()
        extra: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "done": record.done, "tokens": record.tokens, "seconds": record.seconds, "losses": record.losses,
            "scores": record.scores, "epoch losses": record.epoch_losses, "elapsed": self.elapsed(),
            "settings": json.dumps(settings_of(run)), "squeezing": json.dumps(record.squeezed),
            "squeezed to": {} if record.squeezed is None else {"begin": run.begin, "end": run.end},
        }  # fmt: skip
        save_state(self.checkpoint, model=run.model, optimizer=run.optimizer, extra=extra)
        self.saved_at = run.done

    def read(self) -> None:
        """Bring the run to its checkpoint, if there is one, or one that was being replaced when the process was killed.

        Raises:
            MPOError: it is of another run, or of a newer version.
        """
        if self.checkpoint is None:
            return
        recover(self.checkpoint)
        if not self.checkpoint.is_dir():
            return
        self.resumed = True
        run = self.run
        _check_settings(self.checkpoint, run)
        extra = run.load(self.checkpoint)
        squeezed = json.loads(extra["squeezing"])
        ended: list[int] = []
        if squeezed is not None:  # where the squeezing ended is where what follows it began; no more is asked of it
            kinds = [type(phase) for phase in run.phases]
            ended = [extra["squeezed to"]["begin"]] * (kinds.index(SqueezePhase) + 1)
        record = Record(
            done=extra["done"], tokens=extra["tokens"], seconds=extra["seconds"], losses=extra["losses"],
            epoch_losses=extra["epoch losses"], scores=extra["scores"], ended=ended, squeezed=squeezed,
        )  # fmt: skip
        run.take_up(record)
        self.before, self.saved_at = extra["elapsed"], run.done

    def told(self, error: NotFiniteError) -> NotFiniteError:
        """The same error, with the place of the last good state."""
        if self.checkpoint is None or self.saved_at is None:
            return error
        return NotFiniteError(
            f"{error}. The state after step {self.saved_at} is in {self.checkpoint}: --resume goes on from it, with "
            "other rates if you like",
            error.step,
        )


def _check_settings(checkpoint: Path, run: Run) -> None:
    """A checkpoint of other settings is of another run."""
    file = checkpoint / "state.json"
    try:
        extra = json.loads(file.read_text(encoding="utf-8"))["extra"]
        saved = completed(json.loads(extra["settings"]), checked_version(extra, file))
    except MPOError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # load says what is wrong with it
    missing = sorted(_NEEDED - set(extra))
    if missing:
        raise MPOError(f"{checkpoint} is damaged, it lacks {', '.join(missing)}: start anew with --overwrite")
    here = json.loads(json.dumps(settings_of(run)))
    for key in sorted({*saved, *here}):
        if saved.get(key) != here.get(key) and key not in _MAY_CHANGE:
            raise MPOError(
                f"the checkpoint in {checkpoint} is of another run: {key} was {saved.get(key)!r} and is "
                f"{here.get(key)!r}; give the same arguments, or start anew with --overwrite"
            )


def finished_run(
    folder: Path, source: str | Path, data: Data, method: Method, settings: Settings, squeezing: Squeezing | None
) -> FinetuneResult:
    """The result in the folder of a run that is finished.

    Raises:
        MPOError: it is damaged or of a newer version, or of a run that was asked for something else.
    """
    result = read_result(folder)
    asked = {"task": data.name, **asked_settings(str(source), data, method, settings, squeezing)}
    there = {"task": result.task, **result.settings}
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
        shutil.rmtree(folder.resolve())
    elif resume and (folder / "result.json").exists():
        raise MPOError(f"{folder} holds a finished run, there is nothing to resume: read its result.json")
    check_target(folder, overwrite=overwrite, marker="result.json", keep=Path(source))


def _is_run(folder: Path) -> bool:
    """Whether there is nothing in it but what a run writes, hidden folders that a killed process leaves among it."""
    names = [path.name for path in folder.iterdir()]
    begins = (".checkpoint", ".squeezing") if {"checkpoint", "squeezing"} & {*names} else (".checkpoint.",)
    return bool(names) and all(name in ("checkpoint", "squeezing") or name.startswith(begins) for name in names)
