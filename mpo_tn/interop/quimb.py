"""MatrixProductOperator of quimb, whose tensors have named indices and lack the outer bonds."""

from __future__ import annotations

from typing import Any

from mpo_tn.chains.chain import Chain
from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import Array, namespace


def to_quimb(chain: Chain) -> Any:
    """See :meth:`mpo_tn.MPO.to_quimb`."""
    try:
        from quimb.tensor import MatrixProductOperator
    except ImportError as error:
        raise MPOError("to_quimb needs quimb: pip install quimb") from error
    n = len(chain)
    xp = namespace(chain.cores[0])
    arrays: list[Array] = []
    for k, core in enumerate(chain.cores):
        left, out, in_, right = core.shape
        inner = [left] * (k > 0) + [out, in_] + [right] * (k < n - 1)
        arrays.append(xp.reshape(core, tuple(inner)))
    # quimb takes the axes in the order of the letters given and puts its own order before: views, not copies.
    return MatrixProductOperator(arrays, shape="ludr")


def cores_of(operator: Any) -> list[Array]:
    """The cores of an operator of quimb. See :meth:`mpo_tn.MPO.from_quimb`."""
    kind = type(operator).__name__
    if not all(hasattr(operator, name) for name in ("sites", "upper_ind", "lower_ind", "select_tensors", "site_tag")):
        raise MPOError(
            f"{kind} is no chain of operators of quimb, which has sites with an upper and a lower index each"
        )
    sites = list(operator.sites)
    if any(isinstance(site, tuple) for site in sites):
        raise MPOError(f"{kind} is no chain: its sites have {len(sites[0])} coordinates")
    tensors: list[Any] = []
    for site in sites:
        found = operator.select_tensors(operator.site_tag(site))
        if len(found) != 1:
            raise MPOError(f"{kind} is no chain: site {site} has {len(found)} tensors, contract them first")
        tensors.append(found[0])
    if operator.num_tensors != len(sites):
        raise MPOError(f"{kind} is no chain: {operator.num_tensors} tensors on {len(sites)} sites, contract them first")
    cores: list[Array] = []
    for k, (site, tensor) in enumerate(zip(sites, tensors, strict=True)):
        upper, lower = operator.upper_ind(site), operator.lower_ind(site)
        if upper not in tensor.inds or lower not in tensor.inds:
            raise MPOError(f"{kind} is no chain of operators: site {site} has no pair of indices {upper}, {lower}")
        bonds = [set(tensor.inds) & set(tensors[j].inds) if 0 <= j < len(sites) else set() for j in (k - 1, k + 1)]
        others = set(tensor.inds) - {upper, lower} - bonds[0] - bonds[1]
        if others or len(set(tensor.inds)) < len(tensor.inds) or any(len(bond) > 1 for bond in bonds):
            raise MPOError(
                f"{kind} is no chain with open ends: site {site} has the indices {tensor.inds}, of which "
                f"{sorted(map(str, bonds[0] | bonds[1]))} lead to its neighbours, one each is allowed"
            )
        if len(sites) == 2 and bonds[0] & bonds[1]:
            raise MPOError(f"{kind} is no chain with open ends: it is periodic")
        left, right = (next(iter(bond), None) for bond in bonds)
        order = [name for name in (left, upper, lower, right) if name is not None]
        array = namespace(tensor.data).permute_dims(tensor.data, tuple(tensor.inds.index(name) for name in order))
        out, in_ = tensor.ind_size(upper), tensor.ind_size(lower)
        ends = [1 if name is None else tensor.ind_size(name) for name in (left, right)]
        cores.append(namespace(array).reshape(array, (ends[0], out, in_, ends[1])))
    exponent = float(operator.exponent)
    if exponent:
        # Shared out, as the number itself may be out of range.
        cores = [core * 10.0 ** (exponent / len(cores)) for core in cores]
    return cores
