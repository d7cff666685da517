"""mpo_record.json: what lies beside the weights of a folder, to tell whether they are still what was written.

Digests are for :mod:`mpo_tn.torch.hf.verify`, checksums, which cost next to nothing, for whoever loads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import header_digest, open_checkpoint, tensors_in
from mpo_tn.storage.files import checked_file, write_whole
from mpo_tn.storage.tensors import bytes_digest, file_digest

NAME = "mpo_record.json"
_LONGEST = 2**28
FORMAT = "mpo_tn.record"
VERSION = 1
RECORD_NOTE = "mpo_tn.record"
"""In the header of every file of weights of a run: the name of the record, which cannot be taken away unnoticed."""

_WEIGHTS = "model*.safetensors"
_SAVED = (_WEIGHTS, "model*.safetensors.index.json", "config.json")
"""What ``save_pretrained`` writes and nobody else in its stead; of the rest of a folder others are the authors."""

Checksums = Mapping[str, Mapping[str, str]]
"""By file, by tensor."""


def record_run(folder: Path, made: Mapping[str, Any], digests: Mapping[str, str], checksums: Checksums) -> None:
    """Write the record of a folder that a run has just made.

    Args:
        folder: with everything else in it.
        made: ``run``, ``plan`` and ``units``.
        digests: of every tensor, before it was written.
        checksums: as well.
    """
    _write(folder, {**made, "tensors": dict(sorted(digests.items())), "files": file_digests(folder),
                    "checksums": checksums})  # fmt: skip


def record_saved(folder: Path) -> None:
    """Write the record of a folder that a model with MPO modules was just saved to, of the files that hold it.

    Cost: every tensor is read once; about 0.8 s of one core a gigabyte.

    Raises:
        MPOError: the disk is full, or something else writes to the folder.
    """
    digests: dict[str, str] = {}
    checksums: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob(_WEIGHTS)):
        own = checksums.setdefault(path.name, {})
        for stored in tensors_in(path):
            tensor = stored.raw()
            digests[stored.key], own[stored.key] = tensor.digest(), tensor.checksum()
    paths = sorted(path for pattern in _SAVED for path in folder.glob(pattern))
    _write(folder, {
        "run": None, "plan": None, "units": [], "tensors": dict(sorted(digests.items())),
        "files": {path.name: _file_digest(path) for path in paths}, "checksums": checksums,
    })  # fmt: skip


def forget(folder: Path) -> None:
    """Take the record away from a folder that holds something else now."""
    (folder / NAME).unlink(missing_ok=True)


def _write(folder: Path, told: Mapping[str, Any]) -> None:
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **told}
    content["digest"] = _digest_of(content)
    write_whole(folder / NAME, _text_of(content).encode())


def file_digests(folder: Path) -> dict[str, str]:
    """Digests of all files of a model folder but the record, by path inside; of weights of their headers alone."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: _file_digest(path) for name, path in paths.items() if name != NAME}


def _file_digest(path: Path) -> str:
    return header_digest(path) if path.suffix == ".safetensors" else file_digest(path)


def _digest_of(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "digest"}
    return bytes_digest([json.dumps(content, sort_keys=True).encode()])


def _text_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def read_record(folder: Path) -> dict[str, Any]:
    """What was written of a folder. ``run`` is None if the model was in memory when it was saved.

    Raises:
        MPOError: there is none, it is damaged, or was altered.
    """
    path = folder / NAME
    checked_file(path, "the record of a model", _LONGEST)
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
        if record["format"] != FORMAT or record["version"] > VERSION:
            raise ValueError(f"its format is {record['format']!r}, version {record['version']!r}")
        if record["digest"] != _digest_of(record) or text != _text_of(record):
            raise ValueError("it was altered")
        if not all(isinstance(each, dict) for each in (record["files"], *record["checksums"].values())):
            raise TypeError("its parts are of other types")
        return {key: record[key] for key in ("run", "plan", "units", "tensors", "files", "checksums")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MPOError(f"{path} cannot be read ({error}): it tells how {folder} was made") from error


def altered(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What of a folder is not what was written, a phrase each. Cost: every byte is read, one tensor at a time.

    Raises:
        MPOError: the weights are damaged or missing.
    """
    files = file_digests(folder)
    if record["run"] is None:  # others put their files beside the model
        files = {name: digest for name, digest in files.items() if any(fnmatch(name, own) for own in _SAVED)}
    found = _compared(record["files"], files)
    there, wanted = open_checkpoint(folder).tensors, record["tensors"]
    return found + _compared(
        wanted,
        {key: there[key].raw().digest() for key in there if key in wanted}
        | dict.fromkeys((key for key in there if key not in wanted), ""),
    )


def _compared(wanted: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    found = [f"{key} is missing" for key in wanted if key not in there]
    found += [f"{key} was not there when the folder was written" for key in there if key not in wanted]
    return found + [f"{key} was altered" for key in wanted if key in there and there[key] != wanted[key]]


def check_files(paths: Sequence[str | Path]) -> None:
    """Hold weight files against the record beside them, if there is one that knows them.

    Guarantee (loaded-as-saved): of a folder with a record, a change of any byte of a weight file is refused.

    Cost: every byte is read once more, from where the system keeps it by then; some 0.2 s of one core a gigabyte.

    Raises:
        MPOError: names the tensor, or the file.
    """
    records: dict[Path, dict[str, Any] | None] = {}
    for path in map(Path, paths):
        folder = path.parent
        if folder not in records:
            records[folder] = _known(folder)
        record = records[folder]
        if record is None or path.name not in record["checksums"]:
            continue
        wanted: Mapping[str, str] = record["checksums"][path.name]
        if header_digest(path) != record["files"].get(path.name):
            raise MPOError(f"the header of {path} was altered since it was written: {_WAY_OUT}")
        for stored in tensors_in(path):
            if stored.raw().checksum() != wanted.get(stored.key):
                raise MPOError(f"{stored.key} in {path} was altered since it was written: {_WAY_OUT}")


_WAY_OUT = (
    "the file is damaged, fetch or save it again; mpo-tn verify says what else differs. If it was changed on purpose, "
    f"delete {NAME} beside it"
)


def _known(folder: Path) -> dict[str, Any] | None:
    if not (folder / NAME).is_file():
        return None
    try:
        return read_record(folder)
    except MPOError as error:
        raise MPOError(f"{error}; delete it if the weights are known to be right") from error
