"""Truncation, what may be cut, and Report, what was cut and what it cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpo_tn.exceptions import MPOError, is_real, list_text, whole_number
from mpo_tn.markup import table


@dataclass(frozen=True)
class Truncation:
    """How far bonds may be cut. ``Truncation()`` keeps every full bond, zero singular values included.

    Args:
        max_bond: the largest bond allowed, one number for all bonds or one per bond.
        rel_error: the total error allowed as a fraction of the Frobenius norm, ``0 < rel_error < 1``.
        abs_error: the total Frobenius error allowed, ``> 0``. With both tolerances the smaller budget holds.
        strict: raise if ``max_bond`` stops a tolerance from being met, instead of reporting it.
        max_parameters: the most numbers that the cores may hold. The spectra of all bonds are computed first and turned
            into one cap per bond, within ``max_bond``, so that the a-priori bound on the error is small, see
            :meth:`mpo_tn.truncate.spectra.Spectra.bonds_for`. A tolerance may then cut further.

    A tolerance is one budget for the whole chain. It is spent bond by bond: each bond may use an equal share (of the
    square) of what is left, and the last one all of it. ``MPO.from_matrix`` comes to the widest bond last,
    ``MPO.compress`` goes from the first bond to the last.

    Guarantee (tolerance): ``report.error`` is within the budget, to a relative ``1e-12``, or ``report.tolerance_met``
    is False, or, if ``strict``, it raises. Without ``max_bond`` and ``max_parameters`` it is within by every method,
    except that ``gram`` on data of more than 32 bits may exceed it by ``1.5e-8`` of the norm. No bond is ever cut below
    1.

    Raises:
        MPOError: a bond or a number of parameters below 1, or a tolerance that is not positive and finite.

    >>> Truncation(max_bond=64, rel_error=0.1)
    Truncation(max_bond=64, rel_error=0.1, abs_error=None, strict=False, max_parameters=None)
    """

    max_bond: int | tuple[int, ...] | None = None
    rel_error: float | None = None
    abs_error: float | None = None
    strict: bool = False
    max_parameters: int | None = None

    def __post_init__(self) -> None:
        one_per_bond = isinstance(self.max_bond, Sequence) and not isinstance(self.max_bond, (str, bytes))
        given: tuple[Any, ...] = tuple(self.max_bond) if one_per_bond else (self.max_bond,)  # type: ignore[arg-type]
        if self.max_bond is not None:
            bonds = tuple(number for number in map(whole_number, given) if number is not None and number >= 1)
            if len(bonds) != len(given):
                shown = given if one_per_bond else self.max_bond
                raise MPOError(f"max_bond={shown!r}: a bond must be a whole number of at least 1")
            object.__setattr__(self, "max_bond", bonds if one_per_bond else bonds[0])
        if self.max_parameters is not None:
            allowed = whole_number(self.max_parameters)
            if allowed is None or allowed < 1:
                raise MPOError(f"max_parameters={self.max_parameters!r} must be a whole number of at least 1")
            object.__setattr__(self, "max_parameters", allowed)
        for name, value in (("rel_error", self.rel_error), ("abs_error", self.abs_error)):
            if value is not None and not (is_real(value) and 0 < value < math.inf):
                raise MPOError(
                    f"{name}={value!r} must be a positive, finite number; for no truncation leave it out (Truncation())"
                )
            if value is not None:
                # A NumPy scalar of single precision would drag the budget down to its own range.
                object.__setattr__(self, name, float(value))
        if self.rel_error is not None and self.rel_error >= 1:
            raise MPOError(
                f"rel_error={self.rel_error!r} is not below 1: it is a fraction of the norm, so 0.05 means five per "
                "cent; for an error in units of the matrix use abs_error"
            )
        if self.strict and self.rel_error is None and self.abs_error is None:
            raise MPOError("strict=True needs rel_error or abs_error: there is no tolerance that could be missed")

    @property
    def has_tolerance(self) -> bool:
        """Whether a tolerance was given."""
        return self.rel_error is not None or self.abs_error is not None

    @property
    def limit(self) -> str:
        """What stops a tolerance from being met, in words: ``"max_bond=4"``."""
        given = {"max_bond": self.max_bond, "max_parameters": self.max_parameters}
        return " and ".join(f"{name}={value}" for name, value in given.items() if value is not None) or "bonds of 1"

    def caps(self, num_bonds: int) -> tuple[int | None, ...]:
        """The cap of every bond, ``None`` where there is none.

        Raises:
            MPOError: ``max_bond`` lists another number of bonds.
        """
        if isinstance(self.max_bond, tuple):
            if len(self.max_bond) != num_bonds:
                raise MPOError(
                    f"max_bond={list_text(self.max_bond)} lists {len(self.max_bond)} bonds and the chain has "
                    f"{num_bonds}: give one number, or one per bond"
                )
            return self.max_bond
        return (self.max_bond,) * num_bonds

    def budget(self, norm: float, eps: float, dtype_name: str) -> float:
        """The total Frobenius error allowed for a matrix of this norm; infinite where only bonds are capped.

        Raises:
            MPOError: a tolerance below what the dtype can represent, ``eps * norm``.
        """
        budgets = [math.inf]
        if self.rel_error is not None:
            if self.rel_error < eps:
                raise MPOError(
                    f"rel_error={self.rel_error!r} is below the machine precision {eps:.3g} of {dtype_name}: use a "
                    "larger tolerance, a wider dtype, or Truncation() for an exact decomposition"
                )
            budgets.append(self.rel_error * norm)
        if self.abs_error is not None:
            if self.abs_error < eps * norm:
                raise MPOError(
                    f"abs_error={self.abs_error!r} is below the machine precision {eps:.3g} of {dtype_name} times the "
                    f"norm {norm:.6g}: use a larger tolerance, a wider dtype, or Truncation() for an exact "
                    "decomposition"
                )
            budgets.append(self.abs_error)
        return min(budgets)


def checked_truncation(truncation: object) -> Truncation:
    """The truncation itself.

    Raises:
        MPOError: it is none.
    """
    if not isinstance(truncation, Truncation):
        raise MPOError(f"truncation={truncation!r} is not a Truncation: pass Truncation(max_bond=...) or similar")
    return truncation


@dataclass(frozen=True)
class BondReport:
    """What happened at one bond: of ``available`` singular values ``kept`` were kept.

    ``discarded_norm`` is the 2-norm of the values actually cut (``e_k``). ``tail`` is the 2-norm of the values of the
    *original* unfolding beyond ``kept`` (``eps_k``), known only when spectra were asked for. ``method`` is the one that
    was used, which ``auto`` and a fallback choose, or ``"full"`` where nothing could be cut and nothing was factorised.
    """

    kept: int
    available: int
    discarded_norm: float
    tail: float | None = None
    method: str | None = None


_SHOWN = 16
"""Of the bonds of longer chains only the first and the last few are printed."""


@dataclass(frozen=True)
class Report:
    """What a truncation did, in the Frobenius norm.

    Attributes:
        error: ``|W - W'|`` for what was cut. Exact (to rounding) when ``exact``, else an upper bound, or, without a
            ``bound``, an estimate: of :meth:`mpo_tn.MPO.compress` by gram on data of more than 32 bits, which is right
            to ``6e-8`` of the norm.
        norm: ``|W|`` of what was decomposed or compressed.
        bonds: one :class:`BondReport` per inner bond, 0-based, same index as ``MPO.bonds``.
        bound: an upper bound on the error: ``sqrt(sum_k eps_k**2)`` when spectra were asked for, otherwise ``error``.
        lower_bound: no MPO with these bonds can have a smaller error: ``max_k eps_k`` (``max_k e_k`` without spectra).
            Both bounds are None if a bond was cut by an approximate method: krylov, randomized, or gram on data of more
            than 32 bits. ``error`` is exact all the same, but for what ``exact`` says.
        exact: whether ``error`` is an equality rather than a bound, or an estimate if ``bound`` is None.
        tolerance_met: whether the tolerance was met; True when none was given.
        floor: the size of what rounding and the storage dtype usually add to ``error``, see
            :func:`mpo_tn.truncate.float_floor`.
        notes: anything out of the ordinary, such as an upcast or a factorisation that had to be repeated.

    For one sweep ``error**2 == sum_k bonds[k].discarded_norm**2``.

    Guarantee (inequalities): for one sweep whose bonds were all cut in the best way, which is when there are bounds,
    ``max_k e_k <= max_k eps_k <= |W - best| <= error <= sqrt(sum_k eps_k**2) <= sqrt(n-1) |W - best|``, up to
    ``4 eps(dtype) sqrt(size) norm`` (Oseledets, SIAM J. Sci. Comput. 33, 2011, Theorem 2.2 and Corollary 2.4).
    Guarantee (estimates-told): where only an estimate of the error can be had, ``exact`` is False, both bounds are None
    and ``error`` is within ``6e-8`` of the norm.
    Guarantee (lost-below-range): what a norm below the range of the storage dtype loses is in the error, so that no
    tolerance is met that is not.
    Guarantee (bounds-in-order): what is reported obeys ``lower_bound <= error <= bound`` without any slack.
    """

    error: float
    norm: float
    bonds: tuple[BondReport, ...]
    bound: float | None
    lower_bound: float | None
    floor: float
    exact: bool = True
    tolerance_met: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def rel_error(self) -> float:
        """``error / norm``; 0 for a zero matrix."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def optimality(self) -> float | None:
        """``error / lower_bound``: at most this many times the error of the best MPO with the same bonds.

        None if ``lower_bound`` is.
        """
        if self.lower_bound is None:
            return None
        if self.lower_bound > 0:
            return self.error / self.lower_bound
        return 1.0 if self.error == 0 else math.inf

    def after(self, earlier: Report) -> Report:
        """The error of both truncations together, measured against the matrix of the earlier one.

        Guarantee (two-sweeps): two sweeps project onto spaces that need not commute, so only the triangle inequality
        holds: ``error <= earlier.error + self.error``, and ``exact`` is False unless one of them cut nothing.
        """
        both: dict[str, Any] = {
            "norm": earlier.norm,
            "bonds": self.bonds,
            "floor": earlier.floor + self.floor,
            "tolerance_met": earlier.tolerance_met and self.tolerance_met,
            "notes": earlier.notes + self.notes,
        }
        if self.error == 0 or earlier.error == 0:
            return replace(earlier if self.error == 0 else self, **both)
        error = earlier.error + self.error
        estimated = any(not report.exact and report.bound is None for report in (earlier, self))
        return Report(error=error, bound=None if estimated else error, lower_bound=0.0, exact=False, **both)

    def __repr__(self) -> str:
        return f"Report({self})"

    def _repr_html_(self) -> str:
        """A table of the bonds, short however many there are."""
        rows = [(k, b.kept, b.available, f"{b.discarded_norm:.4g}", b.method or "") for k, b in enumerate(self.bonds)]
        caption = str(self).partition("; bonds kept")[0]
        met = () if self.tolerance_met else ("the tolerance is NOT met",)
        head = ("bond", "kept", "of", "discarded norm", "method")
        return table(caption, head, rows, (f"norm {self.norm:.6g}, floor {self.floor:.3g}", *met, *self.notes))

    def __str__(self) -> str:
        relation = "=" if self.exact else "is about" if self.bound is None else "<="
        kept = [f"{bond.kept}/{bond.available}" for bond in self.bonds]
        if len(kept) > _SHOWN:
            kept = [*kept[:6], "...", *kept[-2:], f"{len(kept)} in all"]
        kept = ", ".join(kept) or "none"
        met = "" if self.tolerance_met else "; tolerance NOT met"
        ratio = self.optimality
        certified = "" if ratio is None else f", at most {ratio:.3f} x the best possible"
        return (
            f"error {relation} {self.error:.6g} ({self.rel_error:.4%} of the norm){certified}; bonds kept {kept}{met}"
        )
