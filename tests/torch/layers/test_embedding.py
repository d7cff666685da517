"""MPOEmbedding against the dense table it stands for, which is never built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.adapter import close, compressed, embedding, reference_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_tn import MPOError
from mpo_tn.torch.layers import rows as rows_module

SIZES = st.integers(1, 40)
SHAPES = [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 2, 1)]


@given(SIZES, SIZES, st.integers(1, 5), st.data())
def test_an_embedding_gives_the_rows_of_the_table(ids: int, width: int, n: int, data: st.DataObject) -> None:
    dense = embedding(ids, width)
    layer, _ = compressed(dense, sites=n)
    shape = data.draw(st.sampled_from(SHAPES))
    count = torch.Size(shape).numel()
    chosen = data.draw(st.lists(st.integers(0, ids - 1), min_size=count, max_size=count))
    index = torch.tensor(chosen, dtype=data.draw(st.sampled_from([torch.int64, torch.int32]))).reshape(shape)
    rows = layer(index)
    assert rows.shape == (*shape, width)
    close(rows, dense(index), dense.weight)
    close(rows, reference_matrix(layer)[index.long()].float(), dense.weight)


@pytest.mark.parametrize("bad", [-1, 101, 103, 10**9])
def test_an_id_outside_the_table(bad: int) -> None:
    layer, _ = compressed(embedding(101, 8))
    assert layer.spec.sites.shape[0] > 103  # the padding has rows for it
    with pytest.raises(IndexError, match=rf"{bad} .*0 to 100"):
        layer(torch.tensor([3, bad]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.float32])
def test_ids_are_int32_or_int64_as_for_a_dense_table(dtype: torch.dtype) -> None:
    layer, _ = compressed(embedding(50, 8))
    with pytest.raises(MPOError, match=f"{dtype}.*int64"):
        layer(torch.tensor([1, 0, 1]).to(dtype))


def test_the_padding_id_takes_no_gradient() -> None:
    dense = embedding(12, 6, padding_idx=5)
    layer, _ = compressed(dense, bond=3)
    assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (5, 12, 6)
    layer(torch.tensor([5, 5])).sum().backward()
    assert all(core.grad is None or not core.grad.any() for core in layer.cores)
    layer(torch.tensor([5, 1])).sum().backward()
    table = reference_matrix(layer)
    wanted = torch.autograd.grad(table[1].sum(), list(layer.cores))
    for core, gradient in zip(layer.cores, wanted, strict=True):
        close(core.grad, gradient.float())


class Largest(TorchDispatchMode):
    """Remembers the most entries any new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        return result


@pytest.mark.guarantee("table-never-built")
def test_the_table_is_never_built() -> None:
    layer, _ = compressed(embedding(3001, 32), bond=8)
    entries = layer.spec.out_features * layer.spec.in_features
    assert layer.spec.num_parameters < entries / 4
    with Largest() as forward:
        rows = layer(torch.arange(0, 3000, 150))
    with Largest() as backward:
        rows.sum().backward()
    assert 0 < forward.entries < entries / 4
    assert 0 < backward.entries < entries / 4
    with Largest() as control:
        layer.dense_weight()
    assert control.entries >= entries


@pytest.mark.guarantee("table-never-built")
def test_rows_in_chunks_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = compressed(embedding(101, 12), bond=5)
    ids = torch.arange(101).reshape(1, 101)
    whole = layer(ids)
    largest_slice = max(core[:, 0].numel() for core in layer.cores)
    for rows_at_once in (1, 7, 100):
        monkeypatch.setattr(rows_module, "_GATHERED_ENTRIES", rows_at_once * largest_slice)
        close(layer(ids), whole)
        with Largest() as gathered:
            rows_module.table_rows(tuple(layer.cores), ids.flatten())
        assert gathered.entries <= max(rows_at_once * largest_slice, ids.numel() * layer.spec.sites.shape[1])
