"""What a caller gives as batches, by step: the same batch for the same seed and step, whatever it is given as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.models.ranks import own_rows, world


@dataclass(frozen=True)
class Fed:
    """One batch: what goes into the model, and its labels if it has any.

    ``key`` is equal only for batches that are the same; None where that is not known.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor | None
    key: int | None

    @property
    def mask(self) -> torch.Tensor | None:
        """Which positions hold text: shape (examples, positions), or None if all do."""
        return self.inputs.get("attention_mask")

    def to(self, device: torch.device) -> Fed:
        """The same on a device."""
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()
        }
        return Fed(moved, None if self.labels is None else self.labels.to(device), self.key)

    def own_part(self) -> Fed | None:
        """What of it this process takes, which is all of it if there is one; None for nothing.

        Raises:
            MPOError: tensors whose rows are not those of the others.
        """
        if world() == 1:
            return self
        labels = {} if self.labels is None else {"labels": self.labels}
        part = own_rows({**self.inputs, **labels})
        return None if part is None else Fed(part, part.pop("labels", None), self.key)


class Feed:
    """Batches by step.

    Args:
        batches: something with ``at(step)``, as :class:`~mpo_tn.tuning.tasks.batches.Batches`; or a sequence of
            batches, gone through in an order drawn anew for every epoch; or anything that can be iterated again and
            again, in its own order. A batch is a dictionary of what the model takes, ``labels`` among it or not, or an
            object with such ``inputs`` and ``labels``.
        seed: of the order; where a ``DataLoader`` shuffles, of that too, if it draws from torch's own generator.
        name: what it is called in messages.

    Raises:
        MPOError: nothing in it, or something that can be gone through only once.
    """

    def __init__(self, batches: Any, seed: int, name: str) -> None:
        self._batches, self._seed, self._name = batches, seed, name
        self._random_access = hasattr(batches, "at")
        if not self._random_access and not isinstance(batches, Iterable):
            raise MPOError(
                f"{name} is a {type(batches).__name__}: give a list of batches, each a dictionary of tensors"
            )
        if isinstance(batches, Mapping):
            raise MPOError(f"{name} is one batch: give a list of batches, {name}=[batch] if there is only one")
        if isinstance(batches, Iterator):
            raise MPOError(
                f"{name} is a {type(batches).__name__}, which can be gone through only once, and training does it "
                "again and again: give a list"
            )
        self._starts, self._epoch, self._place = [0], 0, 0
        self._running: Iterator[Any] | None = None
        if not self._random_access and next(self._begin(0), None) is None:
            raise self._empty()

    def at(self, step: int) -> Fed:
        """The batch of a step, counted from 0 over all epochs.

        Raises:
            MPOError: it is no batch.
        """
        if self._random_access:
            return self._fed(self._batches.at(step), step, None)
        if isinstance(self._batches, Sequence):
            epoch, place = divmod(step, len(self._batches))
            number = int(np.random.default_rng([self._seed, epoch]).permutation(len(self._batches))[place])
            return self._fed(self._batches[number], number, number)
        return self._fed(self._stream_to(step), step, None)

    def in_order(self) -> Iterator[Fed]:
        """Every batch once, for measuring."""
        several = self._batches.in_order() if hasattr(self._batches, "in_order") else self._begin(0)
        repeats = hasattr(self._batches, "in_order") or isinstance(self._batches, Sequence)
        count = 0
        for count, batch in enumerate(several, start=1):
            yield self._fed(batch, count - 1, count - 1 if repeats else None)
        if count == 0:
            raise self._empty()

    def _stream_to(self, step: int) -> Any:
        """The batch of a step of what can only be gone through from its beginning."""
        if self._running is None or step < self._place:
            self._epoch = max(k for k, start in enumerate(self._starts) if start <= step)
            self._place, self._running = self._starts[self._epoch], self._begin(self._epoch)
        while True:
            found = next(self._running, None)
            if found is not None:
                self._place += 1
                if self._place > step:
                    return found
            elif self._place == self._starts[self._epoch]:
                raise self._empty()
            else:
                self._epoch += 1
                if self._epoch == len(self._starts):
                    self._starts.append(self._place)
                self._running = self._begin(self._epoch)

    def _begin(self, epoch: int) -> Iterator[Any]:
        """The batches of one epoch; what shuffles with torch's generator does so by the seed, and leaves it alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed * 1_000_003 + epoch)
            running = iter(self._batches)
            first = next(running, None)
        if first is None:
            return
        yield first
        yield from running

    def _fed(self, batch: Any, number: int, key: int | None) -> Fed:
        inputs, labels = getattr(batch, "inputs", batch), getattr(batch, "labels", None)
        if not isinstance(inputs, Mapping) or not any(isinstance(value, torch.Tensor) for value in inputs.values()):
            raise MPOError(
                f"batch {number} of {self._name} is a {type(batch).__name__} without tensors: give dictionaries of "
                "tensors, as a tokenizer makes them with return_tensors='pt'"
            )
        own = dict(inputs)
        labels = own.pop("labels", labels)
        fed = Fed(own, labels, key)
        if fed.mask is not None and not bool(fed.mask.any()):
            raise MPOError(f"batch {number} of {self._name} has no text in it: its attention_mask is all zeros")
        if any(isinstance(value, torch.Tensor) and value.numel() == 0 for value in own.values()):
            raise MPOError(f"batch {number} of {self._name} is empty: leave it out")
        return fed

    def _empty(self) -> MPOError:
        return MPOError(f"{self._name} holds no batch: give at least one")
