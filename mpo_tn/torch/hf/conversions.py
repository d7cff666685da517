"""What converters of transformers make of the tensors of a checkpoint, without making it: which piece comes where."""

from __future__ import annotations

from collections.abc import Iterable

from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from mpo_tn.exceptions import MPOError
from mpo_tn.storage.checkpoint import StoredTensor
from mpo_tn.storage.pieces import StoredPieces, alone, joined, stacked


def pieces_of(
    converter: WeightConverter, parts: Iterable[tuple[StoredTensor, str]], shape: tuple[int, ...]
) -> StoredPieces | None:
    """The tensor that a converter makes of others, if all it does is to stack, join and transpose; else None.

    Args:
        converter: what is done.
        parts: what it is given, each with the pattern that it matches, in order.
        shape: that the model has.

    Raises:
        MPOError: the parts do not fit together.
    """
    if len(converter.target_patterns) != 1:
        return None
    held: dict[str, list[StoredPieces]] = {}
    for tensor, pattern in parts:
        held.setdefault(pattern, []).append(alone(tensor))
    for step in converter.operations:
        try:
            done = _done(step, converter, held, shape)
        except MPOError:
            raise
        except ValueError:  # which transformers raises of what it cannot do
            return None
        if done is None:
            return None
        held = done
    found = next(iter(held.values()))
    return found[0] if len(held) == 1 and len(found) == 1 else None


def _done(
    step: object, converter: WeightConverter, held: dict[str, list[StoredPieces]], shape: tuple[int, ...]
) -> dict[str, list[StoredPieces]] | None:
    """One operation, under the names that it gives."""
    sources, targets = converter.source_patterns, converter.target_patterns
    # By the very class: another one may do something else.
    if type(step) is MergeModulelist:
        return {
            step.get_target_pattern(len(held), pattern, targets): [stacked(parts, _axis(step.dim, parts[0], 1))]
            for pattern, parts in held.items()
        }
    if type(step) is Concatenate:
        parts = [part for pattern in sources for part in held.get(pattern, ())]
        return {step.get_target_pattern(targets): [joined(parts, _axis(step.dim, parts[0]))]} if parts else None
    if type(step) is Transpose:
        name = step.get_target_pattern(dict.fromkeys(held), sources, targets)  # pyright: ignore[reportArgumentType]
        ((part, *more),) = held.values()
        if more:
            return None
        if step.check_dims and part.shape == shape:
            return {name: [part]}
        return {name: [part.transposed(_axis(step.dim0, part), _axis(step.dim1, part))]}
    return None


def _axis(axis: int, part: StoredPieces, added: int = 0) -> int:
    """Counted from the front."""
    axes = len(part.shape) + added
    if not -axes <= axis < axes:
        raise MPOError(f"{part.key} is {list(part.shape)}, and has no axis {axis}: fetch the checkpoint again")
    return axis % axes
