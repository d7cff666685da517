"""Batches by step: the same for the same seed and step, whatever they are given as."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mpo_tn import MPOError
from mpo_tn.torch.loops.feeding import Feed
from mpo_tn.tuning.tasks.batches import Batches

ROWS = [{"input_ids": [k] * (1 + k % 4), "attention_mask": [1] * (1 + k % 4)} for k in range(1, 12)]


class Stream:
    """Iterated again and again, with as many batches in an epoch as it says."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.begun = counts, -1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.begun += 1
        return iter([one(k) for k in range(self.counts[0])])


def one(k: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[k]])}


def ids(feed: Feed, steps: Any) -> list[int]:
    return [int(feed.at(step).inputs["input_ids"][0, 0]) for step in steps]


@pytest.mark.slow
@given(count=st.integers(1, 7), seed=st.integers(0, 5), steps=st.lists(st.integers(0, 14), min_size=1, max_size=5))
def test_a_step_has_one_batch_however_it_is_reached(count: int, seed: int, steps: list[int]) -> None:
    loader = DataLoader(range(count), shuffle=True, collate_fn=lambda rows: one(rows[0]))  # type: ignore[arg-type]
    for batches in ([one(k) for k in range(count)], Stream(count), loader):
        whole = ids(Feed(batches, seed, "batches"), range(15))
        assert ids(Feed(batches, seed, "batches"), steps) == [whole[step] for step in steps]
        for epoch in range(15 // count):
            assert sorted(whole[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_sequences_and_loaders_are_shuffled_and_the_generator_is_left_alone() -> None:
    batches = [one(k) for k in range(20)]
    before = torch.get_rng_state()
    loader = DataLoader(range(20), shuffle=True, collate_fn=lambda rows: one(rows[0]))  # type: ignore[arg-type]
    for given_ in (batches, loader):
        a, b = (ids(Feed(given_, seed, "batches"), range(20)) for seed in (0, 1))
        assert a != b
        assert a != list(range(20))
        assert a != ids(Feed(given_, 0, "batches"), range(20, 40))
    assert ids(Feed(Stream(20), 0, "batches"), range(20)) == list(range(20))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_tuning_tasks() -> None:
    batches = Batches(ROWS, None, {}, 4, seed=3)
    feed = Feed(batches, 0, "batches")
    fed = feed.at(5)
    assert torch.equal(fed.inputs["input_ids"], batches.at(5).inputs["input_ids"])
    assert fed.labels is not None
    assert fed.key is None
    assert fed.mask is fed.inputs["attention_mask"]
    assert [part.key for part in feed.in_order()] == [0, 1, 2]


def test_keys_tell_what_comes_again() -> None:
    batches = [one(k) for k in range(3)]
    feed = Feed(batches, 0, "batches")
    assert sorted(feed.at(step).key for step in range(3)) == [0, 1, 2]  # type: ignore[type-var]
    assert all(feed.at(s).inputs["input_ids"].equal(batches[feed.at(s).key]["input_ids"]) for s in range(9))  # type: ignore[index]
    assert [part.key for part in feed.in_order()] == [0, 1, 2]
    assert [part.key for part in Feed(Stream(2), 0, "batches").in_order()] == [None, None]
    assert Feed(Stream(2), 0, "batches").at(1).key is None


def test_labels_are_apart_from_what_goes_in() -> None:
    fed = Feed([{**one(1), "labels": torch.tensor([3])}], 0, "batches").at(0)
    assert set(fed.inputs) == {"input_ids"}
    assert fed.labels is not None
    assert int(fed.labels) == 3


class Dry:
    """Something in the first epoch, nothing afterwards."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.epochs += 1
        return iter([one(0)] if self.epochs < 3 else [])


def test_what_runs_dry_is_said() -> None:
    feed = Feed(Dry(), 0, "batches")
    with pytest.raises(MPOError, match="batches holds no batch"):
        ids(feed, range(5))
