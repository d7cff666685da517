"""What a saved state has to look like, asked before anything is changed: parts that are there, each of its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import checked_file
from mpo_tn.torch.state.nested_values import decode

T = TypeVar("T")

_LARGEST = 2**30  # bytes of a log or a description

# What code that reads values of another kind than it expects may raise.
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def damaged(reason: str) -> MPOError:
    """The error that says so."""
    return MPOError(f"the state is damaged: {reason}; nothing has been changed: name another state")


def shown(value: Any) -> str:
    """The value for a message, not too long."""
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else text[:57] + "..."


def read_json(file: Path) -> Any:
    """What is in a file of JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, no JSON, or nested deeper than anything we write.
    """
    try:
        there = checked_file(file, "what a run wrote", _LARGEST) if file.exists() else file
        return json.loads(there.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def part(values: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    """An entry that is there and of its kind.

    Raises:
        MPOError: it is not.
    """
    if key not in values:
        raise damaged(f"{where}{key} is missing")
    value = values[key]
    if not isinstance(value, kind):
        raise damaged(f"{where}{key} is {shown(value)}")
    return value


def optional_part(values: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """An entry that is there and a dictionary or ``None``; errors as :func:`part`."""
    return None if values.get(key, key) is None else part(values, key, dict)


def strings(values: Mapping[str, Any], key: str, where: str = "") -> list[str]:
    """An entry that is a list of strings; errors as :func:`part`."""
    found: list[Any] = part(values, key, list, where)
    if not all(isinstance(value, str) for value in found):
        raise damaged(f"{where}{key} is {shown(found)}")
    return found


def decoded(value: Any, tensors: Mapping[str, torch.Tensor], name: str) -> dict[Any, Any]:
    """A dictionary that was encoded.

    Raises:
        MPOError: it is no such thing.
    """
    if not isinstance(value, dict):
        raise damaged(f"{name} is {shown(value)}")
    try:
        found = decode(value, tensors)
    except (*MISFITS, RecursionError) as error:
        raise damaged(f"{name} cannot be decoded ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise damaged(f"{name} is {shown(value)}")
    return found


def check_alike(there: Mapping[Any, Any], here: Mapping[Any, Any], name: str) -> None:
    """Refuse numbers where there should be lists, and the like; ``None``, and what one of the two lacks, may be.

    Raises:
        MPOError: an entry of ``there`` is of another kind than that of ``here``.
    """
    for key in [key for key in there if key in here and here[key] is not None]:
        mine, value = _kind(here[key]), there[key]
        if mine is not None and mine is not _kind(value) and not (value is None and isinstance(here[key], bool)):
            raise damaged(f"{key} of {name} is {shown(value)}")


def _kind(value: Any) -> type | None:
    if isinstance(value, (bool, int, float, torch.Tensor)):
        return float
    return next((kind for kind in (str, list, tuple, dict) if isinstance(value, kind)), None)
