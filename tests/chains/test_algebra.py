"""Sums, products, adjoints, inner products and distances against dense NumPy, and what each claims of its form.

Every tolerance is ``C * eps(dtype) * sqrt(size) * gauge``, where the gauge is the product of the norms of the cores.
What is summed up in double precision, such as a distance, is held to its eps whatever the dtype.
"""

import itertools
import math
import operator
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.chains import EPS, C, dense, fro, host, left_defect, legs, random_chain, right_defect, slack
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPO, MPOError, Sites
from mpo_tn.chains.chain import Chain

SEEDS = st.integers(0, 2**32 - 1)
SCALARS = st.sampled_from((2.0, -0.3, 1, 0, 1e-3, 3 - 4j, 1j, np.float32(1.5), np.complex64(2j), np.int8(3)))


@st.composite
def chains(draw, count=1, max_size=400, square=False):
    """``count`` chains of the same legs, dtype and library, with a centre or without."""
    sites = draw(legs(max_size=max_size))
    if square:
        sites = Sites(sites.out, sites.out)
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(st.sampled_from(("numpy", "torch")))
    found = []
    for _ in range(count):
        chain = random_chain(sites, draw(st.integers(1, 4)), draw(SEEDS), dtype, library)
        found.append(chain.canonicalize(draw(st.integers(0, len(sites) - 1))) if draw(st.booleans()) else chain)
    return found[0] if count == 1 else tuple(found)


def dtype_of(chain):
    return str(chain.dtype).rsplit(".", maxsplit=1)[-1]


def gauge(chain):
    return math.prod(fro(host(core)) for core in chain.cores)


def tolerance(chain, scale):
    return slack(dtype_of(chain), math.prod(chain.shape), scale)


def close(chain, expected, scale):
    """The chain is the matrix ``expected``, and whatever form it claims it has."""
    assert chain.shape == expected.shape
    assert fro(dense(chain.cores) - expected) <= tolerance(chain, scale)
    low, high = chain.canonical_interval
    for k, core in enumerate(chain.cores):
        assert k >= low or left_defect(core) <= slack(dtype_of(chain), math.prod(core.shape), core.shape[3])
        assert k <= high or right_defect(core) <= slack(dtype_of(chain), math.prod(core.shape), core.shape[0])


def claims_nothing(chain):
    return chain.canonical_interval == (0, len(chain) - 1)


@given(chains(count=2))
def test_sum_and_difference(pair):
    a, b = pair
    both = gauge(a) + gauge(b)
    for result, expected in ((a + b, dense(a.cores) + dense(b.cores)), (a - b, dense(a.cores) - dense(b.cores))):
        close(result, expected, both)
        assert type(result) is MPO
        assert result.dtype == a.dtype
        assert result.bonds == tuple(x + y for x, y in zip(a.bonds, b.bonds, strict=True))
        assert claims_nothing(result)


@given(chains(), SCALARS)
def test_multiples_keep_the_form(a, c):
    w = dense(a.cores)
    for result in (c * a, a * c, torch.from_numpy(host(np.asarray(c))) * a, np.asarray(c) * a):
        close(result, w * host(np.asarray(c)), abs(c) * gauge(a))
        assert result.canonical_interval == a.canonical_interval
        assert result.bonds == a.bonds
        assert dtype_of(result).startswith("complex") == (dtype_of(a).startswith("complex") or np.iscomplexobj(c))
        assert EPS[dtype_of(result)] == EPS[dtype_of(a)]
    if c != 0:
        close(a / c, w / host(np.asarray(c)), gauge(a) / abs(c))
        assert (a / c).canonical_interval == a.canonical_interval
    close(-a, -w, 0.0)
    assert (-a).canonical_interval == a.canonical_interval


@given(chains(), st.integers(-40, 40))
def test_powers_of_two_scale_exactly(a, power):
    assert np.array_equal(dense((2.0**power * a).cores), dense(a.cores) * 2.0**power)
    assert np.array_equal(dense((a / 2.0**power).cores), dense((a * 2.0**-power).cores))


