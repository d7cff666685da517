"""docs/architecture.md holds the one table of what each room may import; every import of the package keeps to it."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest
from helpers.paths import ROOT

PAGE = "docs/architecture.md"
MOST_LINES = 420
UNKNOWN = "named at run time"
EVERYWHERE = "every room"
IMPORTERS = ("import_module", "__import__")


def package_sources() -> dict[str, str]:
    files = sorted((ROOT / "mpo_tn").rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


SOURCES = package_sources()


def rows_of(text: str, first_column: str) -> list[list[str]]:
    """The cells of the table with this heading of its first column, row by row."""
    found = re.search(rf"^\| {first_column} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert found, f"{PAGE} has no table whose first column is {first_column!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell) or ([cell] if cell else [])


@dataclass(frozen=True)
class Table:
    """What each room and each library allows.

    Attributes:
        rooms: the rooms that a room may import; a room is used only by rooms before it.
        libraries: by whom a library may be imported.
        asked: by whom only inside a function, when it is asked for.
    """

    rooms: dict[str, list[str]]
    libraries: dict[str, list[str]]
    asked: dict[str, list[str]]

    @classmethod
    def of(cls, text: str) -> Table:
        rooms, libraries = rows_of(text, "room"), rows_of(text, "library")
        assert len({row[0] for row in rooms}) == len(rooms), "a room has two rows"
        return cls(
            {names_in(name)[0]: names_in(may) for name, _, may in rooms},
            {names_in(name)[0]: names_in(always) for name, always, _ in libraries},
            {names_in(name)[0]: names_in(asked) for name, _, asked in libraries},
        )


@dataclass(frozen=True)
class Import:
    """One name that a file imports; ``deferred`` if that waits for a call, or for a type checker."""

    line: int
    name: str
    deferred: bool


def module_of(path: str) -> str:
    """``"mpo_tn.chains.chain"`` of its path; a package is its ``__init__``."""
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: str) -> str:
    """The folder of a file in a package; a file in the root is a room of its own, and its ``__init__`` the face."""
    folders = PurePosixPath(path).parts[1:-1]
    stem = PurePosixPath(path).stem
    return "/".join(folders) if folders else "mpo_tn" if stem == "__init__" else stem


@cache
def imports_of(path: str, source: str, modules: frozenset[str]) -> tuple[Import, ...]:
    """Every import of a file at any depth, relative ones and ``importlib.import_module`` too."""

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            deferred = True
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            deferred = True
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, deferred)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield Import(node.lineno, inner if inner in modules else origin, deferred)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS:
            match node.args:
                case [ast.Constant(value=str(name))] if not name.startswith("."):
                    yield Import(node.lineno, name, deferred)
                case _:
                    yield Import(node.lineno, UNKNOWN, deferred)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, deferred)

    package = PurePosixPath(path).parent.parts
    return tuple(walk(ast.parse(source), False))


def known_module(name: str, modules: Container[str]) -> str:
    """The module that a dotted name is, or is in."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def faults(sources: Mapping[str, str], table: Table) -> list[str]:
    """What in the sources ``{path: text}`` the table does not allow, and what in the table is wrong; one line each."""
    modules = {module_of(path): path for path in sources}
    found = [*_faults_of_table(sources, table)]
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path, source in sources.items():
        here = room_of(path)
        for imported in imports_of(path, source, frozenset(modules)):
            place = f"{path}:{imported.line}"
            library = imported.name.partition(".")[0]
            if library != "mpo_tn":
                if library not in sys.stdlib_module_names:
                    found += _faults_of_library(place, path, imported, library, table)
                continue
            target = known_module(imported.name, modules)
            room = room_of(modules[target])
            graph[module_of(path)].add(target)
            if room != here and room not in table.rooms.get(here, []):
                allowed = ", ".join(table.rooms.get(here, [])) or "nothing"
                found.append(f"{place} imports {target}, of the room {room}: {here} may import {allowed}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
    return found


def _faults_of_table(sources: Mapping[str, str], table: Table) -> Iterator[str]:
    rooms, order = {room_of(path) for path in sources}, list(table.rooms)
    yield from (f"{PAGE} has no row for the room {room}" for room in sorted(rooms - set(order)))
    yield from (f"{PAGE} has a row for {room}, which does not exist" for room in order if room not in rooms)
    for position, (room, may) in enumerate(table.rooms.items()):
        for other in may:
            if other not in order[position + 1 :]:
                yield f"{PAGE} lets {room} import {other}, which is not below it"


def _faults_of_library(place: str, path: str, imported: Import, library: str, table: Table) -> Iterator[str]:
    def named(places: list[str]) -> bool:
        within = PurePosixPath(path).with_suffix("").relative_to("mpo_tn")
        return EVERYWHERE in places or any(within.is_relative_to(room) for room in places)

    key = UNKNOWN if imported.name == UNKNOWN else library
    if key not in table.libraries:
        yield f"{place} imports {key}, which has no row among the libraries of {PAGE}"
    elif named(table.libraries[key]):
        return
    elif not named(table.asked[key]):
        allowed = ", ".join((*table.libraries[key], *table.asked[key]))
        yield f"{place} imports {key}: only {allowed} may"
    elif not imported.deferred:
        yield f"{place} imports {key} as soon as it is loaded: here it has to wait inside a function"


def test_every_import_keeps_to_the_table() -> None:
    found = faults(SOURCES, Table.of(page()))
    assert not found, "\n".join(["", *found, f"Move the code to a room below, or change the table of {PAGE}."])


PLANTED = {
    "upward": ("chains/chain.py", "from mpo_tn.truncate.sweep import Sweep", "mpo_tn.truncate.sweep, of the room tru"),
    "in a function": ("chains/chain.py", "def f():\n    import mpo_tn.mpo.verbs", "the room mpo: chains may"),
    "for types": ("linalg.py", "if TYPE_CHECKING:\n    from mpo_tn.chains.chain import Chain", "the room chains"),
    "relative": ("chains/chain.py", "from ..truncate import sweep", "imports mpo_tn.truncate.sweep"),
    "relative, of a face": ("chains/__init__.py", "from ..fit.sweeps import fit", "imports mpo_tn.fit.sweeps"),
    "module from the root": ("planning/legs.py", "from mpo_tn import torch", "imports mpo_tn.torch, of the room torch"),
    "the face": ("storage/files.py", "from mpo_tn import MPO", "imports mpo_tn, of the room mpo_tn"),
    "by name": ("mpo/verbs.py", 'importlib.import_module("mpo_tn.torch.layers")', "the room torch/layers"),
    "a name nobody can read": ("fit/sweeps.py", "importlib.import_module(name)", "imports named at run time: only"),
    "not named though below": ("tuning/run.py", "import mpo_tn.plot", "the room plot: tuning may import"),
    "torch in chains": ("chains/chain.py", "import torch.nn", "imports torch: only torch, tuning, app"),
    "torch in planning": ("planning/cost.py", "def f():\n    from torch import nn", "imports torch: only"),
    "transformers in tuning": ("tuning/run.py", "def f():\n    import transformers", "imports transformers: only"),
    "JAX at once": ("linalg.py", "try:\n    import jax\nexcept ImportError:\n    pass", "has to wait inside"),
    "TensorNetwork twice": ("chains/norms.py", "def f():\n    import tensornetwork", "only chains/contraction may"),
    "a library of no row": ("tuning/run.py", "import requests", "imports requests, which has no row"),
    "a room of no row": ("attic/__init__.py", "", "no row for the room attic"),
    "a module of no row": ("attic.py", "", "no row for the room attic"),
    "a circle in a room": ("chains/chain.py", "from mpo_tn.chains import algebra", "import each other in a circle"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_import_is_found(kind: str) -> None:
    file, planted, expected = PLANTED[kind]
    path = f"mpo_tn/{file}"
    before = SOURCES.get(path, "")
    table = Table.of(page())
    new = set(faults({**SOURCES, path: before + planted + "\n"}, table)) - set(faults(SOURCES, table))
    assert any(expected in fault for fault in new), new
    placed = [re.match(rf"{re.escape(path)}:(\d+) ", fault) for fault in new]
    assert all(int(match[1]) > before.count("\n") for match in placed if match)


def test_a_table_that_is_not_in_order_is_found() -> None:
    rows = [line for line in page().splitlines() if line.startswith(("| `chains` |", "| `linalg` |"))]
    swapped = page().replace(rows[0], "X").replace(rows[1], rows[0]).replace("X", rows[1])
    assert f"{PAGE} lets chains import linalg, which is not below it" in faults(SOURCES, Table.of(swapped))
    gone = page().replace(rows[1] + "\n", "")
    assert f"{PAGE} has no row for the room linalg" in faults(SOURCES, Table.of(gone))
    more = page().replace(rows[1], rows[1] + "\n| `attic` | nothing | |")
    assert f"{PAGE} has a row for attic, which does not exist" in faults(SOURCES, Table.of(more))


def test_one_module_knows_tensornetwork_and_opt_einsum() -> None:
    modules = frozenset(map(module_of, SOURCES))
    knows = {
        path
        for path, source in SOURCES.items()
        for imported in imports_of(path, source, modules)
        if imported.name.partition(".")[0] in ("tensornetwork", "opt_einsum")
    }
    assert knows == {"mpo_tn/chains/contraction.py"}


def test_modules_are_short_named_plainly_and_say_what_they_are() -> None:
    long = {path: text.count("\n") for path, text in SOURCES.items() if text.count("\n") > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: {long}"
    hidden = [path for path in SOURCES if re.search(r"(^|/)_(?!_(init|main)__\.py$)", path)]
    assert not hidden, f"a package's __init__ is its face, and module names carry no underscore: {hidden}"
    silent = [path for path, text in SOURCES.items() if not ast.get_docstring(ast.parse(text))]
    assert not silent, f"no docstring: {silent}"


def defined_in(source: str) -> set[str]:
    """The names that a module itself gives a meaning to; what it imports is not among them."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("face", ["mpo_tn", "mpo_tn.torch"])
def test_every_public_name_is_where_the_page_says(face: str) -> None:
    where = {name: names_in(file)[0] for names, file in rows_of(page(), "name") for name in names_in(names)}
    module = importlib.import_module(face)
    for name in module.__all__:
        value = getattr(module, name)
        home = getattr(value, "__module__", face).replace(".", "/") + ".py"
        assert name in where, f'add the row | `{name}` | `{home}` | to "Where is ...?" in {PAGE}'
        assert name in defined_in(SOURCES[where[name]]), f"{PAGE} says {where[name]}, but {face}.{name} is in {home}"
        assert getattr(importlib.import_module(module_of(where[name])), name) is value


def test_the_page_names_no_other_names_and_only_rooms_that_exist() -> None:
    faces = [importlib.import_module(face) for face in ("mpo_tn", "mpo_tn.torch")]
    public = {name for face in faces for name in face.__all__}
    named = [name for names, _ in rows_of(page(), "name") for name in names_in(names)]
    assert sorted(named) == sorted(public)
    rooms = {room_of(path) for path in SOURCES}
    places = {module_of(path).removeprefix("mpo_tn.").replace(".", "/") for path in SOURCES} | rooms
    written = re.findall(r"`(\w+(?:/\w+)+(?:\.py)?)`", page())
    assert written
    gone = [place for place in written if not ((ROOT / place).exists() if place.endswith(".py") else place in places)]
    assert not gone, f"{PAGE} names what is not there: {gone}"
