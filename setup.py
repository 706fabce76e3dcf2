"""The compiled parts: the CPU engine once per instruction set, and the bindings.

Everything else about the package stands in pyproject.toml. torch's folder is read, but only a build
with CUDA imports torch: `make wheel` builds for Pythons that cannot.
"""

import copy
import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import BoundedSemaphore

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, PlatformError

NO_TORCH = (
    "rnnkern is built with the installed torch, 2.10 or newer, and found none: "
    "pip install torch setuptools && pip install --no-build-isolation ."
)
NO_COMPILER = (
    "rnnkern's kernels need a C++20 compiler, and there is no {}: "
    "install one (on Debian and Ubuntu: apt install g++), or name yours, as in CXX=clang++"
)
LINUX = sys.platform == "linux"
CFLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Python's own flags ask for debug information: ten times the size of the code.
CFLAGS += ["-g0"]
# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised. Clang
# does not know that warning, and GCC says nothing of a -Wno- that it does not know.
CFLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
# Clang has no -fno-schedule-insns, which GCC needs on AArch64 (csrc/cpu/levels.txt).
CFLAGS += ["-Wno-ignored-optimization-argument"]
# Error messages name the source file: as it is called here, not where it was built.
CFLAGS += [f"-ffile-prefix-map={Path.cwd()}/="]


def torch_folder() -> Path | None:
    """Of the torch that the package will run beside.

    pip's isolated environment has none: torch is no build requirement, as pip would then fetch
    gigabytes, of another version. The interpreter's own packages are looked through instead.
    """
    spec = find_spec("torch")
    places = list((spec and spec.submodule_search_locations) or ())
    places += [f"{sysconfig.get_path(kind)}/torch" for kind in ("platlib", "purelib")]
    header = "include/torch/csrc/stable/library.h"
    return next((Path(place) for place in places if Path(place, header).exists()), None)


TORCH_FOLDER = torch_folder()
TORCH_VERSION = (TORCH_FOLDER / "version.py").read_text() if TORCH_FOLDER else ""
TORCH_RELEASE = "".join(re.findall(r"^__version__ = '([^+']+)", TORCH_VERSION, re.MULTILINE))
if tuple(map(int, re.findall(r"\d+", TORCH_RELEASE)[:2])) < (2, 10):
    TORCH_FOLDER = None
TORCH_CUDA = re.search(r"^cuda\b.*'", TORCH_VERSION, re.MULTILINE)


LEVELS = "csrc/cpu/levels.txt"


def target_machine() -> str:
    """What is compiled for: setuptools' platform names it in a cross build, too.

    A universal2 Python of macOS compiles for two machines at once, whose levels have flags of their
    own: then ARCHFLAGS says which one, or it is this one.
    """
    machine = sysconfig.get_platform().rpartition("-")[2]
    if machine == "universal2":
        flags = os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
        machine = flags.rpartition(" ")[2]
    return machine


ARCHITECTURES = {"x86_64": "x86", "amd64": "x86", "aarch64": "aarch64", "arm64": "aarch64"}


def levels() -> dict[str, list[str]]:
    """Name and compiler flags of each instruction-set level of the target's architecture."""
    lines = Path(LEVELS).read_text().splitlines()
    wanted = ("any", ARCHITECTURES.get(target_machine()))
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: flags for where, name, *flags in rows if where in wanted}


# A build of Python without the GIL.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
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
        "obj_deps": {source: ["setup.py", LEVELS, *dependencies(source)] for source in sources},
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


def check_tools() -> None:
    """Raises PlatformError, which is one line without a traceback."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise PlatformError(NO_COMPILER.format(compiler))
    if TORCH_FOLDER is None:
        raise PlatformError(NO_TORCH)


def side_by_side(work: Callable, items: list) -> list:
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(work, items))


class BuildLibraries(build_clib):
    """Compiles the libraries side by side, each into objects of its own.

    They know neither Python nor torch: every build of one checkout takes them from the same place,
    also one for which pip or setuptools makes a temporary folder.
    """

    def finalize_options(self) -> None:
        names = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "ARCHFLAGS")
        key = hashlib.sha256(repr([os.environ.get(name) for name in names]).encode()).hexdigest()
        place = f"build/levels-{target_machine()}-{key[:8]}"
        self.build_temp = self.build_temp or place
        self.build_clib = self.build_clib or place
        super().finalize_options()

    def run(self) -> None:
        check_tools()
        super().run()

    def build_libraries(self, libraries: list) -> None:
        def build(item: tuple[str, dict]) -> None:
            one = copy.copy(self)
            one.build_temp = f"{self.build_temp}/{item[0]}"
            build_clib.build_libraries(one, [item])

        side_by_side(build, libraries)


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
STABLE_LINK = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"] if LINUX else []
TORCH_INCLUDE = (TORCH_FOLDER or Path("torch")) / "include"


def torch_extension(name: str, sources: list[str], *flags: str, abi3: bool = False) -> Extension:
    """Linked with torch's libraries: with libtorch_python unless it uses nothing of Python."""
    headers = [f"-isystem{TORCH_INCLUDE}{part}" for part in ("", "/torch/csrc/api/include")]
    return Extension(
        name,
        sources,
        library_dirs=[str(TORCH_INCLUDE.with_name("lib"))],
        libraries=["c10", "torch", "torch_cpu", *([] if abi3 else ["torch_python"])],
        define_macros=[("TORCH_EXTENSION_NAME", name.rpartition(".")[2])],
        # Messages of torch's headers then name the file as torch's.
        extra_compile_args=[*CFLAGS, f"-ffile-prefix-map={TORCH_INCLUDE}/=", *headers, *flags],
        extra_link_args=STABLE_LINK if abi3 else [],
        depends=dependencies(*sources),
        py_limited_api=abi3,
        **WITH_ENGINE,
    )


