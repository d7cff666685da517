"""What a run of many matrices comes to: the order it does them in, played through with the cost law."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.planning.effort import Effort


@dataclass(frozen=True)
class Forecast:
    """What a run comes to.

    Attributes:
        seconds: from its beginning to its end, on cores such as the law was measured on.
        memory: the most that one process holds at a time, bytes above the libraries.
        together: the same of all processes at a time.
        bytes_read: of the source and of finished matrices, from the disk or its cache.
        bytes_written: of finished matrices and of the result, which lie side by side in the end.
        busy: the share of their time that workers have something to do, while matrices are done.
    """

    seconds: float
    memory: int
    together: int
    bytes_read: int
    bytes_written: int
    busy: float


def forecast(
    efforts: Sequence[Effort], workers: int, *, cores: float | None = None, beside: int = 0, most_shard: int = 0,
    done: int = 0,
) -> Forecast:  # fmt: skip
    """Play a streamed run through: every worker that is free takes the longest of the matrices that are left.

    Args:
        efforts: of the matrices that are to be done.
        workers: processes of one thread each.
        cores: how many of them compute at full speed at a time; more share those. None: as many as there are workers.
        beside: bytes of what is copied from the source into the result as it is.
        most_shard: bytes of the largest file of the result, which is in memory while it is written.
        done: bytes of matrices that were finished before.

    Cost: ``n log n`` for n matrices.

    Raises:
        MPOError: as :func:`finish_time`.

    >>> found = forecast([Effort(3.0, 100, 10, 5), Effort(1.0, 20, 2, 1), Effort(2.0, 60, 4, 2)], 2)
    >>> found.memory, found.together, found.bytes_written
    (100, 160, 16)
    """
    starts, ends, order = _played([effort.seconds for effort in efforts], workers)
    cores_written = sum(effort.bytes_written for effort in efforts)
    result = cores_written + done + beside
    # What is finished is read once to see that it is whole, and once to be put into the result.
    read = sum(effort.bytes_read for effort in efforts) + beside + 2 * (cores_written + done)
    seconds = _shared(starts, ends, cores) + _BEGIN + (_POOL if workers > 1 and efforts else 0.0) + result * _ASSEMBLED
    memory = max((effort.memory for effort in efforts), default=0)
    end = max(ends, default=0.0)
    busy = sum(effort.seconds for effort in efforts) / (end * workers) if end > 0 else 1.0
    return Forecast(
        seconds,
        max(memory, most_shard),
        max(_most_together(starts, ends, [efforts[k].memory for k in order]), most_shard),
        read,
        cores_written + result,
        busy,
    )


def finish_time(seconds: Iterable[float], workers: int, *, cores: float | None = None) -> float:
    """When the last of several jobs ends that are given to so many workers, the longest first.

    Args:
        seconds: of every job, done alone.
        workers: how many are done at a time.
        cores: how many of those at full speed; more share them evenly. None: all.

    Guarantee (finish-bounds): at least ``sum(seconds) / c`` and at least the longest, and at most
    ``sum(seconds) / c + longest``, with ``c = min(workers, cores)`` and one core or more.

    Cost: ``n log n`` for n jobs.

    Raises:
        MPOError: workers that are no positive whole number, cores that are not positive.

    Source: Graham, SIAM J. Appl. Math. 17 (1969): longest first is at most 4/3 of the best order.

    >>> finish_time([3, 3, 2, 2, 2], 2), finish_time([3, 3, 2, 2, 2], 4, cores=2)
    (7.0, 6.5)
    """
    starts, ends, _ = _played(list(seconds), workers)
    return _shared(starts, ends, cores)


def _played(seconds: Sequence[float], workers: int) -> tuple[list[float], list[float], list[int]]:
    """When each job begins and ends if every worker has a core, and which it is; in the order of the beginnings."""
    number = whole_number(workers)
    if number is None or number < 1:
        raise MPOError(f"workers={workers!r} must be a whole number of at least 1")
    order = sorted(range(len(seconds)), key=lambda k: (-seconds[k], k))
    free = [0.0] * min(number, max(len(seconds), 1))
    starts: list[float] = []
    ends: list[float] = []
    for k in order:
        start = heapq.heappop(free)
        starts.append(start)
        ends.append(start + seconds[k])
        heapq.heappush(free, ends[-1])
    return starts, ends, order


def _shared(starts: Sequence[float], ends: Sequence[float], cores: float | None) -> float:
    """The end, if more jobs at a time than cores are slowed down alike.

    All that run go on at one speed, so that they begin and end in the order in which they would with a core each; only
    the clock goes slower, ``running / cores`` times.
    """
    if cores is None:
        return float(max(ends, default=0.0))
    if not cores > 0:
        raise MPOError(f"cores={cores!r} must be positive")
    total, now, running = 0.0, 0.0, 0
    for moment, change in _changes(starts, ends, [1] * len(starts)):
        total += (moment - now) * max(1.0, running / cores)
        now, running = moment, running + change
    return total


def _most_together(starts: Sequence[float], ends: Sequence[float], memory: Sequence[int]) -> int:
    most = held = 0
    for _, change in _changes(starts, ends, memory):
        held += change
        most = max(most, held)
    return most


def _changes(starts: Sequence[float], ends: Sequence[float], amounts: Sequence[int]) -> list[tuple[float, int]]:
    """What comes and goes, by time; what goes at a moment goes before what comes then."""
    found = [(moment, amount) for moment, amount in zip(starts, amounts, strict=True)]
    found += [(moment, -amount) for moment, amount in zip(ends, amounts, strict=True)]
    return sorted(found, key=lambda change: (change[0], change[1]))


_BEGIN, _POOL, _ASSEMBLED = 0.3, 4.0, 3e-9
"""Seconds to look at a checkpoint, to start a pool of processes, and for every byte of the result to be checked and
written, which one process does."""
