from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.storage.checkpoint import WEIGHTS, RawTensor, StoredTensor, open_checkpoint, write_shard
from mpo_tn.storage.pieces import alone, joined, stacked

WIDTHS = {"float64": np.uint64, "float32": np.uint32, "bfloat16": np.uint16, "int8": np.uint8}


def written(folder: Path, arrays: dict[str, np.ndarray], dtype: str) -> dict[str, StoredTensor]:
    own = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    raws = {key: RawTensor(dtype, array.shape, array.reshape(-1).view(np.uint8)) for key, array in own.items()}
    write_shard(folder / WEIGHTS, raws)
    return dict(open_checkpoint(folder).tensors)


@pytest.mark.guarantee("pieces-as-whole")
@given(
    experts=st.integers(1, 4), rows=st.integers(1, 5), columns=st.integers(1, 5), axis=st.integers(0, 2),
    along=st.integers(0, 2), turn=st.tuples(st.integers(0, 2), st.integers(0, 2)), early=st.booleans(),
    dtype=st.sampled_from(sorted(WIDTHS)), count=st.integers(1, 200),
)  # fmt: skip
def test_pieces_are_read_as_the_whole_is(
    tmp_path_factory: pytest.TempPathFactory, experts: int, rows: int, columns: int, axis: int, along: int,
    turn: tuple[int, int], early: bool, dtype: str, count: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("pieces")
    rng = np.random.default_rng(0)
    arrays = {
        f"{kind}.{k}": rng.integers(0, 1 << 8 * WIDTHS[dtype]().itemsize - 1, (rows, columns), WIDTHS[dtype])
        for kind in "ab"
        for k in range(experts)
    }
    stored = written(folder, arrays, dtype)
    own = [stacked([alone(stored[f"{kind}.{k}"]) for k in range(experts)], axis) for kind in "ab"]
    wanted = [np.stack([arrays[f"{kind}.{k}"] for k in range(experts)], axis) for kind in "ab"]
    if early:
        own, wanted = [part.transposed(*turn) for part in own], [array.swapaxes(*turn) for array in wanted]
    whole, array = joined(own, along), np.concatenate(wanted, along)
    if not early:
        whole, array = whole.transposed(*turn), array.swapaxes(*turn)
    (folder / "whole").mkdir()
    one = written(folder / "whole", {"one": array}, dtype)["one"]
    assert (whole.shape, whole.dtype, whole.itemsize, whole.nbytes) == (one.shape, one.dtype, one.itemsize, one.nbytes)
    assert sorted(whole.keys) == sorted(stored)
    assert np.array_equal(whole.read(), one.read())
    assert np.array_equal(whole.sample(count), one.sample(count))


def test_one_piece_is_held_beside_the_whole(tmp_path: Path) -> None:
    stored = written(tmp_path, {str(k): np.ones((200, 300), np.float32) for k in range(6)}, "float32")
    whole = stacked([alone(stored[str(k)]) for k in range(6)], 0).transposed(1, 2)
    tracemalloc.start()
    try:
        whole.read()
        assert tracemalloc.get_traced_memory()[1] < whole.nbytes + 1.1 * stored["0"].nbytes
    finally:
        tracemalloc.stop()


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    stored = written(tmp_path, {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 3), np.float32)}, "float32")
    with pytest.raises(MPOError, match=r"a is float32 \[1, 2, 3\] and a?b is float32 \[1, 3, 3\]"):
        stacked([alone(stored["a"]), alone(stored["b"])], 0)
    assert joined([alone(stored["a"]), alone(stored["b"])], 0).shape == (5, 3)


def test_a_piece_that_is_changed_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    stored = written(tmp_path, {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}, "float32")
    whole = stacked([alone(stored["a"]), alone(stored["b"])], 0)
    with (tmp_path / WEIGHTS).open("ab") as file:
        file.write(b"0")
    for read in (whole.read, lambda: whole.sample(4)):
        with pytest.raises(MPOError, match="was changed while it was read"):
            read()
