"""Calibration: what is known of the inputs of a model's matrices from sample data, and of which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpo_tn.exceptions import MPOError
from mpo_tn.linalg import check_loaded, eigenvectors
from mpo_tn.storage.tensors import bytes_digest, read_tensors, write_tensors
from mpo_tn.torch.models.feeding import entries_of

FORMAT = "mpo_tn.calibration"
VERSION = 1
_LISTED = 3  # so many differences are spelled out
_BY_INPUT = ("second", "cross", "mean", "dense_mean")
SAMPLED = 1024
"""So many entries of a parameter, evenly spread, tell it from another."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of one matrix (out, in): float64 tensors on the host, None where nothing is.

    Attributes:
        tokens: how many inputs were seen; of a table how many ids.
        second: ``S = E[x x^T]``, (in, in), of what the layer gets. Not centred.
        cross: ``Cx = E[y x^T]``, (in, in), y being what it got in the dense model; None where that is the same as x,
            so that ``Cx = S``.
        outer: ``G``, (out, out), of the gradients at its output.
        rows: (out,), how often each id of a table was read: the weights of its rows.
        mean: ``E[x]``, (in,), and
        dense_mean: ``E[y]``, (in,), None where y is x: by them a bias takes up the mean of an error.
    """

    tokens: int
    second: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    dense_mean: torch.Tensor | None = None

    @property
    def most_rank(self) -> int:
        """What the rank of S is at most: so many tokens, or the width."""
        return 0 if self.second is None else min(self.tokens, self.second.shape[0])

    def rank(self) -> int:
        """The numerical rank of S: eigenvalues above ``in eps`` of the largest. Cost: ``9 in**3`` flops."""
        if self.second is None:
            return 0
        values = eigenvectors(self.second).values
        return int((values > len(values) * torch.finfo(torch.float64).eps * values[0]).sum())


@dataclass(frozen=True)
class Fingerprint:
    """Which model and which text: a digest of evenly spread entries of every parameter, and one of all batches."""

    model: str
    parameters: Mapping[str, tuple[str, tuple[int, ...], str]]
    text: str

    @classmethod
    def of(cls, model: nn.Module, text: str = "") -> Fingerprint:
        """The fingerprint of a model as it is now.

        Cost: 1,024 entries a parameter; a change between them is not seen.

        Raises:
            MPOError: a parameter without data.
        """
        found: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for name, parameter in model.named_parameters():
            check_loaded(parameter, name)
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED)]
            dtype = str(parameter.dtype).removeprefix("torch.")
            found[name] = (dtype, tuple(parameter.shape), bytes_digest([entries_of(sample)]))
        return cls(type(model).__name__, found, text)

    def differences(self, other: Fingerprint) -> list[str]:
        """What of this model is different in ``other``, a phrase each."""
        found: list[str] = []
        for name in sorted({*self.parameters, *other.parameters}):
            mine, theirs = self.parameters.get(name), other.parameters.get(name)
            if mine is None or theirs is None:
                found.append(f"{name} is {'new' if mine is None else 'missing'}")
            elif mine[:2] != theirs[:2]:
                found.append(f"{name} is {theirs[0]} {list(theirs[1])}, not {mine[0]} {list(mine[1])}")
            elif mine != theirs:
                found.append(f"{name} has other numbers")
        return found


@dataclass(frozen=True, eq=False)
class Calibration:
    """Moments of the inputs of matrices, each distinct input once. See :func:`~mpo_tn.torch.calibrate`.

    Attributes:
        moments: key to what is known of an input; the key is the name of the first unit that reads it.
        inputs: unit to the key of its input: query, key and value have one together.
        outers: unit to ``G`` of its output, if gradients were asked for.
        rows: unit to the counts of ids, for tables.
        units: the units that were looked at, those too that nothing reached.
        tokens: tokens of the text, without padding.
        fingerprint: of the model and the text.
        seed: of the random signs for gradients.
        notes: what a reader should know: few tokens, units that nothing reached, padding that could not be told.
    """

    moments: Mapping[str, Moments]
    inputs: Mapping[str, str]
    units: tuple[str, ...]
    tokens: int
    fingerprint: Fingerprint
    seed: int = 0
    outers: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    notes: tuple[str, ...] = ()

    def of(self, unit: str) -> Moments | None:
        """What is known of a unit, None if nothing reached it.

        Raises:
            MPOError: it was not looked at.
        """
        if unit not in self.units:
            raise MPOError(f"{unit} was not calibrated: the units are {_some(self.units)}")
        counts = self.rows.get(unit)
        if unit in self.inputs:
            return replace(self.moments[self.inputs[unit]], outer=self.outers.get(unit), rows=counts)
        return None if counts is None else Moments(int(counts.sum()), rows=counts)

    @property
    def unreached(self) -> tuple[str, ...]:
        """The units that no token reached: of these there is no metric."""
        return tuple(unit for unit in self.units if unit not in self.inputs and unit not in self.rows)

    def check(self, model: nn.Module) -> None:
        """Refuse another model than the one that was calibrated.

        Raises:
            MPOError: parameters of other names, shapes, dtypes or numbers; the message names them.
        """
        self.check_print(Fingerprint.of(model))

    def check_print(self, found: Fingerprint) -> None:
        """The same for a model of which only the fingerprint is known.

        Raises:
            MPOError: as :meth:`check`.
        """
        differences = self.fingerprint.differences(found)
        if differences:
            raise MPOError(
                f"the calibration, of a {self.fingerprint.model}, is not of this {found.model}: "
                f"{_some(differences, '; ')}; calibrate this model"
            )

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file, float64: 8 bytes for every entry of S.

        Guarantee (calibration-whole): at any moment there is the old file or the new one, complete.

        Raises:
            MPOError: it cannot be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        for key, known in self.moments.items():
            assert known.second is not None
            found = {kind: getattr(known, kind) for kind in _BY_INPUT}
            tensors |= {f"{kind}.{key}": tensor for kind, tensor in found.items() if tensor is not None}
        tensors |= {f"outer.{unit}": outer for unit, outer in self.outers.items()}
        tensors |= {f"rows.{unit}": counts for unit, counts in self.rows.items()}
        print_ = self.fingerprint
        record = {
            "format": FORMAT,
            "version": VERSION,
            "tokens": self.tokens,
            "seed": self.seed,
            "units": list(self.units),
            "inputs": dict(self.inputs),
            "counted": {key: known.tokens for key, known in self.moments.items()},
            "model": print_.model,
            "parameters": {name: list(entry) for name, entry in print_.parameters.items()},
            "text": print_.text,
            "notes": list(self.notes),
        }
        write_tensors(Path(path), {name: tensor.numpy() for name, tensor in tensors.items()}, record)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Guarantee (calibration-bits): all numbers are what they were, bit for bit.

        Raises:
            MPOError: no such file, damaged, or of a newer version.
        """
        arrays, record = read_tensors(Path(path), FORMAT, VERSION)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        try:
            parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in (*_BY_INPUT, "outer", "rows")}
            for name, tensor in tensors.items():
                kind, _, key = name.partition(".")
                parts[kind][key] = tensor
            moments = {
                key: Moments(int(count), **{kind: parts[kind].get(key) for kind in _BY_INPUT})
                for key, count in record["counted"].items()
            }
            if without := [key for key, known in moments.items() if known.second is None]:
                raise LookupError(f"no second moment of {without[0]}")
            parameters = {
                name: (str(dtype), tuple(map(int, shape)), str(digest))
                for name, (dtype, shape, digest) in record["parameters"].items()
            }
            return cls(
                moments,
                {str(unit): str(key) for unit, key in record["inputs"].items()},
                tuple(map(str, record["units"])),
                int(record["tokens"]),
                Fingerprint(str(record["model"]), parameters, str(record["text"])),
                int(record["seed"]),
                parts["outer"],
                parts["rows"],
                tuple(map(str, record["notes"])),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise MPOError(f"{path} is damaged ({type(error).__name__}: {error}): calibrate again") from error

    def summary(self) -> dict[str, Any]:
        """How many tokens and inputs, widths and the most ranks; for JSON."""
        return {
            "tokens": self.tokens,
            "inputs": len(self.moments),
            "units": len(self.units),
            "widths": sorted({known.second.shape[0] for known in self.moments.values() if known.second is not None}),
            "bytes": self.bytes,
            "notes": list(self.notes),
        }

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        matrices = [m for known in self.moments.values() for m in (known.second, known.cross) if m is not None]
        return sum(t.numel() * t.element_size() for t in (*matrices, *self.outers.values(), *self.rows.values()))

    def __str__(self) -> str:
        groups: dict[int, list[Moments]] = {}
        for known in self.moments.values():
            assert known.second is not None
            groups.setdefault(known.second.shape[0], []).append(known)
        lines = [
            f"{self.tokens} tokens; {len(self.units)} matrices read {len(self.moments)} distinct inputs"
            f"{f' and {len(self.rows)} tables' if self.rows else ''}; {self.bytes / 1e6:.1f} MB"
        ]
        for width, group in sorted(groups.items()):
            ranks = sorted({known.most_rank for known in group})
            said = " to ".join(str(rank) for rank in sorted({ranks[0], ranks[-1]}))
            lines.append(f"{len(group)} inputs of width {width}, rank at most {said}")
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))


def notes_on(calibration: Calibration, unmasked: Sequence[str]) -> tuple[str, ...]:
    """What a reader of a calibration should know."""
    notes: list[str] = []
    few = [
        key
        for key, known in calibration.moments.items()
        if known.second is not None and known.tokens < known.second.shape[0]
    ]
    if few:
        most = max(calibration.moments[key].second.shape[0] for key in few)  # type: ignore[union-attr]
        notes.append(f"too few tokens for {len(few)} inputs, {_some(few)}: below {most} tokens S has no full rank")
    if calibration.unreached:
        notes.append(f"nothing reached {_some(calibration.unreached)}: there is no metric for these")
    if unmasked:
        notes.append(f"padding could not be told in the inputs of {_some(unmasked)}, so it was counted")
    return tuple(notes)


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f"{separator.rstrip()} and {more} more" if more > 0 else "")
