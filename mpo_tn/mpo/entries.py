"""Entries: what of a matrix can be looked up without the matrix, and the products that SciPy's solvers call."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from mpo_tn.chains import entries
from mpo_tn.chains.chain import Chain
from mpo_tn.chains.linear import linear_operator, product, product_dtype
from mpo_tn.linalg import Array, to_numpy


class Entries(Chain):
    """Indexing as of a matrix, and ``matvec`` and ``rmatvec`` for iterative methods."""

    __iter__: ClassVar[None] = None  # type: ignore[assignment]
    """Not iterable: ``len`` counts sites and an index is a row."""

    def __getitem__(self, key: Any) -> Array:
        """What ``to_matrix()[key]`` is, without the matrix: ``a[i, j]``, ``a[i]``, ``a[:, j]``, ``a[rows, columns]``.

        Rows and columns are numbered as in the matrix and may be negative; arrays of whole numbers broadcast against
        each other, slices span a grid, and ``a[i]`` is a row. The result has the cores' own dtype and library.

        Guarantee (entry): right to ``4 eps(dtype) sqrt(size)`` times the norm, of a chain without a centre the product
        of the norms of its cores, for chains of any length: a power of two is taken out at every site.
        Cost: ``2 sum_k d_{k-1} d_k`` flops an entry for bonds d; a single row or column is contracted as
        :meth:`to_matrix` is.

        Raises:
            MPOError: an index that is not there or is none, too many of them, or a result out of the dtype's range.

        >>> from mpo_tn import MPO, Sites
        >>> eye = MPO.identity(Sites((2,) * 1000, (2,) * 1000))
        >>> float(eye[2**999, 2**999]), eye[[0, 1], [0, 0]].tolist()
        (1.0, [1.0, 0.0])
        """
        return entries.item(self, key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense matrix, on the host: what ``numpy.asarray(mpo)`` and NumPy's functions work with."""
        return np.asarray(to_numpy(entries.item(self, (slice(None), slice(None)))), dtype=dtype)

    def diagonal(self) -> Array:
        """The main diagonal, ``min(out, in)`` entries, in the cores' own dtype, without the matrix.

        As a matrix it is :meth:`hadamard` with the identity, which works for chains of any length.

        Guarantee (diagonal): right to ``4 eps(dtype) sqrt(size)`` times the product of the norms of the cores.
        Cost: that of a product with a vector where the legs of every site are equal; else as many single entries.

        Raises:
            MPOError: it is too long to be held.

        >>> import numpy as np
        >>> from mpo_tn import MPO, Sites
        >>> mpo, _ = MPO.from_matrix(np.diag([1.0, 2.0, 3.0, 4.0]), Sites((2, 2), (2, 2)))
        >>> [round(float(value), 12) for value in mpo.diagonal()]
        [1.0, 2.0, 3.0, 4.0]
        """
        return entries.diagonal(self)

    def matvec(self, x: Array) -> Array:
        """``self @ x`` for ``x`` (in,) or (in, batch), as SciPy's solvers call it.

        Other than ``@`` it takes NumPy arrays whatever the library of the cores, and gives them back, and it takes
        other
        dtypes: the result has the wider of both.

        Raises:
            MPOError: another shape.

        >>> import numpy as np
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> from mpo_tn import MPO, Sites
        >>> operator = aslinearoperator(2 * MPO.identity(Sites((2, 2), (2, 2)), dtype="float32"))
        >>> operator.matvec(np.arange(4.0)), operator.dtype
        (array([0., 2., 4., 6.]), dtype('float32'))
        """
        return product(self, x, adjoint=False)

    matmat = matvec

    def rmatvec(self, x: Array) -> Array:
        """``self.H @ x`` for ``x`` (out,) or (out, batch); see :meth:`matvec`."""
        return product(self, x, adjoint=True)

    rmatmat = rmatvec

    def linear_operator(self) -> Any:
        """The matrix as a ``scipy.sparse.linalg.LinearOperator`` on NumPy arrays, whatever the library of the cores.

        For NumPy and JAX it is what ``scipy.sparse.linalg.aslinearoperator(self)`` gives; that does not understand the
        dtypes of torch.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 2), (2, 2))).linear_operator().shape
        (4, 4)
        """
        return linear_operator(self, product_dtype(self))
