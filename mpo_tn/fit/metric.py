"""The metric of a layer: what an error in a matrix does to the outputs, for the inputs that the layer gets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import array_api_compat
import numpy as np

from mpo_tn.chains.canonical import wide_chain
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.scaled import Scaled, unit, unit_cores
from mpo_tn.exceptions import MPOError, is_real, shape_text
from mpo_tn.lapack import pivoted_cholesky
from mpo_tn.linalg import (
    Array,
    adjoint,
    check_matrix,
    dtype_name,
    frobenius_norm,
    namespace,
    times_power_of_two,
    to_numpy,
    widen,
)

_SYMMETRY = 1e-4
"""How far a moment may be from symmetric, of its norm: moments are accumulated in single precision, too."""

_UNSCALED = 8
"""So many cores of norm 1 are multiplied in double precision before a power of two is taken out of the product."""

_NEGATIVE = 1e-5
"""How far a moment may be from positive semidefinite, of its trace."""

_ROWS = 1024
"""Rows of a difference that are weighed at once."""


@dataclass(frozen=True, eq=False)
class Metric:
    """The size of an error by what it does: ``|D|**2 = tr(G D S D^T)`` for a difference D of matrices (out, in).

    With ``S = E[x x^T]`` and no G that is ``E|D x|**2``, the mean square error of the outputs.

    Args:
        second: S, (in, in), the second moment of what the layer gets; symmetric, positive semidefinite, any scale.
        cross: ``E[x_dense x^T]``, (in, in), if the layer no longer gets what it got in the dense model: then the goal
            is ``E|W x_dense - W' x|**2``, which is the error to :meth:`target` but for a constant.
        outer: G, (out, out), the weight of the outputs, for instance the second moment of their gradients; the
            identity if ``None``.
        damping: with ``cross``, what holds the target to the matrix itself where the calibration has seen little, as a
            fraction of the mean of the diagonal of S.

    Attributes:
        root: ``L`` (in, rank) with ``S = L L^T``.
        outer_root: ``K`` (out, rank) with ``G = K K^T``, or ``None``.

    Raises:
        MPOError: moments that are no real square matrices of finite numbers, of different sizes, zero, not symmetric or
            not positive semidefinite; a damping that is not positive.

    Cost: a Cholesky decomposition of each moment, ``in**3 / 3`` and ``out**3 / 3`` multiplications, on the host.

    >>> import numpy as np
    >>> metric = Metric(np.diag([4.0, 1.0, 0.0]))
    >>> metric.norm(np.ones((2, 3))), metric.rank
    (3.1622776601683795, 2)
    """

    second: Array
    cross: Array | None = None
    outer: Array | None = None
    damping: float = 0.01
    root: Array = field(init=False, repr=False)
    outer_root: Array | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "second", _moment(self.second, "second"))
        size = self.second.shape[0]
        if self.cross is not None:
            cross = _square(self.cross, "cross")
            if cross.shape != self.second.shape:
                raise MPOError(f"cross is {tuple(cross.shape)} and second {(size, size)}: both are (in, in)")
            object.__setattr__(self, "cross", cross)
        if self.outer is not None:
            object.__setattr__(self, "outer", _moment(self.outer, "outer"))
            object.__setattr__(self, "outer_root", _root(self.outer, "outer"))
        object.__setattr__(self, "root", _root(self.second, "second"))
        if not (is_real(self.damping) and 0 < self.damping < math.inf):
            raise MPOError(f"damping={self.damping!r} must be positive: a fraction of the mean of the diagonal")

    @property
    def name(self) -> str:
        """What reports call it: ``"activation"``, with ``", anchored"`` and ``", two-sided"`` where it is."""
        return "activation" + ", anchored" * (self.cross is not None) + ", two-sided" * (self.outer is not None)

    @property
    def rank(self) -> int:
        """How many directions of the inputs have any weight: errors in the others cost nothing."""
        return int(self.root.shape[1])

    def target(self, matrix: Array) -> Array:
        """What fits aim at, in double precision: W, or with ``cross`` the best W* for the inputs as they are.

        ``W* = W + W (Cx - S) (S + damping mean(diag S))^-1``.
        """
        xp = namespace(matrix)
        wide = self._checked(matrix)
        if self.cross is None:
            return wide
        second, cross = (like(part, wide) for part in (self.second, self.cross))
        size = second.shape[0]
        ridge = self.damping * float(xp.mean(xp.linalg.diagonal(second)))
        damped = second + ridge * xp.eye(size, dtype=wide.dtype, device=array_api_compat.device(wide))
        return wide + adjoint(xp.linalg.solve(damped, adjoint(wide @ (cross - second))))

    def weighed(self, difference: Array) -> float:
        """``sqrt(tr(G D S D^T))`` of a difference (out, in), as the norm of ``K^T D L``."""
        root, outer = like(self.root, difference), self.outer_root
        if outer is not None:
            return frobenius_norm(adjoint(like(outer, difference)) @ (difference @ root))
        starts = range(0, difference.shape[0], _ROWS)
        return math.hypot(*(frobenius_norm(difference[start : start + _ROWS, :] @ root) for start in starts))

    def norm(self, matrix: Array) -> float:
        """The norm of the target of a matrix (out, in)."""
        return self.weighed(self.target(matrix))

    def error(self, matrix: Array, chain: Chain) -> float:
        """How far a chain is from the target of a matrix (out, in), measured on the difference in double precision.

        Raises:
            MPOError: another shape than that of the moments.

        >>> import numpy as np
        >>> from mpo_tn import MPO
        >>> Metric(np.eye(2)).error(np.eye(2), MPO.low_rank(np.ones((2, 1)), np.ones((1, 2))))
        1.4142135623730951
        """
        wide = self.target(matrix)
        if chain.shape != tuple(wide.shape):
            raise MPOError(f"the chain is {shape_text(chain.shape)} and the matrix {tuple(wide.shape)}")
        return self.weighed(wide - dense(wide_chain(chain).cores))

    def _checked(self, matrix: Array) -> Array:
        matrix = check_matrix(matrix)
        refuse_complex(matrix, "the matrix")
        rows, columns = matrix.shape
        if columns != self.second.shape[0]:
            raise MPOError(f"the matrix is {(rows, columns)} and second {tuple(self.second.shape)}: second is (in, in)")
        if self.outer is not None and rows != self.outer.shape[0]:
            raise MPOError(f"the matrix is {(rows, columns)} and outer {tuple(self.outer.shape)}: outer is (out, out)")
        return widen(matrix)


def dense(cores: tuple[Array, ...] | list[Array]) -> Array:
    """The matrix (out, in) of cores in their own precision, from left to right."""
    xp = namespace(cores[0])
    parts, exponent = unit_cores(cores)
    matrix = Scaled(parts[0][0], exponent)
    for k, core in enumerate(parts[1:], start=1):
        out, in_ = matrix.array.shape[0] * core.shape[1], matrix.array.shape[1] * core.shape[2]
        joined = xp.permute_dims(xp.tensordot(matrix.array, core, axes=1), (0, 2, 1, 3, 4))
        matrix = Scaled(xp.reshape(joined, (out, in_, core.shape[3])), matrix.exponent)
        # Few cores of norm 1 stay in range.
        matrix = matrix if k % _UNSCALED else unit(matrix.array, matrix.exponent)
    return times_power_of_two(matrix.array, matrix.exponent)[:, :, 0]


def like(moment: Array, array: Array) -> Array:
    """A moment in the library, dtype and device of an array."""
    xp = namespace(array)
    return xp.asarray(moment, dtype=array.dtype, device=array_api_compat.device(array))


def refuse_complex(array: Array, what: str) -> None:
    """Raise for complex arrays: the metric is that of a layer with real inputs.

    Raises:
        MPOError: it is complex.
    """
    if dtype_name(array).startswith("complex"):
        raise MPOError(f"{what} is {dtype_name(array)}: a metric is for real matrices; fit its parts one by one")


def _square(moment: Array, name: str) -> Array:
    try:
        checked = check_matrix(moment)
    except MPOError as error:
        raise MPOError(f"{name}: {error}") from None
    refuse_complex(checked, name)
    if checked.shape[0] != checked.shape[1]:
        raise MPOError(f"{name} is {tuple(checked.shape)}: a moment is square")
    return widen(checked)


def _moment(moment: Array, name: str) -> Array:
    wide = _square(moment, name)
    norm, skew = frobenius_norm(wide), frobenius_norm(wide - adjoint(wide))
    if not norm > 0:
        raise MPOError(f"{name} is zero: no error would count; was the layer ever reached?")
    if not skew <= _SYMMETRY * norm:
        raise MPOError(f"{name} is not symmetric: {name} - {name}^T has {skew / norm:.3g} of its norm")
    return (wide + adjoint(wide)) / 2


def _root(moment: Array, name: str) -> Array:
    host = to_numpy(moment)
    root = pivoted_cholesky(host)
    # What is left of a matrix that is no square is as large as its negative eigenvalues, and so are a few products.
    probes = np.random.default_rng(0).standard_normal((len(host), 4))
    missed = float(np.linalg.norm(host @ probes - root @ (root.T @ probes))) / 2
    trace = float(np.trace(host))
    if not missed <= _NEGATIVE * abs(trace):
        raise MPOError(
            f"{name} is not positive semidefinite: {missed:.3g} of it, of a trace of {trace:.3g}, is no square; "
            "accumulate moments in double precision"
        )
    return like(root, moment)