@given(chains())
def test_transpose_conjugate_and_adjoint(a):
    w = dense(a.cores)
    # No arithmetic is done, so the matrices are equal to the last bit but for the order of summation.
    for result, expected in ((a.T, w.T), (a.conj(), w.conj()), (a.H, w.conj().T), (a.T.T, w), (a.H.H, w)):
        close(result, expected, gauge(a))
        assert result.canonical_interval == a.canonical_interval
    assert np.array_equal(dense(a.conj().cores), w.conj())
    for core in a.conj().cores:
        assert not (isinstance(core, torch.Tensor) and core.is_conj())


@st.composite
def factors(draw, count=2):
    """``count`` chains that can be multiplied in this order."""
    n = draw(st.integers(1, 4))
    sides = [draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=n, max_size=n)) for _ in range(count + 1)]
    dtype, library = draw(st.sampled_from(tuple(EPS))), draw(st.sampled_from(("numpy", "torch")))
    pairs = itertools.pairwise(sides)
    return tuple(
        random_chain(Sites(tuple(out), tuple(in_)), draw(st.integers(1, 3)), draw(SEEDS), dtype, library)
        for out, in_ in pairs
    )


@given(factors())
def test_product_of_two(pair):
    a, b = pair
    result = a @ b
    close(result, dense(a.cores) @ dense(b.cores), gauge(a) * gauge(b))
    assert result.bonds == tuple(x * y for x, y in zip(a.bonds, b.bonds, strict=True))
    assert claims_nothing(result)
    assert claims_nothing(a.canonicalize(0) @ b.canonicalize(0))
    close((a @ b).H, (dense(a.cores) @ dense(b.cores)).conj().T, gauge(a) * gauge(b))


@given(factors(count=3))
def test_products_are_associative_and_distribute(chain):
    a, b, c = chain
    scale = gauge(a) * gauge(b) * gauge(c)
    expected = dense(a.cores) @ dense(b.cores) @ dense(c.cores)
    close((a @ b) @ c, expected, scale)
    close(a @ (b @ c), expected, scale)
    close(a @ (b + b.conj()), dense(a.cores) @ (2 * dense(b.cores).real), 2 * gauge(a) * gauge(b))


@given(chains(count=3))
def test_sums_are_associative_and_scale(chain):
    a, b, c = chain
    scale = gauge(a) + gauge(b) + gauge(c)
    expected = dense(a.cores) + dense(b.cores) + dense(c.cores)
    close((a + b) + c, expected, scale)
    close(a + (b + c), expected, scale)
    close(2 * a - b / 4, 2 * dense(a.cores) - dense(b.cores) / 4, 3 * scale)


@given(chains(count=2))
def test_inner_product_conjugates_the_first(pair):
    a, b = pair
    expected = np.vdot(dense(a.cores), dense(b.cores))
    # Computed in double precision whatever the dtype.
    allowed = slack("float64", math.prod(a.shape), gauge(a) * gauge(b))
    value = a.inner(b)
    assert isinstance(value, complex if dtype_of(a).startswith("complex") else float)
    assert abs(value - expected) <= allowed
    assert abs(b.inner(a) - np.conj(value)) <= allowed
    # The norm trusts the form, which cores are rounded to.
    assert abs(a.inner(a) - a.norm() ** 2) <= 2 * tolerance(a, gauge(a) ** 2)
    if dtype_of(a).startswith("complex"):
        rotated = (1j * a).inner(b)
        assert abs(rotated + 1j * value) <= slack(dtype_of(a), math.prod(a.shape), gauge(a) * gauge(b))


@given(chains(square=True, max_size=100))
def test_trace(a):
    expected = np.trace(dense(a.cores))
    value = a.trace()
    assert isinstance(value, complex if dtype_of(a).startswith("complex") else float)
    assert abs(value - expected) <= slack("float64", math.prod(a.shape), gauge(a))
    product = (a.H @ a).trace()
    # The cores of the product are rounded to the dtype.
    assert abs(product - a.inner(a)) <= tolerance(a, gauge(a) ** 2)


@pytest.mark.guarantee("distance")
@given(chains(count=2))
def test_distance_is_that_of_the_dense_matrices(pair):
    a, b = pair
    allowed = slack("float64", math.prod(a.shape), gauge(a) + gauge(b))
    assert abs(a.distance(b) - fro(dense(a.cores) - dense(b.cores))) <= allowed
    assert a.distance(a) <= allowed
    assert abs(a.distance(-a) - 2 * fro(dense(a.cores))) <= 2 * allowed
    assert a.distance(b) <= fro(dense(a.cores)) + fro(dense(b.cores)) + allowed


