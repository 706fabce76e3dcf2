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
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised.
CFLAGS += ["-Wno-maybe-uninitialized"]
# Error messages name the source file: as it is called here, not where it was built.
CFLAGS += [f"-ffile-prefix-map={Path.cwd()}/="]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {"baseline": [], "baseline_bf16": ["-DRNNKERN_BF16", "-DRNNKERN_AMX"]}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma"]
    LEVELS["avx512"] = ["-mfma", *AVX512]
    LEVELS["avx512_bf16"] = ["-mfma", *AVX512, "-mavx512bf16", "-DRNNKERN_BF16"]
    AMX = ["-mamx-tile", "-mamx-bf16", "-DRNNKERN_AMX"]
    LEVELS["avx512_amx"] = [*LEVELS["avx512_bf16"], *AMX]

# The stable ABI of torch 2.10: what is compiled against newer headers loads in every later torch.
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


ENGINE = [
    str(path) for part in ("cells", "core", "cpu") for path in sorted(Path("csrc", part).iterdir())
]


def library(name: str, sources: list[str], flags: list[str]) -> tuple[str, dict]:
    return name, {
        "sources": sources,
        "cflags": [*CFLAGS, *flags],
        "obj_deps": {"": ENGINE, **dict.fromkeys(sources, ENGINE)},
    }


# setuptools links them in this order: what refers to the levels comes before them.
common = ["csrc/cpu/dispatch.cpp", "csrc/cpu/plan.cpp", "csrc/cpu/team.cpp"]
libraries = [
    library("rnnkern_common", common, []),
    *(
        library(f"rnnkern_{isa}", ["csrc/cpu/engine.cpp"], [*flags, f"-DRNNKERN_ISA={isa}"])
        for isa, flags in LEVELS.items()
    ),
]


class BuildLibraries(build_clib):
    """Compiles the libraries side by side, each into objects of its own."""

    def build_libraries(self, libraries: list) -> None:
        def build(item: tuple[str, dict]) -> None:
            one = copy.copy(self)
            one.build_temp = f"{self.build_temp}/{item[0]}"
            build_clib.build_libraries(one, [item])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, libraries))


class Build(BuildExtension):
    """The libraries first, also where only the extensions are asked for."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (RuntimeError, CompileError) as error:  # ninja's, the compiler's
            if not ext.optional:
                raise
            self.warn(f"left out, as it does not compile: {ext.name}\n{error}")


torch_ops = CppExtension(
    "rnnkern._C",
    ["csrc/bindings/torch_ops.cpp"],
    extra_compile_args=[*CFLAGS, *TORCH, "-Wno-unused-parameter"],
    extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if LINUX else [],
    depends=ENGINE,
    py_limited_api=True,
)

numpy_module = Extension(
    "rnnkern._numpy",
    ["csrc/bindings/numpy_module.cpp"],
    include_dirs=[str(Path(torch.__file__).parent / "include")],  # torch brings pybind11
    extra_compile_args=CFLAGS,
    depends=ENGINE,
)


def autograd() -> list[Extension]:
    """For the torch that builds it, as torch has no stable ABI for autograd; its name says which.

    Without it, or under another torch, the same runs in Python. RNNKERN_AUTOGRAD=0 leaves it out.
    """
    if os.environ.get("RNNKERN_AUTOGRAD") == "0":
        return []
    release = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    return [
        CppExtension(
            f"rnnkern._autograd_torch{release}",
            ["csrc/bindings/autograd.cpp"],
            extra_compile_args=[*CFLAGS, "-g0", "-Wno-unused-parameter"],
            depends=["csrc/cells/registry.h"],
            optional=True,
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
        [*Path("csrc/bindings").glob("torch_cuda_*.cpp"), *Path("csrc/cuda").rglob("*.cu")]
    )
    extension = CUDAExtension(
        "rnnkern._C_cuda",
        [str(p) for p in sources],
        extra_compile_args={
            "cxx": [*CFLAGS, *TORCH, "-DUSE_CUDA", "-Wno-unused-parameter"],
            "nvcc": nvcc,
        },
        extra_link_args=["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if LINUX else [],
        depends=[
            str(p)
            for d in ("bindings", "cells", "core", "cuda")
            for p in Path("csrc", d).rglob("*.h")
        ],
        py_limited_api=True,
    )
    # The runtime inside, so that no major version of CUDA is asked for.
    extension.libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return [extension]


setup(
    libraries=libraries,
    ext_modules=[torch_ops, *autograd(), numpy_module, *cuda_ops()],
    cmdclass={"build_ext": Build, "build_clib": BuildLibraries},
)
