"""Sums, products, adjoints and inner products of chains, and chains built from nothing. What they claim is honest.

A result claims a canonical form only where the operation keeps it: that of a sum or a product is unknown, that of a
multiple, a transpose or a conjugate is the one of the chain it came from.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import array_api_compat
import numpy as np

from mpo_tn.chains import contraction
from mpo_tn.chains.balance import balanced, least_exponent
from mpo_tn.chains.canonical import ChainT, check_cores, norm_of
from mpo_tn.chains.chain import Chain, same_kind
from mpo_tn.chains.scaled import TOP, Scaled, Size, evened, has_values, join, shared_out, size_of, unit, unit_cores
from mpo_tn.exceptions import MPOError, count_text, shape_text, whole_number
from mpo_tn.linalg import (
    Array,
    binary_exponent,
    conjugate,
    describe,
    dtype_name,
    full_precision,
    namespace,
    restored,
    times_power_of_two,
    triangle,
    widen,
)
from mpo_tn.sites import Sites, checked_sites

_APART = 256
"""Powers of two by which two chains may be apart somewhere on their way, more than they are on average."""

_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
_COMPLEX = {"float32": "complex64", "float64": "complex128"}


def add(a: ChainT, b: Chain) -> ChainT:
    """``a + b``, every bond the sum of the two.

    ::

        [A_1 B_1] -- [A_2  0 ] -- [A_3]
                     [ 0  B_2]    [B_3]
    """
    check_pair("add", a, b, same_legs=True)
    last = len(a) - 1
    xp = namespace(a.cores[0])
    if last == 0:
        with np.errstate(over="ignore"):
            total = a.cores[0] + b.cores[0]
        return a.with_cores([_checked_sum(total, a.cores[0], b.cores[0])], None)
    cores: list[Array] = []
    for k, (core, other) in enumerate(zip(*_alike(a.cores, b.cores), strict=True)):
        if k == 0:
            cores.append(xp.concat([core, other], axis=3))
        elif k == last:
            cores.append(xp.concat([core, other], axis=0))
        else:
            upper = xp.concat([core, _zeros(core, (core.shape[0], *core.shape[1:3], other.shape[3]))], axis=3)
            lower = xp.concat([_zeros(core, (other.shape[0], *core.shape[1:3], core.shape[3])), other], axis=3)
            cores.append(xp.concat([upper, lower], axis=0))
    return a.with_cores(cores, None)


def _alike(a: Sequence[Array], b: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
    """The cores of both, each with its norm shared out evenly if they go through very different sizes on their way.

    What is carried along the sum holds both, and the smaller one only as far as double precision reaches.
    """
    if not all(map(has_values, (*a, *b))):
        return a, b
    exponents = [[binary_exponent(size_of(core)) for core in cores] for cores in (a, b)]
    ahead = list(accumulate(first - second for first, second in zip(*exponents, strict=True)))
    if all(abs(gap - ahead[-1] * (k + 1) / len(a)) < _APART for k, gap in enumerate(ahead)):
        return a, b
    return evened(a), evened(b)


def subtract(a: ChainT, b: Chain) -> ChainT:
    """``a - b``."""
    return add(a, scaled(b, -1.0, operator.mul))


def scaled(chain: ChainT, number: complex, act: Callable[[Any, Any], Any]) -> ChainT:
    """``act(chain, number)`` for multiplication or division: one core inside the canonical interval takes it all.

    Where that core would leave the range of its dtype, the others inside the interval take their share.
    """
    xp = namespace(chain.cores[0])
    cores = list(chain.cores)
    if isinstance(number, complex) and not dtype_name(cores[0]).startswith("complex"):
        wider = _COMPLEX.get(dtype_name(cores[0]))
        if wider is None:
            raise MPOError(f"{number!r} times an MPO of {describe(cores[0])}: there is no complex half precision")
        cores = [xp.astype(core, getattr(xp, wider)) for core in cores]
    if not abs(number) <= float(xp.finfo(cores[0].dtype).max) or (act is operator.truediv and number == 0):
        raise MPOError(f"an MPO cannot be scaled by {number!r}: it is zero or beyond the range of {describe(cores[0])}")
    low, high = chain.canonical_interval
    power = binary_exponent(abs(number)) * (-1 if act is operator.truediv else 1)
    if number and has_values(cores[low]) and _is_risky(cores[low], power):
        # By its digits here, and by its power of two wherever there is room.
        core, digits = unit(cores[low]), Size(number, -binary_exponent(abs(number))).rounded()
        cores[low] = act(core.array, digits)
        exponents = [core.exponent + power if k == low else 0 for k in range(len(cores))]
        cores = shared_out(cores, exponents, range(low, high + 1), "the multiple")
    else:
        cores[low] = act(cores[low], number)
    return chain.with_cores(cores, chain.canonical_interval)


def traced_multiple(chain: ChainT, number: Array, act: Callable[[Any, Any], Any]) -> ChainT:
    """The same for a number that JAX traces, in the dtype of the chain; complex if the number is."""
    xp = namespace(number)
    cores = list(chain.cores)
    if dtype_name(number).startswith("complex") and not dtype_name(cores[0]).startswith("complex"):
        wider = _COMPLEX.get(dtype_name(cores[0]))
        if wider is None:
            raise MPOError(f"a complex number times an MPO of {describe(cores[0])}: there is no complex half precision")
        cores = [xp.astype(core, getattr(xp, wider)) for core in cores]
    low, _ = chain.canonical_interval
    cores[low] = act(cores[low], xp.astype(number, cores[low].dtype))
    return chain.with_cores(cores, chain.canonical_interval)


def normalized(chain: ChainT) -> ChainT:
    """The chain over its norm. See :meth:`mpo_tn.MPO.normalized`."""
    size = norm_of(chain)
    if not size.mantissa:
        raise MPOError(f"the norm of the matrix of shape {shape_text(chain.shape)} is 0: there is nothing to normalize")
    low, high = chain.canonical_interval
    inside, exponent = unit_cores([widen(core) for core in chain.cores[low : high + 1]])
    inside[0] = inside[0] / abs(size.mantissa)
    # The product of many cores of norm 1 may be of any size: what is left of the power of two is shared out.
    share, rest = divmod(exponent - size.exponent, len(inside))
    inside = [times_power_of_two(core, share + (k < rest)) for k, core in enumerate(inside)]
    parts = [restored(core, chain.cores[low]) for core in inside]
    return chain.with_cores((*chain.cores[:low], *parts, *chain.cores[high + 1 :]), chain.canonical_interval)


def multiply(a: ChainT, b: Chain) -> ChainT:
    """``a @ b`` site by site, every bond the product of the two."""
    check_pair("multiply", a, b, same_legs=False)
    return pairwise(a, b, _product, "the product")


def pairwise(a: ChainT, b: Chain, join: Callable[[Array, Array], Array], what: str) -> ChainT:
    """The chain of ``join(a_k, b_k)``, linear in both, within the range of the dtype; ``what`` it is, for messages."""
    both = (*a.cores, *b.cores)
    if not all(map(has_values, both)) or not any(_is_risky(core, 0) or _has_small_columns(core) for core in both):
        return a.with_cores(map(join, a.cores, b.cores), None)
    (first, exponent), (second, other) = balanced(a.cores), balanced(b.cores)
    parts = [unit(join(*pair)) for pair in zip(first, second, strict=True)]
    exponents = [part.exponent for part in parts]
    exponents[0] += exponent + other
    return a.with_cores(shared_out([part.array for part in parts], exponents, range(len(parts)), what), None)


def _product(core: Array, other: Array) -> Array:
    """``--A_k--`` above ``--B_k--``, both bonds as one."""
    xp = namespace(core)
    left, out, _, right = core.shape
    left_b, _, in_, right_b = other.shape
    both = xp.permute_dims(xp.tensordot(core, other, axes=((2,), (1,)), **full_precision(xp)), (0, 3, 1, 4, 2, 5))
    return xp.reshape(both, (left * left_b, out, in_, right * right_b))


def _is_risky(core: Array, exponent: int) -> bool:
    """Whether an operation that changes a core by a power of two comes near the end of the range of its dtype."""
    reach = TOP[dtype_name(core)] // 3
    return abs(binary_exponent(size_of(core)) + exponent) > reach or abs(exponent) > reach


def _has_small_columns(core: Array) -> bool:
    """Whether products of two columns may be below the range of the dtype, although those of whole cores are not."""
    return least_exponent(core) < -(TOP[dtype_name(core)] // 3)


def apply(chain: Chain, x: Array, memory_limit: int | None = None) -> Array:
    """The matrix times ``x``, of shape (in,) or (in, batch), as one network. See `MPO.apply`."""
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise MPOError("a MaskedArray has entries without a value: fill them first, for instance with x.filled(0)")
        x = np.asarray(x)
    check_same_kind("apply", chain.cores[0], x)
    shape = tuple(int(size) for size in x.shape)
    rows, columns = chain.shape
    if len(shape) not in (1, 2) or shape[0] != columns:
        raise MPOError(
            f"an array of shape {shape} cannot be multiplied by a matrix of shape {shape_text((rows, columns))}: "
            f"expected ({count_text(columns)},) or ({count_text(columns)}, batch)"
        )
    batch = shape[1] if len(shape) == 2 else 1
    # An empty batch is contracted like a single column: there is no order in which it costs anything.
    if batch == 0:
        return _zeros(x, (rows, 0))
    plan = contraction.plan_for_chain(chain, batch, memory_limit)
    xp = namespace(x)
    y = contraction.contract_application(chain.cores, xp.reshape(x, (columns, batch)), plan)
    return y if len(shape) == 2 else xp.reshape(y, (rows,))


def apply_from_left(chain: Chain, x: Array) -> Array:
    """``x`` of shape (out,) or (batch, out) times the matrix."""
    rows, columns = chain.shape
    if x.ndim not in (1, 2) or int(x.shape[-1]) != rows:
        raise MPOError(
            f"an array of shape {tuple(x.shape)} cannot multiply a matrix of shape {shape_text((rows, columns))} from "
            f"the left: expected ({count_text(rows)},) or (batch, {count_text(rows)})"
        )
    return apply(transpose(chain), x) if x.ndim == 1 else apply(transpose(chain), x.T).T


def transpose(chain: ChainT) -> ChainT:
    """Swap the legs of every site. The canonical form stays: it does not tell rows from columns."""
    xp = namespace(chain.cores[0])
    return chain.with_cores((xp.permute_dims(core, (0, 2, 1, 3)) for core in chain.cores), chain.canonical_interval)


def conj(chain: ChainT) -> ChainT:
    """Conjugate every core. The canonical form stays."""
    return chain.with_cores(map(conjugate, chain.cores), chain.canonical_interval)


def trace(chain: Chain) -> Size:
    """The trace, in double precision, as a product of matrices: one a site."""
    check_cores(chain)
    check_square(chain)
    wide, exponent = unit_cores([widen(core) for core in chain.cores])
    xp = namespace(wide[0])
    carried = Scaled(one(wide[0]), exponent)
    for core in wide:
        matrix = xp.linalg.trace(xp.permute_dims(core, (0, 3, 1, 2)))
        carried = unit(carried.array @ matrix, carried.exponent)
    return Size(carried.array[0, 0].item(), carried.exponent)


def check_square(chain: Chain) -> None:
    """Refuse chains that have no trace site by site.

    Raises:
        MPOError: names the first site whose legs differ.
    """
    for k, (out, in_) in enumerate(chain.sites):
        if out != in_:
            raise MPOError(f"the trace needs square sites, and site {k} has legs (out, in) = {(out, in_)}")


def inner(a: Chain, b: Chain) -> Size:
    """``sum conj(a) * b`` over all entries, in double precision, from the first site to the last."""
    check_pair("take the inner product", a, b, same_legs=True)
    check_cores(a)
    check_cores(b)
    wide_a, exponent_a = unit_cores([widen(core) for core in a.cores])
    wide_b, exponent_b = unit_cores([widen(core) for core in b.cores])
    xp = namespace(wide_a[0])
    carried = Scaled(one(wide_a[0]), exponent_a + exponent_b)  # (bond of a, bond of b)
    for core, other in zip(wide_a, wide_b, strict=True):
        passed = join(carried.array, other)
        carried = unit(xp.tensordot(conjugate(core), passed, axes=((0, 1, 2), (0, 1, 2))), carried.exponent)
    return Size(carried.array[0, 0].item(), carried.exponent)


def distance(a: Chain, b: Chain) -> float:
    """``|a - b|`` by QR of the difference chain, in double precision."""
    check_pair("take the distance", a, b, same_legs=True)
    check_cores(a)
    check_cores(b)
    found = difference(*(unit_cores([widen(core) for core in chain.cores]) for chain in (a, b)))
    if not found.in_range and not any(norm_of(chain).in_range for chain in (a, b)):
        found.number("the distance", "normalized(), or (a - b).log_norm()")
    return found.length("the distance")


def difference(a: tuple[list[Array], int], b: tuple[list[Array], int]) -> Size:
    """``|2**e A - 2**f B|`` of cores in double precision, each with its exponent.

    ::

        [A_1 2**e | B_1 2**f] = Q [R_A 2**e' | R_B 2**f']        QR of columns that are scaled has the same Q, so
                                                                 either side keeps an exponent of its own
    """
    (cores_a, exponent_a), (cores_b, exponent_b) = a, b
    left, right = Scaled(one(cores_a[0]), exponent_a), Scaled(one(cores_b[0]), exponent_b)
    for k, (core, other) in enumerate(zip(cores_a, cores_b, strict=True)):
        left = unit(join(left.array, core), left.exponent)
        right = unit(join(right.array, other), right.exponent)
        if k < len(cores_a) - 1:
            left, right = side_by_side(left, right)
    return left.plus(Scaled(-right.array, right.exponent)).size()


def side_by_side(left: Scaled, right: Scaled) -> tuple[Scaled, Scaled]:
    """The triangular factor of two cores with the same rows, its columns divided between the two."""
    xp = namespace(left.array)
    width = int(left.array.shape[3])
    joined = xp.concat([xp.reshape(part.array, (-1, part.array.shape[3])) for part in (left, right)], axis=1)
    r = triangle(joined) if joined.shape[0] > joined.shape[1] else joined
    return unit(r[:, :width], left.exponent), unit(r[:, width:], right.exponent)


def one(like: Array) -> Array:
    """The 1 x 1 matrix 1, in the library, dtype and device of an array."""
    return namespace(like).ones((1, 1), dtype=like.dtype, device=array_api_compat.device(like))


def identity_cores(sites: Sites, dtype: Any, like: Any) -> list[Array]:
    """Cores of the identity matrix, all bonds 1, in the library and on the device of ``like``."""
    sites = checked_sites(sites)
    for k, (out, in_) in enumerate(sites):
        if out != in_:
            raise MPOError(f"the identity needs square sites, and site {k} has legs (out, in) = {(out, in_)}")
    model = like.cores[0] if isinstance(like, Chain) else np.empty(0) if like is None else like
    xp = namespace(model)
    wanted = model.dtype if dtype is None else dtype_of(xp, dtype)
    device = array_api_compat.device(model)
    return [xp.reshape(xp.eye(out, dtype=wanted, device=device), (1, out, out, 1)) for out in sites.out]


def random_cores(sites: Sites, bonds: int | Sequence[int], seed: int, dtype: Any) -> list[Array]:
    """Gaussian NumPy cores whose matrix has entries of mean 0 and variance 1."""
    sites = checked_sites(sites)
    number = whole_number(seed)
    if number is None or number < 0:
        raise MPOError(f"seed={seed!r} must be a whole number of at least 0")
    given = tuple(bonds) if isinstance(bonds, Sequence) and not isinstance(bonds, str) else None
    inner_bonds = sites.capped_bonds(bonds) if given is None else tuple(map(whole_number, given))  # type: ignore[arg-type]
    if any(bond is None or bond < 1 for bond in inner_bonds) or len(inner_bonds) != len(sites) - 1:
        raise MPOError(f"bonds={bonds!r} must be {len(sites) - 1} positive integers, or one number that caps them all")
    wanted = dtype_of(namespace(np.empty(0)), dtype)
    rng = np.random.default_rng(number)
    ends: list[Any] = [1, *inner_bonds, 1]
    cores: list[Array] = []
    for k, (out, in_) in enumerate(sites):
        parts = rng.standard_normal((2, ends[k], out, in_, ends[k + 1])) / math.sqrt(ends[k])
        core = (parts[0] + 1j * parts[1]) / math.sqrt(2) if np.dtype(wanted).kind == "c" else parts[0]
        cores.append(core.astype(wanted))
    return cores


def low_rank_cores(left: Array, right: Array) -> list[Array]:
    """The two cores of ``left @ right``."""
    left, right = (np.asarray(factor) if isinstance(factor, np.ndarray) else factor for factor in (left, right))
    check_same_kind("multiply the factors", left, right)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise MPOError(
            f"left of shape {tuple(left.shape)} and right of shape {tuple(right.shape)} are no factors: expected "
            "(out, rank) and (rank, in)"
        )
    xp = namespace(left)
    return [xp.reshape(left, (1, left.shape[0], 1, -1)), xp.reshape(right, (-1, 1, right.shape[1], 1))]


def check_same_kind(verb: str, a: Array, b: Array) -> None:
    """Refuse two arrays of different libraries, dtypes or devices.

    Raises:
        MPOError: they are.
    """
    if not same_kind(a, b):
        raise MPOError(f"cannot {verb}: {describe(a)} and {describe(b)}: use one library, dtype and device")


def check_pair(verb: str, a: Chain, b: Chain, *, same_legs: bool) -> None:
    """Refuse what is no chain, another library, dtype or device, and legs that do not fit together.

    Raises:
        MPOError: names the first site that does not fit, and both shapes.
    """
    if not isinstance(b, Chain):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MPOError(f"cannot {verb}: {b!r} of type {type(b).__name__} is not an MPO")
    check_same_kind(verb, a.cores[0], b.cores[0])
    if len(a) != len(b):
        raise MPOError(f"cannot {verb}: {len(a)} sites on the left, {a.sites}, and {len(b)} on the right, {b.sites}")
    for k, (left, right) in enumerate(zip(a.sites, b.sites, strict=True)):
        if left != right if same_legs else left[1] != right[0]:
            need = "equal legs are" if same_legs else "an in leg on the left equal to the out leg on the right is"
            raise MPOError(
                f"cannot {verb}: site {k} has legs (out, in) = {left} on the left and {right} on the right, and {need} "
                f"needed; the matrices are {shape_text(a.shape)} and {shape_text(b.shape)}"
            )


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    return namespace(like).zeros(shape, dtype=like.dtype, device=array_api_compat.device(like))


def _checked_sum(total: Array, *parts: Array) -> Array:
    """The sum of two cores, where it did not leave the range."""
    if has_values(total) and not math.isfinite(size_of(total)) and all(math.isfinite(size_of(part)) for part in parts):
        raise MPOError(f"the sum is beyond the range of {describe(total)}: use a wider dtype, or smaller terms")
    return total


def dtype_of(xp: Any, dtype: Any) -> Any:
    """The dtype of one library that has the name of ``dtype``, which may be a name or a dtype of another library."""
    name = str(dtype).rsplit(".", maxsplit=1)[-1]
    if name not in _DTYPES:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = ""
    found = getattr(xp, name, None) if name in _DTYPES else None
    if found is None:
        raise MPOError(f"dtype={dtype!r} is none that {xp.__name__} has among {', '.join(_DTYPES)}")
    return found
