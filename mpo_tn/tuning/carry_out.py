"""The phases of a run carried out: steps, cuts and scores, with a checkpoint wherever one belongs."""

from __future__ import annotations

from mpo_tn.progress import Progress, silent
from mpo_tn.tuning.checkpoints import Keeper
from mpo_tn.tuning.phases import SqueezePhase, TrainPhase
from mpo_tn.tuning.run import Run
from mpo_tn.tuning.squeezing import squeeze_run
from mpo_tn.tuning.tasks.data import TaskData


def carry_out(
    run: Run, *, keeper: Keeper | None = None, gap_data: TaskData | None = None, progress: Progress | None = None
) -> None:
    """Carry out the phases of a run that are not behind it.

    Args:
        run: from :func:`~mpo_tn.tuning.run.start`.
        keeper: keeps checkpoints, after ``save_every`` steps, epochs and phases.
        gap_data: what the gap of a squeezing is measured on; the dev set if not given.
        progress: told of steps and rounds.

    Raises:
        NotFiniteError: the loss is no number any more.
    """
    keeper, say = keeper or Keeper(None, run), progress or silent
    while (phase := run.phase) is not None:
        if isinstance(phase, TrainPhase):
            _train(run, phase, keeper, say)
        else:
            _squeeze(run, phase, keeper, gap_data, say)


def _train(run: Run, phase: TrainPhase, keeper: Keeper, say: Progress) -> None:
    per_epoch = run.train.per_epoch
    end = run.begin + phase.steps(per_epoch)
    while run.done < end:
        loss = f", loss {run.losses[-1]:.3f}" if run.losses else ""
        say(run.done, end, f"step {run.done + 1} of {end}{loss}")
        run.step()
        taken = run.done - run.begin
        if taken % per_epoch == 0 or run.done == end:
            if phase.scored:
                say(run.done, end, "scoring the dev set")
                run.end_epoch()
            keeper.save()
        elif taken % run.settings.save_every == 0:
            keeper.save()
    run.end_phase()


def _squeeze(run: Run, phase: SqueezePhase, keeper: Keeper, gap_data: TaskData | None, say: Progress) -> None:
    if keeper.saved_at is None:  # no epoch before: without a checkpoint the rounds would not be known as this run's
        keeper.save()
    where = keeper.folder / "squeezing" if keeper.folder else None
    squeeze_run(run, phase.how, folder=where, resume=keeper.resumed, gap_data=gap_data, progress=say)
    if phase.scored:
        run.score()
    keeper.save()
