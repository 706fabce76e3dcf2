"""`python -m rnnkern run`: any program with rnnkern's layers in the place of torch.nn's."""

import atexit
import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .nn.cells import Cell
from .nn.layers import Layer
from .patching import patch

_is_compiling = torch.compiler.is_compiling
_SHOWN = 8  # reasons in the line at the end


class _Layers:
    """Counts the layers of the program and the paths that their calls take.

    The class's `select_backend`, which every forward asks once, is wrapped for it; outside `run`
    nothing of this is there. Inside a graph of Dynamo's nothing is counted.
    """

    def __init__(self) -> None:
        self.constructed = 0
        self.paths: list[tuple[str, Counter[str]]] = []  # of each layer called: repr, reasons
        self._of: Any = WeakKeyDictionary()  # the reasons of each module
        self._replicas: Any = {}

    def install(self) -> None:
        for base in (Layer, Cell):
            base.__init__ = self._counting(base)  # type: ignore[method-assign]
            base.select_backend = self._noting(base.select_backend)

    def _counting(self, base: Any) -> Any:
        def __init__(module: Any, *args: Any, **kwargs: Any) -> None:
            self.constructed += 1
            super(base, module).__init__(*args, **kwargs)

        return __init__

    def _noting(self, select_backend: Any) -> Any:
        def noted(module: nn.Module, *args: Any) -> Any:
            path = select_backend(module, *args)
            if not _is_compiling():
                self._note(module, "" if path is None or path.name == "fused" else str(path))
            return path

        return noted

    def _note(self, module: nn.Module, reason: str) -> None:
        # DataParallel makes new replicas for each call: those of one layer are counted together.
        replica = getattr(module, "_is_replica", False)
        known, key = (self._replicas, repr(module)) if replica else (self._of, module)
        counter = known.get(key)
        if counter is None:
            counter = known[key] = Counter()
            self.paths.append((repr(module), counter))
        counter[reason] += 1

    def line(self) -> str:
        """What the program's end says, in one line."""
        if not (self.constructed or self.paths):
            return "no LSTM, GRU, RNN or cell was made through torch.nn's names"
        fused = sum(set(reasons) == {""} for _, reasons in self.paths)
        others = Counter(
            f"{name}: {reason} ({reasons[reason]} of {reasons.total()} calls)"
            for name, reasons in self.paths
            for reason in sorted(reasons)
            if reason
        )
        parts = [f"{self.constructed} made", f"{len(self.paths)} called", f"{fused} all fused"]
        parts += [text if n == 1 else f"{n}× {text}" for text, n in others.most_common(_SHOWN)]
        if len(others) > _SHOWN:
            parts.append(f"{len(others) - _SHOWN} more like these")
        if self.constructed > len(self.paths):
            idle = self.constructed - len(self.paths)
            parts.append(f"{idle} not called, or only by compiled code or a forward of its own")
        return f"layers: {'; '.join(parts)}"


def _trimmed(traceback: TracebackType | None) -> TracebackType | None:
    """Without the frames above the program's own."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in own:
        traceback = traceback.tb_next
    return traceback


def _fresh_main() -> ModuleType:
    """An empty `__main__`, as Python starts a program with."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main


def _code(path: str) -> Any:
    with io.open_code(path) as file:
        code = pkgutil.read_code(file)  # of a .pyc
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec")
    return code


def _run_script(path: str, args: list[str]) -> None:
    """As `python path args…` does."""
    sys.argv[:] = [path, *args]
    file = os.path.join(os.getcwd(), path)
    container = os.path.isdir(path) or pkgutil.get_importer(path) is not None
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # else sys.path has no such entry
        sys.path[0] = file if container else os.path.dirname(os.path.realpath(path))
    elif container:
        sys.path.insert(0, file)
    main = _fresh_main()
    if container:  # a directory or an archive with a __main__.py
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    try:
        code = _code(file)
    except OSError as error:
        print(
            f"{sys.executable}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}",
            file=sys.stderr,
        )
        sys.exit(2)
    main.__dict__.update(
        __file__=file, __cached__=None, __loader__=SourceFileLoader("__main__", file)
    )
    exec(code, main.__dict__)


def _run_module(name: str, args: list[str]) -> None:
    """As `python -m name args…` does."""
    sys.argv[:] = ["-m", *args]
    _fresh_main()
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def run(target: list[str], as_module: bool) -> None:
    """Runs `target[0]`, a script or a module, with the arguments after it, under `patch()`.

    Exit codes, SystemExit and KeyboardInterrupt pass through; another exception is printed from the
    program's first frame on and ends with status 1. The last line on stderr sums up the layers.
    """
    layers, process = _Layers(), os.getpid()
    layers.install()
    patch()

    def report() -> None:
        if os.getpid() == process:  # not in its forked children
            print(f"rnnkern: {layers.line()}", file=sys.stderr)

    atexit.register(report)  # first, and so called last
    try:
        (_run_module if as_module else _run_script)(target[0], target[1:])
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        error.__traceback__ = _trimmed(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
