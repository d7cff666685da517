"""What to compress and how far (MPOConfig), and what a module became (ModuleSpec). Both round-trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mpo_tn.exceptions import MPOError, count_text, is_real, whole_number
from mpo_tn.planning.options import DENSE, FAMILIES, USUAL_FAMILIES
from mpo_tn.planning.patterns import matches
from mpo_tn.planning.sizes import size_of
from mpo_tn.planning.spec import ModuleSpec, check_core_bits, sites_from_json, sites_to_json
from mpo_tn.sites import Sites
from mpo_tn.truncate.quantize import GROUP
from mpo_tn.truncation import Truncation

_SIZES = ("keep", "bond", "tolerance")
_BUDGETS = ("size", "bits_per_weight")
_SITES = 5
_MOST_SITES = 64
"""More than any number of entries has factors: beyond it all legs are 1, and a chain takes long for nothing."""
_BOUNDS = ("min_bits_per_weight", "max_bits_per_weight")
_OVERRIDABLE = ("sites", *_SIZES, "bits", "group", *_BOUNDS)
_FRACTIONS = ("bits_per_weight", "max_flops", *_BOUNDS)
_PARTS = ("central", "auxiliary")


@dataclass(frozen=True)
class MPOConfig:
    """Which modules become MPOs, on which legs, and how much of each is kept.

    Args:
        target_modules: PEFT's grammar. A list holds exact names or dotted suffixes; a string is a regular expression
            on the full name; ``"all-linear"`` takes every linear layer but the language-model and classification heads,
            ``"all-matrices"`` the embeddings too, which else have to be named; in a list they stand beside others
            (``["all-linear", "lm_head"]``). An entry that starts with ``re:`` is a regular expression anywhere.
            Whatever matches nothing, here and in the patterns below, is an error once a model is there.
        exclude_modules: the same grammar; what matches is left alone with all that is below it, and so is what shares
            its weight.
        sites: the number of sites, ``"low-rank"`` for the two-site chain that is a plain low-rank factorisation, or
            :class:`~mpo_tn.Sites` for matrices of exactly that shape.
        keep: parameters of the cores as a fraction of the dense weight, bias apart; the largest single cap on the bonds
            that fits is used. Where text is given and no structure (``sites``, ``bits``, ``overrides``) is, it is a
            budget: the numbers that all matrices together may keep, see :attr:`shares_keep`.
        bond: a cap on every bond, or one for each.
        tolerance: the relative Frobenius error allowed per matrix.
        bits: how the numbers of the cores are held: integers of 2 to 8 bits with scales, or 16 for float16; None for
            the dtype of the weight. One number for all cores, or ``{"central": 4, "auxiliary": 8}``, either of which
            may be left out. With ``sites=1`` it is the dense matrix that is held so. In bits only scales train.
        group: columns of a core's matrix (left out, in right) that share a scale.
        size: a budget, in bytes or as text such as ``"25MB"``, for the parameters of the whole model. Structure and
            bits are then chosen for each matrix (``sites`` is not looked at); that takes a calibration.
        bits_per_weight: the same for the matrices that ``target_modules`` means, all bits over their dense weights.
        max_flops: flops of the forward pass through the matrices as a fraction of the dense ones, besides a budget or
            as the only one; structures are then chosen, and numbers stay in their dtype.
        min_bits_per_weight: with a budget, the least that a matrix may be given, and
        max_bits_per_weight: the most; for single matrices in ``overrides``.
        families: for a budget, what matrices may become: ``"dense"`` (as they are), ``"bits"`` (integers),
            ``"low-rank"``, ``"k-legs"`` (two sites with legs (out / k, k), (k, in / k) for k = 2, 4, 8) and
            ``"chains"`` (three to five sites). What the last two lose takes fits to find out, and planning with them
            takes several times as long.
        overrides: pattern to replacements for ``sites``, ``keep``, ``bond``, ``tolerance``, ``bits``, ``group``, and
            the bounds of bits per weight; the first match wins, by any name of a matrix that several modules share. A
            replaced size drops the general one; ``{"keep": None}`` makes the match exact.

    At most one of ``keep``, ``bond``, ``tolerance``, ``size`` and ``bits_per_weight``; none, and no ``max_flops``,
    means exact. ``keep=1.0``
    is not exact: full bonds hold a few per cent more numbers than the matrix. Of more :func:`~mpo_tn.torch.plan` warns.

    Raises:
        MPOError: two sizes at once, a size or bits out of range, an unknown override; bits, or a size in an override,
            with a budget; limits of bits per weight without one, of flops with ``bond`` or ``tolerance``; a family that
            is none.

    >>> MPOConfig(keep=0.6, overrides={"re:.*pooler.*": {"bond": 8}}).for_module("pooler.dense").bond
    8
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    sites: int | str | Sites = _SITES
    keep: float | None = None
    bond: int | tuple[int, ...] | None = None
    tolerance: float | None = None
    bits: int | Mapping[str, int | None] | None = None
    group: int = GROUP
    size: int | str | None = None
    bits_per_weight: float | None = None
    max_flops: float | None = None
    min_bits_per_weight: float | None = None
    max_bits_per_weight: float | None = None
    families: Sequence[str] = USUAL_FAMILIES
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def __post_init__(self) -> None:
        given = [name for name in (*_SIZES, *_BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise MPOError(f"{' and '.join(given)} are given together: use exactly one of them, or none for exact")
        if self.keep is not None and not (is_real(self.keep) and 0 < self.keep <= 2):
            raise MPOError(f"keep={self.keep!r} is not a fraction of the dense parameters: use for instance keep=0.6")
        self._check_budget()
        for name in ("target_modules", "exclude_modules"):
            patterns = getattr(self, name)
            if not isinstance(patterns, str) and not all(isinstance(pattern, str) for pattern in patterns):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MPOError(f"{name}={patterns!r} are not all strings: give names, suffixes or re:PATTERN")
        # Plain Python values, whatever they came as: JSON then gives back what it was given.
        truncation = self.truncation()  # refuses a bad bond or tolerance
        plain: dict[str, Any] = {
            "keep": None if self.keep is None else float(self.keep),
            "bond": truncation.max_bond,
            "tolerance": truncation.rel_error,
            "sites": _plain_sites(self.sites),
            "bits": _plain_bits(self.bits, self.group),
            "group": check_core_bits(16, self.group)[1],
            "size": None if self.size is None else size_of(self.size),
            "families": tuple(self.families),
            **{name: None if (value := getattr(self, name)) is None else float(value) for name in _FRACTIONS},
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        overrides: dict[str, Mapping[str, Any]] = {}
        for pattern, override in self.overrides.items():
            unknown = sorted(set(override) - set(_OVERRIDABLE))
            if unknown:
                raise MPOError(
                    f"overrides[{pattern!r}] sets {', '.join(unknown)}: only {', '.join(_OVERRIDABLE)} can be"
                )
            if self.has_budget and (sizes := [name for name in _SIZES if name in override]):
                raise MPOError(
                    f"overrides[{pattern!r}] sets {', '.join(sizes)} with a budget, for which sizes are chosen: bound "
                    f"it by {' or '.join(_BOUNDS)}, or leave it out of target_modules"
                )
            own = self._overridden(override)
            overrides[pattern] = {key: getattr(own, key) for key in override}
        object.__setattr__(self, "overrides", overrides)

    def _check_budget(self) -> None:
        for name in _FRACTIONS:
            value = getattr(self, name)
            if value is not None and not (is_real(value) and 0 < value < math.inf):
                raise MPOError(f"{name}={value!r} must be a positive number")
        low, high = self.min_bits_per_weight, self.max_bits_per_weight
        if low is not None and high is not None and low > high:
            raise MPOError(f"min_bits_per_weight={low} is above max_bits_per_weight={high}: nothing is between")
        if self.has_budget and self.bits is not None:
            raise MPOError(f"bits={self.bits!r} with a budget, for which bits are chosen: leave one of them out")
        for name in _BOUNDS:
            if getattr(self, name) is not None and not (self.size or self.bits_per_weight):
                raise MPOError(
                    f"{name}={getattr(self, name)!r} goes with a budget: give size or bits_per_weight as well"
                )
        if self.max_flops is not None and (self.bond is not None or self.tolerance is not None):
            raise MPOError(
                f"max_flops={self.max_flops!r} chooses structures, and bond or tolerance cuts given ones: leave one out"
            )
        if self.max_flops is not None and self.keep is not None and not self.shares_keep:
            raise MPOError(
                f"max_flops={self.max_flops!r} with keep chooses structures: leave out sites, bits and their overrides"
            )
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise MPOError(f"families={self.families!r} names {unknown[0]!r}: they are {', '.join(FAMILIES)}")
        if not set(self.families) - {DENSE}:
            raise MPOError(f"families={self.families!r} leaves nothing to choose: name one besides {DENSE}")

    @property
    def has_budget(self) -> bool:
        """Whether structure and bits of each matrix are to be chosen, for a budget of bytes or of flops."""
        return any(getattr(self, name) is not None for name in (*_BUDGETS, "max_flops"))

    @property
    def shares_keep(self) -> bool:
        """Whether ``keep`` leaves structures open: with text it is then shared out among the matrices.

        Without, and where ``sites``, ``bits`` or ``overrides`` say what they become, each of them keeps as much.

        >>> MPOConfig(keep=0.4).shares_keep, MPOConfig(keep=0.4, sites=3).shares_keep
        (True, False)
        """
        given = {name for override in self.overrides.values() for name in override} & {"sites", "bits", *_SIZES}
        return self.keep is not None and self.sites == _SITES and self.bits is None and not given

    def for_module(self, *names: str) -> MPOConfig:
        """The configuration of one module, with the first override applied that matches any of its names."""
        for pattern, override in self.overrides.items():
            if any(matches(name, (pattern,)) for name in names):
                return self._overridden(override)
        return replace(self, overrides={})

    def _overridden(self, override: Mapping[str, Any]) -> MPOConfig:
        sizes = dict.fromkeys((*_SIZES, *_BUDGETS, "max_flops")) if set(override) & set(_SIZES) else {}
        return replace(self, **{**sizes, **override, "overrides": {}})

    def core_bits(self, spec: ModuleSpec) -> tuple[int | None, ...]:
        """How each core of a structure is held, see :class:`ModuleSpec`."""
        bits = self.bits if isinstance(self.bits, Mapping) else dict.fromkeys(_PARTS, self.bits)
        return tuple(bits.get("central" if k == spec.center else "auxiliary") for k in range(len(spec.sites)))

    def truncation(self) -> Truncation:
        """The truncation that ``bond`` or ``tolerance`` stand for; ``keep`` depends on the legs."""
        return Truncation(max_bond=self.bond, rel_error=self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold.

        >>> MPOConfig.from_dict(MPOConfig(bond=4, sites=3).to_dict()) == MPOConfig(bond=4, sites=3)
        True
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["sites"] = sites_to_json(self.sites)
        values["bond"] = _to_json(self.bond)
        values["families"] = list(self.families)
        for name in ("target_modules", "exclude_modules"):
            values[name] = values[name] if isinstance(values[name], str) else list(values[name])
        values["overrides"] = {
            pattern: {key: _to_json(value) for key, value in override.items()}
            for pattern, override in self.overrides.items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MPOConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: a key this version does not know.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise MPOError(f"unknown configuration keys {', '.join(unknown)}: was it written by a newer version?")
        plain = dict(values)
        for name in ("target_modules", "exclude_modules"):
            if name in plain and not isinstance(plain[name], str):
                plain[name] = tuple(plain[name])
        plain["sites"] = sites_from_json(plain.get("sites", _SITES))
        plain["overrides"] = {
            pattern: {key: sites_from_json(value) if key == "sites" else value for key, value in override.items()}
            for pattern, override in plain.get("overrides", {}).items()
        }
        return cls(**plain)

    def to_hf(self) -> dict[str, Any]:
        """The same as transformers takes it, for ``from_pretrained(dense, quantization_config=...)``.

        A dictionary: ``mpo_tn.torch`` registers the method that it names, and the model that is loaded has the
        configuration class of that method. transformers refuses it, with a ValueError, for a folder that is compressed
        already.

        >>> config = MPOConfig(keep=0.6, sites=3)
        >>> config.to_hf()["quant_method"], MPOConfig.from_dict(config.to_hf()["config"]) == config
        ('mpo', True)
        """
        return {"quant_method": "mpo", "config": self.to_dict()}


def _plain_bits(bits: object, group: object) -> int | dict[str, int | None] | None:
    if not isinstance(bits, Mapping):
        return None if bits is None else check_core_bits(bits, group)[0]
    if unknown := sorted(map(str, set(bits) - set(_PARTS))):
        raise MPOError(f"bits={dict(bits)!r} names {', '.join(unknown)}: only {' and '.join(_PARTS)} tensors have bits")
    held = {part: None if bits[part] is None else check_core_bits(bits[part], group)[0] for part in bits}
    return {part: held[part] for part in _PARTS if held.get(part) is not None} or None


def _plain_sites(sites: object) -> int | str | Sites:
    number = whole_number(sites)
    if number is not None and 1 <= number <= _MOST_SITES:
        return number
    if number is not None and number > _MOST_SITES:
        raise MPOError(f"sites={count_text(number)}: no matrix has so many factors; use at most {_MOST_SITES}")
    if isinstance(sites, Sites) or sites == "low-rank":
        return sites  # type: ignore[return-value]
    raise MPOError(f'sites={sites!r} must be a positive number of sites, "low-rank" or Sites(...)')


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else sites_to_json(value)
