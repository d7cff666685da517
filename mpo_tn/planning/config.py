"""What to compress and how far (MPOConfig), and what a module became (ModuleSpec). Both round-trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.planning.patterns import matches
from mpo_tn.sites import Sites
from mpo_tn.truncation import Truncation

_SIZES = ("keep", "bond", "tolerance")
_OVERRIDABLE = ("sites", *_SIZES)


@dataclass(frozen=True)
class MPOConfig:
    """Which modules become MPOs, on which legs, and how much of each is kept.

    Args:
        target_modules: PEFT's grammar. A list holds exact names or dotted suffixes; a string is a regular expression
            on the full name; ``"all-linear"`` takes every linear layer but the language-model and classification heads.
            An entry that starts with ``re:`` is a regular expression anywhere. Embeddings have to be named.
        exclude_modules: the same grammar; what matches is left alone, and so is what shares its weight.
        sites: the number of sites, ``"low-rank"`` for the two-site chain that is a plain low-rank factorisation, or
            :class:`~mpo_tn.Sites` for matrices of exactly that shape.
        keep: parameters of the cores as a fraction of the dense weight, bias apart; the largest single cap on the bonds
            that fits is used.
        bond: a cap on every bond.
        tolerance: the relative Frobenius error allowed per matrix.
        overrides: pattern to replacements for ``sites``, ``keep``, ``bond``, ``tolerance``; the first match wins. A
            replaced size drops the general one; ``{"keep": None}`` makes the match exact.

    At most one of ``keep``, ``bond`` and ``tolerance``; none means exact. ``keep=1.0`` is not exact: full bonds hold a
    few per cent more numbers than the matrix.

    Raises:
        MPOError: two sizes at once, a size out of range, an unknown override.

    >>> MPOConfig(keep=0.6, overrides={"re:.*pooler.*": {"bond": 8}}).for_module("pooler.dense").bond
    8
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    sites: int | str | Sites = 5
    keep: float | None = None
    bond: int | None = None
    tolerance: float | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])

    def __post_init__(self) -> None:
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise MPOError(f"{' and '.join(given)} are given together: use exactly one of them, or none for exact")
        if self.keep is not None and not (_is_number(self.keep) and 0 < self.keep <= 2):
            raise MPOError(f"keep={self.keep!r} is not a fraction of the dense parameters: use for instance keep=0.6")
        if self.sites != "low-rank" and not isinstance(self.sites, Sites) and not _is_count(self.sites):
            raise MPOError(f'sites={self.sites!r} must be a positive number of sites, "low-rank" or Sites(...)')
        self.truncation()  # refuses a bad bond or tolerance
        for pattern, override in self.overrides.items():
            unknown = sorted(set(override) - set(_OVERRIDABLE))
            if unknown:
                raise MPOError(
                    f"overrides[{pattern!r}] sets {', '.join(unknown)}: only {', '.join(_OVERRIDABLE)} can be"
                )
            self._overridden(override)

    def for_module(self, name: str) -> MPOConfig:
        """The configuration of one module, with the first matching override applied."""
        for pattern, override in self.overrides.items():
            if matches(name, (pattern,)):
                return self._overridden(override)
        return replace(self, overrides={})

    def _overridden(self, override: Mapping[str, Any]) -> MPOConfig:
        sizes = dict.fromkeys(_SIZES) if set(override) & set(_SIZES) else {}
        return replace(self, **{**sizes, **override, "overrides": {}})

    def truncation(self) -> Truncation:
        """The truncation that ``bond`` or ``tolerance`` stand for; ``keep`` depends on the legs."""
        return Truncation(max_bond=self.bond, rel_error=self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold.

        >>> MPOConfig.from_dict(MPOConfig(bond=4, sites=3).to_dict()) == MPOConfig(bond=4, sites=3)
        True
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["sites"] = _sites_to_json(self.sites)
        for name in ("target_modules", "exclude_modules"):
            values[name] = values[name] if isinstance(values[name], str) else list(values[name])
        values["overrides"] = {
            pattern: {key: _sites_to_json(value) for key, value in override.items()}
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
        plain["sites"] = _sites_from_json(plain.get("sites", 5))
        plain["overrides"] = {
            pattern: {key: _sites_from_json(value) for key, value in override.items()}
            for pattern, override in plain.get("overrides", {}).items()
        }
        return cls(**plain)

    def to_hf(self) -> Any:
        """The same as a transformers quantization config, for ``from_pretrained(quantization_config=...)``.

        Raises:
            MPOError: transformers is not installed.
        """
        if not _hf_wrappers:
            raise MPOError("there is no transformers to make a quantization config for: pip install 'mpo-tn[torch]'")
        return _hf_wrappers[-1](self)


_hf_wrappers: list[Callable[[MPOConfig], Any]] = []


def wrap_for_hf(wrapper: Callable[[MPOConfig], Any]) -> None:
    """Let ``wrapper`` make what :meth:`MPOConfig.to_hf` returns; the module that knows transformers calls this."""
    _hf_wrappers.append(wrapper)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _sites_to_json(value: Any) -> Any:
    return {"out": list(value.out), "in": list(value.in_)} if isinstance(value, Sites) else value


def _sites_from_json(value: Any) -> Any:
    return Sites(tuple(value["out"]), tuple(value["in"])) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class ModuleSpec:
    """The structure of one compressed module, enough to build it empty, and the error that was made.

    ``kind`` is ``"linear"``, ``"conv1d"`` (GPT-2's transposed linear) or ``"embedding"``. ``out_features`` and
    ``in_features`` are the sizes the module had; the legs may multiply to more (zero padding, cropped again). For an
    embedding they are the number of ids and the width. ``tied_to`` names the module whose cores are used.
    """

    kind: str
    sites: Sites
    bonds: tuple[int, ...]
    out_features: int
    in_features: int
    bias: bool = False
    padding_idx: int | None = None
    tied_to: str | None = None
    rel_error: float | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "conv1d", "embedding"):
            raise MPOError(f"kind={self.kind!r} is not linear, conv1d or embedding")
        rows, columns = self.sites.shape
        if len(self.bonds) != len(self.sites) - 1 or min(self.bonds, default=1) < 1:
            raise MPOError(f"bonds={self.bonds} do not fit {len(self.sites)} sites")
        if self.out_features > rows or self.in_features > columns:
            raise MPOError(f"legs multiply to {rows} x {columns}, less than {self.out_features} x {self.in_features}")

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The shapes of the cores."""
        around = (1, *self.bonds, 1)
        return tuple((around[k], out, in_, around[k + 1]) for k, (out, in_) in enumerate(self.sites))

    @property
    def center(self) -> int:
        """The index of the central tensor, the core with the most entries; the others are the auxiliary tensors.

        Of several largest cores it is the middle one of an odd number of sites if that is among them, else the first.
        It follows from the bonds, so cutting them far enough can move it.

        >>> ModuleSpec("linear", Sites((2, 3, 2), (2, 2, 2)), (4, 4), out_features=12, in_features=8).center
        1
        """
        entries = [math.prod(shape) for shape in self.core_shapes]
        middle = len(entries) // 2
        if len(entries) % 2 and entries[middle] == max(entries):
            return middle
        return entries.index(max(entries))

    @property
    def num_parameters(self) -> int:
        """How many numbers the cores hold."""
        return self.sites.num_parameters(self.bonds)

    @property
    def kept(self) -> float:
        """The kept ratio of this matrix, bias apart."""
        return self.num_parameters / (self.out_features * self.in_features)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**asdict(self), "sites": _sites_to_json(self.sites), "bonds": list(self.bonds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModuleSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            MPOError: a key this version does not know, or one that is missing.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        missing = sorted({"kind", "sites", "bonds", "out_features", "in_features"} - set(values))
        if unknown or missing:
            raise MPOError(
                f"a module entry has unknown keys {unknown} and lacks {missing}: the file is damaged or from a newer "
                "version"
            )
        plain = dict(values)
        plain["sites"] = _sites_from_json(values["sites"])
        plain["bonds"] = tuple(values["bonds"])
        return cls(**plain)
