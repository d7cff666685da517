"""The least-squares problem of one core in a metric, the other cores given.

The matrix is linear in the core C (a, o, i, b): ``W'[o_< o o_>, i_< i i_>] = sum A[o_<, i_<, a] C[a, o, i, b] B[b, o_>,
i_>]``, and the error ``tr(G D S D^T)`` quadratic, with normal matrix ``N = (A C B)^T (G x S) (A C B)``. With G = 1 the
rows o of the core are separate right-hand sides and N acts on (a, i, b) alone.

What is solved for is the step from the core as it is: damping makes the step shorter and never the error larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import array_api_compat

from mpo_tn.linalg import Array, adjoint, namespace, narrow, triangle

_DIRECT = 1500
"""The most unknowns of one right-hand side for which the normal matrix is formed."""

_WORTH = 8
"""Forming the normal matrix may cost as much as this many products with it."""

_RIDGE = 1e-12
"""Damping of the normal matrix, as a fraction of the mean of its diagonal: above what rounds, below what matters."""

_PRECONDITIONER_RIDGE = 1e-5

_STEPS = 24
"""The most steps of conjugate gradients for one core; the next sweep goes on where they end."""

_LEAST_GAIN = 0.01
"""Conjugate gradients stop when a step gains less than this fraction of what all have gained."""


@dataclass
class LocalProblem:
    """One core between two frames.

    Args:
        left: A, (o_<, i_<, a).
        right: B, (b, o_>, i_>).
        second: S, (in, in), double precision.
        outer: G, (out, out), or None for the identity.
        single: whether iterations may be in single precision, as the data are.
    """

    left: Array
    right: Array
    second: Array
    outer: Array | None
    single: bool

    def step(self, core: Array, difference: Array) -> Array:
        """What to add to the core, given the difference (out, in) that the chain with it leaves of the target."""
        xp = namespace(core)
        if self.outer is None and self.left.shape[1] == 1 == self.right.shape[2]:
            # The inputs are all in this core: whatever S is, the best core is the one of the identity.
            rows = xp.linalg.pinv(self.left[:, 0, :])
            columns = xp.linalg.pinv(self.right[:, :, 0])
            return project(
                difference, xp.permute_dims(rows, (1, 0))[:, None, :], xp.permute_dims(columns, (1, 0))[:, :, None]
            )
        gradient = project(self.weigh(difference), self.left, self.right)
        self._reduce()
        unknowns = core.shape[0] * core.shape[2] * core.shape[3]
        if self.outer is None and unknowns <= _DIRECT and min(self._costs()) <= _WORTH * core.shape[1]:
            return self._direct(gradient)
        return self._iterative(gradient)

    def weigh(self, difference: Array) -> Array:
        """``G D S``."""
        weighted = difference @ self.second
        return weighted if self.outer is None else self.outer @ weighted

    def _reduce(self) -> None:
        """Rows that the left and right frame do not tell apart are summed, which N does not notice."""
        if self.outer is not None:
            return
        xp = namespace(self.left)
        rows, in_, a = self.left.shape
        if rows > in_ * a:
            self.left = xp.reshape(triangle(xp.reshape(self.left, (rows, in_ * a))), (-1, in_, a))
        self.right = reduced_rows(self.right)

    # --- the normal matrix itself ---

    def _costs(self) -> tuple[float, float]:
        """Forming the normal matrix, left or right frame first, in products of it with one row of the core."""
        rows, big, a = self.left.shape
        b, right_rows, small = self.right.shape
        n = self.second.shape[0]
        leg = n // (big * small)
        product = max(rows * right_rows, 1) * n * n

        def cost(rows: int, bond: int, legs: int, later_rows: int, later_bond: int, later_legs: int) -> float:
            first = rows * bond * n * n * (1 + bond / legs)
            inner = (bond * leg) ** 2
            return (first + later_rows * inner * later_legs * later_bond * (later_legs + later_bond)) / product

        return cost(rows, a, big, right_rows, b, small), cost(right_rows, b, small, rows, a, big)

    def _direct(self, gradient: Array) -> Array:
        xp = namespace(gradient)
        a, out, in_, b = gradient.shape
        size = a * in_ * b
        normal = xp.reshape(self._normal(a, in_, b), (size, size))
        ridge = _RIDGE * float(xp.sum(xp.linalg.diagonal(normal))) / size
        if not ridge > 0:
            return xp.zeros_like(gradient)
        eye = xp.eye(size, dtype=normal.dtype, device=array_api_compat.device(normal))
        sides = xp.reshape(xp.permute_dims(gradient, (0, 2, 3, 1)), (size, out))
        found = xp.linalg.solve((normal + adjoint(normal)) / 2 + ridge * eye, sides)
        return xp.permute_dims(xp.reshape(found, (a, in_, b, out)), (0, 3, 1, 2))

    def _normal(self, a: int, in_: int, b: int) -> Array:
        """(a, i, b, a', i', b')."""
        xp = namespace(self.second)
        left_first, right_first = self._costs()
        big, small = self.left.shape[1], self.right.shape[2]
        shape = (big, in_ * small, big, in_ * small)
        lefts = [self.left[q] for q in range(self.left.shape[0])]
        rights = [xp.permute_dims(self.right[:, q, :], (1, 0)) for q in range(self.right.shape[1])]
        if left_first <= right_first:
            inner = _sandwich(xp.reshape(self.second, shape), lefts)  # (a, i J, a', i' J')
            turned = xp.permute_dims(xp.reshape(inner, (a, in_, small, a, in_, small)), (2, 0, 1, 5, 3, 4))
            found = _sandwich(xp.reshape(turned, (small, a * in_, small, a * in_)), rights)  # (b, a i, b', a' i')
            return xp.permute_dims(xp.reshape(found, (b, a, in_, b, a, in_)), (1, 2, 0, 4, 5, 3))
        turned = xp.permute_dims(xp.reshape(self.second, (big * in_, small, big * in_, small)), (1, 0, 3, 2))
        inner = xp.reshape(_sandwich(turned, rights), (b, big, in_, b, big, in_))
        turned = xp.permute_dims(inner, (1, 2, 0, 4, 5, 3))
        found = _sandwich(xp.reshape(turned, (big, in_ * b, big, in_ * b)), lefts)
        return xp.reshape(found, (a, in_, b, a, in_, b))

    # --- conjugate gradients ---

    def _iterative(self, gradient: Array) -> Array:
        """Preconditioned conjugate gradients from zero, then the best length along the step they found."""
        xp = namespace(gradient)
        lower = narrow if self.single else xp.asarray
        problem = LocalProblem(
            lower(self.left),
            lower(self.right),
            lower(self.second),
            None if self.outer is None else lower(self.outer),
            self.single,
        )
        inverses = [lower(part) for part in self._preconditioner(gradient.shape)]
        scale = float(xp.linalg.vector_norm(xp.reshape(gradient, (-1,))))
        if not 0 < scale < math.inf:
            return xp.zeros_like(gradient)
        rest = lower(gradient / scale)
        step, gained = xp.zeros_like(rest), 0.0
        towards = _on_legs(rest, inverses)
        direction, size = towards, float(xp.sum(rest * towards))
        for _ in range(_STEPS):
            image = problem.times(direction)
            curvature = float(xp.sum(direction * image))
            if not (curvature > 0 and size > 0):
                break
            step, rest = step + (size / curvature) * direction, rest - (size / curvature) * image
            gained += size**2 / curvature
            if size**2 / curvature <= _LEAST_GAIN * gained:
                break
            towards = _on_legs(rest, inverses)
            before, size = size, float(xp.sum(rest * towards))
            direction = towards + (size / before) * direction
        curvature = float(xp.sum(step * problem.times(step)))
        step = xp.astype(step, gradient.dtype)
        slope = float(xp.sum(step * gradient)) / scale
        if not (slope > 0 and curvature > 0):
            return xp.zeros_like(gradient)
        return step * (scale * slope / curvature)

    def times(self, step: Array) -> Array:
        """The normal matrix times a core."""
        return project(self.weigh(expand(step, self.left, self.right)), self.left, self.right)

    def _preconditioner(self, shape: tuple[int, ...]) -> list[Array]:
        """Inverses on each of the four legs: the Kronecker product of the partial traces of N stands for N."""
        xp = namespace(self.second)
        _, out, in_, _ = shape
        big, small = self.left.shape[1], self.right.shape[2]
        tensor = xp.reshape(self.second, (big, in_, small, big, in_, small))
        left = xp.tensordot(self.left, self.left, axes=((0, 2), (0, 2)))
        right = xp.tensordot(self.right, self.right, axes=((0, 1), (0, 1)))
        beside_left = xp.tensordot(tensor, right, axes=((2, 5), (0, 1)))  # (I, i, I', i')
        beside_right = xp.tensordot(tensor, left, axes=((0, 3), (0, 1)))  # (i, J, i', J')
        on_in = xp.tensordot(beside_left, left, axes=((0, 2), (0, 1)))
        on_left = xp.sum(xp.linalg.diagonal(xp.permute_dims(beside_left, (0, 2, 1, 3))), axis=-1)
        on_right = xp.sum(xp.linalg.diagonal(xp.permute_dims(beside_right, (1, 3, 0, 2))), axis=-1)
        a = xp.tensordot(xp.tensordot(on_left, self.left, axes=((1,), (1,))), self.left, axes=((0, 1), (1, 0)))
        b = xp.tensordot(xp.tensordot(on_right, self.right, axes=((1,), (2,))), self.right, axes=((0, 2), (2, 1)))
        if self.outer is None:
            on_out = xp.eye(out, dtype=self.second.dtype, device=array_api_compat.device(self.second))
        else:
            rows, last = self.left.shape[0], self.right.shape[1]
            legs = xp.reshape(self.outer, (rows, out, last, rows, out, last))
            on_out = xp.linalg.diagonal(xp.permute_dims(legs, (1, 4, 0, 3, 2, 5)))
            on_out = xp.sum(xp.linalg.diagonal(xp.sum(on_out, axis=-1)), axis=-1)
        return [_inverse(part) for part in (a, on_out, on_in, b)]


def expand(core: Array, left: Array, right: Array) -> Array:
    """The matrix (out, in) of a core between its frames."""
    xp = namespace(core)
    o, i, a = left.shape
    b, p, j = right.shape
    _, out, in_, _ = core.shape
    if o * i * b <= a * p * j:
        found = xp.tensordot(xp.tensordot(left, core, axes=1), right, axes=1)
    else:
        found = xp.tensordot(left, xp.tensordot(core, right, axes=1), axes=1)
    return xp.reshape(xp.permute_dims(found, (0, 2, 4, 1, 3, 5)), (o * out * p, i * in_ * j))


def project(matrix: Array, left: Array, right: Array) -> Array:
    """The core (a, o, i, b) that a matrix (out, in) looks like between two frames: the adjoint of :func:`expand`."""
    xp = namespace(matrix)
    o, i, a = left.shape
    b, p, j = right.shape
    out, in_ = matrix.shape[0] // (o * p), matrix.shape[1] // (i * j)
    tensor = xp.permute_dims(xp.reshape(matrix, (o, out, p, i, in_, j)), (0, 3, 1, 4, 2, 5))
    if o * i * b <= a * p * j:
        return xp.tensordot(left, xp.tensordot(tensor, right, axes=((4, 5), (1, 2))), axes=((0, 1), (0, 1)))
    return xp.tensordot(xp.tensordot(left, tensor, axes=((0, 1), (0, 1))), right, axes=((3, 4), (1, 2)))


def column_moment(left: Array, right: Array, second: Array) -> Array:
    """S as the columns (i, b) of a core see it, (i b, i' b'): the mean over the rows a of the core, in some scale.

    Exact where the normal matrix is a Kronecker product of rows and columns, as in a chain of one site or of low rank.
    """
    xp = namespace(second)
    big, (b, rows, small) = left.shape[1], right.shape
    leg = second.shape[0] // (big * small)
    weights = xp.tensordot(left, left, axes=((0, 2), (0, 2)))
    tensor = xp.reshape(second, (big, leg * small, big, leg * small))
    inner = xp.reshape(xp.tensordot(tensor, weights, axes=((0, 2), (0, 1))), (leg, small, leg, small))
    frames = [xp.permute_dims(right[:, q, :], (1, 0)) for q in range(rows)]
    found = _sandwich(xp.permute_dims(inner, (1, 0, 3, 2)), frames)  # (b, i, b', i')
    return xp.reshape(xp.permute_dims(found, (1, 0, 3, 2)), (leg * b, leg * b))


def reduced_rows(frame: Array) -> Array:
    """A right frame (b, rows, in) with no more rows than columns, and the same Gram matrix."""
    xp = namespace(frame)
    b, rows, in_ = frame.shape
    if rows <= b * in_:
        return frame
    turned = xp.reshape(xp.permute_dims(frame, (1, 0, 2)), (rows, b * in_))
    return xp.permute_dims(xp.reshape(triangle(turned), (-1, b, in_)), (1, 0, 2))


def _sandwich(tensor: Array, frames: list[Array]) -> Array:
    """``sum_q F_q^T X F_q`` over the first and third index of (I, R, I', R'); frames (I, a)."""
    xp = namespace(tensor)
    found = None
    for frame in frames:
        half = xp.tensordot(frame, tensor, axes=((0,), (0,)))  # (a, R, I', R')
        part = xp.tensordot(half, frame, axes=((2,), (0,)))  # (a, R, R', a')
        found = part if found is None else found + part
    return xp.permute_dims(found, (0, 1, 3, 2))


def _inverse(part: Array) -> Array:
    xp = namespace(part)
    size = part.shape[0]
    mean = float(xp.sum(xp.linalg.diagonal(part))) / size
    eye = xp.eye(size, dtype=part.dtype, device=array_api_compat.device(part))
    if not mean > 0:
        return eye
    return xp.linalg.inv((part + adjoint(part)) / (2 * mean) + _PRECONDITIONER_RIDGE * eye)


def _on_legs(core: Array, matrices: list[Array]) -> Array:
    """Symmetric matrices applied to the legs of a core; those of size 1 are left alone: no scale matters here."""
    xp = namespace(core)
    for axis, matrix in enumerate(matrices):
        if matrix.shape[0] > 1:
            moved = xp.tensordot(matrix, core, axes=((1,), (axis,)))
            order = [*range(1, axis + 1), 0, *range(axis + 1, 4)]
            core = xp.permute_dims(moved, tuple(order))
    return core
