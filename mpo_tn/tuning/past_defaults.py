"""Which defaults held when a checkpoint or ``result.json`` was written: what a setting was that it does not name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError, whole_number

# Values as JSON has them, and never read from the classes: those say what holds today. A row says what was new in its
# version and is not edited afterwards; what is new next goes into a row of its own, at the end:
# - a default that changes: the new one;
# - a new setting: the value that describes what runs did before there was a choice. If its default is another, that is
#   one more row.
CHANGES: tuple[dict[str, dict[str, Any]], ...] = (
    {  # 0: files that do not say their version
        "Method": {
            "name": "lfa", "target": "all-linear", "sites": 5, "keep": None, "policy": "auxiliary", "bonds": None,
            "train": [], "layers": 2, "rank": None, "lr": None, "tensor_lr": None, "weight_decay": 0.01,
        },
        "Settings": {
            "epochs": 3, "max_steps": None, "seed": 0, "batch_size": 32, "max_length": 128, "warmup": 0.06,
            "clip": 1.0, "bf16": False, "device": "cpu", "save_every": 200,
        },
        "Squeezing": {
            "delta": 1.0, "cuts_per_round": 50, "tune_steps": 10, "keep": None, "max_rounds": 100,
            "score": "error_per_parameter", "rate": 0.1, "final_epochs": 0, "gap_on": "dev",
        },
    },
    {},  # 1: files say their version
)  # fmt: skip
"""What each version of the files changed in the defaults of Method, Settings and Squeezing, by name."""

FORMAT_VERSION = len(CHANGES) - 1
"""The version of the checkpoints and of the ``result.json`` that are written."""


def defaults_of(version: int) -> dict[str, dict[str, Any]]:
    """The defaults of Method, Settings and Squeezing in a version; a later setting has the value it came with.

    >>> defaults_of(0)["Squeezing"]["rate"]
    0.1
    """
    # The last to be laid over the others is the version itself; of those after it the nearest comes last.
    rows = [*reversed(CHANGES[version + 1 :]), *CHANGES[: version + 1]]
    return {name: {key: value for row in rows for key, value in row.get(name, {}).items()} for name in CHANGES[0]}


def completed(settings: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The settings of a run as a file of some version has them, and what it does not name as it was by default then."""
    past = defaults_of(version)
    del past["Method"]["name"]  # a file says it as ``method``
    squeezing = settings.get("squeezing")
    if squeezing is not None:
        squeezing = {**past["Squeezing"], **squeezing}
    return {**past["Method"], **past["Settings"], **settings, "squeezing": squeezing}


def checked_version(values: Mapping[str, Any], path: Path) -> int:
    """The version of the file at ``path``, going by what is in it.

    Raises:
        MPOError: it is newer than this one, or no version at all.
    """
    version = whole_number(values.get("format_version", 0))
    if version is None or version < 0:
        raise MPOError(f"{path} is damaged: its format_version is {values['format_version']!r}")
    if version > FORMAT_VERSION:
        raise MPOError(
            f"{path} has format_version {version}, and this version of mpo_tn reads up to {FORMAT_VERSION}: use the "
            "one that wrote it, or a newer one"
        )
    return version
