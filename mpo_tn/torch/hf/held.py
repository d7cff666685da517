"""What weight files say they hold, by their headers; nothing of the tensors is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError, safe_open

from mpo_tn.exceptions import MPOError, clipped
from mpo_tn.torch.hf.sentinel import RECORD, read_record

CORE = re.compile(r"^(?P<module>.*)\.cores\.(?P<k>\d+)(?:\.(?P<part>weight(?:_packed|_scale|_shape)?))?$")
"""The name of a core, or of a tensor that a core in bits is held by."""

Shapes = dict[tuple[int, str], tuple[int, ...]]
"""Of the tensors of one chain, by the number of the core and the part of it that they are."""


@dataclass(frozen=True)
class Held:
    """The shapes of what files hold of cores, by module, and the record that was saved beside them, if there is one."""

    chains: dict[str, Shapes] = field(default_factory=dict[str, Shapes])
    record: dict[str, Any] | None = None


def held_by(paths: Sequence[str]) -> Held:
    """Read the headers of safetensors files.

    Raises:
        MPOError: a file of another format, or damaged; a core that is in two files.
    """
    chains: dict[str, Shapes] = {}
    record: dict[str, Any] | None = None
    for path in map(str, paths):
        if not path.endswith(".safetensors"):
            raise MPOError(f"{path} is no safetensors file: no other format of a compressed model is read")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    part = file.get_slice(key)
                    shape = tuple(part.get_shape())
                    if (found := CORE.match(key)) is not None:
                        chain = chains.setdefault(found["module"], {})
                        place = (int(found["k"][:9]), found["part"] or "")
                        if place in chain:
                            raise MPOError(f"{clipped(key)} is there twice: the files are damaged")
                        chain[place] = shape
                    elif len(shape) == 1 and key.endswith((".weight", RECORD)) and part.get_dtype() == "U8":
                        record = read_record(file.get_tensor(key).numpy().tobytes()) or record
        except MPOError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            raise MPOError(
                f"{path} cannot be read, it is damaged ({clipped(str(error))}): save the model again"
            ) from error
    return Held(chains, record)
