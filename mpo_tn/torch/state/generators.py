"""The states of the random generators of Python, NumPy and torch: kept, checked, and given back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mpo_tn.torch.state.damage import MISFITS, damaged, decoded, shown
from mpo_tn.torch.state.nested_values import encode


def random_state(tensors: dict[str, torch.Tensor]) -> Any:
    """The states of all of them, encoded."""
    legacy: Any = np.random.get_state()  # noqa: NPY002  # whoever draws from the old global generator needs it
    parts: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": tuple(
            torch.from_numpy(part.astype(np.int64)) if isinstance(part, np.ndarray) else part for part in legacy
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    version, numbers, gauss = parts["python"]
    parts["python"] = (version, torch.tensor(numbers), gauss)
    return encode(parts, "random", tensors)


def checked_random(value: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The states of the generators, as ``setstate`` of each takes them: tried on generators of nobody.

    Raises:
        MPOError: one of them would not take its own.
    """
    parts = decoded(value, tensors, "random")
    try:
        version, numbers, gauss = parts["python"]
        python = (version, tuple(numbers.tolist()), gauss)
        random.Random(0).setstate(python)
        legacy: Any = tuple(p.numpy().astype(np.uint32) if isinstance(p, torch.Tensor) else p for p in parts["numpy"])
        np.random.RandomState(0).set_state(legacy)
        if not 0 <= legacy[2] <= 624:
            raise ValueError(f"position {legacy[2]}")
        torch.Generator().set_state(parts["torch"])
        cuda = parts["cuda"]
        if not isinstance(cuda, list) or not all(isinstance(p, torch.Tensor) for p in cuda):
            raise TypeError(f"cuda is {shown(cuda)}")
        if torch.cuda.is_available():
            for p in cuda:
                torch.Generator("cuda").set_state(p)
    except MISFITS as error:
        raise damaged(f"random cannot be read ({type(error).__name__}: {error})") from error
    return {"python": python, "numpy": legacy, "torch": parts["torch"], "cuda": cuda}


def restore_random(parts: Mapping[str, Any]) -> None:
    """Bring the generators to what :func:`checked_random` gave."""
    random.setstate(parts["python"])
    np.random.set_state(parts["numpy"])  # noqa: NPY002
    torch.set_rng_state(parts["torch"])
    if parts["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(parts["cuda"][: torch.cuda.device_count()])
