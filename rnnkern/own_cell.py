"""Compiles the header of a user's cell into a library of its own, and adds it to the engine.

The library has the engine's templates for this one cell, at one instruction-set level. It is kept
in a folder of the user's, under a name that says all it was made of. Needs no torch.
"""

import ctypes
import os
import platform
import re
import shlex
import shutil
import sysconfig
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ._cell_library import compiled, include_folder, includes, key_of
from ._missing import built, not_built

_CFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", "-g0"]
# As setup.py has them; the first error says what is wrong, the others follow from it.
_CFLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wfatal-errors"]
# Header in the engine's cells/ and struct of each built-in cell, by mode.
_BUILT_IN = {
    "LSTM": ("lstm.h", "rnnkern::Lstm"),
    "GRU": ("gru.h", "rnnkern::Gru"),
    "RNN_TANH": ("elman.h", "rnnkern::ElmanTanh"),
    "RNN_RELU": ("elman.h", "rnnkern::ElmanRelu"),
}
_STRUCT = re.compile(r"^\s*struct\s+(\w+)[^;{]*\bCellDefaults\b", re.MULTILINE)

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

    def inside(self, around: str) -> "Source":
        """The cell with a template around it, such as "Zoneout"."""
        return Source(self.header, self.struct, f"{around}{self.name}", around)

    @property
    def include_around(self) -> str:
        """The line of a source file that includes the template, if there is one."""
        words = re.findall("[A-Z][a-z]*", self.around)
        return f'#include "cells/{"_".join(words).lower()}.h"\n' if words else ""

    def text(self, mode: str) -> str:
        """The library's source file."""
        around = self.include_around
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


def source_of(header: str | os.PathLike[str], name: str | None = None) -> Source:
    """The cell of a user's header; raises what `add` does for it."""
    path = Path(header).resolve(strict=True)
    name = name or _only_struct(path)
    return Source(str(path), name, name)


def built_in_source(mode: str) -> Source:
    """A built-in cell, to put a template around it."""
    header, struct = _BUILT_IN[mode]
    return Source(str(include_folder() / "cells" / header), struct, mode)


def add(header: str | os.PathLike[str], level: str, name: str | None = None) -> AddedCell:
    """Compiles a cell's header for this level, unless that was done before, and adds the cell.

    level  one that the library has ("avx512_bf16"); an added cell has no kernels for bfloat16
    name   of the struct; if None, the one in the header that derives from CellDefaults

    Raises FileNotFoundError without the header, ValueError where `name` is needed, RuntimeError
    without a compiler, where the header does not compile, and for a folder that others can write.
    """
    return add_source(source_of(header, name), level)


def add_source(source: Source, level: str) -> AddedCell:
    """`add` for what is not just a struct in a header."""
    level = re.sub("_(bf16|amx)$", "", level)
    key = _key(source, level)
    mode = f"{source.name}@{key[:8]}"
    if mode not in _added:
        path = Path(source.header)
        library = compiled(
            f"{source.name}-{level}-{key}.so", path, level, source.text(mode),
            partial(_command, level, path),
        )  # fmt: skip
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
    words = (source.name, source.type, level, *_compiler(), *_flags(), platform.machine())
    headers = include_folder()
    cells = (headers / "cells").glob("*.h")
    files = (Path(source.header), headers / "cpu/added_cell.h", headers / "cpu/levels.txt")
    return key_of(words, (*files, *cells))


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


def engine_library() -> Path:
    path = built("_engine")
    if path is None:
        raise RuntimeError(not_built("_engine"))
    return path


def _command(level: str, header: Path, source: Path, library: Path) -> list[str]:
    engine = engine_library()
    command = [*_compiler(), *_flags(), *_level_flags(level), *includes(header)]
    return [*command, str(source), "-o", str(library), str(engine), f"-Wl,-rpath,{engine.parent}"]


def _load(library: Path) -> int:
    """Loads a cell's library; returns its number."""
    ctypes.CDLL(str(engine_library()))  # of this package, before the library asks for it
    id: int = ctypes.CDLL(str(library)).rnnkern_add_cell()
    if id < 0:
        raise RuntimeError("there are too many cells: 256 can be added to a process")
    return id
