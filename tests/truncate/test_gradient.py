"""The gradient of a truncation: against differences, against what it stands for, and where others fail."""

import math

import jax
import numpy as np
import pytest
import torch
from helpers.chains import C, dense, fro, host, problems
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites, Truncation, truncated
from mpo_tn.truncate.gradient import _adjoint_of_step, _forward, _order

LEGS = [
    (Sites((2, 3), (3, 2)), 3),
    (Sites((2, 2, 3), (2, 3, 2)), (3, 4)),
    (Sites((2, 2, 2, 2), (2, 2, 2, 2)), (2, 5, 3)),
    (Sites((6, 1), (1, 4)), 2),
]


@given(problems(), st.integers(1, 9))
def test_it_is_the_matrix_of_the_decomposition(problem, cap):
    """To ``8 eps sqrt(size) norm (1 + norm / gap)**2``, of the least gap; where it closes, luck decides."""
    truncation = Truncation(max_bond=cap)
    _, report = MPO.from_matrix(problem.matrix, problem.sites, truncation, method="svd")
    value = truncated(problem.matrix, problem.sites, truncation)
    assert type(value) is type(problem.matrix)
    assert value.dtype == problem.matrix.dtype
    caps = truncation.caps(len(problem.sites) - 1)
    steps = zip(_forward(problem.matrix, problem.sites, caps)[1], _order(problem.sites, caps), strict=True)
    gap = min((values[rank - 1] - values[rank] for (_, values, _), (_, rank) in steps), default=math.inf)
    if gap > 0.01 * problem.norm:
        allowed = 2 * problem.slack * (1 + problem.norm / gap) ** 2
        assert abs(fro(problem.host - host(value)) - report.error) <= allowed


@pytest.mark.guarantee("truncated-matrix")
@given(problems(), st.integers(1, 9))
def test_it_is_the_matrix_of_the_mpo_itself(problem, cap):
    """Entry by entry, to the same; by whatever method from_matrix takes."""
    truncation = Truncation(max_bond=cap)
    mpo, _ = MPO.from_matrix(problem.matrix, problem.sites, truncation)
    value = truncated(problem.matrix, problem.sites, truncation)
    caps = truncation.caps(len(problem.sites) - 1)
    steps = zip(_forward(problem.matrix, problem.sites, caps)[1], _order(problem.sites, caps), strict=True)
    gap = min((values[rank - 1] - values[rank] for (_, values, _), (_, rank) in steps), default=math.inf)
    if gap > 0.01 * problem.norm:
        allowed = 2 * problem.slack * (1 + problem.norm / gap) ** 2
        assert fro(host(value) - dense(mpo.cores)) <= allowed


@pytest.mark.guarantee("truncated-gradient")
@pytest.mark.slow
@pytest.mark.parametrize(("sites", "bonds"), LEGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck(sites, bonds, dtype):
    torch.manual_seed(0)
    w = torch.randn(sites.shape, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: truncated(x, sites, Truncation(max_bond=bonds)), (w,))


@pytest.mark.guarantee("truncated-gradient")
@pytest.mark.parametrize("values", [(3, 3, 3, 1, 0.5), (3, 2, 2, 1, 1), (3, 3, 1, 1, 1), (3, 2, 1, 0, 0)])
@pytest.mark.parametrize("shape", [(5, 5), (5, 8), (8, 5)])
@pytest.mark.parametrize("complex_", [False, True])
def test_degenerate_values_have_a_gradient(values, shape, complex_):
    """Against central differences in random directions, to ``1e-7 norm``: their error is ``h**2`` and ``eps / h``."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(_draw(rng, (size, 5), complex_))[0] for size in shape)
    w = (u * np.array(values, dtype=float)) @ v.conj().T
    rank = 1 + max(k for k in range(4) if values[k] > values[k + 1] and k < 3)
    sites, truncation = Sites.low_rank(*shape), Truncation(max_bond=rank)
    g = _draw(rng, shape, complex_)
    x = torch.from_numpy(w).requires_grad_()
    truncated(x, sites, truncation).backward(torch.from_numpy(g))
    for _ in range(4):
        d, h = _draw(rng, shape, complex_), 1e-5
        change = (truncated(w + h * d, sites, truncation) - truncated(w - h * d, sites, truncation)) / (2 * h)
        assert abs(np.vdot(g, change).real - np.vdot(x.grad.numpy(), d).real) <= 1e-7 * fro(g) * fro(d)


def _draw(rng, shape, complex_):
    return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0.0)


@pytest.mark.guarantee("truncated-gradient")
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize(("sites", "bonds"), LEGS)
def test_jax_and_torch_agree(sites, bonds, complex_):
    """Up to the conjugate, of which each has its own convention; ``4 eps sqrt(size)`` of the gradient in float32."""
    rng = np.random.default_rng(2)
    kind = np.complex64 if complex_ else np.float32
    w, target = (_draw(rng, sites.shape, complex_).astype(kind) for _ in range(2))
    truncation = Truncation(max_bond=bonds)
    x = torch.from_numpy(w).requires_grad_()
    (truncated(x, sites, truncation) - torch.from_numpy(target)).abs().square().sum().backward()
    loss = lambda m: (abs(truncated(m, sites, truncation) - target) ** 2).sum()  # noqa: E731
    found = np.asarray(jax.grad(loss)(jax.numpy.asarray(w)))
    assert found.dtype == w.dtype
    assert fro(found - x.grad.numpy().conj()) <= 50 * C * 2.0**-23 * math.sqrt(w.size) * fro(found)


def test_nothing_cut_is_the_identity():
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    value = truncated(w, Sites((2, 2), (2, 3)), Truncation())
    assert torch.equal(value, w)
    (gradient,) = torch.autograd.grad(value.sum(), w)
    assert torch.equal(gradient, torch.ones_like(w))


def test_bad_input():
    w = torch.eye(4, dtype=torch.float64, requires_grad=True)
    sites = Sites((2, 2), (2, 2))
    with pytest.raises(MPOError, match="give max_bond"):
        truncated(w, sites, Truncation(rel_error=0.1))
    with pytest.raises(MPOError, match="legs must multiply exactly"):
        truncated(w, Sites((2, 3), (2, 2)), Truncation(max_bond=1))
    with pytest.raises(MPOError, match=r"singular values 2 and 3 of bond 0 are equal \(1\)"):
        truncated(w, Sites.low_rank(4, 4), Truncation(max_bond=2)).sum().backward()
    with pytest.raises(MPOError, match="NaN"):
        truncated(np.full((4, 4), np.nan), sites, Truncation(max_bond=1))
    with pytest.raises(MPOError, match="legs must multiply exactly"):
        jax.jit(lambda m: truncated(m, sites, Truncation(max_bond=1)))(jax.numpy.eye(8))
    with pytest.raises(MPOError, match=r"mpo_tn.truncated"):
        MPO.from_matrix(w, sites)


def test_the_adjoint_is_of_the_kept_and_the_cut_alone():
    """Zero where nothing kept meets the gradient; and the identity on the tangent space where nothing is cut."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((6, 4)))[0] for _ in range(2))
    values = np.array([4.0, 3.0, 0.0, 0.0])
    outside = u[:, 2:] @ rng.standard_normal((2, 2)) @ v[:, 2:].T
    assert fro(_adjoint_of_step(outside, (u, values, v), 2, 0)) <= C * 2.0**-52 * 6 * fro(outside)
    tangent = u[:, :2] @ rng.standard_normal((2, 6))
    assert fro(_adjoint_of_step(tangent, (u, values, v), 2, 0) - tangent) <= C * 2.0**-52 * 6 * fro(tangent)
