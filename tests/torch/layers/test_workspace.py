"""The memory in which cores are merged on the CPU: one at a time, closed whatever happens, one for each thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers.modes import agrees, layer_of
from helpers.specs import LARGER

from mpo_tn.torch import free_workspace
from mpo_tn.torch.layers import product
from mpo_tn.torch.layers import workspace as module
from mpo_tn.torch.layers.workspace import give_back, is_open, scratch, workspace

CORE = torch.zeros(1)


@pytest.fixture(autouse=True)
def empty() -> None:
    free_workspace()


@pytest.mark.parametrize("through", ["workspace", "layer"])
def test_it_does_not_nest(through: str) -> None:
    layer = layer_of(LARGER, "rebuild")
    x = torch.randn(4, LARGER.in_features, dtype=torch.float64)
    with torch.no_grad(), workspace(CORE):
        outer = scratch.take(4, torch.float64).fill_(1)
        with pytest.raises(AssertionError, match="does not nest"):
            layer(x) if through == "layer" else workspace(CORE).__enter__()
        assert is_open()  # what failed to open did not close the one around it
        scratch.take(4, torch.float64).fill_(2)
        assert torch.equal(outer, torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        agrees(layer, x, layer(x))


@torch.no_grad()
def test_an_exception_closes_it() -> None:
    with pytest.raises(RuntimeError, match="size"), workspace(CORE):
        scratch.take(8, torch.float32).view(3)
    assert not is_open()
    with workspace(CORE):
        assert is_open()
    assert not is_open()


def test_a_product_that_fails_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(LARGER, "rebuild")
    x = torch.randn(4, LARGER.in_features, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())
    assert not is_open()
    y = layer(x)

    def fail(*_: Any) -> None:
        assert is_open()
        raise RuntimeError("in backward")

    monkeypatch.setattr(product, "spread", fail)
    with pytest.raises(RuntimeError, match="in backward"):
        y.sum().backward()
    assert not is_open()


@torch.no_grad()
def test_threads_have_their_own() -> None:
    found: list[Any] = []

    def other() -> None:
        found.append(is_open())
        with torch.no_grad(), workspace(CORE):
            found.append(scratch.take(4, torch.float64).fill_(2).data_ptr())
        free_workspace()

    with workspace(CORE):
        mine = scratch.take(4, torch.float64).fill_(1)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert is_open()
        assert found[0] is False
        assert found[1] != mine.data_ptr()
        assert torch.equal(mine, torch.ones(4, dtype=torch.float64))
    assert len(idle()) == 1  # the other thread freed its own


@torch.no_grad()
def test_memory_is_used_again_until_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    with workspace(CORE):
        first = scratch.take(8, torch.float64).data_ptr()
    with workspace(CORE):
        value = scratch.take(4, torch.float32)
        assert value.data_ptr() == first
        assert scratch.take(4, torch.float32).data_ptr() != first
        give_back(value)
        assert scratch.take(4, torch.float32).data_ptr() == first
    assert len(idle()) == 2
    free_workspace()
    assert idle() == []
    monkeypatch.setattr(module, "_MOST_KEPT_BYTES", 31)
    with workspace(CORE):
        scratch.take(4, torch.float64)
        scratch.take(3, torch.float64)
    assert [buffer.numel() for buffer in idle()] == [24]


def idle() -> list[torch.Tensor]:
    return scratch._idle


def test_it_is_opened_only_where_no_graph_is_recorded() -> None:
    with workspace(CORE):
        assert not is_open()
    with torch.no_grad():
        with workspace(torch.zeros(1, device="meta")):
            assert not is_open()
        with workspace(torch.zeros(1, requires_grad=True)):
            assert is_open()
