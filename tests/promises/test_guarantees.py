"""Every promise that a docstring makes has an id, and at least one test that is marked as its proof.

A docstring says ``Guarantee (its-id): ...``, and a test that proves it is marked ``@pytest.mark.guarantee("its-id")``.
Both are read from the sources, nothing is imported. ``python tests/promises/test_guarantees.py`` prints which test
proves what.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATED = re.compile(r"\bGuarantee\b(?: \(([^)]*)\))?:")
ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Claim:
    """An id, or None where there is none, and where it stands: in a docstring, or as a mark of a test."""

    id: str | None
    place: str


def docstrings(path: str, source: str) -> Iterator[tuple[str, str]]:
    """Every string that stands alone, as docstrings do, and those below the names they describe; with the place."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield f"{path}:{node.lineno}", node.value.value


def stated(sources: Mapping[str, str]) -> list[Claim]:
    """The guarantees of docstrings, in order."""
    return [
        Claim(match[1] if match[1] is not None and ID.fullmatch(match[1]) else None, place)
        for path, source in sources.items()
        for place, text in docstrings(path, source)
        for match in STATED.finditer(text)
    ]


def is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.guarantee"


def marked(sources: Mapping[str, str]) -> list[Claim]:
    """The ids with which tests are marked. None: an argument that is no string, or a mark on what is no test."""
    found: list[Claim] = []
    for path, source in sources.items():
        tree = ast.parse(source)
        tests = {
            id(mark): f"{path}::{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            for mark in node.decorator_list
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_mark(node.func):
                place = tests.get(id(node), f"{path}:{node.lineno}")
                values = [value.value if isinstance(value, ast.Constant) else None for value in node.args] or [None]
                known = id(node) in tests and not node.keywords
                found += [Claim(value if known and isinstance(value, str) else None, place) for value in values]
        bare = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        found += [
            Claim(None, f"{path}:{node.lineno}")
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and is_mark(node) and id(node) not in bare
        ]
    return found


def faults(package: Mapping[str, str], tests: Mapping[str, str]) -> list[str]:
    """What is wrong, a line each: nothing if every guarantee has an id of its own and a test, and no mark is idle."""
    promised, proofs = stated(package), marked(tests)
    places: dict[str, list[str]] = {}
    for claim in promised:
        if claim.id is not None:
            places.setdefault(claim.id, []).append(claim.place)
    proved = {claim.id for claim in proofs}
    return [
        *(f"{claim.place}: a Guarantee without an id (lower case, with hyphens)" for claim in promised if not claim.id),
        *(f"{' and '.join(found)}: {name} is stated twice" for name, found in places.items() if len(found) > 1),
        *(
            f"{found[0]}: no test is marked as the proof of {name}"
            for name, found in places.items()
            if name not in proved
        ),
        *(f"{claim.place}: a mark that is no id, or on no test" for claim in proofs if claim.id is None),
        *(f"{c.place}: no docstring states {c.id}" for c in proofs if c.id is not None and c.id not in places),
    ]


def sources_of(folder: str) -> dict[str, str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def test_every_guarantee_has_an_id_and_a_test() -> None:
    found = faults(sources_of("mpo_tn"), sources_of("tests"))
    assert not found, "\n".join(["", *found])
    assert len(stated(sources_of("mpo_tn"))) > 40


PACKAGE = {
    "a.py": '"""Guarantee (one): x."""\ndef f():\n    """F.\n\n    Guarantee (two-3): y.\n    """\nK = 1\n"""K."""\n'
}
MARKED = '''
import pytest
@pytest.mark.guarantee("one", "two-3")
@pytest.mark.slow
def test_a():
    """Guarantee: not read here."""
'''
TESTS = {"t.py": MARKED}


def test_what_is_in_order_has_no_faults() -> None:
    assert faults(PACKAGE, TESTS) == []
    assert [claim.id for claim in stated(PACKAGE)] == ["one", "two-3"]
    assert marked(TESTS) == [Claim("one", "t.py::test_a"), Claim("two-3", "t.py::test_a")]


@pytest.mark.parametrize(
    ("package", "tests", "fault"),
    [
        ({"b.py": '"""Guarantee (three): z."""'}, {}, "b.py:1: no test is marked as the proof of three"),
        ({"b.py": 'K = 1\n"""Guarantee (three): z."""'}, {}, "b.py:2: no test is marked as the proof of three"),
        ({"b.py": '"""Guarantee (one): again."""'}, {}, "a.py:1 and b.py:1: one is stated twice"),
        ({"b.py": '"""B. Guarantee (one): and Guarantee (one): again."""'}, {}, "and b.py:1: one is stated twice"),
        ({"b.py": 'class B:\n    """Guarantee: z."""'}, {}, "b.py:2: a Guarantee without an id"),
        ({"b.py": '"""Guarantee (Three Of): z."""'}, {}, "b.py:1: a Guarantee without an id"),
        ({"b.py": '"""Guarantee (): z."""'}, {}, "b.py:1: a Guarantee without an id"),
        ({}, {"u.py": '@pytest.mark.guarantee("four")\ndef test_b(): ...'}, "u.py::test_b: no docstring states four"),
        ({}, {"u.py": "@pytest.mark.guarantee()\ndef test_b(): ..."}, "u.py::test_b: a mark that is no id"),
        ({}, {"u.py": "@pytest.mark.guarantee\ndef test_b(): ..."}, "u.py:1: a mark that is no id"),
        ({}, {"u.py": "@pytest.mark.guarantee(NAME)\ndef test_b(): ..."}, "u.py::test_b: a mark that is no id"),
        (
            {},
            {"u.py": '@pytest.mark.guarantee("one")\ndef helper(): ...'},
            "u.py:1: a mark that is no id, or on no test",
        ),
        ({}, {"u.py": 'x = pytest.param(1, marks=pytest.mark.guarantee("one"))'}, "u.py:1: a mark that is no id, or"),
    ],
)
def test_a_planted_fault_is_found(package: dict[str, str], tests: dict[str, str], fault: str) -> None:
    (found,) = faults(PACKAGE | package, TESTS | tests)
    assert fault in found


def test_a_lost_mark_is_missed() -> None:
    (found,) = faults(PACKAGE, {"t.py": MARKED.replace(', "two-3"', "")})
    assert found == "a.py:3: no test is marked as the proof of two-3"


if __name__ == "__main__":
    by_id: dict[str | None, list[str]] = {}
    for mark in marked(sources_of("tests")):
        by_id.setdefault(mark.id, []).append(mark.place)
    for claim in stated(sources_of("mpo_tn")):
        print(f"{claim.id} ({claim.place})", *(f"    {place}" for place in by_id.get(claim.id, ())), sep="\n")
