"""Commands that a launcher starts several times; what two do together is in tests/torch/models/test_ranks.py."""

from __future__ import annotations

import pytest
import torch
import typer

from mpo_tn import MPOError
from mpo_tn.app.launching import launched, own_device, refuse_several

TOLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def tell(monkeypatch: pytest.MonkeyPatch, **told: str) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("told", [{}, {**TOLD, "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_without_a_launcher_of_several_there_is_no_group(told: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, **told)
    refuse_several("compress")
    with launched() as speaks:
        assert speaks
        assert not torch.distributed.is_initialized()


def test_only_the_first_says_that_a_command_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, **TOLD)
    refuse_several("heal")
    with pytest.raises(MPOError, match="one of 2 processes, and compress does not share"):
        refuse_several("compress")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(typer.Exit):
        refuse_several("compress")


def test_others_that_cannot_be_reached_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, **{**TOLD, "MASTER_PORT": "nowhere"})
    with pytest.raises(MPOError, match=r"process 0 of 2 cannot reach the others at 127.0.0.1:nowhere"), launched():
        pass


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch)
    assert [own_device(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    tell(monkeypatch, **{**TOLD, "LOCAL_RANK": "1"})
    assert [own_device(name) for name in ("cpu", "mps", "cuda", "cuda:3")] == ["cpu", "mps", "cuda:1", "cuda:3"]
