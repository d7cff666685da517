"""One shape of progress for everything that takes long."""

from __future__ import annotations

import inspect
import typing

import pytest

from mpo_tn import torch as adapter
from mpo_tn import tuning
from mpo_tn.app import demo
from mpo_tn.progress import Progress, doing, silent
from mpo_tn.torch.models.summary import inspect_model


def test_words_before_the_name() -> None:
    seen: list[tuple[int, int, str]] = []
    doing("inspecting", lambda *step: seen.append(step))(2, 5, "pooler")
    assert seen == [(2, 5, "inspecting pooler")]
    assert silent(2, 5, "pooler") is None


@pytest.mark.parametrize(
    "function", [adapter.compress, adapter.squeeze, inspect_model, tuning.finetune, tuning.carry_out, demo.run_demo]
)
def test_whoever_takes_a_callback_calls_it_progress(function: typing.Any) -> None:
    assert typing.get_type_hints(function)["progress"] == Progress | None
    assert inspect.signature(function).parameters["progress"].default is None