@pytest.mark.guarantee("distance")
@given(chains(count=2), st.data())
def test_distance_of_chains_with_a_centre_is_right_to_their_norms(pair, data):
    a, b = (chain.canonicalize(data.draw(st.integers(0, len(chain) - 1))) for chain in pair)
    allowed = slack("float64", math.prod(a.shape), a.norm() + b.norm())
    assert abs(a.distance(b) - fro(dense(a.cores) - dense(b.cores))) <= allowed


@pytest.mark.guarantee("distance")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_floor_of_the_distance_is_eps_and_not_its_root(dtype, library):
    sites = Sites((3, 4, 4, 3), (4, 3, 3, 4))
    a = random_chain(sites, 12, 0, dtype, library).canonicalize(1)
    norm = a.norm()
    assert a.distance(a.canonicalize(3)) <= slack(dtype, 144, norm)
    for relative in (1e-4, 1e-8, 1e-11, 1e-13):
        step = random_chain(sites, 2, 1, dtype, library).canonicalize(2)
        step = step * (relative * norm / step.norm())
        assert abs(a.distance(a + step) - relative * norm) <= slack(dtype, 144, 2 * norm)
    # What inner products would give for a pair that differs by 1e-11: their rounding alone is 1e-8.
    other = a.canonicalize(0)
    naive = math.sqrt(abs(a.inner(a) + other.inner(other) - 2 * complex(a.inner(other)).real))
    assert a.distance(other) < 1e-13 * norm
    assert naive == 0 or naive > 1e-9 * norm


def test_distance_of_single_precision_is_taken_in_double():
    sites = Sites((4, 4, 4), (4, 4, 4))
    a = random_chain(sites, 8, 0, "float32").canonicalize(1)
    b = a.canonicalize(2)
    exact = fro(dense(a.cores) - dense(b.cores))
    assert abs(a.distance(b) - exact) <= slack("float64", 4096, 2 * a.norm())
    assert exact > 0


def test_scales_beyond_the_range_do_not_matter_where_they_cancel():
    cores = random_chain(Sites((2, 3, 2), (3, 2, 2)), 3, 0).cores
    a = MPO(cores)
    b = MPO((cores[0] * 1e-250, cores[1] * 1e250, cores[2]))
    allowed = slack("float64", 144, gauge(a) ** 2)
    assert abs(b.inner(b) - a.inner(a)) <= allowed
    assert abs(a.inner(b) - a.inner(a)) <= allowed
    square = MPO(random_chain(Sites((2, 2, 2), (2, 2, 2)), 3, 0).cores)
    shifted = MPO((square.cores[0] * 1e250, square.cores[1] * 1e250, square.cores[2] * 1e-300))
    assert abs(shifted.trace() / 1e200 - square.trace()) <= slack("float64", 64, gauge(square))
    for verb in (lambda mpo: mpo.inner(mpo), lambda mpo: mpo.T.inner(mpo.T)):
        with pytest.raises(MPOError, match="overflows double precision"):
            verb(a * 1e160)
    with pytest.raises(MPOError, match="overflows double precision"):
        MPO((*shifted.cores[:2], square.cores[2])).trace()


@pytest.mark.guarantee("identity")
@given(legs(max_size=100), st.sampled_from((None, *EPS)), st.sampled_from(("none", "array", "mpo", "torch")))
def test_identity_is_exact(sites, dtype, model):
    square = Sites(sites.out, sites.out)
    like = {
        "none": None,
        "array": np.ones(1, "float32"),
        "mpo": random_chain(sites, 1, 0, "complex64", "torch"),
        "torch": torch.ones(1, dtype=torch.complex128),
    }[model]
    eye = MPO.identity(square, dtype=dtype, like=like)
    assert np.array_equal(host(eye.to_matrix()), np.eye(square.shape[0]))
    assert isinstance(eye.cores[0], torch.Tensor) == (model in ("mpo", "torch"))
    assert dtype_of(eye) == (
        dtype or {"none": "float64", "array": "float32", "mpo": "complex64"}.get(model, "complex128")
    )
    assert set(eye.bonds) <= {1}
    assert eye.trace() == square.shape[0]
    assert claims_nothing(eye)


