"""Compiles the CUDA engine as a check, without a GPU and without torch's CUDA build.

Every .cu file for the GPUs that it is for, and the operators against the stable headers of the
torch that is installed. Where nvcc is missing it says so and succeeds.

    python bench/gpu_build.py          as CI does, with little optimization: a third quicker
    python bench/gpu_build.py --all    every file for Turing, Ampere, Ada and Hopper, as it is built
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("75", "80", "89", "90a")
KERNELS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC",
    "-Werror=all-warnings",
]
QUICK = ["-Xcicc=-O1", "-Xptxas=-O1"]
OPERATORS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-DUSE_CUDA"]
OPERATORS += ["-Wconversion", "-Wno-sign-conversion"]  # an index cut to 32 bits would show
OPERATORS += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPERATORS += ["-isystem", str(Path(torch.__file__).parent / "include")]


def compile_checked(command: list[str], source: Path, what: str) -> None:
    """Raises subprocess.CalledProcessError with the compiler's own words above it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "-c", str(source), "-o", f"{folder}/object.o"], check=True)
    print(f"{source.relative_to(ROOT)} {what}: {time.perf_counter() - start:.1f} s", flush=True)


def architectures(source: Path, every: bool) -> tuple[str, ...]:
    """Kernels in clusters are empty before Hopper, those of *_ampere.cu before Ampere."""
    if every:
        return ARCHITECTURES
    if source.stem.endswith("_ampere"):
        return ("75", "80")
    return ("90a",) if source.parent.name == "persistent" else ("80", "90a")


def main() -> int:
    nvcc, host = shutil.which("nvcc"), shutil.which("c++")
    if not nvcc or not host:
        print(f"cuda-check: skipped, no {'c++' if nvcc else 'nvcc'} on PATH")
        return 0
    every = "--all" in sys.argv
    operators = sorted(ROOT.glob("csrc/bindings/torch_cuda_*.cpp"))
    jobs = [([host, *OPERATORS], source, "operators") for source in operators]
    for source in sorted([*ROOT.glob("csrc/cuda/**/*.cu"), *ROOT.glob("bench/*.cu")]):
        for arch in architectures(source, every):
            target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            jobs.append(([nvcc, *KERNELS, *([] if every else QUICK), target], source, f"sm_{arch}"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_checked(*job), jobs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
