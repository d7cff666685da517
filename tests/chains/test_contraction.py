"""Contraction plans against an independent simulation, and the TensorNetwork graph."""

import math

import numpy as np
import opt_einsum
import pytest
import torch
from helpers.chains import dense, fro, host, legs, mpos, random_chain, slack
from helpers.plans import simulate
from hypothesis import given

from mpo_tn import MPO, Sites
from mpo_tn.chains.contraction import plan_network
from mpo_tn.linalg import library

CHAINS = mpos(legs(max_size=1000), forms=("none",), max_bond=4)


@given(CHAINS)
def test_plan_costs_are_those_of_a_simulation(chain):
    plan = chain.plan()
    assert (plan.flops, plan.largest_intermediate, plan.peak_entries) == simulate(plan)
    assert plan.itemsize == chain.cores[0].itemsize
    assert plan.peak_bytes == plan.peak_entries * plan.itemsize
    assert chain.plan() is plan
    if len(chain) > 1:
        _, info = opt_einsum.contract_path(plan.equation, *plan.shapes, shapes=True, optimize=list(plan.path))
        assert plan.largest_intermediate == info.largest_intermediate


def test_plan_of_a_chain_counted_by_hand():
    # (2,3)(3,4) -> 2*2*3*4 = 48 flops; (2,4)(4,5) -> 2*2*4*5 = 80; the other order would cost 120 + 60.
    plan = plan_network(["ab", "bc", "cd"], "ad", ((2, 3), (3, 4), (4, 5)), 8)
    assert plan.flops == 128
    assert plan.largest_intermediate == 10
    # 6 + 12 + 20 operands; the worst moment has the intermediate of 8 beside the result of 10; then result and copy.
    assert plan.peak_entries == 38 + max(8 + 10, 10 + 10)
    assert plan.peak_bytes == 8 * 58
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((2, 3)), rng.standard_normal((3, 4)), rng.standard_normal((4, 5))
    assert np.abs(plan.contract([a, b, c]) - a @ b @ c).max() <= 1e-14
    assert "2 pairwise steps, 128 flops" in str(plan)


def test_plan_of_an_outer_product_counts_no_additions():
    plan = plan_network(["a", "b"], "ba", ((2,), (3,)), 8)
    assert plan.flops == 6
    assert np.array_equal(plan.contract([np.array([1.0, 2]), np.array([1.0, 2, 3])]), [[1, 2], [2, 4], [3, 6]])


def test_plan_depends_on_the_dtype():
    sites = Sites((2, 2), (2, 2))
    assert random_chain(sites, 2, 0, "float32").plan().itemsize == 4
    assert random_chain(sites, 2, 0, "complex128").plan().itemsize == 16
    half = MPO(tuple(torch.ones(1, 2, 2, 1).to(torch.bfloat16) for _ in range(2)))
    assert half.plan().itemsize == 2


@given(CHAINS)
def test_to_matrix_is_the_contraction_of_the_cores(chain):
    expected = dense(chain.cores)
    gauge = math.prod(fro(host(core)) for core in chain.cores)
    dtype = str(chain.dtype).rsplit(".", maxsplit=1)[-1]
    assert fro(host(chain.to_matrix()) - expected) <= slack(dtype, expected.size, gauge)


@given(CHAINS)
def test_to_nodes_contract_to_the_matrix(chain):
    nodes = chain.to_nodes()
    assert [node.name for node in nodes] == [f"T{k}" for k in range(len(chain))]
    assert all(node.axis_names == ["left", "out", "in", "right"] for node in nodes)
    backend = {"torch": "pytorch"}.get(library(chain.cores[0]), library(chain.cores[0]))
    assert all(node.backend.name == backend for node in nodes)
    edges = [nodes[0]["left"], *(n["out"] for n in nodes), *(n["in"] for n in nodes), nodes[-1]["right"]]
    result = nodes[0]
    for node in nodes[1:]:
        result = result @ node
    tensor = host(result.reorder_edges(edges).tensor)
    expected = dense(chain.cores)
    gauge = math.prod(fro(host(core)) for core in chain.cores)
    dtype = str(chain.dtype).rsplit(".", maxsplit=1)[-1]
    assert fro(tensor.reshape(chain.shape) - expected) <= slack(dtype, expected.size, gauge)
    assert chain.to_nodes()[0] is not nodes[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_to_matrix_is_differentiable(n):
    chain = random_chain(Sites((2,) * n, (3,) * n), 2, n, "float64", "torch")
    cores = [core.clone().requires_grad_() for core in chain.cores]
    assert torch.autograd.gradcheck(lambda *args: MPO(args).to_matrix(), cores, fast_mode=True)
    weight = torch.randn(2**n, 3**n, dtype=torch.float64)
    (MPO(tuple(cores)).to_matrix() * weight).sum().backward()
    # W is linear in every core, so <core, gradient> is the inner product itself (Euler).
    inner = float((torch.from_numpy(dense(cores)) * weight).sum())
    for core in cores:
        gap = abs(float((core.detach() * core.grad).sum()) - inner)
        assert gap <= 1e-12 * math.prod(fro(host(c)) for c in cores) * float(weight.norm())
