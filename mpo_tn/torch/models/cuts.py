"""Cuts: the spectra of all bonds as they are now, which bond to cut next, and the cut itself.

Nothing here builds a matrix or moves a gauge. A bond is looked at from both sides through triangular factors::

    T_1 -- .. -- T_k --d-- T_{k+1} -- .. -- T_n  =  Q_left (R --d-- L) Q_right        R, L at most (d, d)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from mpo_tn.exceptions import MPOError, whole_number
from mpo_tn.torch.models.moments import OptimizerLike, map_moments
from mpo_tn.torch.models.units import MPOUnit, cuttable_units
from mpo_tn.truncate.bond_cut import cut_bond, left_factors, right_factors, values_between, workable
from mpo_tn.truncate.spectra import Spectra


def bond_spectra(model: nn.Module) -> dict[str, Spectra]:
    """The singular values of every bond of every unit, from the cores as they are now, which stay as they are.

    Of the padded matrix, where legs pad: cutting also clears what training left on the padding. Cost: two triangular
    factors of each core in double precision, about ``4 sum_k p_k d_{k-1} d_k (d_{k-1} + d_k)`` flops a unit.

    Raises:
        MPOError: as for :func:`cuttable_units`; cores with entries that are NaN or infinite.

    >>> from mpo_tn.torch import MPOConfig, compress
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = compress(model, MPOConfig(sites=3))
    >>> [len(values) for values in bond_spectra(model)["0"]]
    [4, 4]
    """
    return {name: unit_spectra(unit) for name, unit in cuttable_units(model).items()}


def unit_spectra(unit: MPOUnit) -> Spectra:
    """The spectra of one unit. See :func:`bond_spectra`."""
    cores = workable(unit.tensors(), unit.name)
    values = map(values_between, left_factors(cores), right_factors(cores))
    return Spectra(values, unit.spec.sites)


def cut_unit(unit: MPOUnit, k: int, new_bond: int, optimizer: OptimizerLike | None = None) -> list[str]:
    """Cut bond ``k`` of a unit, in place, with fresh factors; an optimiser's moments follow.

    The parameters keep their identity and lose their gradients. A core in bits beside the bond is rounded to as many
    again. Returns notes on optimiser state that could not follow. See :func:`cut_bond`,
    :func:`~mpo_tn.torch.models.moments.map_moments`.
    """
    cores = unit.cores
    cut = cut_bond(unit.tensors(), k, new_bond, unit.name)
    bonds = [new_bond if j == k else bond for j, bond in enumerate(unit.spec.bonds)]
    tensors = [{k: cut.left, k + 1: cut.right}.get(j, core) for j, core in enumerate(cores)]
    notes: list[str] = []
    if optimizer is not None:
        # dL/dA' = dL/dA q^H and dL/dB' = p^H dL/dB, and a core has its bond last or first.
        for at, matrix, axis in ((k, cut.q.T, 3), (k + 1, cut.p, 0)):
            core = cores[at]
            if isinstance(core, nn.Parameter):
                notes += map_moments(optimizer, core, matrix, axis=axis, name=f"{unit.name}.cores.{at}")
    unit.replace(tensors, bonds)
    return notes


def cut_model(
    model: nn.Module, bonds: Mapping[str, Sequence[int]], optimizer: OptimizerLike | None = None
) -> list[str]:
    """Cut units to given bonds at once, in place: the one-shot truncation with which squeezing is compared.

    Args:
        model: with MPO modules.
        bonds: unit name to its new bonds, none above what it has; units that are not named stay as they are.
        optimizer: whose state is to follow.

    Guarantee (cuts-add-up): the bonds of a unit are cut one after another with fresh factors, so the error is at most
    the sum of the tails.
    Guarantee (cuts-refused): if the bonds do not fit, or name no unit, nothing has been changed.

    Returns:
        Notes on optimiser state that could not follow.

    Raises:
        MPOError: an unknown unit, bonds that do not fit; cores with entries that are NaN or infinite, when the units
            before them have been cut.
    """
    units = cuttable_units(model)
    for name, wanted in bonds.items():
        if name not in units:
            raise MPOError(f"bonds names {name}, which is no unit of the model: the units are {', '.join(units)}")
        have = units[name].spec.bonds
        numbers = [whole_number(bond) for bond in wanted]
        if len(numbers) != len(have) or any(n is None or not 1 <= n <= h for n, h in zip(numbers, have, strict=True)):
            raise MPOError(f"bonds of {name} are {have} and cannot be cut to {tuple(wanted)}: give each from 1 to that")
    notes: list[str] = []
    for name, wanted in bonds.items():
        for k, bond in enumerate(wanted):
            if bond < units[name].spec.bonds[k]:
                notes += cut_unit(units[name], k, int(bond), optimizer)
    return notes
