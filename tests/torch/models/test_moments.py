"""What optimisers know of a core follows a cut, or is dropped and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.adapter import close, compressed, linear, reference_matrix, unit_of
from helpers.chains import slack
from helpers.gauges import gauged, scale_at
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpo_tn import MPOError
from mpo_tn.torch.models.cuts import cut_unit
from mpo_tn.torch.models.moments import check_optimizer, unwrapped
from mpo_tn.torch.models.units import mpo_units
from mpo_tn.truncate.bond_cut import cut_bond


@pytest.mark.guarantee("moments-follow")
@given(gauged(dtypes=("float64",), library="torch"), st.integers(0, 10**6))
def test_moments_follow_as_the_gradient_does(cores: list[torch.Tensor], seed: int) -> None:
    """For a loss that is linear in W the gradient of W stays what it was, so the gradients of cores map exactly."""
    layer = unit_of(cores)
    unit = mpo_units(nn.Sequential(layer))["0"]
    rng = np.random.default_rng(seed)
    k = int(rng.integers(len(cores) - 1))
    new = int(rng.integers(1, cores[k].shape[3] + 1))
    direction = torch.from_numpy(rng.standard_normal(layer.spec.sites.shape))

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((reference_matrix(layer) * direction).sum(), list(layer.cores))

    optimizer = torch.optim.Adam(layer.parameters())
    squares = [torch.from_numpy(rng.uniform(0, 1, core.shape)) for core in cores]
    for core, gradient, square in zip(layer.cores, gradients(), squares, strict=True):
        optimizer.state[core] = {"step": torch.tensor(7.0), "exp_avg": gradient, "exp_avg_sq": square}
    scale = scale_at(cores, k) * float(direction.norm())
    parameters, before = list(layer.cores), [core.clone() for core in layer.cores]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    cut = cut_bond(list(layer.cores), k, new)
    assert cut_unit(unit, k, new, optimizer) == []
    assert layer.spec.bonds[k] == new
    for j, (core, gradient) in enumerate(zip(layer.cores, gradients(), strict=True)):
        state = optimizer.state[core]
        assert core is parameters[j]
        assert core.grad is None
        assert float(state["step"]) == 7.0
        if j not in (k, k + 1):
            assert torch.equal(core, before[j])
            assert torch.equal(state["exp_avg_sq"], squares[j])
        else:
            weights = torch.from_numpy(cut.q.T if j == k else cut.p) ** 2
            equation = "aoib,bc->aoic" if j == k else "aoib,ac->coib"
            close(state["exp_avg_sq"], torch.einsum(equation, squares[j], weights))
            assert (state["exp_avg_sq"] >= 0).all()
            size = float(np.linalg.norm(cut.p)) * float(np.linalg.norm(cut.q))
            assert float((state["exp_avg"] - gradient).norm()) <= slack("float64", core.numel(), scale * size * 10)


@pytest.mark.guarantee("moments-follow")
def test_state_that_cannot_follow_is_dropped_and_named() -> None:
    for optimizer_class, kept in [
        (torch.optim.Adamax, False), (torch.optim.Rprop, False), (torch.optim.ASGD, False), (torch.optim.NAdam, True),
        (torch.optim.RMSprop, True), (torch.optim.Adagrad, True), (torch.optim.SGD, True), (torch.optim.RAdam, True),
    ]:  # fmt: skip
        layer, _ = compressed(linear(12, 8), sites=3)
        options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
        optimizer = optimizer_class(layer.parameters(), lr=0.01, **options)

        def step(layer: Any = layer, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            layer(torch.ones(2, 12)).square().sum().backward()
            optimizer.step()

        step()
        notes = cut_unit(mpo_units(layer)[""], 0, 2, optimizer)
        assert len(notes) == (0 if kept else 2), optimizer_class
        assert all("cores" in note and "cannot follow" in note for note in notes)
        step()
        assert all(torch.isfinite(core).all() for core in layer.cores)
    adam = torch.optim.Adam(layer.parameters(), amsgrad=True, capturable=False)
    layer(torch.ones(2, 12)).square().sum().backward()
    adam.step()
    cut_unit(mpo_units(layer)[""], 1, 1, adam)
    assert {tuple(adam.state[layer.cores[2]][key].shape) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")} == {
        tuple(layer.cores[2].shape)
    }


@pytest.mark.guarantee("moments-follow")
@given(gauged(dtypes=("complex128",), library="torch"), st.data())
def test_the_state_of_complex_cores_is_dropped(cores: list[torch.Tensor], data: st.DataObject) -> None:
    """torch keeps squares of real and imaginary parts apart, which no map of a complex core carries on."""
    layer = unit_of(cores)
    k = data.draw(st.integers(0, len(cores) - 2))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2, layer.in_features, dtype=torch.complex128)).abs().sum().backward()
    optimizer.step()
    notes = cut_unit(mpo_units(layer)[""], k, 1, optimizer)
    assert len(notes) == 2
    assert all("cannot follow a cut and was dropped" in note for note in notes)
    assert [core in optimizer.state for core in layer.cores] == [j not in (k, k + 1) for j in range(len(cores))]
    layer(torch.ones(2, layer.in_features, dtype=torch.complex128)).abs().sum().backward()
    optimizer.step()


class Wrapped:
    """What accelerate does around an optimiser."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_optimisers_that_are_refused() -> None:
    layer, _ = compressed(linear(12, 8), sites=3)
    adam = torch.optim.Adam(layer.parameters())
    check_optimizer(adam, layer)
    check_optimizer(Wrapped(Wrapped(adam)), layer)
    assert unwrapped(Wrapped(adam)) is adam
    with pytest.raises(MPOError, match="LBFGS"):
        check_optimizer(torch.optim.LBFGS(layer.parameters()), layer)
    with pytest.raises(MPOError, match=r"none of the model's parameters.*after compress"):
        check_optimizer(torch.optim.Adam(linear(3, 3).parameters()), layer)
    with pytest.raises(MPOError, match="str is not a torch optimiser"):
        check_optimizer("adam", layer)
    for mark in ("_is_flat_param", "ds_id", "placements"):
        flat = nn.Parameter(torch.zeros(3))
        setattr(flat, mark, True)
        with pytest.raises(MPOError, match="sharded"):
            check_optimizer(torch.optim.Adam([flat, *layer.parameters()]), layer)
    for name, module in [("ZeroRedundancyOptimizer", "torch"), ("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero")]:
        sharded = type(name, (torch.optim.SGD,), {"__module__": module})
        with pytest.raises(MPOError, match=f"{name}.*sharded"):
            check_optimizer(sharded(layer.parameters()), layer)
