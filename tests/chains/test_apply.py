"""MPO times vectors and batches, without the dense matrix and within a memory limit.

Tolerance: ``C * eps(dtype) * sqrt(size of the matrix) * gauge * |x|``, gauge the product of the norms of the cores.
"""

import math
import re
import tracemalloc

import numpy as np
import opt_einsum
import pytest
import torch
from helpers.chains import EPS, dense, fro, host, legs, random_chain, slack
from helpers.plans import simulate
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites
from mpo_tn.chains import contraction

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def applications(draw):
    """A chain, an ``x`` of shape (in,) or (in, batch) and a ``y`` of shape (out,) or (out, batch), of one kind."""
    sites = draw(legs(max_size=1000))
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(st.sampled_from(("numpy", "torch")))
    chain = random_chain(sites, draw(st.integers(1, 4)), draw(SEEDS), dtype, library)
    shape = draw(st.sampled_from(((), (1,), (2,), (5,), (40,))))
    rng = np.random.default_rng(draw(SEEDS))

    def array(size):
        values = rng.standard_normal((2, size, *shape))
        values = (values[0] + 1j * values[1] if dtype.startswith("complex") else values[0]).astype(dtype)
        return torch.from_numpy(values) if library == "torch" else values

    return chain, array(sites.shape[1]), array(sites.shape[0])


def allowed(chain, *arrays):
    dtype = str(chain.dtype).rsplit(".", maxsplit=1)[-1]
    scale = math.prod(fro(host(core)) for core in chain.cores) * math.prod(fro(host(array)) for array in arrays)
    return slack(dtype, math.prod(chain.shape), scale)


@given(applications())
def test_application_is_the_dense_product(application):
    chain, x, y = application
    w = dense(chain.cores)
    result = chain @ x
    assert tuple(result.shape) == (chain.shape[0], *x.shape[1:])
    assert type(result) is type(x)
    assert result.dtype == x.dtype
    assert fro(host(result) - w @ host(x)) <= allowed(chain, x)
    rows = y if y.ndim == 1 else y.T
    from_left = rows @ chain
    assert tuple(from_left.shape) == (*rows.shape[:-1], chain.shape[1])
    assert fro(host(from_left) - host(rows) @ w) <= allowed(chain, y)


@given(applications())
def test_adjoint_pairing(application):
    chain, x, y = application
    left = np.vdot(host(chain @ x), host(y))
    right = np.vdot(host(x), host(chain.H @ y))
    assert abs(left - right) <= 2 * allowed(chain, x, y)


@given(applications())
def test_application_is_linear_and_follows_products(application):
    chain, x, _ = application
    z = x[::-1] if isinstance(x, np.ndarray) else x.flip(0)
    combined = host(chain @ (2 * x - z))
    assert fro(combined - 2 * host(chain @ x) + host(chain @ z)) <= 6 * allowed(chain, x)
    assert fro(host((chain + chain) @ x) - 2 * host(chain @ x)) <= 4 * allowed(chain, x)
    twice = (chain.H @ chain) @ x
    scale = math.prod(fro(host(core)) for core in chain.cores)
    assert fro(host(twice) - host(chain.H @ (chain @ x))) <= 2 * scale * allowed(chain, x)


@given(applications())
def test_plan_of_an_application(application):
    chain, x, _ = application
    batch = 1 if x.ndim == 1 else x.shape[1]
    plan = chain.plan(batch=batch)
    assert (plan.flops, plan.largest_intermediate, plan.peak_entries) == simulate(plan)
    assert chain.plan(batch=batch) is plan
    assert all(len(pair) <= 2 for pair in plan.path)
    assert plan.flops == flops_of(plan)
    # Neither sweep over the cores is cheaper.
    n = len(chain)
    for path in ([(0, k) for k in range(n, 0, -1)], [(k - 1, k) for k in range(n, 0, -1)]):
        assert plan.flops <= flops_of(plan, path)


