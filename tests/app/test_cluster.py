from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_tn import MPOError
from mpo_tn.app import cluster
from mpo_tn.app.cluster import dask_executor
from mpo_tn.torch.models.stream_unit import seen_from_here, versions

distributed = pytest.importorskip("distributed", reason="the extra [distributed] is not installed")
ADDRESS = "tcp://127.0.0.1:8786"


class Scheduler:
    """What a client tells of a scheduler: the answer of each worker, an error, or nothing."""

    def __init__(self, answer: Callable[[list[str]], Any] | None) -> None:
        self.answer = answer

    def __call__(self, _address: str, timeout: float) -> Scheduler:
        return self

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_for_workers(self, _count: int, timeout: float) -> None:
        if self.answer is None:
            raise TimeoutError("Only 0/1 workers arrived")

    def run(self, function: Any, folders: list[str]) -> dict[str, Any]:
        assert function is seen_from_here
        assert self.answer is not None
        return {"tcp://one": function(folders), "tcp://two": self.answer(folders)}

    def get_executor(self, pure: bool) -> str:
        assert not pure
        return "executor"


def broken(_folders: list[str]) -> Any:
    raise ModuleNotFoundError("No module named 'mpo_tn'")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, f"the scheduler at {ADDRESS} has no workers: start some with dask worker"),
        (broken, "a worker cannot do the work .No module named 'mpo_tn'.: install the same"),
        (lambda _: (versions() | {"numpy": "1.0"}, []), r"the worker at tcp://two has .*numpy 1\.0, and here are"),
        (lambda folders: (versions(), folders[1:]), "the worker at tcp://two does not see .*out: put source and"),
    ],
)
def test_workers_that_cannot_do_the_work_are_told_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[list[str]], Any] | None, said: str
) -> None:
    monkeypatch.setattr(distributed, "Client", Scheduler(answer))
    (tmp_path / "out").mkdir()
    with pytest.raises(MPOError, match=said), dask_executor(ADDRESS, [tmp_path, tmp_path / "out"]):
        pass


def test_good_workers_are_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Client", Scheduler(lambda _: (versions(), [])))
    with dask_executor(ADDRESS, [tmp_path]) as executor:
        assert executor == "executor"


@pytest.mark.parametrize("speaks", [False, True])
def test_what_listens_and_is_no_scheduler_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speaks: bool
) -> None:
    monkeypatch.setattr(cluster, "_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def serve() -> None:
            taken.append(server.accept()[0])
            if speaks:
                taken[0].close()

        threading.Thread(target=serve, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MPOError, match=f"there is no Dask scheduler at {address}"), dask_executor(address, []):
            pass
        for own in taken:
            own.close()
