"""squeeze: lower bonds one by one where it hurts least, tuning after each cut, until the gap is too large."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.ranking import Score
from mpo_tn.torch.loops.policy import Policy, as_number, cut_once, set_training, training_flags
from mpo_tn.torch.loops.rounds import SqueezeResult, SqueezeRound, bonds_after, outcome
from mpo_tn.torch.loops.run_folder import RunFolder
from mpo_tn.torch.models.moments import OptimizerLike, check_optimizer, unwrapped
from mpo_tn.torch.models.units import MPOUnit, all_bonds, count_parameters, kept_ratio, mpo_units
from mpo_tn.torch.state.training_state import TrainingState, capture, random_digest, restore

Progress = Callable[[int, int, str], None]
"""Called with how many rounds are done, how many there are at most, and what the last one did."""


def squeeze(
    model: nn.Module,
    *,
    evaluate: Callable[[nn.Module], Any],
    delta: float,
    train_step: Callable[[int], Any] | None = None,
    optimizer: OptimizerLike | None = None,
    scheduler: Any = None,
    higher_is_better: bool = True,
    max_steps: int = 100,
    cuts_per_round: int = 1,
    tune_steps: int = 10,
    score: Score = "error_per_parameter",
    keep: float | None = None,
    minimum_bond: int = 1,
    reference: float | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    on_round: Callable[[SqueezeRound], None] | None = None,
) -> SqueezeResult:
    """Squeeze the bonds of a model, in place: cut, tune, evaluate, until it is worse by more than ``delta``.

    Algorithm 2 of Liu, Gao et al. (ACL 2021). Each round computes the spectra of all bonds as they are now, cuts the
    ``cuts_per_round`` bonds of least score by one, tunes and evaluates.

    Args:
        model: with MPO modules, see :func:`~mpo_tn.torch.compress`. What may train is up to the caller.
        evaluate: ``evaluate(model)`` gives a number. The model is in evaluation mode, and gradients are off.
        delta: how much worse than the reference is still good, in the units of what ``evaluate`` returns.
        train_step: ``train_step(step)`` does one optimiser step and returns its loss. ``step`` counts from 0 over the
            whole run, and the batch has to be a function of it (and of the random generators) so that a run can be
            resumed. Modules have the training flags they had when this was called. ``None`` cuts without tuning.
        optimizer: the one that ``train_step`` uses; its state follows the cuts.
        scheduler: the one that ``train_step`` steps; rolled back and resumed with the rest.
        higher_is_better: of what ``evaluate`` returns.
        max_steps: the most rounds.
        cuts_per_round: cuts by one in each round.
        tune_steps: calls of ``train_step`` in each round.
        score: ``"error_per_parameter"``, ``"error"`` or a callable, see :class:`~mpo_tn.planning.ranking.Ranking`. By
            ``"error"`` the bonds beside small cores go first, which hardly makes the model smaller (docs/results.md).
        keep: stop at this kept ratio of the decomposed matrices.
        minimum_bond: no bond goes below this.
        reference: the value to count the gap from; ``None`` evaluates the model as it is given.
        folder: for a log of every round, ``log.json``, and the state to resume from.
        resume: go on with the run in ``folder``, if there is one; else start it afresh.
        progress: called after each round, see :data:`Progress`.
        on_round: called after each round with what was logged of it.

    Guarantee (last-good-state): the model, the optimiser and the scheduler end in the state after the last round whose
    gap was within ``delta``, also if anything raises.
    Guarantee (killed-same-bits): killed at any point and called again with the same arguments and ``folder``, the run
    ends in the same bonds and bits.

    Returns:
        Every round, the bonds, and why it stopped.

    Raises:
        MPOError: a bad argument, a model without MPO modules or without a bond to cut, an optimiser that cannot follow,
            a loss that is NaN or infinite, a ``folder`` of another run.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> weight = model[0].dense_weight().detach()
    >>> def distance(model):
    ...     return float((model[0].dense_weight() - weight).norm() / weight.norm())
    >>> result = squeeze(model, evaluate=distance, delta=0.3, higher_is_better=False)
    >>> result.stopped, result.value <= 0.3, result.bonds == {"0": model[0].spec.bonds}
    ('gap', True, True)
    """
    policy = Policy(
        delta, higher_is_better, max_steps, cuts_per_round, tune_steps if train_step else 0, score, keep, minimum_bond
    )
    units = mpo_units(model)
    if optimizer is not None:
        check_optimizer(optimizer, model)
    policy.check_start(units)
    run = _Run(model, units, policy, evaluate, train_step, optimizer, scheduler)
    home = None
    if folder is not None:
        home = RunFolder(folder, {**run.settings(), "reference": reference}, resume=resume)
    return run.go(reference, home, progress, on_round)


class _Run:
    def __init__(
        self, model: nn.Module, units: dict[str, MPOUnit], policy: Policy, evaluate: Callable[[nn.Module], Any],
        train_step: Callable[[int], Any] | None, optimizer: OptimizerLike | None, scheduler: Any,
    ) -> None:  # fmt: skip
        self.model, self.units, self.policy = model, units, policy
        self.evaluate, self.train_step = evaluate, train_step
        self.optimizer, self.scheduler = optimizer, scheduler
        self.flags = training_flags(model)
        self.start = all_bonds(units)
        self.start_digest = ""
        self.rounds: list[SqueezeRound] = []
        self.position = 0

    def settings(self) -> dict[str, Any]:
        """What has to be the same for a run to be resumed."""
        score = self.policy.score
        name = score if isinstance(score, str) else getattr(score, "__qualname__", type(score).__qualname__)
        return {
            **{field.name: getattr(self.policy, field.name) for field in fields(self.policy)},
            "score": name,
            "tuned": self.train_step is not None,
            "optimizer": None if self.optimizer is None else type(unwrapped(self.optimizer)).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
        }

    def go(
        self,
        reference: float | None,
        home: RunFolder | None,
        progress: Progress | None,
        on_round: Callable[[SqueezeRound], None] | None,
    ) -> SqueezeResult:
        try:
            if home is not None and home.log is not None:
                good, reference = self.resume(home), float(home.log["reference"])
                if "result" in home.log:
                    return self.result(home.log["result"]["stopped"], reference)
            else:
                reference = self.measure() if reference is None else float(reference)
                if not math.isfinite(reference):
                    raise MPOError(f"the reference is {reference}: evaluate has to give a number before the first cut")
                good = self.snapshot()
                self.start_digest = good.model_digest()
                self.save(home, reference, good)
            try:
                while not (stopped := self.reason_to_stop()):
                    part = self.round(reference)
                    self.rounds.append(part)
                    if part.accepted:
                        good = self.snapshot()
                    self.save(home, reference, good if part.accepted else None)
                    if on_round:
                        on_round(part)
                    if progress:
                        progress(len(self.rounds), self.policy.max_steps, _line(part))
            except BaseException:  # an interrupt, too: whatever ends the run, the last good state is what is left
                self.restore(good)
                raise
            if stopped == "gap":
                self.restore(good)
            result = self.result(stopped, reference)
            self.save(home, reference, None, result)
            return result
        finally:
            set_training(self.flags)

    def resume(self, home: RunFolder) -> TrainingState:
        """Bring everything to the state that a folder holds."""
        assert home.log is not None
        try:
            start = {name: tuple(bonds) for name, bonds in home.log["start_bonds"].items()}
            rounds = [SqueezeRound.from_dict(part) for part in home.log["rounds"]]
            digest = str(home.log["start_digest"])
            known = [bonds_after(start, rounds[:number]) for number in range(len(rounds) + 1)]
        except (KeyError, TypeError, AttributeError) as error:
            raise MPOError(
                f"the log in {home.path} is damaged ({error!r}): pass resume=False to start afresh"
            ) from error
        if all_bonds(self.units) not in known:
            raise MPOError(
                f"{home.path} is of a run of another model: it started from the bonds {start}, and this model has "
                f"{all_bonds(self.units)}; name another folder, or pass resume=False to start afresh"
            )
        given = self.snapshot() if all_bonds(self.units) == start else None
        good = home.state()
        try:
            self.restore(good)
        except MPOError as error:
            raise MPOError(f"{home.path} cannot be resumed: {error}, or pass resume=False to start afresh") from error
        if given is not None and given.model_digest() != digest:
            self.restore(given)
            raise MPOError(
                f"{home.path} is of a run of another model: its tensors had other values at the start; give the model "
                "it started from, name another folder, or pass resume=False to start afresh"
            )
        self.start, self.start_digest, self.rounds = start, digest, rounds
        return good

    def save(
        self, home: RunFolder | None, reference: float, state: TrainingState | None, result: SqueezeResult | None = None
    ) -> None:
        if home is None:
            return
        content: dict[str, Any] = {
            "reference": reference,
            "start_bonds": self.start,
            "start_digest": self.start_digest,
            "rounds": [part.to_dict() for part in self.rounds],
        }
        if result is not None:
            content["result"] = {key: value for key, value in result.to_dict().items() if key not in content}
        home.write(content, state, len(self.rounds))

    def result(self, stopped: str, reference: float) -> SqueezeResult:
        return outcome(self.model, self.units, self.rounds, stopped, reference, self.start)

    def reason_to_stop(self) -> str:
        """Why there is no further round, or an empty string."""
        policy = self.policy
        if self.rounds and not self.rounds[-1].accepted:
            return "gap"
        return policy.satisfied(self.units) or ("max_steps" if len(self.rounds) >= policy.max_steps else "")

    def round(self, reference: float) -> SqueezeRound:
        began = time.perf_counter()
        policy, number = self.policy, len(self.rounds) + 1
        cuts, notes = cut_once(self.model, self.units, policy, self.optimizer)
        loss = self.tune(number)
        value = self.measure()
        gap = policy.gap(value, reference)
        return SqueezeRound(
            number, tuple(cuts), loss, value, gap, gap <= policy.delta, kept_ratio(self.units.values()),
            count_parameters(self.model), self.position, random_digest(), time.perf_counter() - began,
            notes,
        )  # fmt: skip

    def tune(self, number: int) -> float | None:
        """The mean loss of the training steps."""
        if self.train_step is None:
            return None
        set_training(self.flags)
        for parameter in self.model.parameters():
            parameter.grad = None
        total = 0.0
        for _ in range(self.policy.tune_steps):
            loss = float(as_number(self.train_step(self.position), "train_step"))
            if not math.isfinite(loss):
                raise MPOError(
                    f"the loss of round {number} is {loss} at step {self.position}: the model is back in the state "
                    f"after round {number - 1}; try a smaller learning rate or more tune_steps"
                )
            total += loss
            self.position += 1
        return total / self.policy.tune_steps if self.policy.tune_steps else None

    def measure(self) -> float:
        self.model.eval()
        with torch.no_grad():
            return as_number(self.evaluate(self.model), "evaluate")

    def snapshot(self) -> TrainingState:
        extra = {"position": self.position}
        return capture(self.model, self.optimizer, self.scheduler, extra)

    def restore(self, state: TrainingState) -> None:
        self.position = restore(state, self.model, self.optimizer, self.scheduler)["position"]


def _line(part: SqueezeRound) -> str:
    cuts: Sequence[str] = [f"{cut.unit}[{cut.bond}] {cut.before} -> {cut.after}" for cut in part.cuts]
    shown = ", ".join(cuts[:2]) + (f" and {len(cuts) - 2} more" if len(cuts) > 2 else "")
    return f"{shown}; kept {part.kept:.3f}, value {part.value:.6g}, gap {part.gap:.3g}"
