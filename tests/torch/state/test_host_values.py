"""Copies that share nothing, and digests of the bytes in C order."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from mpo_tn.torch.state.host_values import host_copy, tensors_digest

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool]


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4)])
def test_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape) * 5).to(dtype)
    data = np.ascontiguousarray(value.reshape(-1).view(torch.uint8).numpy()).tobytes()
    assert len(data) == value.numel() * dtype.itemsize
    assert tensors_digest([value]) == digest(data)
    assert tensors_digest([value, value]) == digest(data + data)
    assert torch.equal(host_copy(value), value)


def test_views_count_as_what_they_show() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    for view in (whole.T, whole[:, ::2], whole[1:], whole[:1].expand(3, 6), torch.nn.Parameter(whole.T)):
        plain = view.detach().clone(memory_format=torch.contiguous_format)
        assert tensors_digest([view]) == digest(plain.numpy().tobytes())
        copy = host_copy(view)
        assert torch.equal(copy, plain)
        assert copy.is_contiguous()
        assert not copy.requires_grad
        copy.zero_()
    assert torch.equal(whole, torch.arange(24.0).reshape(4, 6))


def test_nothing_has_a_digest_too() -> None:
    assert tensors_digest([]) == digest(b"")
