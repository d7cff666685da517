"""Routes are planned when they are needed, once for all layers of one structure, also while torch traces."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.modes import COMPUTING, agrees, layer_of
from helpers.specs import LARGER, SMALL, spec_of, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from mpo_tn.planning.cost import choices
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers import routes

Solved = list[tuple[Any, ...]]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Solved]:
    """The cases that are solved during a test, which starts with none."""
    found: Solved = []

    def counted(*arguments: Any, **case: Any) -> Any:
        found.append((case["device_type"], case["itemsize"], case["training"]))
        return choices(*arguments, **case)

    monkeypatch.setattr(routes, "choices", counted)
    routes.routes_of.cache_clear()
    yield found
    routes.routes_of.cache_clear()


def cut(layer: Any) -> None:
    bonds = (layer.spec.bonds[0] - 1, *layer.spec.bonds[1:])
    cores = [core.detach() for core in layer.cores]
    layer.replace_cores([cores[0][..., :-1], cores[1][:-1], *cores[2:]], bonds)


def test_after_a_cut_one_case_is_solved(solved: Solved) -> None:
    layer = layer_of(LARGER)
    x = torch.randn(4, LARGER.in_features, dtype=torch.float64)
    assert solved == []
    layer(x)
    cut(layer)
    assert solved == [("cpu", 8, True)]
    for _ in range(2):
        agrees(layer, x, layer(x))
    assert solved == [("cpu", 8, True)] * 2
    with torch.no_grad():
        layer(x)
    layer.float()(x.float())
    assert solved[2:] == [("cpu", 8, False), ("cpu", 4, True)]


def test_layers_of_one_structure_plan_once(solved: Solved) -> None:
    x = torch.randn(4, LARGER.in_features, dtype=torch.float64)
    first, second = layer_of(LARGER), layer_of(LARGER, seed=1)
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    for layer in (first, second, copy.deepcopy(first), torch.load(file, weights_only=False)):
        agrees(layer, x, layer(x))
    assert solved == [("cpu", 8, True)]
    second.mode = "chain"
    second(x)
    second.mode = "auto"
    second(x)
    assert solved == [("cpu", 8, True)] * 2


def test_tables_plan_nothing(solved: Solved) -> None:
    table = layer_of(spec_of((3, 4), (2, 2), 3, kind="embedding"))
    table(torch.arange(12)).sum().backward()
    assert solved == []


@settings(max_examples=60)
@given(specs(), st.sampled_from(COMPUTING), st.integers(0, 60), st.booleans())
def test_a_layer_takes_the_route_of_its_case(spec: ModuleSpec, mode: str, tokens: int, training: bool) -> None:
    layer = layer_of(spec, mode, dtype=torch.float32)
    x = torch.randn(tokens, spec.in_features)
    with torch.set_grad_enabled(training):
        taken = layer._route(x, layer.cores.forward())
    size = spec.out_features, spec.in_features
    assert taken == choices(spec.core_shapes, *size, mode, training=training).at(tokens)


class Block(nn.Module):
    """Two structures, so that a graph has to look at both."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        there, back = spec_of((3, 4, 4), (4, 3, 3), 3), spec_of((4, 3, 3), (3, 4, 4), 3)
        self.there = layer_of(there, dtype=torch.float32, seed=seed)
        self.back = layer_of(back, dtype=torch.float32, seed=seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(torch.relu(self.there(x)))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_one_graph_serves_all_blocks_and_survives_what_is_planned_later(solved: Solved) -> None:
    blocks = [Block(seed) for seed in range(3)]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 36)
    for block in blocks:
        assert torch.allclose(block(x), block.forward(x), rtol=1e-4, atol=1e-3)
    assert graphs() == 1
    assert solved == [("cpu", 4, True)] * 2
    with torch.no_grad():
        blocks[0].forward(x)
    assert solved == [("cpu", 4, True)] * 2 + [("cpu", 4, False)] * 2
    for block in blocks:
        block(x)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh")
def test_a_graph_is_made_anew_after_a_change(solved: Solved) -> None:
    layer = layer_of(LARGER, dtype=torch.float32)
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(1, LARGER.in_features)
    agrees(layer, x, fast(x))
    cut(layer)
    agrees(layer, x, fast(x))
    layer.mode = "rebuild"
    agrees(layer, x, fast(x))
    assert graphs() == 3
    assert solved == [("cpu", 4, True)] * 3


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("strict", [False, True])
def test_export_without_a_call_before(strict: bool, solved: Solved) -> None:
    layer = layer_of(SMALL, dtype=torch.float32)
    x = torch.randn(3, SMALL.in_features)
    program = torch.export.export(layer, (x,), strict=strict)
    agrees(layer, x, program.module()(x))
    assert solved == [("cpu", 4, True)]
