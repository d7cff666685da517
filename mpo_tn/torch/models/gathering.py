"""From runs of a model to a calibration: the inputs of units summed up, or kept to be compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.tensors import bytes_digest
from mpo_tn.torch.models.calibration import Calibration, Fingerprint, Moments, notes_on
from mpo_tn.torch.models.feeding import Call, EnoughError
from mpo_tn.torch.models.listening import Listener, Reader
from mpo_tn.torch.models.sums import InputSum

T = TypeVar("T")
Heard = Mapping[str, list[torch.Tensor]]
"""What was heard in one run under each key, call by call: tokens without padding, on the host."""


class OtherCallsError(MPOError):
    """A unit is called otherwise than in the dense model, as an expert that other tokens are sent to."""


class Gatherer:
    """Sums over what units are given, in as many runs as one likes.

    Args:
        model: of which the readers are.
        readers: the units, by name.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Reader]) -> None:
        self.readers = readers
        self._listener = Listener(model, readers)
        self._probed = len(readers) < 2
        self._sums: dict[str, InputSum] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._tokens: int | None = 0
        self._digests: list[bytes] = []
        self._place: dict[str, int] = {}

    @property
    def inputs(self) -> Mapping[str, str]:
        """Of every unit that was reached the key of its inputs; known after a run, or a probe."""
        return self._listener.inputs

    @property
    def reached(self) -> bool:
        """Whether anything reached any unit."""
        return any(total.tokens for total in self._sums.values()) or bool(self._counts)

    def probe(self, run: Callable[[], object]) -> None:
        """See once, in a run of its own, which units are given the same tensors. The first run does it by itself."""
        if not self._probed:
            self._listener.probe(run)
            self._probed = True

    def gather_until_known(self, call: Call, run: Callable[[], object], dense: Heard) -> None:
        """Take in one run, and end it as soon as every unit was called as often as in the dense model."""

        def left() -> bool:
            return any(len(rows) > self._place.get(key, 0) for key, rows in dense.items() if key in self.readers)

        with contextlib.suppress(EnoughError):
            self.gather(call, run, dense, while_=left)

    def gather(
        self, call: Call, run: Callable[[], T], dense: Heard | None = None, *, while_: Callable[[], bool] | None = None
    ) -> T:
        """Take in one run. Returns what it returns.

        Args:
            call: that is run: its masks, and what the text is known by.
            run: runs the model, or a part of it.
            dense: what was heard when the dense model was run with the same text.
            while_: asked after every input; if it says no the run is broken off.

        Raises:
            MPOError: entries that are not finite.
            OtherCallsError: another number of tokens than in the dense model.
        """
        place = self._place = dict[str, int]()

        def rows(key: str, x: torch.Tensor) -> None:
            if key not in self._sums:
                self._sums[key] = InputSum(x.shape[1], x.device)
            place[key] = place.get(key, 0) + 1
            there = None
            if dense is not None:
                there = dense[key][place[key] - 1] if len(dense.get(key, ())) >= place[key] else None
                if there is None or there.shape != x.shape:
                    raise OtherCallsError(
                        f"{key} is not called as in the dense model: change what layers are, not their calls"
                    )
            self._sums[key].add(x, key, there)
            if while_ is not None and not while_():
                raise EnoughError

        def ids(unit: str, x: torch.Tensor) -> None:
            out = self.readers[unit].shape[0]
            counts = torch.bincount(x.detach().cpu().clamp(min=0), minlength=out).double()
            if len(counts) == out:  # an id out of range the table itself refuses
                self._counts[unit] = self._counts[unit] + counts if unit in self._counts else counts

        self.probe(run)
        counted = call.tokens
        self._tokens = None if counted is None or self._tokens is None else self._tokens + counted
        self._digests.append(call.digest().encode())
        with self._listener.listening(call, rows, ids):
            return run()

    def hear(self, call: Call, run: Callable[[], T]) -> tuple[T, Heard]:
        """What a run returns, and what units were given in it, which is not summed up."""
        heard: dict[str, list[torch.Tensor]] = {}

        def rows(key: str, x: torch.Tensor) -> None:
            heard.setdefault(key, []).append(x.to("cpu", copy=True))

        self.probe(run)
        with self._listener.listening(call, rows, lambda _unit, _ids: None):
            return run(), heard

    def calibration(self, fingerprint: Fingerprint) -> Calibration:
        """What was gathered; the sums are used up.

        Raises:
            MPOError: no token was counted.
        """
        reached = [key for key, total in self._sums.items() if total.tokens]
        counts = {unit: counted for unit, counted in self._counts.items() if bool(counted.any())}
        if not reached and not counts:
            raise MPOError(f"nothing reached any of the {len(self.readers)} matrices: does the model use them?")
        moments: dict[str, Moments] = {}
        for key in reached:
            total = self._sums.pop(key)
            moments[key] = Moments(total.tokens, **total.means())
        inputs = {unit: key for unit, key in self._listener.inputs.items() if key in moments}
        tokens = max((known.tokens for known in moments.values()), default=0) if self._tokens is None else self._tokens
        text = replace(fingerprint, text=bytes_digest(self._digests))
        found = Calibration(moments, inputs, tuple(self.readers), tokens, text, rows=counts)
        return replace(found, notes=notes_on(found, sorted(self._listener.unmasked)))
