"""Compiles the stepwise CUDA kernels of an added cell from the same header. Needs no torch."""

import ctypes
import os
import re
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path

from ._cell_library import compiled, include_folder, includes, key_of
from .cell_spec import Cell
from .own_cell import AddedCell, engine_library

_FLAGS = ["-std=c++20", "-O3", "-shared", "--expt-relaxed-constexpr"]
_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
#: nvcc's own, which change what it does.
_VARIABLES = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_CAPABILITY = re.compile(r"(\d+)\.(\d)(a?)")

_SOURCE = """#include "cuda/cell_math.h"
#include "{header}"
{around}#include "cuda/added_cell.h"
RNNKERN_ADDED_KERNELS({type})
"""

#: By mode: why a cell has no kernels; "" if it has.
_refusals: dict[str, str] = {}


def refusal(mode: str) -> str:
    """Why the cell has no CUDA kernels in this process; "" if it has."""
    return _refusals.get(mode, "no CUDA kernels were compiled: there was no GPU")


def not_taken(spec: Cell) -> str:
    """Why the kernels do not take such a cell; "" if they do."""
    if spec.given_sums:
        return "CUDA kernels have a W_ih, and its sums are given"
    if spec.masks_hidden:
        return "CUDA kernels have no mask on h before W_hh"
    return ""


def add_kernels(cell: AddedCell, missing: str = "") -> None:
    """Compiles the cell's kernels for the GPUs here, unless that was done before, and adds them.

    Not where something is `missing`, or nvcc or a GPU's architecture is: `refusal` says so
    afterwards. Raises RuntimeError, with nvcc's words, where the header does not compile.
    """
    if cell.mode in _refusals:
        return
    missing = missing or _missing()
    if not missing:
        try:
            _load(cell.id, _library(cell))
        except RuntimeError as error:  # nvcc's host compiler may be one that it does not know
            message = f"{error}\n(RNNKERN_CUDA=0 leaves out the CUDA kernels)"
            raise RuntimeError(message) from None
    _refusals[cell.mode] = missing


def source_text(cell: AddedCell) -> str:
    """The library's source file."""
    return _SOURCE.format(header=cell.header, around=cell.include_around, type=cell.type)


def _missing() -> str:
    if os.environ.get("RNNKERN_CUDA") == "0":
        return "RNNKERN_CUDA=0 leaves out its CUDA kernels"
    if _nvcc() is None:
        return "its CUDA kernels are compiled at load, and there is no nvcc on PATH or in CUDA_HOME"
    if not _architectures():
        return "nvidia-smi names no GPU to compile its CUDA kernels for (TORCH_CUDA_ARCH_LIST can)"
    return ""


def _nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [Path(home, "bin", "nvcc") for home in homes if home]
    found = shutil.which("nvcc")
    named += [Path(found)] if found else []
    named.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in named if path.exists()), None)


def _architectures() -> list[str]:
    """Those of this machine's GPUs, such as "90", or those that TORCH_CUDA_ARCH_LIST names.

    torch is not asked: that would set up CUDA in a process that may never use it.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST") or _capabilities()
    return sorted({"".join(parts) for parts in _CAPABILITY.findall(named)})


@cache
def _capabilities() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def _library(cell: AddedCell) -> Path:
    nvcc, architectures = _nvcc(), _architectures()
    assert nvcc is not None  # `_missing` has looked
    binary, header, headers = nvcc.resolve(), Path(cell.header), include_folder()
    version = f"{binary} {binary.stat().st_size} {binary.stat().st_mtime_ns}"
    variables = [os.environ.get(name, "") for name in _VARIABLES]
    words = (cell.name, cell.type, version, *architectures, *_FLAGS, *variables)
    files = (header, headers / "cuda/added_cell.h", *(headers / "cells").glob("*.h"))
    target = "_".join(f"sm_{name}" for name in architectures)
    return compiled(
        f"{cell.name}-{target}-{key_of(words, files)}.so", header, target, source_text(cell),
        partial(_command, str(nvcc), architectures, header),
    )  # fmt: skip


def _command(
    nvcc: str, architectures: list[str], header: Path, source: Path, library: Path
) -> list[str]:
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    include, quoted = includes(header)
    command = [nvcc, *_FLAGS, *targets, include, f"-Xcompiler={quoted}"]
    return [*command, "-x", "cu", str(source), "-o", str(library)]


def _load(id: int, library: Path) -> None:
    kernels = ctypes.CDLL(str(library)).rnnkern_kernels
    kernels.restype = ctypes.c_void_p
    ctypes.CDLL(str(engine_library())).rnnkern_set_kernels(id, ctypes.c_void_p(kernels()))
