"""Calls a function once a module has been imported, now or later. Needs no torch."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and has the function called after it is loaded.

    To be asked for the module does not mean that it is imported (importlib.util.find_spec), so the
    finder stays until the module is loaded.
    """

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function, self._asking = name, function, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self._asking:  # another finder may ask all others as well
            return None
        self._asking = True
        try:
            for finder in sys.meta_path:
                find = None if finder is self else getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find and find(name, path, target)
                if spec:
                    self._extend(spec.loader)
                    return spec
        finally:
            self._asking = False
        return None

    def _extend(self, loader: Any) -> None:
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function(module)

        loader.exec_module = exec_module


def after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Calls `function(module)` at once if the module `name` is imported, else when it has been."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, function))
