from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import WEIGHTS, open_checkpoint
from mpo_tn.torch.hf.conversions import pieces_of
from mpo_tn.torch.models.stream_unit import tensor_of

ONE, OTHER = "experts.*.w1", "experts.*.w3"


class Reversed(MergeModulelist):
    """Not what is known of its base."""


def converter(patterns: list[str], *steps: Any, targets: tuple[str, ...] = ("experts.whole",)) -> WeightConverter:
    return WeightConverter(patterns, list(targets), list(steps))


def parts_in(folder: Path, patterns: list[str], rows: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    torch.manual_seed(0)
    named = {
        pattern.replace("*", str(k)): (pattern, torch.randn(rows + row, 5))
        for row, pattern in enumerate(patterns)
        for k in range(3)
    }
    tensors = {key: tensor for key, (_, tensor) in named.items()}
    save_file(tensors, folder / WEIGHTS)
    return tensors, {key: pattern for key, (pattern, _) in named.items()}


@pytest.mark.parametrize(
    ("patterns", "steps"),
    [
        ([ONE], [MergeModulelist(dim=0)]),
        ([ONE], [MergeModulelist(dim=1)]),
        ([ONE], [MergeModulelist(dim=0), Transpose(1, 2)]),
        ([ONE], [Concatenate(dim=-1)]),
        ([ONE, OTHER], [Concatenate(dim=0)]),
        ([OTHER, ONE], [MergeModulelist(dim=0), Concatenate(dim=1)]),
        ([ONE, OTHER], [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(-1, 1)]),
    ],
)
def test_what_comes_is_what_transformers_makes(tmp_path: Path, patterns: list[str], steps: list[Any]) -> None:
    tensors, matched = parts_in(tmp_path, patterns)
    theirs, ours = converter(patterns, *steps), converter(patterns, *steps)
    for key, pattern in matched.items():
        read: Any = lambda key=key: tensors[key]  # noqa: E731 - transformers calls it
        theirs.add_tensor("experts.whole", key, pattern, read)
    (wanted,) = theirs.convert("experts.whole").values()
    stored = open_checkpoint(tmp_path).tensors
    found = pieces_of(ours, [(stored[key], pattern) for key, pattern in matched.items()], ())
    assert found is not None
    assert torch.equal(tensor_of(found), wanted)


def test_a_tensor_is_turned_only_where_its_shape_asks_for_it(tmp_path: Path) -> None:
    tensors, _ = parts_in(tmp_path, [ONE])
    stored = open_checkpoint(tmp_path).tensors["experts.0.w1"]
    for shape in ((2, 5), (5, 2)):
        found = pieces_of(converter([ONE], Transpose(0, 1, check_dims=True)), [(stored, ONE)], shape)
        assert found is not None
        assert torch.equal(tensor_of(found), tensors["experts.0.w1"] if shape == (2, 5) else tensors["experts.0.w1"].T)


def test_what_is_not_known_is_left_to_transformers_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    _, matched = parts_in(tmp_path, [ONE, OTHER])
    stored = open_checkpoint(tmp_path).tensors
    parts = [(stored[key], pattern) for key, pattern in matched.items()]
    first = parts[:3]
    assert pieces_of(converter([ONE], Reversed(dim=0)), first, ()) is None
    assert pieces_of(converter([ONE], Chunk(dim=0), targets=("a", "b")), first, ()) is None
    assert pieces_of(converter([ONE, OTHER], MergeModulelist(dim=0)), parts, ()) is None  # two are left
    assert pieces_of(converter([ONE], Transpose(0, 1)), first, ()) is None  # there is more than the one that it takes
    with pytest.raises(MPOError, match="they are to be one tensor"):
        pieces_of(converter([ONE, OTHER], Concatenate(dim=1)), parts, ())
    with pytest.raises(MPOError, match="has no axis 3"):
        pieces_of(converter([ONE], MergeModulelist(dim=3)), first, ())
