"""`python -m rnnkern`: what this installation can do, for bug reports.

`python -m rnnkern run script.py args…` and `python -m rnnkern run -m module args…` run a program
with rnnkern's layers in the place of torch.nn's.
"""

import argparse
import platform
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy

from . import __version__
from ._missing import NO_TORCH, built, found, python_version

_NO_TORCH = NO_TORCH.removeprefix("torch is ") + "; rnnkern.numpy and rnnkern.reference work"


def _torch_lines() -> Iterator[tuple[str, str]]:
    # Only here: the other lines must come out where torch or its library is not there.
    import torch  # noqa: PLC0415

    yield "torch", torch.__version__
    from .ops import autograd, library  # noqa: PLC0415

    found = library.info()
    yield "instruction set", f"{found['isa']} of {', '.join(found['available'])}"
    yield "", "(RNNKERN_CPU forces a lower one; baseline_bf16 is an emulation for tests)"
    yield "threads", str(torch.get_num_threads())
    slower = f"Python, slower for small calls: no C++ for torch {torch.__version__} in this build"
    yield "autograd", "C++" if autograd.NATIVE is not None else slower
    yield "CUDA", _cuda(torch.cuda, "cuda" in library.DEVICES, built("_C_cuda") is not None)


def _cuda(cuda: Any, loaded: bool, built: bool) -> str:
    if loaded and cuda.is_available():
        return f"kernels loaded, {cuda.get_device_name()}"
    if cuda.is_available():
        return "kernels not built; torch's own path is taken on the GPU"
    return f"no GPU; kernels {'built' if built else 'not built'}"


def _numpy_line() -> str:
    try:
        import_module("rnnkern.numpy")  # which says what is wrong
        isa: str = import_module("rnnkern._numpy").isa()
    except ImportError as error:
        return str(error)
    return f"instruction set {isa}"


def _lines() -> Iterator[tuple[str, str]]:
    yield "rnnkern", __version__
    yield "python", f"{python_version()} on {platform.platform()}"
    yield "numpy", numpy.__version__
    yield "processor", platform.machine()
    yield "rnnkern.numpy", _numpy_line()
    if not found("torch"):
        yield "torch", _NO_TORCH
        return
    try:
        yield from _torch_lines()
    except ImportError as error:
        yield "not available", str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rnnkern",
        description="Without a command: what this installation can do, for bug reports.",
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser(
        "run",
        usage="%(prog)s script.py [args ...]\n       %(prog)s -m module [args ...]",
        description="Runs a program with rnnkern's layers in the place of torch.nn's, and says at "
        "the end which of them ran on the fused kernels.",
    )
    run.add_argument("-m", dest="module", metavar="module", nargs=argparse.REMAINDER)
    run.add_argument("script", nargs=argparse.REMAINDER, help="a Python program and its arguments")
    return parser


def main() -> None:
    """The command line; arguments after the program's name are the program's."""
    parser = _parser()
    options = parser.parse_args()
    if options.command is None:
        for name, value in _lines():
            print(f"{name:>16}  {value}")
        return
    target = [*(options.module or []), *options.script]
    if not target:
        parser.error("run needs a script or -m and a module")
    if not found("torch"):
        parser.exit(1, f"{parser.prog} run: {NO_TORCH}\n")
    # Only here: a bug report must come out where the layers themselves cannot be imported.
    from ._run import run  # noqa: PLC0415

    run(target, options.module is not None)


if __name__ == "__main__":
    main()