def test_identity_takes_the_dtypes_of_any_library():
    sites = Sites((2,), (2,))
    for dtype in (np.float32, np.dtype("float32"), "float32", torch.float32):
        assert MPO.identity(sites, dtype=dtype).dtype == np.float32
        assert MPO.identity(sites, dtype=dtype, like=torch.ones(1)).dtype == torch.float32
    assert MPO.identity(sites, dtype=complex).dtype == np.complex128
    assert MPO.identity(sites, dtype="bfloat16", like=torch.ones(1)).dtype == torch.bfloat16


@pytest.mark.guarantee("seed")
@given(legs(), st.integers(1, 6), SEEDS, st.sampled_from(tuple(EPS)))
def test_random_is_deterministic(sites, bond, seed, dtype):
    a, b = (MPO.random(sites, bond, seed=seed, dtype=dtype) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a.cores, b.cores, strict=True))
    assert a.sites == sites
    assert a.bonds == sites.capped_bonds(bond)
    assert dtype_of(a) == dtype
    assert claims_nothing(a)
    other = MPO.random(sites, bond, seed=seed + 1, dtype=dtype)
    assert not np.array_equal(a.cores[0], other.cores[0])
    uncapped = (bond,) * (len(sites) - 1)
    assert MPO.random(sites, uncapped, seed=0).bonds == uncapped


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_random_entries_have_variance_one(dtype):
    squares = [MPO.random(Sites((4, 4, 4), (4, 4, 4)), 8, seed=k, dtype=dtype).norm() ** 2 / 4096 for k in range(40)]
    # 40 draws scatter by 0.16 each at most; a factor of sqrt(bond) or 2 would be far outside.
    assert abs(np.mean(squares) - 1) < 0.1


