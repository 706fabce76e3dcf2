"""Compiles the header of a user's cell into a library of its own, and adds it to the engine.

The library has the engine's templates for this one cell, at one instruction-set level. It is kept
in a folder of the user's, under a name that says all it was made of. Needs no torch.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from ._missing import built, not_built

_PACKAGE = Path(__file__).parent
_CFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", "-g0"]
# As setup.py has them; the first error says what is wrong, the others follow from it.
_CFLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wfatal-errors"]
_STRUCT = re.compile(r"^\s*struct\s+(\w+)[^;{]*\bCellDefaults\b", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(.+)"', re.MULTILINE)

_SOURCE = """#include "cells/limits.h"
#include "{header}"
{around}static_assert(rnnkern::check_limits<{type}>());
#include "cpu/added_cell.h"
RNNKERN_ADDED_CELL({type}, "{mode}")
"""


@dataclass(frozen=True)
class Source:
    """What the library of a cell is compiled from.

    header  the file with its struct
    struct  the name of that
    name    of the cell's classes in Python
    around  the engine's template around the struct, such as Zoneout (cells/zoneout.h); or ""
    """

    header: str
    struct: str
    name: str
    around: str = ""

    @property
    def type(self) -> str:
        """The cell in C++."""
        return f"rnnkern::{self.around}<{self.struct}>" if self.around else self.struct

    def text(self, mode: str) -> str:
        """The library's source file."""
        around = f'#include "cells/{self.around.lower()}.h"\n' if self.around else ""
        return _SOURCE.format(header=self.header, around=around, type=self.type, mode=mode)


@dataclass(frozen=True)
class AddedCell(Source):
    """A cell that was added to the engine.

    id    the number that crosses the bindings
    mode  its name among all cells: that in Python and, after an @, of what it was made of
    """

    id: int = -1
    mode: str = ""


#: By mode.
_added: dict[str, AddedCell] = {}


def added(mode: str) -> AddedCell | None:
    """The cell of this mode, if this process has it."""
    return _added.get(mode)


def include_folder() -> Path:
    """The folder of the engine's headers: `#include "cells/cell.h"` is found there."""
    installed = _PACKAGE / "csrc"
    return installed if installed.exists() else _PACKAGE.parent / "csrc"


def add(header: str | os.PathLike[str], level: str, name: str | None = None) -> AddedCell:
    """Compiles a cell's header for this level, unless that was done before, and adds the cell.

    level  one that the library has ("avx512_bf16"); an added cell has no kernels for bfloat16
    name   of the struct; if None, the one in the header that derives from CellDefaults

    Raises FileNotFoundError without the header, ValueError where `name` is needed, RuntimeError
    without a compiler, where the header does not compile, and for a folder that others can write.
    """
    path = Path(header).resolve(strict=True)
    name = name or _only_struct(path)
    return add_source(Source(str(path), name, name), level)


def add_source(source: Source, level: str) -> AddedCell:
    """`add` for what is not just a struct in a header."""
    level = re.sub("_(bf16|amx)$", "", level)
    key = _key(source, level)
    mode = f"{source.name}@{key[:8]}"
    if mode not in _added:
        library = _cache_folder() / f"{source.name}-{level}-{key}.so"
        with _one_process(library):
            if not library.exists():
                _compile(source, mode, level, library)
        header, struct, name, around = source.header, source.struct, source.name, source.around
        _added[mode] = AddedCell(header, struct, name, around, _load(library), mode)
    return _added[mode]


def _only_struct(path: Path) -> str:
    found: list[str] = _STRUCT.findall(path.read_text())
    if len(found) != 1:
        raise ValueError(
            f"{path} has {len(found)} structs that derive from CellDefaults: say which one is the "
            "cell, name=..."
        )
    return found[0]


def _key(source: Source, level: str) -> str:
    """The hash of all that a library is made of, and of what made it."""
    found = hashlib.sha256()
    words = (source.name, source.type, level, *_compiler(), *_flags(), platform.machine())
    for word in words:
        found.update(word.encode() + b"\0")
    path, engine = Path(source.header), include_folder() / "cpu/added_cell.h"
    cells = (include_folder() / "cells").glob("*.h")
    for file in sorted({path, engine, *cells, *_included(path), *_included(engine)}):
        found.update(file.read_bytes())
    found.update((include_folder() / "cpu/levels.txt").read_bytes())
    return found.hexdigest()[:32]


def _included(path: Path) -> set[Path]:
    """The files beside a header that it includes, and those that they include."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        for name in _INCLUDE.findall(file.read_text()):
            included = (file.parent / name).resolve()
            if included.exists() and included not in found:
                found.add(included)
                waiting.append(included)
    return found


def _cache_folder() -> Path:
    """The folder of compiled cells, RNNKERN_CACHE or one in the user's cache; theirs alone.

    What lies there is loaded into the process.
    """
    given = os.environ.get("RNNKERN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(home) / "rnnkern"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    return folder.resolve()


def _require_own(path: Path) -> None:
    found = path.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise RuntimeError(f"{path} belongs to another user: compiled cells are not taken from it")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(
            f"{path} can be written by others: compiled cells are not taken from it "
            f"(chmod go-w {path}, or name another folder in RNNKERN_CACHE)"
        )


@contextmanager
def _one_process(library: Path) -> Iterator[None]:
    """The processes that need a library wait for the one that compiles it."""
    if fcntl is None or library.exists():
        yield
        return
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compiler() -> list[str]:
    named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    command = shlex.split(named)
    if shutil.which(command[0]) is None:
        raise RuntimeError(
            f"an own cell is compiled at its first use, and there is no {command[0]}: install a "
            "C++20 compiler (on Debian and Ubuntu: apt install g++), or name yours, as in "
            "CXX=clang++"
        )
    return command


def _flags() -> list[str]:
    return [*_CFLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def _level_flags(level: str) -> list[str]:
    for line in (include_folder() / "cpu/levels.txt").read_text().splitlines():
        where, name, *flags = line.split()
        if where != "#" and name == level:
            return [*flags, f"-DRNNKERN_ISA={level}"]
    raise RuntimeError(f"the engine has no level {level}")


def _engine_library() -> Path:
    path = built("_engine")
    if path is None:
        raise RuntimeError(not_built("_engine"))
    return path


def _compile(cell: Source, mode: str, level: str, library: Path) -> None:
    engine, header = _engine_library(), Path(cell.header)
    began = time.perf_counter()
    print(
        f"rnnkern: compiling {cell.name} ({header.name}) for {level} ...", end=" ", file=sys.stderr
    )
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, made = Path(folder, "cell.cpp"), Path(folder, "cell.so")
        source.write_text(cell.text(mode))
        # Not -I for the header's folder: <limits.h> is not the engine's of that name.
        includes = [f"-I{include_folder()}", f"-iquote{header.parent}"]
        command = [*_compiler(), *_flags(), *_level_flags(level), *includes]
        command += [str(source), "-o", str(made), str(engine), f"-Wl,-rpath,{engine.parent}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            print("failed", file=sys.stderr)
            raise RuntimeError(f"{header} does not compile:\n{run.stderr.strip()}")
        made.chmod(0o700)
        made.replace(library)  # whole, whoever else compiles it now
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


def _load(library: Path) -> int:
    """Loads a cell's library; returns its number."""
    _require_own(library)
    ctypes.CDLL(str(_engine_library()))  # of this package, before the library asks for it
    id: int = ctypes.CDLL(str(library)).rnnkern_add_cell()
    if id < 0:
        raise RuntimeError("there are too many cells: 256 can be added to a process")
    return id
