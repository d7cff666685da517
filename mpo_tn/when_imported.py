"""How something of another library is changed: once, and as soon as anybody imports it, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import local
from types import ModuleType
from typing import Any

_MARK = "_mpo_tn"


def wrap_once(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put ``around(method)`` in the place of a method, however often this is called; of a class method likewise.

    >>> class Theirs:
    ...     def greet(self): return "hello"
    >>> for _ in range(2):
    ...     wrap_once(Theirs, "greet", lambda original: lambda self: f"{original(self)}!")
    >>> Theirs().greet()
    'hello!'
    """
    found = vars(owner).get(name, getattr(owner, name))
    original = found.__func__ if isinstance(found, classmethod) else found
    if hasattr(original, _MARK):
        return
    wrapped = wraps(original)(around(original))
    vars(wrapped)[_MARK] = True
    setattr(owner, name, classmethod(wrapped) if isinstance(found, classmethod) else wrapped)


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call ``then`` once the module of this name is there: now, or right after it has been imported.

    >>> when_imported("json", lambda: print("it is there"))
    it is there
    """
    if sys.modules.get(name) is not None:
        then()
    else:
        sys.meta_path.insert(0, _Waiting(name, then))


class _Waiting(MetaPathFinder):
    """Finds one module as everybody else does, and sees that something is done once after it was imported.

    Finding is not importing: many only look whether a package is there.
    """

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then
        self._thread = local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if fullname != self.name or getattr(self._thread, "finding", False):
            return None
        self._thread.finding = True  # or finding it would end here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._thread.finding = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        spec.loader.exec_module = execute_then
        return spec
