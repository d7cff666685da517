"""Words of packed integers against compressed-tensors, and what they stand for."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from helpers.in_bits import read_core
from hypothesis import example, given
from hypothesis import strategies as st

from mpo_tn.torch import QuantizedCore
from mpo_tn.torch.layers.packing import apart, pack, together, unpack
from mpo_tn.truncate.quantize import BITS


def integers(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_packing_is_that_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    values = integers(bits, rows, columns, seed)
    packed = pack(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(values, bits))
    assert torch.equal(pack(values.T.contiguous().T, bits), packed)  # whatever the strides
    assert torch.equal(unpack(packed, bits, columns), values)
    assert torch.equal(unpack(packed, bits, columns), unpack_from_int32(packed, bits, values.shape))
    assert torch.equal(unpack(packed.T.contiguous().T, bits, columns), values)  # whatever the strides


@given(
    st.sampled_from([*BITS, 16]), st.tuples(*[st.integers(1, 5)] * 4), st.sampled_from([8, 11, 128]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 99),
)  # fmt: skip
@example(bits=7, shape=(3, 2, 5, 4), group=8, dtype=torch.bfloat16, seed=0)
def test_a_core_is_read_with_one_rounding(
    bits: int, shape: tuple[int, int, int, int], group: int, dtype: torch.dtype, seed: int
) -> None:
    core = QuantizedCore.rounded(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), bits, group)
    assert (core.shape, core.numel(), core.ndim) == (shape, torch.Size(shape).numel(), 4)
    wanted = read_core(core)
    assert torch.equal(core.dequantize(torch.float64), wanted)
    assert torch.equal(core.dequantize(dtype), wanted.to(torch.float32).to(dtype))
    digits = torch.randint(0, shape[1], (7,), generator=torch.Generator().manual_seed(seed))
    held = core.forward(torch.float64)
    slices = held.form.slices(held.tensors, digits)
    assert torch.equal(slices.view(7, shape[0], shape[2], shape[3]), wanted.transpose(0, 1)[digits])


@pytest.mark.parametrize("kinds", [(None,), (3,), (16, None, 4), (None, None)])
def test_cores_come_together_as_they_were_taken_apart(kinds: tuple[int | None, ...]) -> None:
    torch.manual_seed(0)
    cores = [torch.randn(1, 2, 3, 1) for _ in kinds]
    held = [
        core if bits is None else QuantizedCore.rounded(core, bits, 8).forward()
        for core, bits in zip(cores, kinds, strict=True)
    ]
    tensors, forms = apart(held)
    assert bool(forms) == any(kinds)
    again = together(tensors, forms)
    assert len(again) == len(kinds)
    for core, other in zip(held, again, strict=True):
        assert torch.equal(core if isinstance(core, torch.Tensor) else core.core(), other)
