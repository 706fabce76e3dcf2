"""The compiled parts: the CPU engine once per instruction set, and the bindings.

Everything else about the package stands in pyproject.toml.
"""

import copy
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.errors import CompileError
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

LINUX = sys.platform == "linux"
CFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Python's own flags ask for debug information: ten times the size of the code.
CFLAGS += ["-g0"]
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised.
CFLAGS += ["-Wno-maybe-uninitialized"]
# Error messages name the source file: as it is called here, not where it was built.
CFLAGS += [f"-ffile-prefix-map={Path.cwd()}/="]


LEVELS = "csrc/cpu/levels.txt"


def levels() -> dict[str, list[str]]:
    """Name and compiler flags of each instruction-set level of this architecture."""
    lines = Path(LEVELS).read_text().splitlines()
    wanted = ("any", "x86") if platform.machine() in ("x86_64", "AMD64") else ("any",)
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: flags for where, name, *flags in rows if where in wanted}


# The stable ABI of torch 2.10: what is compiled against newer headers loads in every later torch.
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


def headers(source: Path) -> set[Path]:
    """The files of this project that a source includes, and those that they include."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            header = Path(os.path.normpath(path.parent / name))
            if header.exists() and header not in found:
                found.add(header)
                waiting.append(header)
    return found


def dependencies(*sources: str) -> list[str]:
    """What a target of these sources must be rebuilt for."""
    return sorted({str(path) for s in sources for path in (Path(s), *headers(Path(s)))})


def library(name: str, sources: list[str], flags: list[str]) -> tuple[str, dict]:
    return name, {
        "sources": sources,
        "cflags": [*CFLAGS, *flags],
        "obj_deps": {source: [LEVELS, *dependencies(source)] for source in sources},
    }


libraries = [
    library(f"rnnkern_{isa}", ["csrc/cpu/engine.cpp"], [*flags, f"-DRNNKERN_ISA={isa}"])
    for isa, flags in levels().items()
]


def jobs() -> int:
    """How many compilers may run at once: torch's own variable, or the cores of this process."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


class BuildLibraries(build_clib):
    """Compiles the libraries side by side, each into objects of its own."""

    def build_libraries(self, libraries: list) -> None:
        def build(item: tuple[str, dict]) -> None:
            one = copy.copy(self)
            one.build_temp = f"{self.build_temp}/{item[0]}"
            build_clib.build_libraries(one, [item])

        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(build, libraries))


class Build(BuildExtension):
    """The levels first, then the engine, which all other extensions are linked with."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext is not engine:
            self.compiler.set_libraries([])  # the levels are the engine's alone
            ext.extra_objects = [self.get_ext_fullpath(engine.name)]
        try:
            super().build_extension(ext)
        except (RuntimeError, CompileError) as error:  # ninja's, the compiler's
            if not ext.optional:
                raise
            self.warn(f"left out, as it does not compile: {ext.name}\n{error}")


# Its limited API is that it uses nothing of Python: the name then fits every version.
runtime = sorted(str(path) for path in Path("csrc/cpu/runtime").glob("*.cpp"))
engine = Extension(
    "rnnkern._engine",
    runtime,
    extra_compile_args=CFLAGS,
    extra_link_args=["-Wl,-soname,_engine.abi3.so"] if LINUX else [],
    depends=dependencies("csrc/cpu/engine.cpp", *runtime),
    py_limited_api=True,
)
# Beside the library that needs it.
WITH_ENGINE = {"runtime_library_dirs": ["$ORIGIN"]} if LINUX else {}

torch_ops = CppExtension(
    "rnnkern._C",
    ["csrc/bindings/torch_ops.cpp"],
    extra_compile_args=[*CFLAGS, *TORCH, "-Wno-unused-parameter"],
    extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if LINUX else [],
    depends=dependencies("csrc/bindings/torch_ops.cpp"),
    py_limited_api=True,
    **WITH_ENGINE,
)

numpy_module = Extension(
    "rnnkern._numpy",
    ["csrc/bindings/numpy_module.cpp"],
    include_dirs=[str(Path(torch.__file__).parent / "include")],  # torch brings pybind11
    extra_compile_args=CFLAGS,
    depends=dependencies("csrc/bindings/numpy_module.cpp"),
    **WITH_ENGINE,
)


def autograd() -> list[Extension]:
    """For the torch that builds it, as torch has no stable ABI for autograd; its name says which.

    Without it, or under another torch, the same runs in Python. RNNKERN_AUTOGRAD=0 leaves it out.
    """
    if os.environ.get("RNNKERN_AUTOGRAD") == "0":
        return []
    release = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    names = ("autograd", "direct_call", "module_weights", "plain_call")
    sources = [f"csrc/bindings/{name}.cpp" for name in names]
    return [
        CppExtension(
            f"rnnkern._autograd_torch{release}",
            sources,
            extra_compile_args=[*CFLAGS, "-Wno-unused-parameter"],
            depends=dependencies(*sources),
            optional=True,
            **WITH_ENGINE,
        )
    ]


def cuda_ops() -> list[Extension]:
    """Where nvcc and a torch with CUDA are found; RNNKERN_CUDA=0 in the environment: nowhere."""
    if os.environ.get("RNNKERN_CUDA") == "0" or not torch.version.cuda or not CUDA_HOME:
        return []
    nvcc = ["-std=c++17", "-O3", "--threads=4", "-Xcompiler=-fvisibility=hidden"]
    # Later GPUs translate the last one's intermediate code.
    nvcc += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (75, 80, 90)]
    nvcc += ["-gencode=arch=compute_90,code=compute_90"]
    # torch's build takes the conversions of the half types away, which its own headers define too.
    nvcc += ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    sources = sorted(
        str(path)
        for folder, pattern in (("bindings", "torch_cuda_*.cpp"), ("cuda", "*.cu"))
        for path in Path("csrc", folder).rglob(pattern)
    )
    extension = CUDAExtension(
        "rnnkern._C_cuda",
        sources,
        extra_compile_args={
            "cxx": [*CFLAGS, *TORCH, "-DUSE_CUDA", "-Wno-unused-parameter"],
            "nvcc": nvcc,
        },
        extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if LINUX else [],
        depends=dependencies(*sources),
        py_limited_api=True,
    )
    # The runtime inside, so that no major version of CUDA is asked for.
    extension.libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return [extension]


setup(
    libraries=libraries,
    ext_modules=[engine, torch_ops, *autograd(), numpy_module, *cuda_ops()],
    cmdclass={"build_ext": Build, "build_clib": BuildLibraries},
)
