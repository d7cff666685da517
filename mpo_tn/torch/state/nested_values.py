"""Nested values as JSON, their tensors apart: what optimisers, schedulers and callers keep, without pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpo_tn.exceptions import MPOError
from mpo_tn.torch.state.host_values import host_copy

_TAG = "$"


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` in what JSON can hold; every tensor goes into ``tensors`` under its path, as a copy on the host.

    Numbers, strings, lists, tuples, dictionaries, counters, tensors and NumPy scalars, nested as they like.

    Raises:
        MPOError: anything else; the message names where it is.

    >>> decode(encode({"betas": (0.9, 0.99), 3: None}, "group", {}), {})
    {'betas': (0.9, 0.99), 3: None}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), path, tensors)
    if isinstance(value, torch.Tensor):
        while path in tensors:  # a key with a slash in it
            path += "'"
        tensors[path] = host_copy(value)
        return {_TAG: "tensor", "key": path, "host": value.device.type == "cpu"}
    if isinstance(value, (list, tuple)):
        parts = [encode(part, f"{path}/{k}", tensors) for k, part in enumerate(value)]
        return parts if isinstance(value, list) else {_TAG: "tuple", "of": parts}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _TAG not in value and not isinstance(value, Counter):
            return {key: encode(part, f"{path}/{key}", tensors) for key, part in value.items()}
        items = [[encode(key, path, tensors), encode(part, f"{path}/{key}", tensors)] for key, part in value.items()]
        return {_TAG: "counter" if isinstance(value, Counter) else "items", "of": items}
    raise MPOError(
        f"{path} is a {type(value).__name__}, which a saved state cannot hold: use numbers, strings, lists, tuples, "
        "dictionaries or tensors"
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device | None = None) -> Any:
    """The inverse of :func:`encode`; tensors that were not on the host go to ``device``, as copies."""
    if isinstance(value, list):
        return [decode(part, tensors, device) for part in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: decode(part, tensors, device) for key, part in value.items()}
    if kind == "tensor":
        tensor = tensors[value["key"]]
        return tensor.to("cpu" if value["host"] or device is None else device, copy=True)
    parts = decode(value["of"], tensors, device)
    if kind == "tuple":
        return tuple(parts)
    pairs = dict(parts)
    return Counter(pairs) if kind == "counter" else pairs
