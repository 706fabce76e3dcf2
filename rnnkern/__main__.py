"""`python -m rnnkern`: what this installation can do, for bug reports.

`python -m rnnkern run script.py args…` and `python -m rnnkern run -m module args…` run a program
with rnnkern's layers in the place of torch.nn's.
"""

import argparse
import importlib.util
import platform
from collections.abc import Iterator

import numpy
import torch

from . import __version__
from .ops import autograd, library


def _cuda() -> str:
    if "cuda" in library.DEVICES and torch.cuda.is_available():
        return f"kernels loaded, {torch.cuda.get_device_name()}"
    built = importlib.util.find_spec("rnnkern._C_cuda") is not None
    if torch.cuda.is_available():
        return "kernels not built; torch's own path is taken on the GPU"
    return f"no GPU; kernels {'built' if built else 'not built'}"


def _autograd() -> str:
    if autograd.NATIVE is not None:
        return "C++"
    return f"Python, slower for small calls: not built for torch {torch.__version__}"


def _lines() -> Iterator[tuple[str, str]]:
    found = library.info()
    yield "rnnkern", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", torch.__version__
    yield "numpy", numpy.__version__
    yield "processor", platform.machine()
    yield "instruction set", f"{found['isa']} of {', '.join(found['available'])}"
    yield "", "(RNNKERN_CPU forces a lower one; baseline_bf16 is an emulation for tests)"
    yield "threads", str(torch.get_num_threads())
    yield "autograd", _autograd()
    yield "CUDA", _cuda()


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
    # Only here: a bug report must come out where the layers themselves cannot be imported.
    from ._run import run  # noqa: PLC0415

    run(target, options.module is not None)


if __name__ == "__main__":
    main()