def flops_of(plan, path=None):
    """Multiplications and additions of a path, from sets of indices."""
    terms = [set(term) for term in plan.equation.split("->")[0].split(",")]
    size = dict(
        item
        for term, shape in zip(plan.equation.split("->")[0].split(","), plan.shapes, strict=True)
        for item in zip(term, shape, strict=True)
    )
    flops = 0
    for pair in plan.path if path is None else path:
        a, b = (terms[position] for position in pair) if len(pair) == 2 else (terms[0], set())
        if len(pair) == 2:
            flops += math.prod(size[index] for index in a | b) * (2 if a & b else 1)
            terms = [term for position, term in enumerate(terms) if position not in pair] + [a ^ b]
    return flops


def largest_of_cores(plan):
    """Entries of the largest intermediate in which ``x`` has no part."""
    inputs = plan.equation.split("->")[0].split(",")
    size = {i: s for term, shape in zip(inputs, plan.shapes, strict=True) for i, s in zip(term, shape, strict=True)}
    live = [(set(term), k == len(inputs) - 1) for k, term in enumerate(inputs)]
    found = [0]
    for first, second in plan.path:
        (a, a_has_x), (b, b_has_x) = live[first], live[second]
        live = [term for position, term in enumerate(live) if position not in (first, second)]
        live.append((a ^ b, a_has_x or b_has_x))
        if not live[-1][1]:
            found.append(math.prod(size[i] for i in a ^ b))
    return max(found)


@pytest.mark.guarantee("vector-never-dense")
@given(legs(min_sites=2), st.integers(1, 9), st.sampled_from((2, 3, 100, 10**6)))
def test_the_matrix_is_not_built_for_a_vector_and_for_a_batch_only_where_it_saves(sites, bond, batch):
    ends = [1, *[bond] * (len(sites) - 1), 1]
    shapes = tuple((ends[k], *leg, ends[k + 1]) for k, leg in enumerate(sites))
    dense_entries = math.prod(sites.shape)
    assert largest_of_cores(contraction.plan_for_shapes(shapes, 8, 1)) < dense_entries
    plan = contraction.plan_for_shapes(shapes, 8, batch)
    inputs, output = plan.equation.split("->")
    strict = contraction.plan_network(inputs.split(","), output, plan.shapes, 8, cap_without_last=dense_entries)
    assert largest_of_cores(strict) < dense_entries
    assert plan.flops <= strict.flops
    if largest_of_cores(plan) >= dense_entries:
        assert plan.peak_bytes <= strict.peak_bytes
        assert (plan.flops, plan.peak_bytes) != (strict.flops, strict.peak_bytes)
    else:
        assert plan == strict


def test_many_columns_and_wide_bonds_go_through_the_matrix():
    mpo = MPO.random(Sites.balanced(768, 3072), 64, seed=0, dtype="float32")
    dense_flops = 2 * 768 * 3072
    assert mpo.plan(batch=1).flops == pytest.approx(14.9 * dense_flops, rel=0.01)
    assert mpo.plan(batch=128).flops == 128 * dense_flops + mpo.plan().flops
    assert mpo.plan(batch=1).peak_bytes < 4 * 768 * 3072


@pytest.mark.guarantee("vector-never-dense")
def test_the_dense_matrix_would_not_fit_and_is_not_needed():
    sites = Sites((8,) * 5, (8,) * 5)  # a matrix of 8 GiB
    mpo = MPO.random(sites, 4, seed=0)
    x = np.random.default_rng(0).standard_normal(8**5)
    tracemalloc.start()
    y = mpo @ x
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # tensordot transposes its operands, which the plan does not count.
    assert peak <= 3 * mpo.plan(batch=1).peak_bytes <= 2**26
    # One row as a check: the cores at the digits of 12345.
    digits = np.unravel_index(12345, (8,) * 5)
    row = MPO(tuple(core[:, d : d + 1] for core, d in zip(mpo.cores, digits, strict=True))).to_matrix()[0]
    assert abs(y[12345] - row @ x) <= 1e-12 * fro(row) * fro(x)


def test_an_application_counted_by_hand():
    # Rank 2: x first meets the right factor, 2*2*6*5 flops, then the left, 2*4*2*5; 12 + 8 operands, 30 entries of x.
    mpo = MPO.low_rank(np.ones((4, 2)), np.ones((2, 6)))
    plan = mpo.plan(batch=5)
    assert plan.flops == 2 * 2 * 6 * 5 + 2 * 4 * 2 * 5
    assert plan.peak_entries == 8 + 12 + 30 + max(10 + 20, 20 + 20)
    assert plan.peak_bytes == 8 * 90
    assert mpo.plan(batch=1).flops == 2 * 2 * 6 + 2 * 4 * 2


