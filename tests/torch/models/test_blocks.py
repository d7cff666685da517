"""Which modules of a model are its blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tiny_models import FAMILIES, tiny, token_ids
from torch import nn

from mpo_tn.torch.models.blocks import BlockCall, find_blocks, record
from mpo_tn.torch.models.feeding import calls_of, only_looked_at

EXPECTED = {
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "albert": None,  # one layer, run several times
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_family(family: str) -> None:
    model, name = tiny(family), EXPECTED[family]
    assert find_blocks(model, token_ids()) == (() if name is None else (f"{name}.0", f"{name}.1"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Stack(nn.Module):
    """Two lists and a rule of how they are run."""

    def __init__(self, run: Callable[[Stack, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.short = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.long = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.rule = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rule(self, x)


def through(
    layers: nn.ModuleList, x: torch.Tensor, between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    for layer in layers:
        x = between(layer(x))
    return x


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda self, x: through(self.short, through(self.long, x)), "long"),
        (lambda self, x: through(self.short, through(self.long, x, torch.relu)), "short"),  # something lies between
        (lambda self, x: through(self.short, x) + sum(layer(x) for layer in self.long), "short"),  # beside each other
        (lambda self, x: through(self.short, through(self.long[::-1], x)), "short"),  # another order
        (lambda self, x: through(self.short, through(self.long, through(self.long, x))), "short"),  # twice
        (lambda self, x: through(self.long, x, lambda y: y.view(y.shape)), "long"),
        (lambda self, x: through(self.long, x, lambda y: y.add_(1)), None),  # changed in place
        (lambda self, x: x, None),
    ],
)
def test_blocks_are_called_once_in_order_each_with_what_the_one_before_gave(
    rule: Callable[[Stack, torch.Tensor], torch.Tensor], expected: str | None
) -> None:
    found = find_blocks(Stack(rule), torch.ones(2, 4))
    assert {name.rpartition(".")[0] for name in found} == ({expected} if expected else set())


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_recorded_blocks_run_one_after_another_give_what_the_model_gives(family: str) -> None:
    model, names = tiny(family), find_blocks(tiny(family), token_ids())
    outputs: list[torch.Tensor] = []
    last = model.get_submodule(names[-1])
    handle = last.register_forward_hook(
        lambda _m, _a, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    (call,) = calls_of(model, [token_ids()])
    with only_looked_at(model):
        once, again = record(model, names, call), record(model, names, call)
        handle.remove()
        hidden = once.hidden
        for name, own in zip(names, once.calls, strict=True):
            hidden = own.run(model.get_submodule(name), hidden)
        assert torch.allclose(hidden, outputs[0], rtol=1e-5, atol=1e-6)
        assert once.same_as(again)
        next(model.parameters()).mul_(1.5)
        assert not once.same_as(record(model, names, call))


def test_a_block_that_changes_its_input_in_place_leaves_the_samples() -> None:
    class InPlace(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input.add_(super().forward(input))

    hidden, block = torch.ones(2, 4), InPlace(4, 4)
    with torch.no_grad():
        first = BlockCall((None,), {}, 0).run(block, hidden)
        assert torch.equal(hidden, torch.ones(2, 4))
        assert torch.equal(BlockCall((), {"input": None}, "input").run(block, hidden), first)
