"""The entries of a matrix in the order of the sites, and back."""

from __future__ import annotations

import math

import numpy as np

from mpo_tn.linalg import Array, namespace


def interleave(matrix: Array, out: tuple[int, ...], in_: tuple[int, ...]) -> Array:
    """The entries of a matrix (out, in) as a vector ordered by ``(out_1, in_1, ..., out_n, in_n)``."""
    xp = namespace(matrix)
    if isinstance(matrix, np.ndarray) and matrix.flags.c_contiguous:
        # Neighbours within the last leg stay neighbours: moved as one item they move several times as fast.
        for together, item in ((16 // matrix.itemsize, np.complex128), (8 // matrix.itemsize, np.float64)):
            if together > 1 and in_[-1] % together == 0:
                moved = interleave(matrix.view(item), out, (*in_[:-1], in_[-1] // together))
                return moved.view(matrix.dtype)
    sizes = (*out, *in_)
    # Axes of size 1 are left out: NumPy has no more than 64.
    kept = [axis for axis, size in enumerate(sizes) if size > 1]
    order = [axis for k in range(len(out)) for axis in (k, len(out) + k) if sizes[axis] > 1]
    tensor = xp.reshape(matrix, tuple(sizes[axis] for axis in kept))
    return xp.reshape(xp.permute_dims(tensor, tuple(kept.index(axis) for axis in order)), (-1,))


def deinterleave(vector: Array, out: tuple[int, ...], in_: tuple[int, ...]) -> Array:
    """The matrix (out, in) of a vector ordered by ``(out_1, in_1, ..., out_n, in_n)``: the inverse of `interleave`.

    >>> matrix = np.arange(24.0).reshape(4, 6)
    >>> bool((deinterleave(interleave(matrix, (2, 2), (3, 2)), (2, 2), (3, 2)) == matrix).all())
    True
    """
    xp = namespace(vector)
    pairs = [(out[k], in_[k]) for k in range(len(out)) if out[k] * in_[k] > 1]
    tensor = xp.reshape(vector, tuple(size for pair in pairs for size in pair))
    order = (*range(0, 2 * len(pairs), 2), *range(1, 2 * len(pairs), 2))
    return xp.reshape(xp.permute_dims(tensor, order), (math.prod(out), math.prod(in_)))
