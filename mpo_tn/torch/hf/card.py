"""The model card of a saved folder: how to load it, what was compressed and what that cost, the original card below."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers.utils.hub import cached_file

from mpo_tn.planning.config import MPOConfig
from mpo_tn.planning.spec import ModuleSpec, kept_ratio
from mpo_tn.storage.files import write_whole
from mpo_tn.torch.hf.quantization_config import MPOQuantizationConfig
from mpo_tn.torch.models.units import count_parameters

NAME = "README.md"
_MARK = "<!-- mpo-tn: what follows was there before the model was compressed -->"
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MOST_ROWS = 30
_LONGEST = 2**20


def card_of(model: Any, config: MPOQuantizationConfig, original: str) -> str:
    """The text of a card.

    Args:
        model: that is saved.
        config: what ``config.json`` says of its modules.
        original: the card of the dense model, or an earlier one of ours, of which the original part is kept.

    Guarantee (card): it begins with what the hub reads of the original card, with ``library_name``, tags and a
    ``base_model`` that is known; the first line after its heading says how to load the model; the text of the original
    follows below.
    """
    front, body = _parts(original)
    ours = _MARK in body
    if ours:
        body = body.partition(_MARK)[2]
    data = _metadata(front, None if ours else _hub_name(model))
    if front is not None and data is None:  # nobody can read it: shown as it is
        body, data = f"```yaml\n{front}\n```\n{body}", _metadata(None, _hub_name(model))
    text = f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{_own_text(model, config)}"
    return f"{text}\n{_MARK}\n" + (f"\n{body.strip()}\n" if body.strip() else "")


def without_ours(card: str) -> str:
    """A card as it would be without our part: for a model that is made dense. Empty where nothing else was there."""
    front, body = _parts(card)
    if _MARK not in body:
        return card
    rest = body.partition(_MARK)[2].strip()
    return f"---\n{front}\n---\n\n{rest}\n" if rest else ""


def _parts(card: str) -> tuple[str | None, str]:
    """What the hub reads at the top of a card, and the text."""
    found = _FRONT.match(card)
    return (None, card) if found is None else (found[1], card[found.end() :])


def _metadata(front: str | None, base: str | None) -> dict[str, Any] | None:
    """The entries for the hub; None if those that were there cannot be read."""
    try:
        data: Any = yaml.safe_load(front or "") or {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    tags: Any = data.get("tags")
    tags = [tags] if isinstance(tags, str) else list(tags) if isinstance(tags, list) else []
    data.setdefault("library_name", "transformers")
    data["tags"] = [*tags, *(tag for tag in ("mpo-tn", "matrix-product-operator") if tag not in tags)]
    if base is not None:
        data |= {"base_model": base, "base_model_relation": "quantized"}
    return data


def _hub_name(model: Any) -> str | None:
    """What the model was loaded from, if that is a name on the hub."""
    name = str(model.config.name_or_path or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _own_text(model: Any, config: MPOQuantizationConfig) -> str:
    modules, name, size = config.modules, type(model).__name__.removeprefix("FSDP"), model.dtype.itemsize
    owners = {own: spec for own, spec in modules.items() if spec.tied_to not in modules}
    numbers = sum(spec.out_features * spec.in_features for spec in owners.values())
    bits = 8 * sum(spec.bytes(size) for spec in owners.values()) / numbers
    told = f"MPOConfig({', '.join(_policy(config.config))})"
    return "\n".join(
        [
            f"# {name}, compressed by mpo-tn",
            "",
            "**Run `import mpo_tn.torch` before `from_pretrained`:** without it transformers refuses this folder.",
            "",
            "```python",
            'import mpo_tn.torch  # pip install "mpo-tn[torch]"',
            f"from transformers import {name}",
            "",
            f'model = {name}.from_pretrained("FOLDER OR NAME ON THE HUB")',
            "```",
            "",
            f"{len(owners)} matrices are matrix product operators, chains of small tensors in place of a weight. They "
            f"keep {100 * kept_ratio(owners.values()):.1f} % of their {numbers:,} numbers, in {bits:.2f} bits for each "
            f"weight there was. The whole model has {count_parameters(model):,} parameters.",
            "",
            "The error is that of the matrix in the Frobenius norm, over the norm of the weight; what it does to the "
            f"outputs is another matter. They were compressed by `{told}`.",
            "",
            *_table(owners, size),
            "",
        ]
    )


def _policy(config: MPOConfig) -> list[str]:
    """What of a policy is not the default."""
    plain = MPOConfig()
    said = {own.name: getattr(config, own.name) for own in fields(config)}
    return [f"{name}={_shown(value)}" for name, value in said.items() if value != getattr(plain, name)]


def _shown(value: object) -> str:
    text = repr(value).replace("`", "'").replace("\n", " ")
    return text if len(text) < 300 else f"{text[:300]}..."


def _table(modules: Mapping[str, ModuleSpec], itemsize: int) -> list[str]:
    """A row for the matrices of one name in all layers."""
    groups: dict[tuple[str, int, int], list[ModuleSpec]] = {}
    for name, spec in modules.items():
        key = re.sub(r"(?<![^.])\d+(?![^.])", "\\*", name), spec.out_features, spec.in_features
        groups.setdefault(key, []).append(spec)
    rows = [
        "| matrices | number | size | cores | largest bond | kept | bits per weight | error |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for (name, out, in_), specs in [*groups.items()][:_MOST_ROWS]:
        bits = [spec.bits_per_weight(itemsize) for spec in specs]
        errors = [spec.rel_error for spec in specs if spec.rel_error is not None]
        error = _range(errors, ".3f") if len(errors) == len(specs) else "not known"
        rows.append(
            f"| {name} | {len(specs)} | {out} x {in_} | {_range([len(spec.sites) for spec in specs], 'd')} | "
            f"{_range([max(spec.bonds, default=1) for spec in specs], 'd')} | "
            f"{_range([spec.kept for spec in specs], '.3f')} | {_range(bits, '.2f')} | {error} |"
        )
    if len(groups) > _MOST_ROWS:
        rows.append(f"| and {len(groups) - _MOST_ROWS} more | | | | | | | |")
    return rows


def _range(values: list[Any], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def write_card(model: Any, folder: Path) -> None:
    """Write the card of a model into the folder that it was saved to; one that is there is the original.

    Raises:
        MPOError: the disk is full or may not be written to.
    """
    config: MPOQuantizationConfig = model.hf_quantizer.quantization_config
    write_whole(folder / NAME, card_of(model, config, _original(model, folder)).encode("utf-8"))


def _original(model: Any, folder: Path) -> str:
    """The card that is in the folder, or of what the model was loaded from; nothing is fetched for it."""
    name = str(model.config.name_or_path or "")
    for place in (folder / NAME, Path(name) / NAME if name else None):
        if place is not None and place.is_file() and place.stat().st_size <= _LONGEST:
            return place.read_text(encoding="utf-8", errors="replace")
    if _hub_name(model) is not None:
        try:
            found = cached_file(name, NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except OSError:
            found = None
        if found is not None:
            return Path(found).read_text(encoding="utf-8", errors="replace")
    return ""
