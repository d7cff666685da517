"""Linear systems and eigenvalues by SciPy's iterative methods, for vectors that fit in memory."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from mpo_tn.chains.canonical import check_cores
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.linear import linear_operator, product_dtype
from mpo_tn.exceptions import MPOError, is_real, shape_text, whole_number
from mpo_tn.linalg import EPS, Array, describe, dtype_name, frobenius_norm, restored, to_numpy

Which = Literal["SA", "LA", "LM"]

_MOST_ENTRIES = 2**26
"""The longest vectors; Krylov methods keep dozens of them."""

_DENSE_BELOW = 3
"""Lanczos needs more rows than twice what it looks for; matrices below that are diagonalised."""


def solve(
    a: Chain, b: Array, *, tol: float | None = None, hermitian: bool = False, max_steps: int | None = None
) -> Array:
    """The ``x`` with ``a @ x = b``, by GMRES, or MINRES if ``a`` is Hermitian; no matrix is built.

    Args:
        a: a square MPO; its vectors have to fit in memory.
        b: shape (out,), of the library and dtype of the cores.
        tol: the largest residual ``|b - a @ x|`` as a fraction of ``|b|``; if ``None`` 1e-10, or 1e-5 in single 1e-5.
        hermitian: whether ``a`` is its own adjoint, which spares memory and time; not checked.
        max_steps: the most products with ``a``; ten times the rows, at most 10,000, if ``None``.

    Guarantee (solved): ``|b - a @ x| <= tol |b|``, measured on what is returned, or it raises.
    Cost: a product with a vector a step, and for GMRES 50 vectors. Many steps are needed where the condition number of
    ``a`` is large. For matrices beyond memory see :meth:`mpo_tn.MPO.to_quimb`.

    Raises:
        MPOError: not square, vectors that do not fit, another library, dtype, device or shape, a tolerance below what
            the dtype can tell, no convergence.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Sites, solve
    >>> sites = Sites((2,) * 3, (2,) * 3)
    >>> a = 3 * MPO.identity(sites)
    >>> solve(a, np.arange(8.0)).round(12).tolist() == (np.arange(8.0) / 3).round(12).tolist()
    True
    """
    from scipy.sparse import linalg

    _check_square(a)
    if describe(a.cores[0]) != describe(b) or tuple(b.shape) != (a.shape[0],):
        raise MPOError(
            f"b is {describe(b)} of shape {tuple(b.shape)}: expected {describe(a.cores[0])} of shape ({a.shape[0]},)"
        )
    precision = EPS[dtype_name(b)]
    tol = (1e-10 if precision < 1e-10 else 1e-5) if tol is None else tol
    if not (is_real(tol) and precision <= tol < 1):
        raise MPOError(f"tol={tol!r} must be below 1 and at least {precision:.3g}, the precision of {dtype_name(b)}")
    steps = min(10 * a.shape[0], 10_000) if max_steps is None else whole_number(max_steps)
    if steps is None or steps < 1:
        raise MPOError(f"max_steps={max_steps!r} must be a whole number of at least 1")
    right = to_numpy(b)
    wide = right.astype("complex128" if np.iscomplexobj(right) else "float64")
    size = frobenius_norm(wide)
    if not np.isfinite(size):
        raise MPOError("b has entries that are NaN or infinite")
    if size == 0:
        return restored(np.zeros_like(wide), b)
    operator = linear_operator(a, wide.dtype)
    if hermitian:
        x = _minres(operator, wide / size, tol / 4, steps)
    else:
        options: dict[str, Any] = {"rtol": tol / 4, "atol": 0.0}
        restart = min(50, a.shape[0])
        x, _ = linalg.gmres(operator, wide / size, restart=restart, maxiter=-(-steps // restart), **options)
    found = restored(x * size, b)
    back = to_numpy(found).astype(wide.dtype)
    residual = frobenius_norm(wide - operator.matvec(back)) / size
    if not residual <= tol:
        raise MPOError(
            f"no solution to tol={tol:g} in {steps} products: the residual is {residual:.3g} of |b|. The matrix may be "
            "singular or badly conditioned: allow more max_steps or a larger tol, or use hermitian=True if it is"
        )
    return found


def _minres(operator: Any, right: np.ndarray, tol: float, steps: int) -> np.ndarray:
    """MINRES to a residual of ``tol |right|``, or as near as it comes.

    SciPy's stops at a residual that is small beside ``|a| |x|``, which may be the condition number times too much; what
    is left is solved for again.
    """
    from scipy.sparse import linalg

    taken = 0

    def count(_: np.ndarray) -> None:
        nonlocal taken
        taken += 1

    x, rest = np.zeros_like(right), right
    size = frobenius_norm(right)
    goal = tol * size
    while size > goal and taken < steps:
        options: dict[str, Any] = {"rtol": tol, "maxiter": steps - taken, "callback": count}
        more, _ = linalg.minres(operator, rest / size, **options)
        x = x + size * more
        rest = right - operator.matvec(x)
        before, size = size, frobenius_norm(rest)
        if not size < before / 2:
            break
    return x


def eigsh(a: Chain, k: int = 1, *, which: Which = "SA", tol: float = 0.0, seed: int = 0) -> tuple[np.ndarray, Array]:
    """A few eigenvalues of a Hermitian MPO and their vectors, by Lanczos with restarts (ARPACK); no matrix is built.

    Args:
        a: a square MPO that is its own adjoint; its vectors have to fit in memory.
        k: how many.
        which: ``"SA"`` the smallest, such as the ground state of a Hamiltonian, ``"LA"`` the largest, ``"LM"`` those of
            largest absolute value.
        tol: the relative accuracy of the eigenvalues; 0 for what double precision gives.
        seed: of the starting vector; the same seed gives the same result.

    Returns:
        The eigenvalues, ascending, as a host array in double precision, and the vectors, (out, k), orthonormal, in the
        library and dtype of the cores.

    Guarantee (eigenpairs): ``|a @ v - v * value| <= (1e-6 + tol) |a|`` in the Frobenius norm of ``a``, or it raises.
    Cost: some hundred products with a vector, and about ``max(2 k, 20)`` vectors. For chains beyond memory see
    :meth:`mpo_tn.MPO.to_quimb` and its DMRG.

    Raises:
        MPOError: not square or not Hermitian, vectors that do not fit, bad options, no convergence.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Sites, eigsh
    >>> z = np.diag([1.0, -1.0])
    >>> chain = MPO.from_terms(Sites((2,) * 6, (2,) * 6), [(float(j + 1), {j: z}) for j in range(6)])
    >>> values, vectors = eigsh(chain, 2)
    >>> values.round(9).tolist(), vectors.shape
    ([-21.0, -19.0], (64, 2))
    """
    from scipy.sparse import linalg

    _check_square(a)
    check_cores(a)
    rows, number = a.shape[0], whole_number(k)
    if number is None or not 1 <= number <= rows:
        raise MPOError(f"k={k!r} must be a whole number from 1 to {rows}, the rows of the matrix")
    if which not in get_args(Which):
        raise MPOError(f"which={which!r} is not one of {', '.join(get_args(Which))}")
    if not (is_real(tol) and 0 <= tol < 1):
        raise MPOError(f"tol={tol!r} must be at least 0 and below 1")
    dtype = np.dtype("complex128" if product_dtype(a).kind == "c" else "float64")
    operator = linear_operator(a, dtype)
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(rows).astype(dtype)
    forward, backward = operator.matvec(start), operator.rmatvec(start)
    gap = frobenius_norm(forward - backward)
    allowed = (
        64 * EPS[dtype_name(a.cores[0])] * np.sqrt(len(a)) * max(frobenius_norm(forward), frobenius_norm(backward))
    )
    if gap > allowed:
        raise MPOError(
            f"the matrix is not Hermitian: a @ x and a.H @ x differ by {gap:.3g} for a random x of norm "
            f"{frobenius_norm(start):.3g}: use (a + a.H) / 2"
        )
    if rows <= _DENSE_BELOW * number + 20:
        values, vectors = np.linalg.eigh(operator.matmat(np.eye(rows, dtype=dtype)))
        order = np.argsort(-np.abs(values) if which == "LM" else values if which == "SA" else -values, kind="stable")
        chosen = np.sort(order[:number])
        values, vectors = values[chosen], vectors[:, chosen]
    else:
        try:
            lanczos: Any = linalg.eigsh  # whose types know no tolerance but 0
            found = lanczos(operator, k=number, which=which, tol=tol, v0=start)
        except linalg.ArpackError as error:
            raise MPOError(f"no {number} eigenvalues to tol={tol:g}: {error}: allow a larger tol, or fewer") from error
        order = np.argsort(found[0])
        values, vectors = found[0][order], found[1][:, order]
    return values, restored(np.ascontiguousarray(vectors), a.cores[0])


def _check_square(a: Chain) -> None:
    if not isinstance(a, Chain):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MPOError(f"{a!r} of type {type(a).__name__} is not an MPO")
    rows, columns = a.shape
    if rows != columns:
        raise MPOError(f"a matrix of shape {shape_text(a.shape)} is not square")
    if rows > _MOST_ENTRIES:
        raise MPOError(
            f"a matrix of shape {shape_text(a.shape)} has vectors of more than {_MOST_ENTRIES} entries: use "
            "to_quimb(), whose DMRG keeps them as chains"
        )
