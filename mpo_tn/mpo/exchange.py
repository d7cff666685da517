"""Exchange: another dtype, another device, the objects of other libraries."""

from __future__ import annotations

from typing import Any, Self

from mpo_tn.chains import casts
from mpo_tn.chains.chain import Chain
from mpo_tn.interop import quimb, tensorly


class Exchange(Chain):
    """The verbs that change how an MPO is held, and by whom."""

    def astype(self, dtype: Any) -> Self:
        """The MPO in another dtype, a name or a dtype; itself if it has it already.

        Fewer digits keep the canonical interval; more digits, which isometries do not have, and half precision do not.
        :meth:`cast_error` tells beforehand what is lost.

        Guarantee (astype): every core is rounded once, and nothing else is lost: a core that would leave the range
        shares its power of two with the others.

        Raises:
            MPOError: no such dtype, a real one for complex cores, or one whose range is too small for the matrix.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 2), (2, 2))).astype("complex64")
        MPO(4 x 4, out=(2, 2), in_=(2, 2), bonds=(1,), center=None, 8 complex64 parameters)
        """
        return casts.astype(self, dtype)

    def to(self, device: Any) -> Self:
        """The MPO with its cores on another device, such as ``"cuda"`` for torch or ``jax.devices()[0]``.

        Raises:
            MPOError: no such device.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 2), (2, 2))).to("cpu").dtype
        dtype('float64')
        """
        return casts.to_device(self, device)

    def to_quimb(self) -> Any:
        """A ``quimb.tensor.MatrixProductOperator``, whose upper index is the row; its arrays are views of the cores.

        Raises:
            MPOError: quimb is not installed.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 2), (2, 2))).to_quimb().to_dense().shape
        (4, 4)
        """
        return quimb.to_quimb(self)

    @classmethod
    def from_quimb(cls, operator: Any) -> Self:
        """The MPO of a quimb operator with open ends, its sites in order; its upper index is the row.

        Bonds that are missing, as in products, have size 1. Arrays are not copied but for such. ``exponent`` counts.

        Guarantee (quimb): there and back again every core has the same bits, and ``to_dense`` is the matrix.

        Raises:
            MPOError: what is no chain of operators: periodic, a state, several tensors at a site or none, a bond
                between sites that are no neighbours.

        >>> import quimb.tensor
        >>> from mpo_tn import MPO
        >>> MPO.from_quimb(quimb.tensor.MPO_ham_heis(4)).bonds
        (5, 5, 5)
        """
        return cls(tuple(quimb.cores_of(operator)))

    def to_tensorly(self) -> Any:
        """A ``tensorly.tt_matrix.TTMatrix`` of the cores themselves; tensorly's backend has to be the library of them.

        Raises:
            MPOError: tensorly is not installed.

        >>> from mpo_tn import MPO, Sites
        >>> MPO.identity(Sites((2, 3), (2, 3))).to_tensorly().rank
        (1, 1, 1)
        """
        return tensorly.to_tensorly(self)

    @classmethod
    def from_tensorly(cls, matrix: Any) -> Self:
        """The MPO of a ``tensorly.tt_matrix.TTMatrix``, or of the list of its factors, which are the cores themselves.

        Guarantee (tensorly): there and back again every core is the same array, and ``to_matrix`` is the matrix.

        Raises:
            MPOError: what is none.

        >>> import numpy as np
        >>> from mpo_tn import MPO
        >>> MPO.from_tensorly([np.ones((1, 2, 2, 3)), np.ones((3, 2, 2, 1))]).bonds
        (3,)
        """
        return cls(tuple(tensorly.cores_of(matrix)))
