"""Units done one by one or many at a time, by whatever executor; what is done stays done."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.progress import Progress
from mpo_tn.torch.models.stream_unit import UnitTask, do_unit

_UNHEARD = 30.0
"""Seconds after a unit was written in which an answer comes, if one comes."""

_FAREWELL = 10.0
"""Seconds in which the workers of a pool end once there is no more work; those that do not are killed."""

ATTEMPTS = 3
"""So often a unit is tried whose worker dies."""


def run_units(
    tasks: Sequence[UnitTask], *, workers: int = 1, executor: Executor | None = None, progress: Progress, total: int
) -> None:
    """Do units, in the order given, in this process, in a pool of processes or by an executor.

    Args:
        tasks: what is to be done, the longest first.
        workers: processes of one BLAS thread each; 1 is this process.
        executor: any of ``concurrent.futures``, of Dask or MPI, in place of ``workers``; whoever made it closes it. Its
            workers must see the same folders.
        progress: told of every unit that is done, out of ``total``.
        total: units of the run; what is not in ``tasks`` was done before.

    A unit whose worker dies is tried again; the third time it is named. One that fails by itself stops the run: what
    has not begun is called off, what has begun is waited for, and what is done stays.

    Raises:
        MPOError: a unit failed, which the message names; the executor is broken or cannot be reached.
    """
    done = total - len(tasks)
    if executor is None and workers == 1:
        for task in tasks:
            progress(done, total, task.name)
            do_unit(task)
            done += 1
    elif executor is not None:
        _Run(tasks, lambda: _lent(executor), 1, progress, total).run()
    else:
        _Run(tasks, lambda: _pool(min(workers, max(len(tasks), 1))), ATTEMPTS, progress, total).run()
    if tasks:
        progress(total, total, tasks[-1].name)


class _Run:
    """Tasks handed to an executor until all are done; a pool that broke is replaced."""

    def __init__(
        self,
        tasks: Sequence[UnitTask],
        made: Callable[[], AbstractContextManager[Executor]],
        attempts: int,
        progress: Progress,
        total: int,
    ) -> None:
        self.left = dict(enumerate(tasks))
        self.made, self.attempts, self.progress, self.total = made, attempts, progress, total
        self.deaths: dict[int, int] = {}

    def run(self) -> None:
        while self.left:
            with self.made() as executor:
                self._round(executor)

    def _round(self, executor: Executor) -> None:
        waiting: dict[Future[str], int] = {}
        try:
            for number, task in self.left.items():
                waiting[_future(executor.submit(do_unit, task))] = number
        except BrokenExecutor as error:
            self._collect(waiting, error)
            return
        except (OSError, RuntimeError, pickle.PicklingError) as error:
            raise MPOError(f"the executor takes no work ({_said(error)}): is it closed, or out of reach?") from error
        try:
            self._collect(waiting)
        finally:
            for future in waiting:
                future.cancel()

    def _collect(self, waiting: dict[Future[str], int], broken: BaseException | None = None) -> None:
        """Wait for all; of those that ended well the tasks are done with."""
        failed: BaseException | None = None
        running: set[int] = set()
        before = len(self.left)
        while waiting:
            ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            if not ready:
                running = {number for future, number in waiting.items() if future.running()}
                ready = self._unheard(waiting)
            for future in ready:
                number = waiting.pop(future)
                try:
                    if future.done():
                        future.result()
                except BrokenExecutor as error:
                    broken = error
                except CancelledError:
                    pass
                except MPOError as error:
                    failed = failed or error
                except BaseException as error:
                    failed = failed or self._odd(number, error)
                else:
                    task = self.left.pop(number)
                    self.progress(self.total - len(self.left), self.total, task.name)
            if failed is not None:
                for future in waiting:
                    future.cancel()
        if failed is not None:
            raise failed
        if broken is not None:
            self._count_deaths(running, broken)
        elif self.left and len(self.left) == before:
            raise MPOError(
                f"the executor called off {len(self.left)} units: is its scheduler still there? What is done is kept"
            )

    def _unheard(self, waiting: Mapping[Future[str], int]) -> set[Future[str]]:
        """Units whose file has been there for some time: a worker that died took its answer with it."""
        found: set[Future[str]] = set()
        for future, number in waiting.items():
            try:
                age = time.time() - Path(self.left[number].file).stat().st_mtime
            except FileNotFoundError:
                continue
            if age > _UNHEARD and not future.done():
                found.add(future)
        return found

    def _odd(self, number: int, error: BaseException) -> BaseException:
        name = self.left[number].name
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        if type(error).__name__ in ("NoWorkerError", "NoValidWorkerError"):
            return MPOError(
                f"{name}: no worker is left to do it ({_said(error)}): start some, and run it again; "
                "what is done is kept"
            )
        if type(error).__name__ == "KilledWorker":
            return MPOError(
                f"{name}: workers died over it ({_said(error)}), most likely of too little memory: give each more, "
                "or use fewer on a machine; what is done is kept"
            )
        found = MPOError(f"{name}: {type(error).__name__}: {_said(error)}; what is done is kept")
        found.__cause__ = error
        return found

    def _count_deaths(self, running: set[int], error: BaseException) -> None:
        suspects = [number for number in running if number in self.left] or list(self.left)[:1]
        for number in suspects:
            self.deaths[number] = self.deaths.get(number, 0) + 1
        worst = max(suspects, key=lambda number: self.deaths[number])
        if self.attempts == 1:
            raise MPOError(
                f"the executor broke ({_said(error)}) with {len(self.left)} units left, {self.left[worst].name} "
                "among them; what is done is kept: give a new executor and run it again"
            )
        if self.deaths[worst] >= self.attempts:
            raise MPOError(
                f"{self.left[worst].name}: its worker died {self.attempts} times, most likely of too little memory: "
                "use fewer workers; what is done is kept"
            )


def _future(found: Any) -> Future[str]:
    """What an executor gave, which may be of its own kind."""
    if isinstance(found, Future):
        return found
    raise MPOError(
        f"the executor gives {type(found).__name__} objects, and what waits for work needs "
        "concurrent.futures.Future: docs/scale.md says how to make it an executor of concurrent.futures"
    )


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _lent(executor: Executor) -> Generator[Executor]:
    """Somebody else closes it."""
    yield executor


@contextmanager
def _pool(workers: int) -> Generator[Executor]:
    """Fresh processes: forks of this one would inherit locks of threads that are not in them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mpo_tn.torch.models.stream_unit"])
    with _environment({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker_begins)
        try:
            yield pool
        finally:
            # A worker that is killed while it waits for work takes the lock of the queue along, and others wait for it.
            late = Timer(_FAREWELL, _kill, [list((pool._processes or {}).values())])  # pyright: ignore[reportPrivateUsage]
            late.start()
            pool.shutdown(wait=True, cancel_futures=True)
            late.cancel()


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _worker_begins() -> None:
    """One thread; and not to outlive whoever asked for the work: nobody would ever tell it to stop."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
