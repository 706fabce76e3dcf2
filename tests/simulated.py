"""The CUDA operators on a CPU: compiled with the simulated chip, and put in rnnkern's place."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import torch
from cases import CELLS, Case
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import rnnkern.ops.autograd
import rnnkern.ops.library
from rnnkern._cell_library import includes
from rnnkern._missing import built
from rnnkern.own_cell import AddedCell, engine_library

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++")


FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DRNNKERN_CUDA_ON_HOST"]
FLAGS += ["-isystem", str(TORCH / "include"), "-I", str(ROOT / "tests/cuda_on_host")]


def compile_operators(path: Path) -> None:
    """The operators of csrc/bindings with tests/cuda_on_host, as a library at `path`."""
    patterns = ("csrc/bindings/torch_cuda_*.cpp", "tests/cuda_on_host/*.cpp")
    sources = sorted(str(source) for pattern in patterns for source in ROOT.glob(pattern))
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", str(built("_engine"))]
    objects = [str(path.with_name(f"{Path(source).stem}.o")) for source in sources]
    made = zip(sources, objects, strict=True)
    runs = [subprocess.Popen([COMPILER, *FLAGS, "-c", source, "-o", out]) for source, out in made]
    codes = [run.wait() for run in runs]
    if any(codes):
        raise RuntimeError("the CUDA operators do not compile for the CPU")
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(path), *link], check=True)


_KERNELS = """#include "cuda/cell_math.h"
{headers}#include "cuda/added_cell.h"
extern "C" __attribute__((visibility("default"))) const void* kernels_of(int cell) {{
  static const rnnkern::cuda::AddedKernels all[] = {{{kernels}}};
  return &all[cell];
}}
"""


def compile_kernels(cells: Sequence[AddedCell], path: Path) -> None:
    """The CUDA kernels of added cells, as one library at `path`."""
    headers = [f'#include "{cell.header}"\n{cell.include_around}' for cell in cells]
    kernels = [f"rnnkern::cuda::added_kernels_of<{cell.type}>()" for cell in cells]
    source = path.with_suffix(".cpp")
    source.write_text(_KERNELS.format(headers="".join(headers), kernels=", ".join(kernels)))
    command = [COMPILER, *FLAGS, *includes(path), "-shared", str(source), "-o", str(path)]
    subprocess.run(command, check=True)


def use_kernels(cells: Sequence[AddedCell], path: Path) -> None:
    """Gives the cells what `compile_kernels` made."""
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
