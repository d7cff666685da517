"""The product with a matrix rebuilt from its cores: gradients, what is kept for backward, torch's own machinery."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.adapter import close, cores_norm, reference_matrix
from helpers.modes import COMPUTING, MODES, agrees, layer_of
from helpers.specs import LARGER, SMALL, spec_of, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mpo_tn.planning.cost import chain_routes, rebuild_route
from mpo_tn.planning.spec import ModuleSpec
from mpo_tn.torch.layers import merging, workspace
from mpo_tn.torch.layers.product import mpo_linear
from mpo_tn.torch.layers.workspace import free_workspace


@pytest.fixture(autouse=True, scope="module")
def nothing_lies_in_the_workspace() -> Iterator[None]:
    """Memory that is used again holds no numbers: those of the call before would hide what is not written."""
    take = workspace._Workspace.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace._Workspace, "take", lambda *arguments: take(*arguments).fill_(math.nan))
        yield


def wanted(layer: Any) -> list[torch.Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def reference(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, reference_matrix(layer), layer.bias)


@settings(max_examples=60)
@given(specs(), st.sampled_from(MODES), st.integers(0, 3), st.data())
def test_gradients_of_any_subset_of_cores(spec: ModuleSpec, mode: str, tokens: int, data: st.DataObject) -> None:
    n = len(spec.sites)
    frozen = tuple(sorted(data.draw(st.sets(st.integers(0, n - 1)))))
    layer = layer_of(spec, mode, frozen=frozen)
    x = torch.randn(tokens, spec.in_features, dtype=torch.float64, requires_grad=data.draw(st.booleans()))
    weight = torch.randn(tokens, spec.out_features, dtype=torch.float64)
    y = layer(x)
    agrees(layer, x, y)
    inputs = wanted(layer) + ([x] if x.requires_grad else [])
    assert y.requires_grad == bool(inputs)
    if not inputs:
        return
    got = torch.autograd.grad((y * weight).sum(), inputs)
    expected = torch.autograd.grad((reference(layer, x) * weight).sum(), inputs)
    scale = cores_norm(layer) * (1 + x.detach().norm()) * (1 + weight.norm())
    smallest = min(1.0, *(float(core.detach().norm()) for core in layer.cores))
    for a, b in zip(got, expected, strict=True):
        close(a, b, (scale + weight.norm()) / smallest)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [SMALL, LARGER], ids=["small", "larger"])
def test_gradcheck(spec: ModuleSpec, mode: str) -> None:
    layer = layer_of(spec, mode)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, spec.in_features, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=spec is LARGER)
    for frozen in itertools.combinations(range(1, len(inputs)), 2):
        some = tuple(value.detach() if k in frozen else value for k, value in enumerate(inputs))
        assert torch.autograd.gradcheck(call, some, fast_mode=True)


@pytest.mark.guarantee("second-derivatives")
@pytest.mark.parametrize("mode", COMPUTING)
def test_second_derivatives(mode: str) -> None:
    layer = layer_of(SMALL, mode)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, SMALL.in_features, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradgradcheck(call, inputs)
    some = tuple(value.detach() if k == 1 else value for k, value in enumerate(inputs))
    assert torch.autograd.gradgradcheck(call, some, fast_mode=True)


@pytest.mark.parametrize("mode", COMPUTING)
def test_complex_cores(mode: str) -> None:
    layer = layer_of(LARGER, mode, dtype=torch.complex128)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, LARGER.in_features, dtype=torch.complex128, requires_grad=True)
    close(torch.view_as_real(layer(x)), torch.view_as_real(functional.linear(x, layer.dense_weight(), layer.bias)))

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def kept_for_backward(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    kept: list[torch.Tensor] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        y = layer(x)
    return y, kept


@pytest.mark.guarantee("x-and-cores")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 50])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_x_and_the_cores_are_kept_for_backward(mode: str, tokens: int, autocast: bool) -> None:
    spec = spec_of((3, 4, 4), (4, 3, 3), 30)
    layer = layer_of(spec, mode, dtype=torch.float32, frozen=(1,))
    x = torch.randn(tokens, spec.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, kept = kept_for_backward(layer, x)
    cores = {core.data_ptr() for core in layer.cores}
    others = [value for value in kept if value.data_ptr() not in cores]
    assert [value.shape for value in others] == [x.shape]
    assert autocast or others[0].data_ptr() == x.data_ptr()
    y.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, without = kept_for_backward(layer.requires_grad_(False), x)
    if mode != "cached":  # whose matrix is there anyway
        assert {value.data_ptr() for value in without} <= cores
    assert all((core.grad is None) == (k == 1) for k, core in enumerate(layer.cores))
    # A plain graph through the matrix keeps it: the test can fail.
    _, plain = kept_for_backward(lambda x: functional.linear(x, layer.dense_weight()), x)
    assert max(value.numel() for value in plain) >= spec.out_features * spec.in_features


def backward_flops(mode: str, frozen: tuple[int, ...], *, x_too: bool = False) -> int:
    layer = layer_of(spec_of((4, 4, 4), (4, 4, 4), 16, bias=False), mode, frozen=frozen)
    x = torch.randn(8, 64, dtype=torch.float64, requires_grad=x_too)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    return counter.get_total_flops()


@settings(max_examples=60)
@given(specs(), st.sampled_from([1, 2, 7]), st.booleans())
def test_predicted_flops_are_those_torch_counts(spec: ModuleSpec, tokens: int, training: bool) -> None:
    layer = layer_of(spec)
    size = (spec.out_features, spec.in_features)
    x = torch.randn(tokens, spec.in_features, dtype=torch.float64, requires_grad=training)
    routes = [rebuild_route(spec.core_shapes, *size), *chain_routes(spec.core_shapes)]
    for route in routes:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            y = mpo_linear(x, layer.bias, route, size, tuple(layer.cores))
            if training:
                y.sum().backward()
        counted = counter.get_total_flops()
        if training:
            # The last merge or step need not be made again to have its gradients.
            assert 0.4 * route.training.total_flops(tokens) < counted <= route.training.total_flops(tokens)
        else:
            assert counted == route.forward.total_flops(tokens)


@pytest.mark.guarantee("frozen-for-nothing")
@pytest.mark.parametrize("mode", ["chain", "rebuild"])
def test_frozen_cores_cost_nothing_in_backward(mode: str) -> None:
    everything = backward_flops(mode, ())
    auxiliaries = backward_flops(mode, (1,))
    last = backward_flops(mode, (0, 1))
    assert last < auxiliaries < everything
    assert backward_flops(mode, (0, 1, 2), x_too=True) < backward_flops(mode, (0, 1), x_too=True)


def made(tree: Any, cores: Any) -> tuple[int, int, int]:
    """The entries of a merged tensor, its right bond, and the flops of making it, with all that is below it."""
    if isinstance(tree, int):
        return cores[tree].numel(), cores[tree].shape[3], 0
    (a, bond, left), (b, right, below) = made(tree[0], cores), made(tree[1], cores)
    entries = a * b // bond**2
    return entries, right, left + below + 2 * entries * bond


def spread(tree: Any, cores: Any, wanted: set[int]) -> int:
    """The flops of taking the gradient of a merged tensor to the wanted cores: a product for each part with some."""
    if isinstance(tree, int):
        return 0
    entries, bond = made(tree, cores)[0], made(tree[0], cores)[1]
    parts = [part for part in tree if wanted & set(tree_leaves(part))]
    return sum(2 * entries * bond + spread(part, cores, wanted) for part in parts)


@pytest.mark.guarantee("frozen-for-nothing")
@settings(max_examples=60)
@given(specs(), st.integers(1, 5), st.booleans(), st.data())
def test_backward_makes_the_products_that_are_wanted_and_no_other(
    spec: ModuleSpec, tokens: int, x_too: bool, data: st.DataObject
) -> None:
    """For a rebuilt matrix, whatever is frozen: counted by torch, and from the shapes."""
    frozen = tuple(sorted(data.draw(st.sets(st.integers(0, len(spec.sites) - 1)))))
    layer = layer_of(replace(spec, bias=False), "rebuild", frozen=frozen)
    x = torch.randn(tokens, spec.in_features, dtype=torch.float64, requires_grad=x_too)
    wanted = set(range(len(spec.sites))) - set(frozen)
    y = layer(x)
    expected = 0
    if wanted or x_too:
        tree, cores = layer._rebuild.segments[0], tuple(layer.cores)
        whole = made(tree, cores)[2]
        root = 0 if isinstance(tree, int) else 2 * made(tree, cores)[0] * made(tree[0], cores)[1]
        product = 2 * tokens * spec.out_features * spec.in_features
        expected += whole if x_too else whole - root
        expected += product * (x_too + bool(wanted)) + spread(tree, cores, wanted)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == expected
    assert [core.grad is None for core in layer.cores] == [k in frozen for k in range(len(spec.sites))]


@pytest.mark.guarantee("frozen-for-nothing")
@pytest.mark.parametrize("mode", ["chain", "rebuild"])
def test_a_bias_alone_costs_nothing_in_backward(mode: str) -> None:
    layer = layer_of(LARGER, mode, frozen=(0, 1, 2))
    y = layer(torch.randn(8, LARGER.in_features, dtype=torch.float64))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 0
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 8))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_rounds_the_matrix_once(mode: str) -> None:
    layer = layer_of(LARGER, mode, dtype=torch.float32)
    x = torch.randn(6, LARGER.in_features, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, again = layer(x), layer(x.bfloat16())
        dense = functional.linear(x, layer.dense_weight(), layer.bias)
    assert y.dtype == again.dtype == dense.dtype == torch.bfloat16
    agrees(layer, x, y.float().bfloat16())
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(dense.float().square().sum(), [x, *layer.parameters()])
    for a, b in zip(gradients, expected, strict=True):
        assert a.dtype == torch.float32
        # In units of bfloat16; the two differ in where they round.
        close(a.bfloat16(), b.bfloat16(), b.norm() + 1)


def test_autocast_rounds_a_rebuilt_matrix_as_it_rounds_a_dense_one() -> None:
    """To the last bit. All numbers are whole and below ``2**24``, so that no order of summation rounds anything."""
    layer = layer_of(LARGER, "rebuild", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-7, 8, parameter.shape, generator=generator))
    x = torch.randint(-3, 4, (6, LARGER.in_features), generator=generator).float()
    weight = layer.dense_weight().detach()
    assert not torch.equal(weight.bfloat16().float(), weight)  # it is rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), functional.linear(x, weight, layer.bias))
        assert torch.equal(layer(x.bfloat16()), layer(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(mode: str, reentrant: bool) -> None:
    layer = layer_of(LARGER, mode, frozen=(1,))
    x = torch.randn(4, LARGER.in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *wanted(layer)]
    layer(x).square().sum().backward()
    plain = [value.grad.clone() for value in inputs]
    for value in inputs:
        value.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(value.grad, gradient) for value, gradient in zip(inputs, plain, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compile_in_one_graph(mode: str) -> None:
    layer = layer_of(LARGER, mode, dtype=torch.float32, frozen=(1,))
    torch._dynamo.reset()  # what was compiled before for other layers counts
    fast = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tokens in (1, 40, 50):
        x = torch.randn(tokens, LARGER.in_features)
        agrees(layer, x, fast(x))
        layer.zero_grad()
        fast(x).square().sum().backward()
        compiled = [core.grad for core in wanted(layer)]
        layer.zero_grad()
        layer(x).square().sum().backward()
        for gradient, parameter in zip(compiled, wanted(layer), strict=True):
            close(gradient, parameter.grad, parameter.grad.norm())
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", MODES)
def test_export(mode: str) -> None:
    layer = layer_of(LARGER, mode, dtype=torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    for shapes, sizes in ((None, (3,)), (({0: tokens},), (2, 3, 900))):
        program = torch.export.export(layer, (torch.randn(3, LARGER.in_features),), dynamic_shapes=shapes)
        for count in sizes:
            x = torch.randn(count, LARGER.in_features)
            agrees(layer, x, program.module()(x))


def test_function_transforms_work_or_say_that_they_do_not() -> None:
    layer = layer_of(LARGER, "rebuild")
    x = torch.randn(3, LARGER.in_features, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    for a, b in zip(got.values(), expected, strict=True):
        close(a, b)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(layer)(x)


def test_inference_mode_and_training_take_turns() -> None:
    """What is kept between calls on the CPU must be usable in and out of inference mode."""
    layer = layer_of(LARGER, "rebuild")
    x = torch.randn(40, LARGER.in_features, dtype=torch.float64)
    for _ in range(2):
        with torch.inference_mode():
            y = layer(x)
        agrees(layer, x, y)
        layer(x).sum().backward()
        larger = layer_of(spec_of((8, 8), (8, 8), 4), "rebuild")
        with torch.inference_mode():
            larger(torch.randn(2, 64, dtype=torch.float64))


class LiveTensors(TorchDispatchMode):
    """Adds up the memory of all tensors that any operation has touched and that are still alive."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.count(known)

    def count(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count((args, kwargs, result))
        self.held = {key: entry for key, entry in self.held.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def peak_of_a_step(layers: list[Any], tokens: int) -> int:
    """Bytes of tensors at the worst moment of a step with AdamW, its state and all parameters included."""
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    x = torch.randn(tokens, layers[0].in_features)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with LiveTensors(*model.parameters(), *states, x) as live:
        step()
    return live.peak


@pytest.mark.parametrize("tokens", [8, 64, 1000])
def test_a_step_that_trains_auxiliaries_needs_no_more_memory_than_full_fine_tuning(
    tokens: int,
) -> None:
    free_workspace()  # of other tests
    wide, narrow = (2, 4, 6, 4, 2), (2, 4, 4, 4, 2)
    up, down = spec_of(wide, narrow, 10**6), spec_of(narrow, wide, 10**6)
    options: Any = {"dtype": torch.float32, "frozen": (2,)}
    mpo = [layer_of(spec, "rebuild", **options) for spec in (up, down, up)]
    dense = [torch.nn.Linear(spec.in_features, spec.out_features) for spec in (up, down, up)]
    assert sum(layer.spec.num_parameters for layer in mpo) > sum(layer.weight.numel() for layer in dense)
    assert peak_of_a_step(mpo, tokens) <= peak_of_a_step(dense, tokens)


def test_a_result_outlives_the_next_call() -> None:
    """The matrix is overwritten by the next one; nothing that was returned may be."""
    layer, other = layer_of(LARGER, "rebuild"), layer_of(LARGER, "rebuild", seed=1)
    x = torch.randn(40, LARGER.in_features, dtype=torch.float64)
    y, weight = layer(x), layer.dense_weight()
    before, weight_before = y.detach().clone(), weight.detach().clone()
    with torch.no_grad():
        other(x)
    assert torch.equal(y, before)
    assert torch.equal(weight, weight_before)


@pytest.mark.parametrize("rows", [1, 20, 30, 10**9])
def test_a_matrix_in_blocks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of one row of the matrix, of several with fewer in the last block, and of all."""
    layer = layer_of(LARGER, "rebuild")
    x = torch.randn(5, LARGER.in_features, dtype=torch.float64)
    whole = layer(x)
    agrees(layer, x, whole)
    monkeypatch.setattr(merging, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(merging, "_BLOCK_ROWS", rows)
    close(layer(x), whole)
