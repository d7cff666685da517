"""Sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.sizes import size_of

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(1, 10**6), st.sampled_from(list(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_a_number_and_a_unit(number: int, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit}"
    assert size_of(text.lower() if lower else text) == number * UNITS[unit]


@pytest.mark.parametrize(
    ("text", "bytes_"), [("1.5GB", 1_500_000_000), ("0.5 kib", 512), ("1e3", 1000), (12, 12), (12.9, 12)]
)
def test_fractions(text: Any, bytes_: int) -> None:
    assert size_of(text) == bytes_


@pytest.mark.parametrize(
    "text",
    [
        float("nan"),
        float("inf"),
        "",
        "MB",
        "25 apples",
        "25MBB",
        "-3MB",
        "0",
        "0.2",
        "nan",
        "inf",
        "1e400MB",
        "1,5MB",
        0,
        0.5,
        -1,
        True,
        None,
        [],
    ],
)
def test_what_is_no_size_is_refused_by_value(text: Any) -> None:
    with pytest.raises(MPOError, match="size="):
        size_of(text)
