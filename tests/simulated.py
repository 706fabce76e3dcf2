"""The CUDA operators on a CPU: compiled with the simulated chip, and put in rnnkern's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import torch
from cases import CELLS, Case
from filelock import FileLock
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import rnnkern.ops.autograd
import rnnkern.ops.library
from rnnkern._cell_library import includes, key_of
from rnnkern._missing import built
from rnnkern.own_cell import AddedCell, engine_library

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++")
#: Where compiled libraries are kept.
FOLDER = ROOT / "build" / "simulated"


FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DRNNKERN_CUDA_ON_HOST"]
FLAGS += ["-isystem", str(TORCH / "include"), "-I", str(ROOT / "tests/cuda_on_host")]


def _kept(files: Sequence[Path], make: Callable[[Path], None], *words: str) -> Path:
    """The library that `make` compiles from these files, once until one of them changes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{key_of([str(COMPILER), *FLAGS, torch.__version__, *words], files)}.so"
    with FileLock(path.with_suffix(".lock")), TemporaryDirectory(dir=FOLDER) as fresh:
        if not path.exists():
            made = Path(fresh, path.name)
            make(made)
            made.replace(path)  # whole, or not at all
    return path


def _compile_operators(sources: Sequence[Path], path: Path) -> None:
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", str(built("_engine"))]
    objects = [str(path.with_name(f"{source.stem}.o")) for source in sources]
    made = zip(map(str, sources), objects, strict=True)
    runs = [subprocess.Popen([COMPILER, *FLAGS, "-c", source, "-o", out]) for source, out in made]
    codes = [run.wait() for run in runs]
    if any(codes):
        raise RuntimeError("the CUDA operators do not compile for the CPU")
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(path), *link], check=True)


def operators() -> Path:
    """The library of the operators of csrc/bindings with tests/cuda_on_host."""
    patterns = ("csrc/bindings/torch_cuda_*.cpp", "tests/cuda_on_host/*.cpp")
    sources = sorted(source for pattern in patterns for source in ROOT.glob(pattern))
    return _kept(sources, partial(_compile_operators, sources))


_KERNELS = """#include "cuda/cell_math.h"
{headers}#include "cuda/added_cell.h"
extern "C" __attribute__((visibility("default"))) const void* kernels_of(int cell) {{
  static const rnnkern::cuda::AddedKernels all[] = {{{kernels}}};
  return &all[cell];
}}
"""


def _compile_kernels(text: str, include: Sequence[str], path: Path) -> None:
    source = path.with_suffix(".cpp")
    source.write_text(text)
    command = [COMPILER, *FLAGS, *include, "-shared", str(source), "-o", str(path)]
    subprocess.run(command, check=True)


def kernels(cells: Sequence[AddedCell]) -> Path:
    """The library of the CUDA kernels of added cells."""
    headers = [f'#include "{cell.header}"\n{cell.include_around}' for cell in cells]
    of_each = [f"rnnkern::cuda::added_kernels_of<{cell.type}>()" for cell in cells]
    text = _KERNELS.format(headers="".join(headers), kernels=", ".join(of_each))
    files = [ROOT / "csrc/cuda/added_cell.h", *(Path(cell.header) for cell in cells)]
    include = includes(Path(cells[0].header))
    return _kept(files, partial(_compile_kernels, text, include), text)


def use_kernels(cells: Sequence[AddedCell], path: Path) -> None:
    """Gives the cells what `kernels` made."""
    kernels_of = ctypes.CDLL(str(path)).kernels_of
    kernels_of.restype = ctypes.c_void_p
    engine = ctypes.CDLL(str(engine_library()))
    for place, cell in enumerate(cells):
        engine.rnnkern_set_kernels(cell.id, ctypes.c_void_p(kernels_of(place)))


@contextmanager
def loaded(path: Path) -> Iterator[None]:
    """torch.ops.rnnkern_cuda_on_host."""
    torch.ops.load_library(path)

    # torch has these on CUDA only: products of half types with a float32 result.
    def matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    aten = torch.library.Library("aten", "IMPL")
    aten.impl("mm.dtype_out", matmul, "CPU")
    aten.impl("bmm.dtype_out", matmul, "CPU")
    yield
    aten._destroy()


@contextmanager
def in_place() -> Iterator[None]:
    """rnnkern's layers call these operators. New tensors are NaN, so that an element that no kernel
    writes shows; one thread, as all tensors are small and the simulation is serial."""
    saved = (rnnkern.ops.autograd.NATIVE, rnnkern.ops.library.forward, rnnkern.ops.library.backward)
    rnnkern.ops.autograd.NATIVE = None  # it would go to the CPU engine
    rnnkern.ops.library.forward = torch.ops.rnnkern_cuda_on_host.forward.default
    rnnkern.ops.library.backward = torch.ops.rnnkern_cuda_on_host.backward.default
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        rnnkern.ops.autograd.NATIVE, rnnkern.ops.library.forward, rnnkern.ops.library.backward = (
            saved
        )


def random_cases(**more: SearchStrategy[Any]) -> SearchStrategy[Case]:
    """Calls whose layers fit on the chip, of a block or of several; `more` of their attributes."""
    return st.builds(
        Case,
        st.sampled_from(CELLS),
        T=st.integers(1, 14),
        B=st.integers(1, 20),
        I=st.integers(1, 9),
        H=st.one_of(st.integers(1, 70), st.integers(1, 270)),
        bias=st.booleans(),
        hx=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
        **more,
    )