def test_an_empty_batch():
    mpo = MPO.low_rank(np.ones((4, 2)), np.ones((2, 6)))
    assert (mpo @ np.ones((6, 0))).shape == (4, 0)
    assert (np.ones((0, 4)) @ mpo).shape == (0, 6)


@given(applications(), st.floats(0.3, 1.5))
def test_memory_limit_is_met_or_refused(application, share):
    chain, x, _ = application
    batch = 1 if x.ndim == 1 else x.shape[1]
    for columns, act in (
        (None, lambda limit: chain.to_matrix(memory_limit=limit)),
        (batch, lambda limit: chain.apply(x, memory_limit=limit)),
    ):
        free = chain.plan(batch=columns)
        limit = max(1, int(free.peak_bytes * share))
        need = least_peak(chain, columns, free.peak_bytes)
        assert chain.plan(batch=columns, memory_limit=need).peak_bytes == need
        if limit < need:
            for refused in (act, lambda bytes_, columns=columns: chain.plan(batch=columns, memory_limit=bytes_)):
                with pytest.raises(MPOError, match=f"memory_limit={limit} bytes .* needs {need} bytes"):
                    refused(limit)
        else:
            plan = chain.plan(batch=columns, memory_limit=limit)
            assert plan.peak_bytes <= limit
            assert all(len(pair) <= 2 for pair in plan.path)
            expected = dense(chain.cores) @ host(x) if columns else dense(chain.cores)
            assert fro(host(act(limit)) - expected) <= allowed(chain, *([x] if columns else []))


def least_peak(chain, columns, enough):
    """The least limit that is met, read from the refusal of a limit of one byte, and met itself."""
    with pytest.raises(MPOError, match="memory_limit=1 bytes") as refusal:
        chain.plan(batch=columns, memory_limit=1)
    need = int(re.search(r"needs (\d+) bytes", str(refusal.value))[1])
    assert need <= enough
    with pytest.raises(MPOError, match=f"needs {need} bytes"):
        chain.plan(batch=columns, memory_limit=need - 1)
    return need


def test_a_memory_limit_chooses_another_path():
    """The order with the fewest flops needs more memory than another one."""
    shapes = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        sites = Sites(tuple(rng.choice((1, 2, 4, 8), 4)), tuple(rng.choice((1, 2, 4, 8), 4)))
        chain = MPO.random(sites, tuple(int(bond) for bond in rng.choice((1, 2, 8, 16), 3)), seed=seed)
        free = chain.plan(batch=16)
        try:
            tight = chain.plan(batch=16, memory_limit=free.peak_bytes - 1)
        except MPOError:
            continue
        shapes.append(free.shapes)
        assert tight.flops >= free.flops
        assert tight.peak_bytes < free.peak_bytes
        x = rng.standard_normal((chain.shape[1], 16))
        assert fro(chain.apply(x, memory_limit=free.peak_bytes - 1) - chain @ x) <= 2 * allowed(chain, x)
    assert shapes


def test_paths_that_join_more_than_two_operands_are_never_taken(monkeypatch):
    """opt_einsum joins all that is left where it cannot keep within its own limit; such a path must not be used."""
    chain = random_chain(Sites((2, 3, 2), (3, 2, 2)), 3, 0)
    original = opt_einsum.contract_path

    def all_at_once(equation, *shapes, **options):
        _, info = original(equation, *shapes, **options)
        return [tuple(range(len(shapes)))], info

    monkeypatch.setattr(opt_einsum, "contract_path", all_at_once)
    contraction.plan_for_shapes.cache_clear()
    plan = chain.plan(batch=3, memory_limit=10**6)
    contraction.plan_for_shapes.cache_clear()
    assert [len(pair) for pair in plan.path] == [2, 2, 2]
    x = np.ones((12, 3))
    operands = [core.reshape(shape) for core, shape in zip((*chain.cores, x), plan.shapes, strict=True)]
    assert fro(plan.contract(operands).reshape(12, 3) - dense(chain.cores) @ x) <= allowed(chain, x)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"], ids=repr)
