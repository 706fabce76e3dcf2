"""Libraries that are compiled on the user's machine: a folder of them, each under a name that says
all it was made of. Needs no torch.
"""

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_INSTANTIATED = "\n          detected during:\n"
_PACKAGE = Path(__file__).parent
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(.+)"', re.MULTILINE)


def include_folder() -> Path:
    """The folder of the engine's headers: `#include "cells/cell.h"` is found there."""
    installed = _PACKAGE / "csrc"
    return installed if installed.exists() else _PACKAGE.parent / "csrc"


def key_of(words: Iterable[str], files: Iterable[Path]) -> str:
    """The hash of these words, of the files and of those beside them that they include."""
    found = hashlib.sha256()
    for word in words:
        found.update(word.encode() + b"\0")
    given = {*files}
    for file in sorted(given.union(*map(_included, given))):
        found.update(file.read_bytes())
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


def cache_folder() -> Path:
    """The folder of compiled cells, RNNKERN_CACHE or one in the user's cache; theirs alone.

    The process loads what is in it.
    """
    given = os.environ.get("RNNKERN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(home) / "rnnkern"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_own(folder)
    return folder.resolve()


def require_own(path: Path) -> None:
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


def compiled(
    name: str, header: Path, target: str, text: str, command: Callable[[Path, Path], Sequence[str]]
) -> Path:
    """The library `name` in the folder; compiled now, unless that was done before.

    header   the user's, which the messages name
    target   what it is compiled for, in words
    text     its source file
    command  what compiles it: (source, library) -> words

    Raises RuntimeError with the compiler's words where it does not compile.
    """
    library = cache_folder() / name
    with _one_process(library):
        if not library.exists():
            _compile(library, header, target, text, command)
    require_own(library)
    return library


def _compile(
    library: Path,
    header: Path,
    target: str,
    text: str,
    command: Callable[[Path, Path], Sequence[str]],
) -> None:
    began = time.perf_counter()
    cell = library.name.partition("-")[0]
    print(f"rnnkern: compiling {cell} ({header.name}) for {target} ...", end=" ", file=sys.stderr)
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, made = Path(folder, "cell.cpp"), Path(folder, "cell.so")
        source.write_text(text)
        run = subprocess.run([*command(source, made)], capture_output=True, text=True)
        if run.returncode:
            print("failed", file=sys.stderr)
            # The first error; below it nvcc lists the engine's templates on the way to it.
            words, _, _ = run.stderr.partition(_INSTANTIATED)
            raise RuntimeError(f"{header} does not compile for {target}:\n{words.strip()}")
        made.chmod(0o700)
        made.replace(library)  # whole, whoever else compiles it now
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


def includes(header: Path) -> list[str]:
    """The compiler's arguments for the engine's headers and those beside a user's."""
    # Not -I for the header's folder: <limits.h> is not the engine's of that name.
    return [f"-I{include_folder()}", f"-iquote{header.parent}"]