@pytest.mark.guarantee("seed")
@pytest.mark.slow
def test_random_is_the_same_in_every_process_and_so_are_the_plans():
    code = (
        "import hashlib, numpy as np; from mpo_tn import MPO, Sites\n"
        "a = MPO.random(Sites((2, 3, 2, 4, 2), (3, 2, 2, 2, 4)), 5, seed=7, dtype='complex64')\n"
        "b = (a @ a.H + 2 * (a @ a.T.conj())) / 3\n"
        "x = np.arange(96 * 5, dtype='complex64').reshape(96, 5)\n"
        "plans = [repr(a.plan(batch=k, memory_limit=m)) for k in (None, 1, 7) for m in (None, 10**9)]\n"
        "parts = [*a.cores, *b.cores, a @ x, np.array([a.inner(a), b.trace(), b.distance(a @ a.H)])]\n"
        "data = b''.join(np.ascontiguousarray(part).tobytes() for part in parts)\n"
        "print(hashlib.sha256(data + repr(plans).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("out", "rank", "in_"), [(6, 3, 8), (1, 1, 5), (4, 7, 1), (1, 1, 1)])
def test_low_rank(out, rank, in_, library):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((out, rank)), rng.standard_normal((rank, in_))
    given = (torch.from_numpy(left), torch.from_numpy(right)) if library == "torch" else (left, right)
    mpo = MPO.low_rank(*given)
    assert mpo.sites == Sites.low_rank(out, in_)
    assert mpo.bonds == (rank,)
    assert claims_nothing(mpo)
    close(mpo, left @ right, fro(left) * fro(right))


def test_from_cores_claims_nothing():
    a = random_chain(Sites((2, 2), (3, 2)), 3, 0).canonicalize(1)
    again = MPO.from_cores(core for core in a.cores)
    assert again.cores == a.cores
    assert claims_nothing(again)


def test_arguments_are_left_alone_and_subclasses_kept():
    class Mine(MPO):
        pass

    a = Mine(random_chain(Sites((2, 2), (2, 2)), 3, 0, "complex128").cores).canonicalize(0)
    before = [host(core) for core in a.cores]
    results = (
        a + a,
        a - a,
        -a,
        2 * a,
        a / 2,
        a @ a,
        a.T,
        a.H,
        a.conj(),
        Mine.identity(a.sites),
        Mine.from_cores(a.cores),
    )
    assert all(type(result) is Mine for result in (*results, Mine.random(a.sites, 2, seed=0)))
    a.distance(a), a.inner(a), a.trace()
    assert all(np.array_equal(x, y) for x, y in zip(before, a.cores, strict=True))


def test_half_precision():
    core = torch.tensor([[1.5, 0.25], [2.0, -1.0]], dtype=torch.bfloat16).reshape(1, 2, 2, 1)
    a = MPO((core, core))
    w = dense(a.cores)
    assert a.inner(a) == fro(w) ** 2
    assert a.trace() == 0.25
    assert a.distance(2 * a) == pytest.approx(fro(w), rel=1e-14)
    assert np.array_equal(dense((a + a).cores), 2 * w)
    with pytest.raises(MPOError, match="no complex half precision"):
        1j * a


A = random_chain(Sites((2, 3), (2, 2)), 2, 0)


@pytest.mark.parametrize(
    "other",
    [
        random_chain(A.sites, 2, 0, "float32"),
        random_chain(A.sites, 2, 0, "complex128"),
        random_chain(A.sites, 2, 0, "float64", "torch"),
        MPO(tuple(torch.ones(1, *leg, 1, device="meta", dtype=torch.float64) for leg in A.sites)),
    ],
    ids=["dtype", "complex", "library", "device"],
)
@pytest.mark.parametrize(
    "verb", [operator.add, operator.sub, operator.matmul, MPO.inner, MPO.distance], ids=lambda verb: verb.__name__
)
def test_mixed_kinds_are_refused(verb, other):
    kind = f"{'torch' if isinstance(other.cores[0], torch.Tensor) else 'numpy'} {dtype_of(other)}"
    with pytest.raises(MPOError, match=f"numpy float64 and {kind}"):
        verb(A, other)
    with pytest.raises(MPOError, match=f"{kind}.* and numpy float64"):
        verb(other, A)


@pytest.mark.parametrize("verb", [operator.add, operator.sub, MPO.inner, MPO.distance], ids=lambda verb: verb.__name__)
def test_legs_that_differ_are_refused(verb):
    other = random_chain(Sites((2, 2), (2, 3)), 2, 0)
    with pytest.raises(
        MPOError, match=re.escape("site 1 has legs (out, in) = (3, 2) on the left and (2, 3) on the right")
    ):
        verb(A, other)
    with pytest.raises(MPOError, match=re.escape("2 sites on the left, Sites(out=(2, 3), in_=(2, 2)), and 1 on the")):
        verb(A, MPO((np.ones((1, 6, 4, 1)),)))


def test_products_whose_legs_do_not_meet_are_refused():
    with pytest.raises(
        MPOError, match=re.escape("site 1 has legs (out, in) = (3, 2) on the left and (3, 2) on the right")
    ):
        A @ A
    with pytest.raises(MPOError, match="2 sites on the left"):
        A @ MPO((np.ones((1, 4, 4, 1)),))


@pytest.mark.parametrize("verb", [MPO.inner, MPO.distance])
@pytest.mark.parametrize("other", [1.0, np.ones((6, 4)), None, "a"], ids=str)
def test_what_is_no_mpo_is_refused(verb, other):
    with pytest.raises(MPOError, match=f"of type {type(other).__name__} is not an MPO"):
        verb(A, other)


BAD_SCALARS = [
    (True, "True"),
    (np.True_, "True"),
    ("2", "'2'"),
    (b"2", "b'2'"),
    (np.ones(2), "shape (2,)"),
    (np.ones((6, 4)), "shape (6, 4)"),
    (torch.ones(1), "shape (1,)"),
    (torch.ones((), requires_grad=True), "shape ()"),
    (torch.tensor(True), "True"),
    (math.nan, "nan"),
    (math.inf, "inf"),
    (complex(0, math.inf), "infj"),
    (10**400, "an integer beyond the range"),
]


@pytest.mark.parametrize(("factor", "message"), BAD_SCALARS, ids=lambda value: repr(value)[:20])
def test_factors_that_are_no_numbers(factor, message):
    for act in (lambda: A * factor, lambda: factor * A, lambda: A / factor):
        with pytest.raises(MPOError, match=re.escape(message)):
            act()


def test_factors_out_of_range():
    with pytest.raises(MPOError, match=r"0\.0: it is zero"):
        A / 0
    with pytest.raises(MPOError, match=r"1e\+39: .* range of numpy float32"):
        1e39 * random_chain(A.sites, 2, 0, "float32")


@pytest.mark.parametrize("other", [None, [1.0], {}, object()], ids=lambda other: type(other).__name__)
def test_operands_that_mean_nothing_are_a_type_error(other):
    for verb in (operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul):
        for left, right in ((A, other), (other, A)):
            with pytest.raises(TypeError):
                verb(left, right)
    for verb in (operator.add, operator.sub):
        for array in (np.ones((6, 4)), torch.ones(6, 4), 1.0):
            with pytest.raises(TypeError):
                verb(A, array)
            with pytest.raises(TypeError):
                verb(array, A)
    for verb in (operator.mul, operator.truediv):
        with pytest.raises(TypeError):
            verb(A, A)


@pytest.mark.parametrize("verb", [MPO.trace, lambda mpo: mpo.inner(mpo), lambda mpo: mpo.distance(mpo)])
def test_cores_that_are_not_finite_or_have_no_values(verb):
    bad = np.ones((1, 2, 2, 1))
    bad[0, 0, 0, 0] = math.nan
    with pytest.raises(MPOError, match=r"core 1 .* NaN or infinite"):
        verb(MPO((np.ones((1, 2, 2, 1)), bad)))
    with pytest.raises(MPOError, match="requires grad"):
        verb(MPO((torch.ones(1, 2, 2, 1, requires_grad=True),)))
    with pytest.raises(MPOError, match="meta"):
        verb(MPO((torch.ones(1, 2, 2, 1, device="meta"),)))


def test_sites_that_are_not_square():
    for act in (lambda: MPO.identity(A.sites), A.trace):
        with pytest.raises(MPOError, match=re.escape("site 1 has legs (out, in) = (3, 2)")):
            act()


@pytest.mark.parametrize("dtype", ["int64", "bool", "float16x", "bfloat16", torch.int64, object, "longdouble"], ids=str)
def test_dtypes_that_an_mpo_cannot_have(dtype):
    for act in (
        lambda: MPO.identity(Sites((2,), (2,)), dtype=dtype),
        lambda: MPO.random(A.sites, 2, seed=0, dtype=dtype),
    ):
        with pytest.raises(MPOError, match=re.escape(f"dtype={dtype!r}")):
            act()
    with pytest.raises(MPOError, match="int64"):
        MPO.identity(Sites((2,), (2,)), like=np.ones(2, dtype="int64"))


@pytest.mark.parametrize("bonds", [0, -1, 1.5, True, "2", (2, 2), (), (0,), (1.5,), (None,)], ids=repr)
def test_random_with_bad_bonds(bonds):
    with pytest.raises(MPOError, match=re.escape(f"{bonds!r}")):
        MPO.random(A.sites, bonds, seed=0)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True, "0"], ids=repr)
def test_random_with_a_bad_seed(seed):
    with pytest.raises(MPOError, match=re.escape(f"seed={seed!r}")):
        MPO.random(A.sites, 2, seed=seed)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), "left of shape (2, 3) and right of shape (2, 3)"),
        (np.ones(3), np.ones((3, 3)), "left of shape (3,)"),
        (np.ones((2, 3)), np.ones((3, 3, 1)), "right of shape (3, 3, 1)"),
        (np.ones((2, 3)), torch.ones(3, 3), "numpy float64 and torch float32"),
        (np.ones((2, 3)), np.ones((3, 2), "float32"), "numpy float64 and numpy float32"),
        (np.ones((2, 0)), np.ones((0, 2)), "shape (1, 2, 1, 0)"),
        ([[1.0]], [[1.0]], "list is not an array"),
    ],
)
def test_factors_of_a_low_rank_matrix_that_do_not_match(left, right, message):
    with pytest.raises(MPOError, match=re.escape(message)):
        MPO.low_rank(left, right)


def test_algebra_works_on_plain_chains():
    plain = Chain(A.cores)
    assert isinstance(A + plain, MPO)
    assert A.distance(plain) <= tolerance(A, 2 * gauge(A))
    assert C == 4.0
