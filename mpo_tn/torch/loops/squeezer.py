"""The engine of squeezing: cut, judge, go back, when to stop, and what came of it.

It neither trains nor evaluates; ``squeeze`` and the Trainer's callback do, each in its own way, and drive it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.ranking import RankedCut
from mpo_tn.planning.spec import kept_ratio
from mpo_tn.torch.loops.policy import Policy, cut_once
from mpo_tn.torch.loops.rounds import Bonds, SqueezeResult, SqueezeRound
from mpo_tn.torch.models.moments import OptimizerLike, check_optimizer
from mpo_tn.torch.models.units import all_bonds, count_parameters, cuttable_units
from mpo_tn.torch.state.damage import damaged, shown
from mpo_tn.torch.state.training_state import TrainingState, capture, random_digest, restore, saved_extra


class Squeezer:
    """One squeezing of one model, in place: its rounds so far, the cuts not judged yet, and the state to go back to.

    Args:
        model: with MPO modules.
        policy: what is cut and when it ends.
        optimizer: whose state follows the cuts.
        scheduler: goes back with the rest.
        reference: the value to count gaps from; ``None`` for the first that is judged.

    Whoever drives it judges the model before the first cut (or has given a reference), then cuts, tunes and judges in
    turn until there is a reason to stop, and finishes. After :meth:`finish` and :meth:`go_back` the model, the
    optimiser, the scheduler and the random generators have the bits they had when a value was last within ``delta``,
    or, where there was none, those they began with.

    Raises:
        MPOError: a model without MPO modules or without a bond to cut, an optimiser that cannot follow, a reference
            that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        optimizer: OptimizerLike | None = None,
        scheduler: Any = None,
        reference: float | None = None,
    ) -> None:
        self.model, self.policy, self.optimizer, self.scheduler = model, policy, optimizer, scheduler
        self.units = cuttable_units(model)
        if optimizer is not None:
            check_optimizer(optimizer, model)
        if self._at_minimum():
            raise MPOError(
                f"nothing is left to cut: every bond is at minimum_bond={policy.minimum_bond} or below already"
            )
        self.reference = None if reference is None else _finite(float(reference))
        self.start_bonds: Bonds = self.bonds
        self.rounds: list[SqueezeRound] = []
        self.position = 0
        """Training steps done when the model was in the state to go back to."""
        self.accepted = False
        """Whether the value that was judged last was within ``delta``."""
        self._cuts: tuple[RankedCut, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._began = 0.0
        self._astray = False  # cut, and not judged to be within delta since
        self._good: TrainingState | None = None

    @property
    def good(self) -> TrainingState:
        """The state to go back to."""
        if self._good is None:
            self.mark_good()
        assert self._good is not None
        return self._good

    @property
    def bonds(self) -> Bonds:
        """The bonds now, by unit."""
        return all_bonds(self.units)

    @property
    def best_round(self) -> int:
        """The last round that was accepted; 0 is the start."""
        return sum(part.accepted for part in self.rounds)

    def mark_good(self) -> None:
        """Take everything as it is for the state to go back to, which is done before the first cut at the latest.

        Raises:
            MPOError: an optimiser or a scheduler whose state cannot be kept.
        """
        self._good = capture(self.model, self.optimizer, self.scheduler, {"position": self.position})

    def reason_to_stop(self) -> str:
        """Why the judged model is not cut any further, or an empty string."""
        if self.rounds and not self.rounds[-1].accepted:
            return "gap"
        if self.policy.keep is not None and kept_ratio(unit.spec for unit in self.units.values()) <= self.policy.keep:
            return "keep"
        if self._at_minimum():
            return "nothing left to cut"
        return "max_steps" if len(self.rounds) >= self.policy.max_steps else ""

    def cut(self) -> None:
        """Carry out the cuts of the next round, from fresh spectra.

        Raises:
            MPOError: the model as it is was not judged, or there is a reason to stop; nothing has been changed.
        """
        if self.reference is None or self._cuts:
            raise MPOError("the model as it is has no value: judge it before it is cut, or give a reference")
        if reason := self.reason_to_stop():
            raise MPOError(f"there is no further round: {reason}")
        if self._good is None:
            self.mark_good()
        self._began, self._astray = time.perf_counter(), True
        self._cuts, self._notes = cut_once(self.units, self.policy, self.optimizer)

    def judge(self, value: float, *, position: int, loss: float | None = None) -> SqueezeRound | None:
        """Hold the value of the model as it is against the reference; within ``delta`` its state is the one to keep.

        A value that is not finite is never within it. A model that is not stays as it is until :meth:`go_back`.

        Args:
            value: of the model; the first one is the reference, if none was given.
            position: training steps done so far.
            loss: the mean over those since the last cut.

        Returns:
            The round, or None if nothing had been cut since the model was judged last.

        Raises:
            MPOError: a reference that is not finite.
        """
        if self.reference is None:
            self.reference = _finite(value)
        gap = self.policy.gap(value, self.reference)
        self.accepted = math.isfinite(value) and gap <= self.policy.delta
        part = None
        if self._cuts:
            part = SqueezeRound(
                number=len(self.rounds) + 1,
                cuts=self._cuts,
                loss=loss,
                value=value,
                gap=gap,
                accepted=self.accepted,
                kept=kept_ratio(unit.spec for unit in self.units.values()),
                parameters=count_parameters(self.model),
                position=position,
                random=random_digest(),
                seconds=time.perf_counter() - self._began,
                notes=self._notes,
            )
            self.rounds.append(part)
            self._cuts, self._notes = (), ()
        if self.accepted:
            self.position, self._astray = position, False
            self.mark_good()
        return part

    def go_back(self) -> None:
        """Bring everything to the state that is kept, bit for bit; cuts that were not judged are forgotten."""
        self._bring(self.good)

    def resume(self, good: TrainingState, start_bonds: Bonds, rounds: Sequence[SqueezeRound], reference: float) -> None:
        """Go on with a squeezing that was interrupted.

        Args:
            good: its state to go back to.
            start_bonds: its bonds before the first cut.
            rounds: all it had judged.
            reference: what its gaps were counted from.

        Raises:
            MPOError: the state is damaged, or of another model, optimiser or scheduler, or the reference is not finite;
                nothing has been changed.
        """
        _finite(reference)
        self._bring(good)
        self._good, self.start_bonds, self.rounds, self.reference = good, start_bonds, list(rounds), reference

    def finish(self) -> SqueezeResult:
        """Go back from cuts that were not accepted, and sum up."""
        if self._astray:
            self.go_back()
        reference = math.nan if self.reference is None else self.reference
        best = self.best_round
        return SqueezeResult(
            rounds=tuple(self.rounds),
            stopped=self.reason_to_stop() or "max_steps",
            best_round=best,
            reference=reference,
            value=self.rounds[best - 1].value if best else reference,
            start_bonds=self.start_bonds,
            bonds=self.bonds,
            kept=kept_ratio(unit.spec for unit in self.units.values()),
            parameters=count_parameters(self.model),
        )

    def _at_minimum(self) -> bool:
        return all(bond <= self.policy.minimum_bond for bonds in self.bonds.values() for bond in bonds)

    def _bring(self, state: TrainingState) -> None:
        position = saved_extra(state).get("position")
        if (whole := whole_number(position)) is None or whole < 0:
            raise damaged(f"the position in it is {shown(position)}")
        restore(state, self.model, self.optimizer, self.scheduler)
        self.position = whole
        self._cuts, self._notes, self._astray = (), (), False


def _finite(reference: float) -> float:
    if not math.isfinite(reference):
        raise MPOError(f"the reference is {reference}: evaluate has to give a number before the first cut")
    return reference
