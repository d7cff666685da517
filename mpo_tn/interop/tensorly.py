"""TTMatrix of tensorly, whose factors have the layout of cores: (bond, row leg, column leg, bond)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array


def to_tensorly(chain: Chain) -> Any:
    """See :meth:`mpo_tn.MPO.to_tensorly`."""
    try:
        from tensorly.tt_matrix import TTMatrix
    except ImportError as error:
        raise MPOError("to_tensorly needs tensorly: pip install tensorly") from error
    return TTMatrix(list(chain.cores))


def cores_of(matrix: Any) -> list[Array]:
    """See :meth:`mpo_tn.MPO.from_tensorly`."""
    factors = getattr(matrix, "factors", matrix)
    if not isinstance(factors, Sequence) or isinstance(factors, (str, bytes)) or not factors:
        raise MPOError(f"{type(matrix).__name__} is no TTMatrix of tensorly, nor a list of its factors")
    for k, factor in enumerate(factors):
        if getattr(factor, "ndim", None) != 4:
            raise MPOError(
                f"factor {k} of the {type(matrix).__name__} is no array of four axes, (bond, row, column, bond): it is "
                "no TTMatrix"
            )
    return list(factors)
