"""The device that a model is put on: named by a user, and there."""

from __future__ import annotations

import torch

from mpo_tn.exceptions import MPOError


def usable_device(name: str) -> torch.device:
    """The device of a name such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, tried with one number.

    Raises:
        MPOError: there is no such kind of device, or it is not in this machine or not in this build of torch.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        float(torch.zeros(1, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MPOError(f"device {name!r} cannot be used here ({reason}): name another, for instance cpu") from error
    return device