OPS = ["csrc/bindings/torch_engine_ops.cpp", "csrc/bindings/torch_ops.cpp"]
torch_ops = torch_extension("rnnkern._C", OPS, *TORCH, abi3=True)

numpy_module = Extension(
    "rnnkern._numpy",
    ["csrc/bindings/numpy_module.cpp"],
    extra_compile_args=[*CFLAGS, f"-isystem{TORCH_INCLUDE}"],  # torch brings pybind11
    depends=dependencies("csrc/bindings/numpy_module.cpp"),
    **WITH_ENGINE,
)


def autograd() -> list[Extension]:
    """For the torch that builds it, as torch has no stable ABI for autograd; its name says which.

    Releases that differ in their last number have the same headers, and get the same machine code.
    Without it, or under another torch, the same runs in Python. RNNKERN_AUTOGRAD=0 leaves it out,
    as does a free-threaded Python: it holds on to what is another's while the GIL keeps that there.
    """
    if os.environ.get("RNNKERN_AUTOGRAD") == "0" or FREE_THREADED:
        return []
    release = re.sub(r"\W", "_", re.sub(r"^(\d+\.\d+)\.\d+$", r"\1", TORCH_RELEASE))
    sources = ["csrc/bindings/autograd_library.cpp"]
    extension = torch_extension(f"rnnkern._autograd_torch{release}", sources)
    extension.optional = True
    return [extension]


def with_cuda() -> bool:
    """Where nvcc and a torch with CUDA are found; RNNKERN_CUDA=0 in the environment: nowhere."""
    if os.environ.get("RNNKERN_CUDA") == "0" or not TORCH_CUDA:
        return False
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    return bool(named) or Path("/usr/local/cuda").exists()


CUDA = with_cuda()
if CUDA:  # torch's own command knows nvcc
    sys.path.append(str(TORCH_FOLDER.parent))  # pip's isolated environment does not find it
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension
else:
    BuildExtension = build_ext


def cuda_ops() -> list[Extension]:
    if not CUDA:
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
        extra_link_args=STABLE_LINK,
        depends=dependencies(*sources),
        py_limited_api=True,
    )
    # The runtime inside, so that no major version of CUDA is asked for.
    extension.libraries = ["c10", "torch_cpu", "torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    return [extension]


class Build(BuildExtension):
    """The levels first, then the engine, which all other extensions are linked with."""

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extensions(self) -> None:
        if CUDA:  # ninja compiles side by side
            super().build_extensions()
            return
        compile_one, slots = self.compiler.compile, BoundedSemaphore(jobs())

        def compile_all(sources: list[str], **settings) -> list[str]:
            def compile_in_turn(source: str) -> list[str]:
                with slots:
                    return compile_one([source], **settings)

            objects = side_by_side(compile_in_turn, sources)
            return [name for of_one in objects for name in of_one]

        self.compiler.compile = compile_all
        self.build_extension(engine)
        side_by_side(self.build_extension, [ext for ext in self.extensions if ext is not engine])

    def get_ext_filename(self, fullname: str) -> str:
        """A free-threaded Python has no stable ABI, but the libraries in it use nothing of Python.

        They are loaded by their path; `_engine.abi3.so` is what the others are linked with.
        """
        path = Path(super().get_ext_filename(fullname))
        if FREE_THREADED and self.ext_map[fullname].py_limited_api:
            path = path.with_name(path.name.partition(".")[0] + ".abi3.so")
        return str(path)

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


class BuildPy(build_py):
    """The package with the engine's headers, which users' cells are compiled with."""

    def run(self) -> None:
        super().run()
        if getattr(self, "editable_mode", False):
            return  # the headers are found beside the package
        for folder in ("cells", "core", "cpu", "cuda"):
            for path in (*Path("csrc", folder).rglob("*.h"), *Path("csrc", folder).rglob("*.txt")):
                target = Path(self.build_lib, "rnnkern", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


def readme() -> str:
    """README.md as PyPI shows it: without the links and pictures of the source tree."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[.*\]\((?!https:).*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^]]+)\]\((?!https:)[^)]+\)", r"\1", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    libraries=libraries,
    ext_modules=[engine, torch_ops, *autograd(), numpy_module, *cuda_ops()],
    cmdclass={"build_ext": Build, "build_clib": BuildLibraries, "build_py": BuildPy},
)
