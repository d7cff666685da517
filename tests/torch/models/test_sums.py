"""Sums of products against plain NumPy, also where the dense model's inputs differ from some batch on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.calibrating import near
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.torch.models.sums import GradientSum, InputSum, first_tensor, sketched_distance


@given(st.lists(st.sampled_from(["none", "equal", "other"]), min_size=1, max_size=5), st.integers(1, 600))
def test_the_cross_moment_counts_batches_that_were_equal_too(kinds: list[str], width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    total, xs, ys = InputSum(width, torch.device("cpu")), list[np.ndarray](), list[np.ndarray]()
    for kind in kinds:
        x = torch.randn(3, width, generator=generator)
        y = x + 1 if kind == "other" else x.clone()
        total.add(x, "layer", None if kind == "none" else y)
        xs.append(x.double().numpy())
        ys.append(y.double().numpy())
    x, y = np.concatenate(xs), np.concatenate(ys)
    found = total.means()
    second, cross = found["second"], found["cross"]
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()) / len(x))
    near(second, x.T @ x / len(x), scale)
    assert (cross is None) == ("other" not in kinds)
    if cross is not None:
        near(cross, y.T @ x / len(x), scale)


def test_what_is_not_finite_is_refused_before_it_is_added() -> None:
    total = InputSum(2, torch.device("cpu"))
    total.add(torch.ones(1, 2), "layer")
    with pytest.raises(MPOError, match="the input of layer has 1 entries that are inf"):
        total.add(torch.tensor([[1.0, float("inf")]]), "layer")
    assert torch.equal(total.means()["second"], torch.ones(2, 2, dtype=torch.float64))


def test_tokens_without_a_gradient_stay_without() -> None:
    total = GradientSum(2, torch.device("cpu"))
    total.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "layer")
    assert float(total.mean().trace()) == pytest.approx(12.5)


def test_the_first_tensor_of_what_a_model_returns() -> None:
    x, ids = torch.ones(1, 2), torch.ones(1, dtype=torch.long)
    for output in (x, (ids, x), [x], {"ids": ids, "x": x}):
        assert first_tensor(output) is x
    assert first_tensor("text") is first_tensor((ids,)) is None
    with pytest.raises(MPOError, match="returned a str without hidden states or logits: give a loss"):
        sketched_distance("text", None, torch.Generator())
