"""Matrices of a model of any size fitted layer after layer, each to what its layer is given by then; and what is kept.

Twice more through the blocks: with the text that is fitted to, beside that of the dense model; then with text that was
held back, through the dense model, the one whose matrices are fitted on their own, and the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpo_tn.torch.models.block_walk import Passage
from mpo_tn.torch.models.calibration import Moments
from mpo_tn.torch.models.distance import distance, outputs
from mpo_tn.torch.models.feeding import calls_of, only_looked_at
from mpo_tn.torch.models.finished_units import FinishedUnits
from mpo_tn.torch.models.gathering import Gatherer, Heard
from mpo_tn.torch.models.stream_walk import BEFORE, NOBODY, Stream, StreamWalk
from mpo_tn.torch.models.walk_files import WalkFiles

Fit = Callable[[Mapping[str, tuple[str, ...]]], None]
"""Fits units, by name, to the moments in these files, after those before them."""

_HEARD = "heard"


@dataclass(frozen=True)
class Own:
    """What of a unit is known that does not depend on those before it: files of it, and whether anything reached it."""

    files: tuple[str, ...]
    reached: bool


class AnchoredWalk:
    """Fits units layer after layer, once all of them are fitted on their own.

    Args:
        walk: which is through.
        finished: the units that are done by then.
        own: of every unit.
        fit: does units.

    Guarantee (anchored-same-fits): every unit is fitted to what
    :func:`~mpo_tn.torch.models.anchoring.best_fits` fits it to, with the same sums in the same order.
    """

    def __init__(self, walk: StreamWalk, finished: FinishedUnits, own: Mapping[str, Own], fit: Fit) -> None:
        self.walk, self.finished, self.own, self.fit = walk, finished, own, fit
        self.files, self.model, self.weights = walk.files, walk.model, walk.weights

    def run(self) -> None:
        """Fit them all; what an earlier run did is not done again.

        Raises:
            StaleWalkError: what it left is damaged or missing.
        """
        walk, calls, after = self.walk, self.walk.calls, self.walk.end

        def dense_after(batch: int) -> Run:
            return partial(walk.run_after, calls[batch], self.files.read("dense", after, batch))

        def after_given(batch: int) -> Run:
            return partial(walk.run_after, calls[batch], self.files.read("given", after, batch))

        def before(batch: int) -> Run:
            return partial(walk.run_before, calls[batch])

        dense = walk.begin("dense", calls)
        self._step(BEFORE, partial(self._outside, BEFORE, before, before))
        with self.finished.put(walk.readers[BEFORE], anchored=True):
            given = walk.begin("given", calls)
        for place in range(after):
            self._step(place, partial(self._block, place, dense, given))
        self._step(after, partial(self._outside, after, dense_after, after_given))

    def _step(self, place: int, do: Callable[[], None]) -> None:
        name = f"anchored-{place + 1:04d}"
        if not self.files.step_is_done(name):
            self.walk.progress(place + 1, self.walk.end + 2, f"layer after layer {self.walk.name_of(place)}")
            do()
            self.files.keep_step(name)
        for kind in ("dense", "given"):
            self.files.forget(kind, place)

    def _outside(self, place: int, dense: Runs, given: Runs) -> None:
        if self.walk.readers[place]:
            with self.walk.outside(), ExitStack() as changed:
                self._fit_part(place, dense, given, changed)

    def _block(self, place: int, dense: Stream, given: Stream) -> None:
        walk = self.walk

        def run_of(stream: Stream, batch: int) -> Run:
            return partial(stream.block, walk, place, batch, self.files.read(stream.kind, place, batch))

        def keep(batch: int, output: Any) -> None:
            self.files.write(dense.kind, place + 1, batch, output)

        with self.weights.loaded(walk.modules[place]), ExitStack() as changed:
            self._fit_part(place, partial(run_of, dense), partial(run_of, given), changed, keep)
            walk.advance(given, place)

    def _fit_part(
        self, place: int, dense: Runs, given: Runs, changed: ExitStack, keep: Callable[[int, Any], None] | None = None
    ) -> None:
        """Fit the units of a part in the order in which they are called, and leave them in their places."""
        readers, calls = self.walk.readers[place], self.walk.calls
        # Looking at a whole model for every batch in every block takes long where there are many.
        run = self.walk.modules[place] if 0 <= place < self.walk.end else self.model
        ears = Gatherer(self.model, readers)
        with only_looked_at(run):
            for batch, call in enumerate(calls):
                output, heard = ears.hear(call, dense(batch))
                self.files.write_all(_HEARD, place, batch, heard)
                if keep is not None:
                    keep(batch, output)
        heard = _HeardFiles(self.files, place, len(calls))
        passage = _OnDisk(self.walk.name_of(place), None, readers, ears.inputs, (), heard, run, calls, NOBODY, given)
        for key in dict.fromkeys(ears.inputs.values()):
            names = [name for name, own in ears.inputs.items() if own == key]
            self._fit_units(names, passage.moments(key))
            changed.enter_context(self.finished.put(names, anchored=True))
        # Tables, and what nothing reached.
        changed.enter_context(self.finished.put([name for name in readers if name not in ears.inputs], anchored=True))
        self.files.forget(_HEARD, place)

    def _fit_units(self, names: Sequence[str], known: Moments | None) -> None:
        # Where nothing before it is changed, or nothing is known of what is, a unit stays as it is fitted on its own.
        wanted = [
            name for name in names if known is not None and (known.cross is not None or not self.own[name].reached)
        ]
        if wanted and known is not None:
            given = self.files.keep_given(names[0], known)
            self.fit({name: (given, *self.own[name].files) for name in wanted})
            Path(given).unlink()


Run = Callable[[], Any]
Runs = Callable[[int], Run]
"""What runs a part of the model on a batch."""


@dataclass(frozen=True, eq=False)
class _OnDisk(Passage):
    """A passage that is run from files."""

    runs: Runs

    def run(self, place: int) -> Run:
        return self.runs(place)


class _HeardFiles(Sequence[Heard]):
    """What units were given in the dense model, batch for batch, read when it is asked for."""

    def __init__(self, files: WalkFiles, place: int, count: int) -> None:
        self.files, self.place, self.size = files, place, count

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, batch: Any) -> Any:
        return self.files.read_all(_HEARD, self.place, range(self.size)[batch])


def distances(walk: StreamWalk, finished: FinishedUnits, held_back: Sequence[Mapping[str, Any]]) -> dict[bool, float]:
    """D on text that was held back, of units fitted on their own (False) and layer after layer (True).

    It is that of :func:`~mpo_tn.torch.models.anchoring.judged`, to rounding.

    Raises:
        StaleWalkError: what an earlier run left is damaged or missing.
    """
    calls = list(calls_of(walk.model, held_back))
    outside = [*walk.readers[BEFORE], *walk.readers[walk.end]]
    kinds: dict[str, Callable[[Iterable[str]], AbstractContextManager[None]]] = {
        "held-dense": lambda _names: nullcontext(),
        "held-alone": partial(finished.put, anchored=False),
        "held-anchored": partial(finished.put, anchored=True),
    }
    streams: dict[str, Stream] = {}
    for kind, put in kinds.items():
        with put(outside):
            streams[kind] = walk.begin(kind, calls)
    for place, block in enumerate(walk.modules):
        left = {kind: stream for kind, stream in streams.items() if not walk.is_through(stream, place)}
        if left:
            walk.progress(place, walk.end, f"comparing {walk.name_of(place)}")
            with walk.weights.loaded(block):
                for kind, stream in left.items():
                    with kinds[kind](walk.readers[place]):
                        walk.advance(stream, place)
    batches = [call.batch for call in calls]

    def of(kind: str) -> AbstractContextManager[None]:
        given = (walk.files.read(kind, walk.end, batch) for batch in range(len(calls)))
        return walk.stand_ins.between(walk.blocks, lambda _: next(given))

    found: dict[bool, float] = {}
    with walk.outside():
        with of("held-dense"):
            for batch, wanted in enumerate(outputs(walk.model, batches)):
                walk.files.write("wanted", walk.end, batch, wanted)
        for kind, anchored in (("held-alone", False), ("held-anchored", True)):
            wanted = (walk.files.read("wanted", walk.end, batch) for batch in range(len(calls)))
            with finished.put(outside, anchored=anchored), of(kind):
                found[anchored] = float(distance(walk.model, wanted, batches))
    return found
