"""Products of a chain with vectors as SciPy wants them: NumPy arrays of any dtype in and out."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpo_tn.chains.algebra import apply, conj, transpose
from mpo_tn.chains.casts import astype
from mpo_tn.chains.chain import Chain
from mpo_tn.linalg import DOUBLE, Array, dtype_name, library, namespace, to_numpy


def product(chain: Chain, x: Any, *, adjoint: bool) -> Array:
    """The matrix of a chain, or its adjoint, times ``x``, in the wider dtype of both. See :meth:`mpo_tn.MPO.matvec`."""
    x = np.asarray(x) if isinstance(x, (list, tuple, np.ndarray)) else x
    if isinstance(x, np.ndarray) and x.dtype.kind in "iub":
        x = x.astype("float64")
    kind = library(chain.cores[0])
    wanted = _wider(dtype_name(chain.cores[0]), dtype_name(x))
    host = kind != "numpy" and isinstance(x, np.ndarray)
    if host and kind == "jax":
        # On the host JAX's arrays are those of NumPy, with double precision whatever x64 says.
        chain = Chain(tuple(to_numpy(core) for core in chain.cores))
        kind, host = "numpy", False
    chain = astype(chain, wanted)
    chain = conj(transpose(chain)) if adjoint else chain
    like = chain.cores[0]
    if host:
        x = namespace(like).asarray(np.ascontiguousarray(x), dtype=like.dtype, device=like.device)
    elif dtype_name(x) != wanted:
        x = namespace(x).astype(x, like.dtype)
    y = apply(chain, x)
    return to_numpy(y) if host else y


def product_dtype(chain: Chain) -> np.dtype:
    """The NumPy dtype of products with vectors of the same precision."""
    name = dtype_name(chain.cores[0])
    return np.dtype("float32" if name in ("float16", "bfloat16") else name)


def linear_operator(chain: Chain, dtype: np.dtype) -> Any:
    """A SciPy LinearOperator of a chain."""
    from scipy.sparse import linalg

    def forward(x: np.ndarray) -> np.ndarray:
        return product(chain, x, adjoint=False)

    def backward(x: np.ndarray) -> np.ndarray:
        return product(chain, x, adjoint=True)

    # SciPy makes another class of this one, of which its types know nothing.
    make: Any = linalg.LinearOperator
    return make(chain.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype)


def _wider(first: str, second: str) -> str:
    """The name of the dtype that holds both; products of half precision are of single precision at least."""
    both = (first, second)
    if first == second and first in ("float16", "bfloat16"):
        return first
    is_complex, double = any(name.startswith("complex") for name in both), any(name in DOUBLE for name in both)
    return ("complex128" if double else "complex64") if is_complex else ("float64" if double else "float32")
