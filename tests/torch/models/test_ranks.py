"""Several processes: each takes its rows, all end with the same, and none waits for one that has left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT, TESTS
from helpers.two_ranks import CHECKS
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch.models import ranks


@pytest.mark.guarantee("heal-as-one", "refine-as-one", "ranks-fail-together", "saved-as-it-is", "squeeze-alone")
@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """One launch for all checks of helpers/two_ranks.py: it takes longer to load torch than to do them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    logs = [(tmp_path / f"{rank}.log").open("w") for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "helpers.two_ranks", str(rank), str(tmp_path), str(port)],
            stdout=log, stderr=log, env=environment,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    end = time.monotonic() + 600
    try:
        while None in [process.poll() for process in started] and time.monotonic() < end:
            time.sleep(0.1)
            if 1 in [process.poll() for process in started]:  # then the other one may wait for a long time
                end = min(end, time.monotonic() + 20)
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    said = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    files = [tmp_path / f"{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), "\n".join(text[-4000:] for text in said)
    found = [json.loads(file.read_text()) for file in files]
    wrong = [f"{name}: {came[-3000:]}" for own in found for name, came in own.items() if came not in ("ok", "ended")]
    assert not wrong, "\n".join(wrong)
    assert [list(own) for own in found] == [list(CHECKS)] * 2, "\n".join(text[-4000:] for text in said)
    assert [process.returncode for process in started] == [0, -9]  # the second one is killed in the last check


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world", lambda: world)


@settings(max_examples=30)
@given(rows=st.integers(1, 9), world=st.integers(1, 5), shared=st.booleans())
def test_every_row_has_one_owner(rows: int, world: int, shared: bool) -> None:
    ids = torch.arange(1, 3 * rows + 1).reshape(rows, 3)
    batch = {"input_ids": ids, "position_ids": torch.arange(3)[None] if shared else ids, "use_cache": False}
    seen: list[torch.Tensor] = []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as monkeypatch:
            as_rank(monkeypatch, rank, world)
            part = ranks.own_rows(batch)
        assert (part is None) == (rank >= rows)
        if part is not None:
            seen.append(part["input_ids"])
            assert part["use_cache"] is False
            assert torch.equal(part["position_ids"], batch["position_ids"] if shared else part["input_ids"])
    assert sorted(torch.cat(seen)[:, 0].tolist()) == ids[:, 0].tolist()


def test_rows_that_are_all_padding_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1, 2)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    assert ranks.own_rows({"input_ids": mask, "attention_mask": mask}) is None
    assert ranks.own_rows({"input_ids": mask, "attention_mask": 1 - mask}) is not None
    with pytest.raises(MPOError, match=r"grid has the shape \[2, 3\] in a batch of 3 rows"):
        ranks.own_rows({"input_ids": mask, "grid": torch.zeros(2, 3)})


def test_alone_everything_is_done_at_once() -> None:
    model = torch.nn.Linear(2, 3)
    before = model.weight.detach().clone()
    assert ranks.together(lambda: 3) == [3]
    assert ranks.of_first(lambda: 4) == ranks.agreed(lambda: 4) == 4
    ranks.spread([model.weight])
    ranks.add_gradients([model.weight], lambda: model.weight.sum().backward())
    assert torch.equal(model.weight.grad, torch.ones(3, 2))
    ranks.check_same({"numbers": 1})
    assert torch.equal(model.weight, before)
    with pytest.raises(KeyError), ranks.agreeing():
        raise KeyError("mine")
