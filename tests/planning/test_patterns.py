"""PEFT's grammar of names: a string is a regular expression on all of a name, a list holds names and suffixes."""

from __future__ import annotations

import pytest
from helpers.grammar import GRAMMAR, NAMES
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.patterns import matches


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        *GRAMMAR,
        (r".*", list(NAMES)),
        ([], []),
        ("", []),
    ],
)
def test_grammar(patterns: str | list[str], expected: list[str]) -> None:
    assert [name for name in NAMES if matches(name, patterns)] == expected


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 3))
def test_a_list_entry_is_a_name_or_its_end_at_a_dot(parts: list[str], start: int) -> None:
    name, end = ".".join(parts), ".".join(parts[min(start, len(parts) - 1) :])
    assert matches(name, [end])
    assert matches(name, [name])
    assert not matches(f"{name}c", [end])
    assert not matches(f"c{name}", [name])


@pytest.mark.parametrize("pattern", ["(", "re:*", "["])
def test_a_broken_expression_is_named(pattern: str) -> None:
    plain = pattern.removeprefix("re:")
    for given_pattern in (plain, f"re:{plain}", [f"re:{plain}"]):
        with pytest.raises(MPOError) as caught:
            matches("a", given_pattern)
        assert repr(plain) in str(caught.value)