def test_plans_with_bad_numbers(value):
    chain = random_chain(Sites((2, 3), (2, 2)), 2, 0)
    for name in ("batch", "memory_limit"):
        with pytest.raises(MPOError, match=re.escape(f"{name}={value!r} must be a positive integer")):
            chain.plan(**{name: value})


class Counting:
    """A namespace of the three functions that a contraction may use."""

    def __init__(self):
        self.calls = 0

    def tensordot(self, a, b, axes):
        self.calls += 1
        return np.tensordot(a, b, axes=axes)

    permute_dims = staticmethod(np.transpose)
    reshape = staticmethod(np.reshape)


def test_contract_takes_a_namespace():
    chain = random_chain(Sites((2, 3, 2), (3, 2, 2)), 3, 0)
    xp = Counting()
    matrix = contraction.contract_matrix(chain.cores, chain.plan(), xp)
    assert xp.calls == 2
    assert np.array_equal(matrix, chain.to_matrix())
    x = np.ones((12, 2))
    assert np.array_equal(contraction.contract_application(chain.cores, x, chain.plan(batch=2), xp), chain @ x)
    assert xp.calls == 2 + 3


@pytest.mark.parametrize("kind", ["vector", "batch"])
def test_application_is_differentiable(kind):
    chain = random_chain(Sites((2, 3, 1), (3, 2, 2)), 2, 0, "complex128", "torch")
    cores = [core.clone().requires_grad_() for core in chain.cores]
    shape = (12,) if kind == "vector" else (12, 3)
    x = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *args: MPO(args) @ x, (x, *cores), fast_mode=True)


A = random_chain(Sites((2, 3), (2, 2)), 2, 0)


@pytest.mark.parametrize("shape", [(), (3,), (5, 2), (4, 2, 2), (2, 4), (0,), (1, 4)], ids=str)
def test_arrays_of_a_wrong_shape(shape):
    with pytest.raises(MPOError, match=re.escape(f"shape {shape} cannot be multiplied by a matrix of shape (6, 4)")):
        A @ np.ones(shape)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (6, 2), (2, 2, 6)], ids=str)
def test_arrays_of_a_wrong_shape_from_the_left(shape):
    with pytest.raises(MPOError, match=re.escape(f"shape {shape} cannot multiply a matrix of shape (6, 4)")):
        np.ones(shape) @ A


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (np.ones(4, "float32"), "numpy float32"),
        (np.ones(4, "complex128"), "numpy complex128"),
        (np.ones(4, "int64"), "numpy int64"),
        (torch.ones(4, dtype=torch.float64), "torch float64"),
        (torch.ones(4, device="meta"), "torch float32 on meta"),
    ],
)
def test_arrays_of_another_kind(x, kind):
    with pytest.raises(MPOError, match=f"numpy float64 and {kind}"):
        A @ x


@pytest.mark.filterwarnings("ignore:the matrix subclass is not the recommended way:PendingDeprecationWarning")
def test_arrays_that_are_no_plain_ones():
    assert type(A @ np.matrix(np.ones((4, 2)))) is np.ndarray
    with pytest.raises(MPOError, match="MaskedArray"):
        A @ np.ma.masked_equal(np.arange(4.0), 2)
    read_only = np.ones(4)
    read_only.setflags(write=False)
    assert fro(A @ read_only[::-1] - dense(A.cores) @ np.ones(4)) <= allowed(A, read_only)


def test_the_result_is_fresh():
    one = MPO((np.ones((1, 1, 3, 1)),))
    x = np.ones((3, 1))
    y = one @ x
    y *= 0
    assert np.array_equal(x, np.ones((3, 1)))


@pytest.mark.parametrize("n", [33, 70])
def test_more_sites_than_numpy_has_axes(n):
    ones = [1] * n
    ones[3], ones[n // 2], ones[-2] = 2, 3, 2
    mpo = MPO.random(Sites(tuple(ones), tuple(reversed(ones))), 3, seed=0)
    x = np.ones((12, 2))
    assert fro(mpo @ x - dense(mpo.cores) @ x) <= allowed(mpo, x)
    assert fro((mpo.H @ mpo).to_matrix() - dense(mpo.cores).T @ dense(mpo.cores)) <= allowed(mpo) * allowed(mpo) / 1e-16
