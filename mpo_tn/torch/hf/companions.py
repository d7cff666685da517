"""The files of a model folder beside its weights: which may be read, and which are copied with what is written."""

from __future__ import annotations

import os
import shutil
import stat
import warnings
from pathlib import Path

from transformers.utils.hub import cached_file

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.files import checked_file
from mpo_tn.torch.hf import card, record
from mpo_tn.torch.hf.config_file import WEIGHTS

_OWN = (Path("config.json"), Path(record.NAME))
"""What is written anew, or not at all."""

_MOST_CONFIG, _MOST_BESIDE = 2**24, 2**29
"""Bytes of a configuration, and of anything else beside the weights: a thousand times what they have."""


def check_folder(folder: Path) -> None:
    """Refuse a model folder with something in it that cannot be read to its end, or that no model has.

    Guarantee (files-that-end): a pipe, a socket, a device, a configuration of more than 16 MiB, or another file beside
    the weights of more than 512 MiB is refused before any is opened.

    Raises:
        MPOError: names it.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        try:
            kind = path.stat().st_mode
        except OSError:  # a link to nothing: whoever needs it will say so
            continue
        if stat.S_ISDIR(kind):
            continue
        if path.name == "config.json":
            checked_file(path, "the configuration of a model", _MOST_CONFIG)
        else:
            checked_file(path, "a part of a model", None if path.name.endswith(WEIGHTS) else _MOST_BESIDE)


def refuse_pickled(source: str | Path, error: Exception) -> None:
    """Say what to do if a model could not be read and its weights are pickled alone.

    Pickled weights are read as transformers reads them, by an unpickler that makes tensors and nothing else
    (``weights_only=True``); what asks for more is refused by it, and nothing of it is run.

    Raises:
        MPOError: they are.
    """
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin")):
        return
    raise MPOError(
        f"{source} has pickled weights (pytorch_model.bin) and no safetensors, and they are damaged or hold more than "
        "tensors, which is not read because it could run anything: get the model as safetensors, or, if you trust "
        "whoever made it, write it anew with torch.load(..., weights_only=False) and safetensors.torch.save_file(..., "
        '"model.safetensors")'
    ) from error


def check_still_there(source: str | Path) -> None:
    """Refuse a source that has been deleted since it was read; nobody could tell a hub name from it otherwise.

    Raises:
        MPOError: it is no folder, and no model of that name has been loaded from the hub.
    """
    if Path(source).is_dir():
        return
    try:
        found = cached_file(str(source), "config.json", local_files_only=True)
    except (OSError, ValueError):
        found = None
    if found is None:
        raise MPOError(f"{source} is gone, it was deleted or renamed while it was being read: nothing was written")


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer, pooling and other small files; the weights in any format stay behind.

    Guarantee (links-stay-inside): a link is followed if it leads to a file of the same folder, or of the hub's cache if
    the folder is a snapshot in it. What any other link leads to is not read; a warning names it, and files that are too
    large to be beside a model.

    Raises:
        MPOError: the folder is no longer what it was when the copying began.
    """
    inside, left = _roots(source), list[str]()
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.name.endswith(WEIGHTS) or relative in _OWN or not path.is_file():
            continue
        is_outside = not any(path.resolve().is_relative_to(root) for root in inside)
        try:
            if is_outside or path.stat().st_size > _MOST_BESIDE:
                left.append(str(relative))
                continue
            target = out / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if relative != Path(card.NAME):
                shutil.copyfile(path, target)
            elif text := card.without_ours(path.read_text(encoding="utf-8", errors="replace")):
                target.write_text(text, encoding="utf-8")  # saving a compressed model writes our part anew
        except FileNotFoundError as error:
            raise MPOError(f"{source} was changed while it was being read, {relative} is gone: start again") from error
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        warnings.warn(
            f"not copied from {source}, for links lead out of it or files are too large: {', '.join(left[:3])}{more}",
            stacklevel=2,
        )


def _roots(source: Path) -> list[Path]:
    """Where links in a folder may lead: into it, and from a snapshot of the hub's cache to the files of that model."""
    place = source.resolve()
    is_snapshot = place.parent.name == "snapshots" and place.parent.parent.name.startswith(("models--", "datasets--"))
    return [place, place.parent.parent / "blobs"] if is_snapshot else [place]
