"""Operators: a chain that Python's ``+ - * / @`` understand."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from array_api_compat import is_array_api_obj

from mpo_tn.chains import algebra, composition
from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import is_traced


class Operators(Chain):
    """What makes an MPO usable like a matrix.

    ========================  ========================================  ===============  ==================
    expression                result                                    bonds            canonical interval
    ========================  ========================================  ===============  ==================
    ``a + b``, ``a - b``      the sum, the difference                   sums of both     claims nothing
    ``c * a, a * c, a / c``   the multiple, complex if ``c`` is         as before        kept
    ``-a, a.T, a.H``          the negative, the transpose, the adjoint  as before        kept
    ``a @ b``                 the matrix product                        products         claims nothing
    ``a ** p``                ``a @ a @ ... @ a``, p times              powers           claims nothing
    ``sum([a, b, c])``        the sum of them all                       sums of all      claims nothing
    ``a @ x``                 array, see :meth:`mpo_tn.MPO.apply`       (none)           (none)
    ``x @ a``                 ``a.T @ x.T`` transposed, for (out,) or   (none)           (none)
                              (batch, out)
    ========================  ========================================  ===============  ==================

    Sums cost no flops; ``a @ b`` costs ``2 sum_k a_{k-1} a_k b_{k-1} b_k out_k mid_k in_k`` for bonds a and b.

    Raises:
        MPOError: libraries, dtypes or devices that differ, legs that do not fit (it names the site), an array of a
            wrong shape, or a factor that is no number: a bool, a string, an array with axes.
        TypeError: an operand that is none of these at all.

    >>> import numpy as np
    >>> from mpo_tn import MPO, Sites
    >>> a = MPO.random(Sites((2, 3), (2, 2)), 4, seed=0)
    >>> b = 2 * (a - a.conj() / 2) @ a.T
    >>> b.shape, b.bonds
    ((6, 6), (32,))
    >>> bool(np.allclose(b.to_matrix(), a.to_matrix() @ a.to_matrix().T))
    True
    """

    __array_ufunc__: ClassVar[None] = None
    """NumPy must not take ``array * mpo`` apart entry by entry."""

    @property
    def T(self) -> Self:  # noqa: N802
        """The transpose: the legs of every site swap, the canonical interval stays."""
        return algebra.transpose(self)

    @property
    def H(self) -> Self:  # noqa: N802
        """The adjoint: :attr:`T` of :meth:`conj`."""
        return algebra.conj(algebra.transpose(self))

    def conj(self) -> Self:
        """The complex conjugate; real cores are shared."""
        return algebra.conj(self)

    def __add__(self, other: Any) -> Self:
        if isinstance(other, int) and not isinstance(other, bool) and other == 0:
            return self  # where ``sum`` begins
        if not isinstance(other, Chain):
            return NotImplemented
        return algebra.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Self:
        if not isinstance(other, Chain):
            return NotImplemented
        return algebra.subtract(self, other)

    def __neg__(self) -> Self:
        return algebra.scaled(self, -1.0, operator.mul)

    def __mul__(self, factor: Any) -> Self:
        return self._multiple(factor, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        return self._multiple(divisor, operator.truediv)

    def _multiple(self, factor: Any, act: Callable[[Any, Any], Any]) -> Any:
        if is_traced(factor) and factor.ndim == 0:
            return algebra.traced_multiple(self, factor, act)
        number = checked_scalar(factor)
        return NotImplemented if number is None else algebra.scaled(self, number, act)

    def __pow__(self, exponent: Any) -> Self:
        return composition.power(self, exponent)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Chain):
            return algebra.multiply(self, other)
        return algebra.apply(self, other) if is_array(other) else NotImplemented

    def __rmatmul__(self, x: Any) -> Any:
        return algebra.apply_from_left(self, x) if is_array(x) else NotImplemented


def checked_scalar(value: Any) -> float | complex | None:
    """The scalar as a Python number, or None if it is nothing that multiplies.

    Raises:
        MPOError: a bool, a string, an array with axes, a tensor that requires grad, a number out of range.
    """
    if isinstance(value, (bool, np.bool_, str, bytes)):
        raise MPOError(f"{value!r} of type {type(value).__name__} is no scalar: multiply by a number")
    array: Any = value
    if is_array(value) and not isinstance(value, np.generic):
        if array.ndim or getattr(array, "requires_grad", False):
            raise MPOError(
                f"an array of shape {tuple(array.shape)} is no plain scalar: multiply by a number, or use @ for the "
                "matrix product"
            )
        return checked_scalar(array.item())
    try:
        if isinstance(value, numbers.Real):
            return float(value)
        return complex(value) if isinstance(value, numbers.Complex) else None
    except OverflowError:
        raise MPOError("an integer beyond the range of double precision is no scalar that an MPO can take") from None


def is_array(value: object) -> bool:
    """Whether a value is an array of some library; array_api_compat does not count all subclasses of NumPy's."""
    return isinstance(value, np.ndarray) or is_array_api_obj(value)
