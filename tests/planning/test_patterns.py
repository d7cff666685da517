"""PEFT's grammar of names: a string is a regular expression on all of a name, a list holds names and suffixes."""

from __future__ import annotations

import pytest
from helpers.grammar import GRAMMAR, NAMES
from hypothesis import given
from hypothesis import strategies as st

from mpo_tn import MPOError
from mpo_tn.planning.patterns import check_matched, matches


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


@pytest.mark.guarantee("patterns-mean-something")
@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["query", "qurey"], r"'qurey' matches no module: did you mean query\?"),
        ([".*query"], r"'\.\*query'.*'re:\.\*query'.*matches"),
        ("query$", r"did you mean query\?|regular expression"),
        (["re:.*quere"], r"did you mean query\?"),
        ("key", r"in a list, \['key'\], it matches"),
        (["zzzz"], r"for instance"),
        (["x" * 5000], r"'x{60}\.\.\.'"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_comes_close(patterns: str | list[str], said: str) -> None:
    known = ["encoder.0.query", "encoder.0.key", "encoder.0"]
    with pytest.raises(MPOError, match=said) as caught:
        check_matched("patterns={}", patterns, known)
    assert len(str(caught.value)) < 400


@given(st.lists(st.sampled_from(NAMES), min_size=1), st.booleans())
def test_what_matches_something_passes(names: list[str], ends: bool) -> None:
    check_matched("patterns={}", [name.rpartition(".")[2] if ends else name for name in names], NAMES)


def test_a_broken_entry_of_a_list_has_no_expression_to_suggest() -> None:
    with pytest.raises(MPOError, match=r"'\(que' matches no module"):
        check_matched("patterns={}", ["(que"], ["a.query"])
