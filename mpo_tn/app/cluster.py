"""Dask's workers as an executor, once it is known that they can do the work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from mpo_tn.exceptions import MPOError

_PATIENCE = 20
"""Seconds for the scheduler to answer, and for a first worker to be there."""


@contextmanager
def dask_executor(address: str, folders: Sequence[Path]) -> Generator[Executor]:
    """The workers of a Dask scheduler, each asked for its versions and whether it sees the folders.

    Raises:
        MPOError: Dask is not installed, the scheduler cannot be reached or has no workers, or one of them has other
            versions or does not see a folder.
    """
    try:
        from distributed import Client  # pyright: ignore[reportMissingImports] - an extra of its own
    except ImportError as error:
        raise MPOError("--scheduler needs Dask: pip install 'mpo-tn[distributed]'") from error
    try:
        client: Any = _in_time(lambda: Client(address, timeout=_PATIENCE))
    except (OSError, TimeoutError, ValueError) as error:
        raise MPOError(
            f"there is no Dask scheduler at {address} ({_said(error)}): start one with dask scheduler, and dask worker "
            f"{address} --nthreads 1 on every machine"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError as error:
            raise MPOError(
                f"the scheduler at {address} has no workers: start some with dask worker {address} --nthreads 1"
            ) from error
        _check(client, [folder.resolve() for folder in folders])
        yield client.get_executor(pure=False)


def _in_time(made: Callable[[], Any]) -> Any:
    """What a call gives, in a thread that is left behind: Dask waits for ever for what listens and never speaks."""
    found: Future[Any] = Future()

    def act() -> None:
        try:
            found.set_result(made())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=act, daemon=True).start()
    try:
        return found.result(2 * _PATIENCE)
    except TimeoutError as error:
        raise TimeoutError(str(error) or "what listens there does not answer as one would") from error


def _check(client: Any, folders: Sequence[Path]) -> None:
    from mpo_tn.torch.models.stream_unit import seen_from_here, versions

    try:
        answers = client.run(seen_from_here, [str(folder) for folder in folders])
    except Exception as error:  # whatever keeps a worker from importing what it is asked
        raise MPOError(
            f"a worker cannot do the work ({_said(error)}): install the same mpo-tn[torch] on all of them"
        ) from error
    for worker, (theirs, missing) in answers.items():
        if theirs != versions():
            raise MPOError(
                f"the worker at {worker} has {_listed(theirs)}, and here are {_listed(versions())}: their last "
                f"digits may "
                "differ; install the same versions everywhere"
            )
        if missing:
            raise MPOError(
                f"the worker at {worker} does not see {missing[0]}: put source and result on a folder that all "
                f"machines "
                "share, under the same path"
            )


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
